"""How the conversations of a dataset are written as rows that have all the same columns.

The examples are read once to find what their rows have in common; then each becomes a row by itself.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Iterator, Mapping

from middo_jax.data.example import Example
from middo_jax.data.formats import FORMATS, DataError, RowFormat, plain
from middo_jax.data.shapes import ShapeError, conversational_row, prompt_row
from middo_jax.data.stored import Examples
from middo_jax.data.tools import TOOL_COLUMN
from middo_jax.data.turns import Row

_log = logging.getLogger(__name__)
# The formats whose rows may end with turns that are not learnt.
_WITH_BEHIND = frozenset({"sharegpt", "messages"})
_SPEAKING = ("assistant", "gpt", "function_call")  # the names of the assistant's turns in written rows


def to_rows(examples: Examples, form: str, id_column: str = "id") -> Iterator[Row]:
    """Rows with conversation, ids and extra columns; `to_example` reads them back. Lineage is not written.

    The user's own ids are in `id_column`, null for rows that have none. Without any, our own are in `id`. Any
    other extra column whose name the format needs is written as `extra_NAME`, with a warning. If one row
    needs the conversational form of prompt_completion, all rows get it, since readers expect one type per
    column.

    Raises:
      DataError: the format can be read only, an answer is not learnt and the format has no field for that,
        or, while the rows are iterated, it has no place for a conversation.
    """
    return map(Layout.of(examples, form, id_column).row, examples)


@dataclasses.dataclass(frozen=True)
class Layout:
    """What the rows of a dataset have in common.

    Attributes:
      form: name of the format.
      id_column: column with the user's ids; None if no example has one.
      names: extra columns -> their names in the rows.
      has_tools: whether any example defines tools.
      has_weights: whether any answer is not learnt.
      is_conversational: whether prompt and completion are lists of turns.
      is_whole: whether rows have what no model sees: the user's other fields of turns, and the turns behind
        the last answer that is learnt, where the format has columns of turns.
      weighs: whether answers have a weight also where all of them are learnt.
    """

    form: str
    id_column: str | None
    names: Mapping[str, str]
    has_tools: bool
    has_weights: bool
    is_conversational: bool
    is_whole: bool = False
    weighs: bool = False

    @classmethod
    def of(cls, examples: Iterable[Example], form: str, id_column: str, whole: bool = False) -> Layout:
        """The layout of some examples, see `to_rows`. With `whole` also of what no model sees."""
        if FORMATS[form].row is None:
            raise DataError(f"rows of format {form} can be read and not written; write messages")
        columns: dict[str, None] = {}
        has_ids = has_tools = has_weights = is_conversational = False
        for example in examples:
            columns.update(dict.fromkeys(example.extra))
            has_ids = has_ids or example.user_id is not None
            has_tools = has_tools or bool(example.tools)
            turns = example.messages + (example.behind if whole and form in _WITH_BEHIND else ())
            has_weights = has_weights or not all(message.learnt for message in turns)
            is_conversational = is_conversational or _is_conversational(example)
        if has_weights and not FORMATS[form].keeps_weights:
            raise DataError(
                f"{form} has no field for answers of weight 0, which are not learnt; write messages instead"
            )
        reserved = FORMATS[form].columns | {"lineage"}
        reserved |= ({TOOL_COLUMN} if has_tools else set()) | ({id_column} if has_ids else set())
        names: dict[str, str] = {}
        for column in columns:
            name = column
            while name in reserved or (name != column and name in columns):
                name = "extra_" + name
            names[column] = name
        if renamed := [f"{column} -> {name}" for column, name in names.items() if column != name]:
            _log.warning("extra columns are renamed, since %s uses their names: %s", form, ", ".join(renamed))
        ids = id_column if has_ids else None
        return cls(form, ids, names, has_tools, has_weights, is_conversational, whole)

    def row(self, example: Example) -> Row:
        """The row of an example.

        Raises:
          DataError: the format has no place for the conversation.
        """
        row: Row = {}
        if self.id_column is not None:
            row[self.id_column] = example.user_id
        elif "id" not in self.names:
            row["id"] = example.id
        try:
            row |= self._conversation(example)
        except ShapeError as e:
            raise DataError(f"{self.form} {e}; write messages instead") from e
        if self.has_tools:
            # As text, since the definitions of two tools have no common type for a column. Null, not "",
            # where there are none: TRL and axolotl parse any text as JSON.
            row[TOOL_COLUMN] = example.tools or None
        row |= {self.names[column]: plain(value) for column, value in example.extra.items()}
        for turn in (turn for column in self._format.required for turn in _turns_in(row[column])):
            self._complete(turn)
        return row

    def _complete(self, turn: Row) -> None:
        """Gives a turn its weight and the user's other fields."""
        is_answer = turn.get("role", turn.get("from")) in _SPEAKING  # before fields of the user's are added
        fields = turn.pop("fields", {})
        if self.is_whole:
            turn |= {name: value for name, value in fields.items() if name not in turn}
        if is_answer:
            if self.has_weights or self.weighs:
                turn.setdefault("weight", 1)
        elif self.has_weights:
            # Readers expect the same fields in all turns. Only answers have one: axolotl learns any 1.
            turn["weight"] = None

    def _conversation(self, example: Example) -> Row:
        turns = example.messages + (example.behind if self.is_whole and self.form in _WITH_BEHIND else ())
        if self.form == "prompt_completion" and self.is_conversational:
            return conversational_row(example.messages)
        to_row = self._format.row
        assert to_row is not None  # `of` refuses such a format
        return {**to_row(turns), **(prompt_row(example) if self.form == "alpaca" else {})}

    @property
    def _format(self) -> RowFormat:
        return FORMATS[self.form]


def _is_conversational(example: Example) -> bool:
    """Whether prompt and completion cannot be one text each."""
    return [m.role for m in example.messages] != ["user", "assistant"] or bool(example.messages[-1].tool)


def _turns_in(value: object) -> list[Row]:
    return [turn for turn in value if isinstance(turn, dict)] if isinstance(value, list) else []
