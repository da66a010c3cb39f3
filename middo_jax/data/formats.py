"""Rows of the four formats <-> conversations, as pure functions: what a column means, which row is unusable.

    alpaca             instruction, output [, input, system, history]
    sharegpt           conversations: [{from, value}, ...]
    messages           messages: [{role, content}, ...]; rows of dataset.jsonl are read back exactly
    prompt_completion  prompt, completion: text, or lists of {role, content}

All four mean the same thing inside: an optional system turn, then user and assistant in turn, the assistant
last. `FORMATS` is the one table of columns, reading and writing.
"""

from __future__ import annotations

import base64
import dataclasses
import itertools
import json
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple

import pydantic

from middo_jax.data.example import Example, Lineage, Message, content_id

Row = dict[str, Any]
Role = Literal["system", "user", "assistant"]

_log = logging.getLogger(__name__)
_KINDS = {
    dict: "an object",
    list: "a list",
    str: "text",
    bool: "a boolean",
    int: "a number",
    float: "a number",
}
_ROLES: dict[str, Role] = {"system": "system", "user": "user", "assistant": "assistant"}
_SHAREGPT_ROLES: dict[str, Role] = {**_ROLES, "human": "user", "gpt": "assistant"}
_TOOL_ROLES = {"tool", "function", "function_call", "tool_call", "tool_response", "observation", "ipython"}
_TOOL_FIELDS = {"tool_calls", "function_call", "tool_call_id"}
_OUR_COLUMNS = {"id", "messages", "lineage", "extra"}
_LINEAGE = pydantic.TypeAdapter(Lineage)


class DataError(ValueError):
    """A dataset cannot be read or written at all; the message says where, why, and what to do."""


class RowError(ValueError):
    """One row cannot be used; the message is the reason that stands in its rejection."""


class Turn(NamedTuple):
    """A turn as its row tells it; `unkept` names its fields that a `Message` has no place for."""

    role: Role
    content: str
    unkept: frozenset[str] = frozenset()


@dataclasses.dataclass(frozen=True)
class RowFormat:
    """How a conversation lies in a row. `required` columns tell the format, all of them are consumed."""

    required: frozenset[str]
    optional: frozenset[str]
    turns: Callable[[Row], list[Turn]]
    row: Callable[[Sequence[Message]], Row]

    @property
    def columns(self) -> frozenset[str]:
        """Columns that the conversation takes; all others are extra."""
        return self.required | self.optional


def plain(value: Any) -> Any:
    """The value as JSON can hold it: numpy types become Python's, NaN and infinities null, all else its text.

    Bytes are UTF-8 text, or base64 where they are not.
    """
    if hasattr(value, "tolist"):  # a numpy array or scalar
        return plain(value.tolist())
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return base64.b64encode(value).decode("ascii")
    return str(value)


def detect(rows: Iterable[Any]) -> str:
    """The format that the columns of the first hundred rows tell.

    Raises:
      DataError: no format's columns are there, or those of several.
    """
    first = itertools.islice((row for row in rows if isinstance(row, dict)), 100)
    columns = list(dict.fromkeys(column for row in first for column in row))
    fitting = [name for name, form in FORMATS.items() if form.required.issubset(columns)]
    if len(fitting) == 1:
        return fitting[0]
    found = ", ".join(columns[:20]) + (", ..." if len(columns) > 20 else "") if columns else "none"
    expected = "; ".join(f"{name} ({', '.join(sorted(form.required))})" for name, form in FORMATS.items())
    trouble = f"fit several formats, {' and '.join(fitting)}" if fitting else "fit no format"
    raise DataError(
        f"the columns ({found}) {trouble}. Name the format, or rename columns; there are: {expected}"
    )


def to_example(row: Any, form: str) -> tuple[Example, frozenset[str]]:
    """Reads one row that `plain` has cleaned.

    {"instruction": "Add.", "input": "2 and 3", "output": "5", "source": "x"} as alpaca
      ->  user "Add.\\n2 and 3", assistant "5", extra {"source": "x"}

    An `id` column that is the row's own content hash (as `to_rows` writes it) is not kept in `extra`.

    Returns:
      The example, and the names of fields inside its turns that could not be kept (`weight`, ...).

    Raises:
      RowError: the row cannot be used.
    """
    if not isinstance(row, dict):
        raise RowError(f"a row must be an object with named columns, not {_kind(row)}")
    for column, value in row.items():
        try:
            json.dumps({column: value}, ensure_ascii=False).encode()
        except UnicodeEncodeError as e:
            raise RowError(f"column {column!r} holds a lone surrogate, which UTF-8 cannot encode") from e
    turns = FORMATS[form].turns(row)
    unkept = frozenset().union(*(turn.unkept for turn in turns))
    messages = _checked(turns)
    if form == "messages" and _is_ours(row):
        return _our_example(row), unkept
    extra = {column: value for column, value in row.items() if column not in FORMATS[form].columns}
    if extra.get("id") == content_id(messages):
        del extra["id"]
    return Example(messages, extra=extra), unkept


def to_rows(examples: Sequence[Example], form: str) -> list[Row]:
    """Rows that hold conversation, `id` and extra columns; `to_example` reads them back.

    A user's own `id` column wins over ours, which is a hash of the text and comes back anyway. Another
    extra column whose name the format needs is written as `extra_NAME`, and logged. Lineage stays in
    dataset.jsonl. prompt_completion is conversational for all rows if one needs it: readers want one type
    a column.
    """
    chosen = FORMATS[form]
    to_row = chosen.row
    if form == "prompt_completion" and any(len(example.messages) > 2 for example in examples):
        to_row = _conversational_row
    columns = dict.fromkeys(column for example in examples for column in example.extra)
    names: dict[str, str] = {}
    for column in columns:
        name = column
        while name in chosen.columns | {"lineage"} or (name != column and name in columns):
            name = "extra_" + name
        names[column] = name
    renamed = [f"{column} -> {name}" for column, name in names.items() if column != name]
    if renamed:
        _log.warning("%s needs the names of extra columns, which are renamed: %s", form, ", ".join(renamed))
    return [
        {
            **({} if "id" in columns else {"id": example.id}),
            **to_row(example.messages),
            **{names[column]: plain(value) for column, value in example.extra.items()},
        }
        for example in examples
    ]


def _checked(turns: Sequence[Turn]) -> tuple[Message, ...]:
    """[system] (user assistant)+, nothing blank; a blank system turn counts as none."""
    numbered = [(n, t) for n, t in enumerate(turns, 1) if t.role != "system" or t.content.strip()]
    if not numbered or numbered[-1][1].role != "assistant":
        last = f"the {numbered[-1][1].role}" if numbered else "nothing"
        raise RowError(f"no response: the conversation must end with the assistant, but ends with {last}")
    start = 1 if numbered[0][1].role == "system" else 0
    for place, (n, turn) in enumerate(numbered[start:]):
        if turn.role == "system":
            raise RowError(f"turn {n} is a system turn; only the first may be one")
        if turn.role != ("user", "assistant")[place % 2]:
            raise RowError(
                f"turn {n} is the {turn.role}'s; user and assistant must alternate, the user first"
            )
        if not turn.content.strip():
            left = len(numbered) - start - place
            raise RowError(
                {1: "empty response", 2: "empty prompt"}.get(left, f"turn {n} ({turn.role}) is empty")
            )
    return tuple(Message(turn.role, turn.content) for _, turn in numbered)


def _kind(value: Any) -> str:
    return _KINDS.get(type(value), "null" if value is None else f"a {type(value).__name__}")


def _text(row: Row, column: str, default: str | None = None) -> str:
    value = row.get(column)
    if value is None:
        if default is not None:
            return default
        raise RowError(f"column {column!r} is missing or null")
    if not isinstance(value, str):
        raise RowError(f"column {column!r} must be text, not {_kind(value)}")
    return value


def _turn_list(row: Row, column: str, role_key: str, text_key: str, roles: dict[str, Role]) -> list[Turn]:
    value = row.get(column)
    if value is None:
        raise RowError(f"column {column!r} is missing or null")
    if not isinstance(value, list):
        raise RowError(f"column {column!r} must be a list of turns, not {_kind(value)}")
    turns = []
    for n, turn in enumerate(value, 1):
        if not isinstance(turn, dict):
            raise RowError(f"turn {n} must be an object, not {_kind(turn)}")
        # Columnar files give every turn every field that any turn has, as null.
        fields = {key: item for key, item in turn.items() if item is not None and item != []}
        role, text = fields.pop(role_key, None), fields.pop(text_key, None)
        if not isinstance(role, str):
            raise RowError(f"turn {n}: {role_key!r} must be text, not {_kind(role)}")
        if role in _TOOL_ROLES or not _TOOL_FIELDS.isdisjoint(fields):
            raise RowError(f"turn {n} uses a tool ({role!r}), which is not supported")
        if role not in roles:
            raise RowError(f"turn {n} has the unknown role {role[:40]!r}; known: {', '.join(roles)}")
        if not isinstance(text, str):
            raise RowError(f"turn {n}: {text_key!r} must be text, not {_kind(text)}")
        turns.append(Turn(roles[role], text, frozenset(fields)))
    return turns


def _alpaca_turns(row: Row) -> list[Turn]:
    turns = [Turn("system", _text(row, "system", ""))]
    history = row.get("history")
    if history is not None and not isinstance(history, list):
        raise RowError(f"column 'history' must be a list of [user, assistant] pairs, not {_kind(history)}")
    for n, pair in enumerate(history or [], 1):
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise RowError(f"column 'history': pair {n} is not a list of two texts, [user, assistant]")
        turns += [Turn("user", pair[0]), Turn("assistant", pair[1])]
    instruction, given = _text(row, "instruction"), _text(row, "input", "")
    prompt = "\n".join(text for text in (instruction, given) if text.strip())
    return [*turns, Turn("user", prompt), Turn("assistant", _text(row, "output"))]


def _alpaca_row(messages: Sequence[Message]) -> Row:
    system = [m.content for m in messages if m.role == "system"]
    texts = [m.content for m in messages if m.role != "system"]
    row: Row = {"instruction": texts[-2], "input": "", "output": texts[-1]}
    if system:
        row["system"] = system[0]
    if texts[:-2]:
        row["history"] = [list(pair) for pair in zip(texts[:-2:2], texts[1:-2:2], strict=True)]
    return row


def _sharegpt_row(messages: Sequence[Message]) -> Row:
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    return {"conversations": [{"from": names[m.role], "value": m.content} for m in messages]}


def _messages_row(messages: Sequence[Message]) -> Row:
    return {"messages": [dataclasses.asdict(m) for m in messages]}


def _prompt_completion_turns(row: Row) -> list[Turn]:
    turns = []
    sides: dict[str, Role] = {"prompt": "user", "completion": "assistant"}
    for column, role in sides.items():
        if isinstance(row.get(column), list):
            turns += _turn_list(row, column, "role", "content", _ROLES)
        else:
            turns.append(Turn(role, _text(row, column)))
    return turns


def _prompt_completion_row(messages: Sequence[Message]) -> Row:
    user, assistant = messages
    return {"prompt": user.content, "completion": assistant.content}


def _conversational_row(messages: Sequence[Message]) -> Row:
    turns = [dataclasses.asdict(m) for m in messages]
    return {"prompt": turns[:-1], "completion": turns[-1:]}


def _is_ours(row: Row) -> bool:
    """A row of dataset.jsonl, rather than a user's that has a column called lineage."""
    lineage = row.get("lineage")
    return "id" in row and isinstance(lineage, dict) and {"root_id", "parent_ids", "op"} <= lineage.keys()


def _our_example(row: Row) -> Example:
    if not isinstance(row["id"], str) or not row["id"]:
        raise RowError(f"column 'id' must be text, not {_kind(row['id'])}")
    if not isinstance(row.get("extra", {}), dict):
        raise RowError(f"column 'extra' must be an object, not {_kind(row['extra'])}")
    try:
        _LINEAGE.validate_json(json.dumps(row["lineage"]), strict=True)
        example = Example.from_json(row)
    except pydantic.ValidationError as e:
        first = e.errors()[0]
        raise RowError(f"lineage.{'.'.join(map(str, first['loc']))}: {first['msg']}") from e
    except (KeyError, TypeError) as e:
        raise RowError(f"lineage cannot be read: {e}") from e
    added = {column: value for column, value in row.items() if column not in _OUR_COLUMNS}
    return dataclasses.replace(example, extra={**added, **example.extra}) if added else example


FORMATS: dict[str, RowFormat] = {
    "alpaca": RowFormat(
        frozenset({"instruction", "output"}),
        frozenset({"input", "system", "history"}),
        _alpaca_turns,
        _alpaca_row,
    ),
    "sharegpt": RowFormat(
        frozenset({"conversations"}),
        frozenset(),
        lambda row: _turn_list(row, "conversations", "from", "value", _SHAREGPT_ROLES),
        _sharegpt_row,
    ),
    "messages": RowFormat(
        frozenset({"messages"}),
        frozenset(),
        lambda row: _turn_list(row, "messages", "role", "content", _ROLES),
        _messages_row,
    ),
    "prompt_completion": RowFormat(
        frozenset({"prompt", "completion"}), frozenset(), _prompt_completion_turns, _prompt_completion_row
    ),
}
