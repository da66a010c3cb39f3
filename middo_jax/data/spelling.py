"""How a dataset writes its turns: names of roles, keys, text parts, weights, tools. Pure functions.

Reading makes all spellings one; a `Spelling` writes the user's own again. A dataset has one spelling: where
its rows differ, the commonest.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any

from middo_jax.data.reading import AS_IT_IS, Reading
from middo_jax.data.shapes import calls_value, has_turns
from middo_jax.data.tools import CALL_ROLES, TOOL_COLUMN, dumped
from middo_jax.data.turns import KEYS, ROLES, SYSTEM_COLUMNS, WEIGHTS, Row, keys_of, listed, weight_of

# Kinds of turns: the four roles, and a call of a tool that has a turn of its own.
_CALL = "call"
_NAMES = {"system": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
# The columns with turns, the keys and the names of roles that each format usually has.
_COLUMNS: dict[str, tuple[str, ...]] = {
    "sharegpt": ("conversations",),
    "messages": ("messages",),
    "prompt_completion": ("prompt", "completion"),
}
_USUAL_KEYS = {"sharegpt": KEYS[1], "messages": KEYS[0], "prompt_completion": KEYS[0]}
USUAL_ROLES: dict[str, dict[str, str]] = {
    "sharegpt": {
        "system": "system",
        "user": "human",
        "assistant": "gpt",
        "tool": "observation",
        _CALL: "function_call",
    },
    "messages": _NAMES,
    "prompt_completion": _NAMES,
}


@dataclasses.dataclass(frozen=True)
class Spelling:
    """Where the turns of a dataset are written in another way than its format usually has them.

    Attributes:
      roles: kind of turn -> its name.
      keys: of a turn's role and its text; None: the usual ones.
      parts: kinds of turns whose text is a list of parts -> the type of a part, "" for a part that is a text.
      weight: the field that says whether an answer is learnt, and whether it is true or false; None: `weight`
        with 0 or 1.
      tool_lists: whether tools are defined as lists, not as JSON text.
      argument_texts: whether the arguments of `tool_calls` are JSON text, not objects.
      lists: whether prompt and completion are lists of turns, also where a text each would do. TRL takes
        only lists through the chat template.
      weighs: whether answers have the field `weight` also where all of them are learnt.
      systems: of several columns for system texts, those that have them; () if there is at most one.
    """

    roles: Mapping[str, str] = dataclasses.field(default_factory=dict)
    keys: tuple[str, str] | None = None
    parts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    weight: tuple[str, bool] | None = None
    tool_lists: bool = False
    argument_texts: bool = False
    lists: bool = False
    weighs: bool = False
    systems: tuple[str, ...] = ()

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Spelling:
        """The inverse of `to_json`."""
        pairs = {name: tuple(value[name]) for name in ("keys", "weight", "systems") if name in value}
        return cls(**{**value, **pairs})

    def to_json(self) -> dict[str, Any]:
        """For the record of a stage: what differs from the usual; {} if nothing does."""
        found = {name: value for name, value in dataclasses.asdict(self).items() if value}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}

    def role(self, kind: str, form: str) -> str | None:
        """The name of a kind of turn in rows of a format; None if the format has no such turns."""
        return self.roles.get(kind, USUAL_ROLES[form].get(kind))

    def keys_in(self, form: str) -> tuple[str, str]:
        """The keys of a turn's role and text in rows of a format."""
        return self.keys or _USUAL_KEYS[form]

    def spelled(self, row: Row, form: str) -> Row:
        """A row in this spelling.

        roles {"user": "Q", "assistant": "A"}, a row of sharegpt {"conversations": [{"from": "human", ...}]}
          ->  {"conversations": [{"from": "Q", ...}]}

        Args:
          row: of a format, as `to_rows` makes it.
          form: the format.
        """
        if self == Spelling():
            return row
        spelled = dict(row)
        for column in _COLUMNS.get(form, ()):
            if isinstance(row.get(column), list):
                turns = [turn for given in row[column] for turn in self._calls_apart(given)]
                spelled[column] = [self._turn(turn, form) for turn in turns]
        if self.tool_lists and TOOL_COLUMN in row:
            # Null, not [], where there are none: Llama 3.1's template takes any list for tools.
            spelled[TOOL_COLUMN] = json.loads(row[TOOL_COLUMN]) if row[TOOL_COLUMN] else None
        return spelled

    def _calls_apart(self, turn: Row) -> list[Row]:
        """An assistant's turn of messages with its calls as a turn of their own, if the user has them so."""
        if _CALL not in self.roles or not turn.get("tool_calls"):
            return [turn]
        rest = {key: value for key, value in turn.items() if key != "tool_calls"}
        call = {**rest, "role": _CALL, "content": calls_value(turn["tool_calls"])}
        return [rest, call] if turn["content"] else [call]

    def _turn(self, turn: Row, form: str) -> Row:
        role_key, text_key = _USUAL_KEYS[form]
        kinds = {name: kind for kind, name in USUAL_ROLES[form].items()} | {_CALL: _CALL}
        rest = {key: value for key, value in turn.items() if key not in (role_key, text_key)}
        kind, text = kinds[turn[role_key]], turn[text_key]
        part = self.parts.get(kind)
        if part is not None and text:
            text = [{"type": part, "text": text}] if part else [text]
        if self.argument_texts and rest.get("tool_calls"):
            rest["tool_calls"] = [_with_text_arguments(call) for call in rest["tool_calls"]]
        if self.weight is not None and "weight" in rest:
            name, is_boolean = self.weight
            value = rest.pop("weight")
            rest[name] = bool(value) if is_boolean and value is not None else value
        own_role, own_text = self.keys_in(form)
        return {own_role: self.role(kind, form), own_text: text, **rest}


class SpellingCount:
    """How often each spelling occurs in the rows of a dataset.

    Args:
      reading: the user's names of columns and roles.
      form: the format of the rows.
    """

    def __init__(self, reading: Reading = AS_IT_IS, form: str = "") -> None:
        self._known_roles, names = reading.roles, reading.columns
        self._usual_keys = _USUAL_KEYS.get(form, KEYS[0])
        self._columns = {names.get(name, name) for name in _COLUMNS.get(form, ())}
        self._tool_column = names.get(TOOL_COLUMN, TOOL_COLUMN)
        self._roles: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self._parts: defaultdict[str, Counter[str | None]] = defaultdict(Counter)
        self._keys: Counter[tuple[str, str]] = Counter()
        self._weights: Counter[tuple[str, bool]] = Counter()
        self._tool_lists: Counter[bool] = Counter()
        self._argument_texts: Counter[bool] = Counter()
        self._lists: Counter[bool] = Counter()
        self._weighs: Counter[bool] = Counter()
        self._system_columns = [names.get(name, name) for name in sorted(SYSTEM_COLUMNS)]
        self._present = set[str]()  # those of them that rows have
        self._systems: Counter[tuple[str, ...]] = Counter()
        self._may_be_lists = form == "prompt_completion"

    def add(self, row: Row) -> None:
        """Counts what a row has."""
        for column in self._columns:
            turns = listed(row.get(column))
            if self._may_be_lists and turns:
                self._lists[has_turns(turns)] += 1
            for turn in turns if isinstance(turns, list) else ():
                if isinstance(turn, dict):
                    self._add_turn(turn)
        if tools := row.get(self._tool_column):
            self._tool_lists[not isinstance(tools, str)] += 1
        present = [name for name in self._system_columns if name in row]
        self._present.update(present)
        self._systems[tuple(name for name in present if row[name])] += 1

    def add_all(self, other: SpellingCount) -> None:
        """Adds what another count has found, such as that of another source of the same format."""
        for kind, names in other._roles.items():
            self._roles[kind] += names
        for kind, parts in other._parts.items():
            self._parts[kind] += parts
        self._keys += other._keys
        self._weights += other._weights
        self._tool_lists += other._tool_lists
        self._argument_texts += other._argument_texts
        self._lists += other._lists
        self._weighs += other._weighs
        self._systems += other._systems
        self._present |= other._present

    def _add_turn(self, turn: Row) -> None:
        keys = keys_of(turn, self._usual_keys)
        name, text = turn.get(keys[0]), turn.get(keys[1])
        if not isinstance(name, str):
            return
        role = self._known_roles.get(name, name).strip().lower()
        kind = _CALL if role in CALL_ROLES else ROLES.get(role)
        if kind is None:
            return
        self._keys[keys] += 1
        self._roles[kind][name] += 1
        if text:
            self._parts[kind][_part_of(text)] += 1
        if kind == "assistant":
            fields = [field for field in WEIGHTS if weight_of(turn.get(field)) is not None]
            self._weights.update((field, isinstance(turn[field], bool)) for field in fields)
            self._weighs[bool(fields)] += 1
        calls = turn.get("tool_calls")
        for call in calls if isinstance(calls, list) else ():
            function = call.get("function") if isinstance(call, dict) else None
            if isinstance(function, dict):
                self._argument_texts[isinstance(function.get("arguments"), str)] += 1

    def commonest(self, form: str) -> Spelling:
        """The commonest spelling of each kind of thing, for rows of the format `form`."""
        if form not in _COLUMNS:
            return Spelling(tool_lists=_first(self._tool_lists) or False, systems=self._columns_of_system())
        usual, keys, weight = USUAL_ROLES[form], _first(self._keys), _first(self._weights)
        roles = {kind: _first(names) for kind, names in self._roles.items()}
        parts = {kind: _first(types) for kind, types in self._parts.items()}
        return Spelling(
            {kind: name for kind, name in roles.items() if name is not None and name != usual.get(kind)},
            None if keys == _USUAL_KEYS[form] else keys,
            {kind: part for kind, part in parts.items() if part is not None},
            None if weight == ("weight", False) else weight,
            _first(self._tool_lists) or False,
            _first(self._argument_texts) or False,
            _first(self._lists) or False,
            _first(self._weighs) or False,
            self._columns_of_system(),
        )

    def _columns_of_system(self) -> tuple[str, ...]:
        """The columns that most rows with a system text have it in; () if there is one column at most."""
        found = Counter({columns: n for columns, n in self._systems.items() if columns})
        return _first(found) or () if len(self._present) > 1 else ()


def _first(count: Counter[Any]) -> Any:
    """The commonest value, the first one that was met of equally common ones; None if nothing was counted."""
    return count.most_common(1)[0][0] if count else None


def _part_of(text: Any) -> str | None:
    """How a turn's text is spelt: None as a text, "" as a list of texts, else as parts of this type."""
    part = text[0] if isinstance(text, list) and text else text if isinstance(text, dict) else None
    if isinstance(part, dict):
        kind = part.get("type")
        return kind if isinstance(kind, str) else "text"
    return "" if isinstance(part, str) else None


def _with_text_arguments(call: Row) -> Row:
    function = call["function"]
    return {**call, "function": {**function, "arguments": dumped(function["arguments"])}}
