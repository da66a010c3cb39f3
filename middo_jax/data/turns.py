"""Reads the turns of a row: roles by any of their names, content in parts, weights, system columns."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

from middo_jax.data.tools import CALL_ROLES, RESULT_ROLES, ToolError, calls_in, calls_of, of_calls, of_result

Row = dict[str, Any]
Role = Literal["system", "user", "assistant", "tool"]

_KINDS = {
    dict: "an object",
    list: "a list",
    str: "text",
    bool: "a boolean",
    int: "a number",
    float: "a number",
}
# In lower case. Every format accepts all of these names.
ROLES: dict[str, Role] = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "model", "bot", "chatbot", "ai"), "assistant"),
    **dict.fromkeys(sorted(CALL_ROLES), "assistant"),
    **dict.fromkeys(sorted(RESULT_ROLES), "tool"),
}
_CALL_FIELDS = {"tool_calls", "function_call"}
_RESULT_FIELDS = {"tool_call_id", "name"}
# Fields of a turn. The value 0 or false means that the answer is not learnt.
WEIGHTS = ("weight", "loss_weight", "loss", "train", "training", "trainable")
SYSTEM_COLUMNS = frozenset({"system", "system_prompt", "system_message"})
# Keys of a turn's role and of its text. Either pair is read in every format.
KEYS = (("role", "content"), ("from", "value"))
_KEYS_EXPECTED = "a turn has " + ", or ".join(" and ".join(map(repr, keys)) for keys in KEYS)


NO_FIELDS: Mapping[str, Any] = {}


class RowError(ValueError):
    """One row cannot be used; the message is the reason in its rejection."""


class Turn(NamedTuple):
    """A turn as it is in the row. `fields` are those that are neither shown to the model nor its weight."""

    role: Role
    content: str
    fields: Mapping[str, Any] = NO_FIELDS
    learnt: bool = True
    tool: str = ""


def kind_of(value: Any) -> str:
    """The name of a value's JSON type, for messages."""
    return _KINDS.get(type(value), "null" if value is None else f"a {type(value).__name__}")


def text_of(row: Row, column: str, default: str | None = None) -> str:
    """A column's text, or `default` if the column is missing or null.

    Raises:
      RowError: the column is not text, or it is missing and there is no default.
    """
    value = row.get(column)
    if value is None:
        if default is not None:
            return default
        raise RowError(f"column {column!r} is missing or null")
    if not isinstance(value, str):
        raise RowError(f"column {column!r} must be text, not {kind_of(value)}")
    return value


def turn_list(row: Row, column: str, keys: tuple[str, str]) -> list[Turn]:
    """The turns in a column with a list of objects, whose roles and texts are usually under `keys`.

    Raises:
      RowError: a turn cannot be read; the message names it.
    """
    value = listed(row.get(column))
    if value is None:
        raise RowError(f"column {column!r} is missing or null")
    if not isinstance(value, list):
        raise RowError(f"column {column!r} must be a list of turns, not {kind_of(value)}")
    turns = []
    for n, turn in enumerate(value, 1):
        if not isinstance(turn, dict):
            raise RowError(f"turn {n} must be an object, not {kind_of(turn)}")
        # In columnar files every turn has the fields of all turns, null where it had none.
        fields = {key: item for key, item in turn.items() if item is not None and item != []}
        role_key, text_key = keys_of(turn, keys)
        missing = [key for key in (role_key, text_key) if key not in turn]
        if missing and not (missing == [text_key] and fields.keys() & _CALL_FIELDS):
            raise RowError(f"turn {n} has no {missing[0]!r}; {_KEYS_EXPECTED}, and it has {_names(turn)}")
        named, text = fields.pop(role_key, None), fields.pop(text_key, "")
        if not isinstance(named, str):
            raise RowError(f"turn {n}: {role_key!r} must be text, not {kind_of(named)}")
        role = named.strip().lower()
        if role not in ROLES:
            shown = named[:40] if named.isprintable() else ascii(named[:40])
            raise RowError(
                f"turn {n} has the unknown role {named[:40]!r}; say what it is, as in data.roles="
                f"'{{{shown}: user}}'; known: {', '.join(ROLES)}"
            )
        weights = {key: weight for key in WEIGHTS if (weight := weight_of(fields.get(key))) is not None}
        try:
            tool, text, used = _tool_of(role, text, fields)
        except ToolError as e:
            raise RowError(f"turn {n}: {e}") from e
        used |= weights.keys() if ROLES[role] == "assistant" else set()
        rest = {key: item for key, item in fields.items() if key not in used} or NO_FIELDS
        content = content_of(text, f"turn {n}: {text_key!r}")
        turns.append(Turn(ROLES[role], content, rest, all(weights.values()), tool))
    return turns


def _names(turn: Row) -> str:
    """The keys of a turn for a message, shortened."""
    return ", ".join(repr(key[:40]) for key in list(turn)[:5]) or "none"


def listed(value: Any) -> Any:
    """A list that is written as JSON text, as tables have it, as a list; any other value as it is."""
    if not (isinstance(value, str) and value.lstrip().startswith("[")):
        return value
    try:
        found = json.loads(value)
        json.dumps(found, ensure_ascii=False).encode()  # refuses lone surrogates, which a file cannot have
    except (ValueError, RecursionError):
        return value
    return found


def keys_of(turn: Row, usual: tuple[str, str]) -> tuple[str, str]:
    """The keys of a turn's role and text: those of `KEYS` that it has, `usual` if it has none or both."""
    found = [keys for keys in KEYS if isinstance(turn.get(keys[0]), str)]
    return found[0] if len(found) == 1 else usual


def _tool_of(role: str, text: Any, fields: Row) -> tuple[str, Any, set[str]]:
    """(`Turn.tool`, the turn's text without calls, the fields that are used)."""
    if ROLES[role] == "tool":
        return of_result(fields), text, {key for key in _RESULT_FIELDS if isinstance(fields.get(key), str)}
    if ROLES[role] != "assistant":
        return "", text, set()
    calls = calls_of(fields)
    if role in CALL_ROLES and not calls:  # ShareGPT has the call as the turn's text
        return of_calls(calls_in(content_of(text, "a tool call"))), "", set()
    return of_calls(calls), text, set(_CALL_FIELDS)


def not_trained_on(fields: Iterable[tuple[str, Any]]) -> frozenset[str]:
    """The names of fields, of `Turn.fields`, that may be meant for training.

    Only answers are learnt. A weight of 1 of another turn says nothing; one of 0 may be meant for an answer.
    """
    return frozenset(name for name, value in fields if not (name in WEIGHTS and weight_of(value)))


def weight_of(value: Any) -> bool | None:
    """Whether a turn is learnt, by the value of one of its weight fields; None if it is neither 0 nor 1."""
    if isinstance(value, str):
        value = {"0": 0, "0.0": 0, "false": 0, "1": 1, "1.0": 1, "true": 1}.get(value.strip().lower())
    return bool(value) if isinstance(value, int | float) and value in (0, 1) else None


def content_of(value: Any, what: str) -> str:
    """A turn's text, or its text parts joined: [{"type": "text", "text": "Hi "}, "there"] -> "Hi there".

    Raises:
      RowError: a part is not text.
    """
    if isinstance(value, str):
        return value
    parts = [value] if isinstance(value, dict) else value
    if not isinstance(parts, list):
        raise RowError(f"{what} must be text, not {kind_of(value)}")
    texts = []
    for part in parts:
        # In columnar files every part has the fields of all parts, null where it had none.
        fields = {k: v for k, v in part.items() if v is not None} if isinstance(part, dict) else part
        if isinstance(fields, dict):
            kind = fields.get("type", "text")
            if kind not in ("text", "input_text", "output_text"):
                raise RowError(f"{what} has a part of type {str(kind)[:40]!r}; only text is supported")
            fields = fields.get("text", "" if "text" in part else None)  # null is no text
        if not isinstance(fields, str):
            raise RowError(f"{what} has a part without text")
        texts.append(fields)
    return "".join(texts)


def with_system(row: Row, turns: list[Turn]) -> list[Turn]:
    """The turns, with the system turn from a column in front.

    Raises:
      RowError: the columns and the first turn have different system texts.
    """
    texts = {column: text for column in sorted(SYSTEM_COLUMNS) if (text := text_of(row, column, "")).strip()}
    own = [turn.content for turn in turns[:1] if turn.role == "system" and turn.content.strip()]
    different = dict.fromkeys(text.strip() for text in (*own, *texts.values()))
    if len(different) > 1:
        where = " and ".join((*(["its first turn"] if own else []), *(f"column {c!r}" for c in texts)))
        raise RowError(f"several different system turns: {where}")
    if own or not texts:
        return turns
    blank = turns[:1] and turns[0].role == "system"
    return [Turn("system", next(iter(texts.values()))), *(turns[1:] if blank else turns)]
