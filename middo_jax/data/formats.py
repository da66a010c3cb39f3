"""Converts rows of the four formats, and of registered ones, to conversations and back. Pure functions.

    alpaca             instruction, output [, input, context, history]
    sharegpt           conversations: [{from, value}, ...]
    messages           messages: [{role, content}, ...]; rows of dataset.jsonl are read back exactly
    prompt_completion  prompt, completion [, context]: text, or lists of {role, content}

All describe the same conversation, see `data.repair`. The system turn may be in a column of its own, see
SYSTEM_COLUMNS, and so are the definitions of tools. A turn's content is text or a list of text parts.
`weight: 0` marks an answer that is not learnt. `FORMATS` is the table of all formats: their columns, how a
row is read, how it is written. `register` adds a format of your own.
"""

from __future__ import annotations

import base64
import dataclasses
import itertools
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import pydantic

from middo_jax.config.formats import BUILT_IN_FORMATS, name_formats
from middo_jax.data.example import Example, Lineage, Message, content_id, shared_names
from middo_jax.data.reading import AS_IT_IS, Reading
from middo_jax.data.repair import BEHIND, as_messages
from middo_jax.data.shapes import (
    alpaca_row,
    alpaca_turns,
    messages_row,
    prompt_columns,
    prompt_completion_row,
    prompt_completion_turns,
    sharegpt_row,
)
from middo_jax.data.tools import TOOL_COLUMN, definitions_of
from middo_jax.data.turns import (
    SYSTEM_COLUMNS,
    Row,
    RowError,
    Turn,
    kind_of,
    not_trained_on,
    turn_list,
    with_system,
)

_NOT_ROWS = ("auto", "parquet", "tfds")  # names that have another meaning, so that no format may have them
# Columns on whose text an answer usually depends. A warning names those that the conversation does not
# contain.
PROMPT_COLUMNS = frozenset(
    (
        *("background", "context", "contexts", "document", "documents", "functions", "input", "instruction"),
        *("instructions", "knowledge", "passage", "passages", "persona", "prompt", "query", "question"),
        *("system_instruction", "system_instructions", "sys_prompt", "tools"),
    )
)
_OUR_COLUMNS = {"id", "messages", "lineage", "extra", "tools", "user_id", "prompt_columns", "behind"}
_LINEAGE = pydantic.TypeAdapter(Lineage)


class DataError(ValueError):
    """A dataset cannot be read or written; the message says where, why, and what to do."""


@dataclasses.dataclass(frozen=True)
class RowFormat:
    """How one format stores a conversation.

    Attributes:
      required: columns by which the format is recognised.
      optional: further columns that are part of the conversation.
      turns: reads the turns of a row; raises RowError if it cannot.
      row: writes a conversation as a row; None: the format can be read only.
      keeps_weights: whether its turns have a field for `weight: 0`, an answer that is not learnt.
    """

    required: frozenset[str]
    optional: frozenset[str]
    turns: Callable[[Row], list[Turn]]
    row: Callable[[Sequence[Message]], Row] | None
    keeps_weights: bool = True

    @property
    def columns(self) -> frozenset[str]:
        """The columns of the conversation; all others are extra."""
        return self.required | self.optional


def plain(value: Any) -> Any:
    """The value as a JSON value.

    Numpy types become Python's, NaN and infinities become null. Bytes become text if they are UTF-8,
    otherwise base64. Any other type becomes its `str`.
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


def first_line(error: Exception) -> str:
    """The first line of an exception's message, or its type if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def detect(rows: Iterable[Any]) -> str:
    """The format of a dataset, recognised by the columns of its first hundred rows.

    Raises:
      DataError: the columns fit no format, or several.
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
        f"the columns ({found}) {trouble}. Name the format (data.format=NAME; middo convert: --from NAME), "
        "or say which column is which, as in data.columns='{instruction: question, output: answer}'. "
        f"The formats and their columns: {expected}"
    )


class ReadRow(NamedTuple):
    """A row as an example.

    Attributes:
      example: the conversation.
      unkept: names of parts that may be meant for training but are not used: fields of turns (`name`, ...)
        and columns that usually belong to a prompt (`documents`, ...).
      repairs: what was repaired, see `data.repair`.
    """

    example: Example
    unkept: frozenset[str]
    repairs: tuple[str, ...]


def to_example(row: Any, form: str, reading: Reading = AS_IT_IS) -> ReadRow:
    """Reads one row of JSON values, see `plain`.

    {"instruction": "Add.", "input": "2 and 3", "output": "5", "source": "x"} as alpaca
      ->  user "Add.\\n2 and 3", assistant "5", extra {"source": "x"}

    An `id` column that equals the row's content hash, as `layout.to_rows` writes it, is not kept in `extra`.

    Raises:
      RowError: the row cannot be used.
    """
    if not isinstance(row, dict):
        raise RowError(f"a row must be an object with named columns, not {kind_of(row)}")
    for column, value in row.items():
        try:
            column.encode()
            (value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)).encode()
        except UnicodeEncodeError as e:
            raise RowError(f"column {column!r} contains a lone surrogate, which UTF-8 cannot encode") from e
    ours = form == "messages" and is_ours(row)
    row = row if ours else reading.apply(row)
    turns = FORMATS[form].turns(row)
    messages, repairs = as_messages(turns if ours else with_system(row, turns), reading.strict and not ours)
    if ours:
        example = _our_example(row)
        if example.messages != messages:
            raise RowError(
                "a row of dataset.jsonl whose turns were changed: remove its columns id and lineage"
            )
        return ReadRow(example, not_trained_on(_fields_of(example.messages)), ())
    # No learnt answer depends on the turns behind the last one.
    end = 1 + max(n for n, m in enumerate(messages) if m.role == "assistant" and m.learnt)
    messages, behind = messages[:end], messages[end:]
    repairs += (BEHIND,) if behind else ()
    unkept = not_trained_on(item for turn in turns for item in turn.fields.items())
    extra = {column: value for column, value in row.items() if column not in FORMATS[form].columns}
    tools = definitions_of(row.get(TOOL_COLUMN))
    if tools is not None:
        extra.pop(TOOL_COLUMN, None)
    shown = " ".join(" ".join(m.content.split()) for m in messages)
    unkept |= {f"column {c!r}" for c in extra if _is_of_prompt(c) and not _is_shown(extra[c], shown)}
    if "id" in extra and extra["id"] == content_id(messages, tools or ""):
        del extra["id"]
    example = Example(
        messages,
        extra=shared_names(extra),
        tools=tools or "",
        prompt_columns=shared_names(prompt_columns(row, form)),
        behind=behind,
    )
    return ReadRow(example, unkept, repairs)


def _fields_of(messages: Sequence[Message]) -> Iterator[tuple[str, Any]]:
    return (item for m in messages if m.fields for item in json.loads(m.fields).items())


def _is_of_prompt(column: str) -> bool:
    """Whether an extra column has a name of PROMPT_COLUMNS or SYSTEM_COLUMNS, such as `systemPrompt`."""
    name = re.sub(r"[\s-]+", "_", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", column.strip())).lower()
    return name in PROMPT_COLUMNS | SYSTEM_COLUMNS


def _is_shown(value: Any, shown: str) -> bool:
    """Whether an extra column adds no text to what the conversation shows."""
    if isinstance(value, str):
        return " ".join(value.split()) in shown
    if isinstance(value, list | dict):
        return all(_is_shown(item, shown) for item in (value.values() if isinstance(value, dict) else value))
    return True


def is_ours(row: Row) -> bool:
    """Whether a row is one of dataset.jsonl, rather than a user's row with a column called lineage."""
    lineage = row.get("lineage")
    return "id" in row and isinstance(lineage, dict) and {"root_id", "parent_ids", "op"} <= lineage.keys()


def _our_example(row: Row) -> Example:
    if not isinstance(row["id"], str) or not row["id"]:
        raise RowError(f"column 'id' must be text, not {kind_of(row['id'])}")
    if not isinstance(row.get("extra", {}), dict):
        raise RowError(f"column 'extra' must be an object, not {kind_of(row['extra'])}")
    if row.get("behind"):
        turn_list(row, "behind", ("role", "content"))
    for turn in (*row["messages"], *(row.get("behind") or ())):
        if not isinstance(turn.get("fields") or {}, dict):
            raise RowError(f"a turn's 'fields' must be an object, not {kind_of(turn['fields'])}")
    try:
        _LINEAGE.validate_json(json.dumps(row["lineage"]), strict=True)
        example = Example.from_json(row)
    except pydantic.ValidationError as e:
        first = e.errors()[0]
        raise RowError(f"lineage.{'.'.join(map(str, first['loc']))}: {first['msg']}") from e
    except (KeyError, TypeError) as e:
        raise RowError(f"lineage cannot be read: {e}") from e
    added = {column: value for column, value in row.items() if column not in _OUR_COLUMNS}
    return dataclasses.replace(example, extra=shared_names({**added, **example.extra})) if added else example


FORMATS: dict[str, RowFormat] = {
    "alpaca": RowFormat(
        frozenset({"instruction", "output"}),
        SYSTEM_COLUMNS | {"input", "context", "history"},
        alpaca_turns,
        alpaca_row,
        keeps_weights=False,
    ),
    "sharegpt": RowFormat(
        frozenset({"conversations"}),
        SYSTEM_COLUMNS,
        lambda row: turn_list(row, "conversations", ("from", "value")),
        sharegpt_row,
    ),
    "messages": RowFormat(
        frozenset({"messages"}),
        SYSTEM_COLUMNS,
        lambda row: turn_list(row, "messages", ("role", "content")),
        messages_row,
    ),
    "prompt_completion": RowFormat(
        frozenset({"prompt", "completion"}),
        SYSTEM_COLUMNS | {"context"},
        prompt_completion_turns,
        prompt_completion_row,
    ),
}


def register(name: str, form: RowFormat) -> None:
    """Adds a format: `data.format=NAME` is valid from now on, and rows are recognised by its columns.

    Raises:
      ValueError: there is a format of that name, or another one with the same required columns.
    """
    if name in (*FORMATS, *_NOT_ROWS):
        raise ValueError(f"there is a format called {name!r} already")
    if not form.required:
        raise ValueError(
            f"format {name!r}: needs at least one required column, by which its rows are recognised"
        )
    if twins := [known for known, other in FORMATS.items() if other.required == form.required]:
        raise ValueError(f"format {name!r}: has the required columns of {twins[0]}")
    FORMATS[name] = form
    name_formats(FORMATS)


def unregister(name: str) -> None:
    """Removes a format that was registered.

    Raises:
      KeyError: there is none of that name, or it is built in.
    """
    if name in BUILT_IN_FORMATS:
        raise KeyError(name)
    del FORMATS[name]
    name_formats(FORMATS)
