"""The shape of the user's rows: their columns in their order, the place of the system text, how turns are
written.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from middo_jax.data.example import Example
from middo_jax.data.layout import Layout
from middo_jax.data.shapes import apart, prompt_row
from middo_jax.data.spelling import Spelling
from middo_jax.data.stored import Changed, Examples
from middo_jax.data.turns import SYSTEM_COLUMNS, Row

# Columns of a format that a row may lack, and what they have where it has nothing to put there.
_EMPTY = {"alpaca": {"context": "", "history": []}, "prompt_completion": {"context": ""}}


@dataclasses.dataclass(frozen=True)
class OwnShape:
    """How rows came in.

    Attributes:
      format: alpaca, sharegpt, messages or prompt_completion.
      names: names of columns as the format has them -> the user's names, see `data.columns`.
      columns: the user's columns in their order; () if they are not known.
      id_column: the column with the user's own ids.
      spelling: how turns are written, where it is not as usual.
    """

    format: str
    names: Mapping[str, str] = dataclasses.field(default_factory=dict)
    columns: tuple[str, ...] = ()
    id_column: str = "id"
    spelling: Spelling = dataclasses.field(default_factory=Spelling)

    @classmethod
    def of(
        cls,
        form: str | None,
        columns: Iterable[str],
        settings: Mapping[str, Any],
        spelling: Spelling | None = None,
    ) -> OwnShape:
        """The shape of data in a format, with these columns, by the settings `data`.

        Of any other format, and where it is not known, rows are written as messages.
        """
        id_column = settings.get("id_column") or "id"
        if form not in ("alpaca", "sharegpt", "messages", "prompt_completion"):
            return cls("messages", id_column=id_column)
        return cls(form, names_of(settings), tuple(columns), id_column, spelling or Spelling())

    def to_json(self) -> dict[str, Any]:
        """For the record of a stage."""
        spelling = self.spelling.to_json()
        facts = {"format": self.format, "names": dict(self.names), "columns": list(self.columns)}
        return {**facts, "id_column": self.id_column, **({"spelling": spelling} if spelling else {})}

    @property
    def system_columns(self) -> list[str]:
        """The user's columns for system texts, in the user's order."""
        theirs = {self.names.get(name, name) for name in SYSTEM_COLUMNS}
        return [name for name in self.columns if name in theirs]

    @property
    def system_column(self) -> str | None:
        """The column that usually has the system text, the first of several; None if there is none."""
        return next(iter([*self.spelling.systems, *self.system_columns]), None)

    def rows(self, examples: Examples, among: Examples | None = None) -> Iterator[Row]:
        """Conversations as rows of this shape. Columns of ours follow the user's, an `id` of ours is first.

        `among` are the rows of all files that are to have the same columns; None: the examples alone.

        names {"output": "answer"}, columns ("answer", "instruction")
          ->  {"id": ..., "answer": ..., "instruction": ...}, without the empty `input` of Alpaca

        Raises:
          DataError: see `layout.to_rows`.
        """
        systems = self.system_columns
        among = examples if among is None else among
        has_input = self.format != "alpaca" or not self.columns or self._has_input(among)
        bare = Changed(among, _without_system) if systems else among
        layout = Layout.of(bare, self.format, self.id_column, whole=True)
        layout = dataclasses.replace(
            layout,
            is_conversational=layout.is_conversational or self.spelling.lists,
            weighs=self.spelling.weighs,
        )
        for example in examples:
            row = layout.row(_without_system(example) if systems else example)
            row |= self._system_texts(example)
            if not has_input:
                row.pop("input", None)
            if self.format == "prompt_completion" and self._has("context"):
                row = apart(row, example)
            for name, empty in _EMPTY.get(self.format, {}).items():
                if self._has(name):
                    row.setdefault(name, empty)
            yield self._named(self.spelling.spelled(row, self.format))

    def _system_texts(self, example: Example) -> Row:
        """The columns for the system text: where the user usually has it, and empty in the others."""
        first, used = example.messages[0], self.spelling.systems or self.system_columns[:1]
        text = first.content if first.role == "system" else ""
        return {self._ours(name): text if name in used else "" for name in self.system_columns}

    def _has(self, name: str) -> bool:
        """Whether the user has a column of a format."""
        return self.names.get(name, name) in self.columns

    def _has_input(self, examples: Examples) -> bool:
        """Whether the user has the column `input`, or a row needs it."""
        return self._has("input") or any(prompt_row(example).get("input") for example in examples)

    def _ours(self, name: str) -> str:
        return next((ours for ours, theirs in self.names.items() if theirs == name), name)

    def _named(self, row: Row) -> Row:
        """The inverse of `Reading.apply`, with the columns in the user's order."""
        back = {f"extra_{name}": name for name in self.names if name in self.columns} | dict(self.names)
        named = {back.get(name, name): value for name, value in row.items()}
        first = [name for name in ("id",) if name in named and name not in self.columns]
        order = dict.fromkeys((*first, *(name for name in self.columns if name in named), *named))
        return {name: named[name] for name in order}


def names_of(settings: Mapping[str, Any]) -> Mapping[str, str]:
    """The user's names of columns by the settings `data`; {} if several sources have different ones."""
    shared = settings.get("columns") or {}
    own = [source.get("columns") for source in settings.get("sources") or ()]
    found = [shared if names is None else names for names in own] or [shared]
    return found[0] if all(names == found[0] for names in found) else {}


def _without_system(example: Example) -> Example:
    turns = example.messages
    return dataclasses.replace(example, messages=turns[1:]) if turns[0].role == "system" else example
