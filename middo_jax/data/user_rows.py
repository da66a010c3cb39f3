"""A dataset as it was read: its rows become examples one at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from middo_jax.data.example import NO_COLUMNS, Example
from middo_jax.data.files import Rejection, with_id
from middo_jax.data.formats import DataError, ReadRow, RowError, is_ours, plain, to_example
from middo_jax.data.places import Places
from middo_jax.data.reading import Reading
from middo_jax.data.spelling import SpellingCount
from middo_jax.data.turns import Row


class Repair(NamedTuple):
    """A row that was repaired: its place, see `Rejection.where`, and what was repaired."""

    where: str
    reason: str


DUPLICATE = "duplicate of "  # how the reason begins that an earlier row has the same conversation
_NOTHING = SpellingCount()


class UserRows(NamedTuple):
    """A dataset as it was read. Every row is in `examples` or in `rejections`, in the order of the dataset.

    Attributes:
      examples: the usable rows, as conversations.
      places: for each example, the place of its row, see `Rejection.where`.
      rejections: all other rows.
      repairs: what was repaired, one per row and kind of repair.
      format: of the rows; messages for several sources of different formats.
      said: what was taken of each of several sources, one line each.
      columns: the names of the columns of the usable rows, in the order in which they first occur.
      spelling: how the usable rows write their turns.
      distinct: for each extra column, whether each value is in one row only, see `data.id_columns`.
      rows: for each example, its row as it was read; None unless they were asked for.
    """

    examples: list[Example]
    places: Sequence[str]
    rejections: list[Rejection]
    repairs: Sequence[Repair] = ()
    format: str = ""
    said: Sequence[str] = ()
    columns: Sequence[str] = ()
    spelling: SpellingCount = _NOTHING
    distinct: Mapping[str, bool] = {}
    rows: list[Any] | None = None

    def id_columns(self, column: str | None) -> list[str]:
        """The columns that name a row: `column`, which is `data.id_column`, and the distinct ones."""
        distinct = {name for name, is_distinct in self.distinct.items() if is_distinct}
        return sorted(distinct | ({column} if column is not None else set()))

    def without(self, reasons: Mapping[int, str]) -> UserRows:
        """The dataset without some examples, which become rejections.

        Args:
          reasons: why each is rejected, by its number.
        """
        if not reasons:
            return self
        kept = [i for i in range(len(self.examples)) if i not in reasons]
        rejected = [
            Rejection(with_id(self.places[i], self.examples[i].user_id), reason, self.examples[i].to_json())
            for i, reason in sorted(reasons.items())
        ]
        gone = {self.places[i] for i in reasons}
        return self._replace(
            examples=[self.examples[i] for i in kept],
            places=Places(self.places[i] for i in kept),
            rejections=self.rejections + rejected,
            repairs=[repair for repair in self.repairs if repair.where not in gone],
            rows=None if self.rows is None else [self.rows[i] for i in kept],
        )


class Converter:
    """Makes examples of rows one at a time, so that a row can be freed before the next one is read.

    Attributes:
      n, n_values: number of rows so far, and of those that could be read.
      names: the columns of all rows that could be read.
      unkept: what `to_example` did not keep of any of them.
      of_ours: for each example, 1 if its row is one of dataset.jsonl.
    """

    def __init__(self, format: str, reading: Reading, keep_rows: bool) -> None:
        self._format, self._reading = format, reading
        self._examples: list[Example] = []
        self._places, self._rows = Places(), [] if keep_rows else None
        self._rejections: list[Rejection] = []
        self._repairs: list[Repair] = []
        self._number_of: dict[str, int] = {}  # id -> number of its example
        self._columns: dict[str, None] = {}
        self._spelling = SpellingCount(reading, format)
        self.n = self.n_values = 0
        self.names: set[str] = set()
        self.unkept: set[str] = set()
        self.of_ours = bytearray()

    def add(self, item: tuple[str, Any] | Rejection) -> None:
        """Converts the next row."""
        self.n += 1
        if isinstance(item, Rejection):
            self._rejections.append(item)
            return
        self.n_values += 1
        where, given = item
        if isinstance(given, dict):
            self.names.update(given.keys())
        row = given
        try:
            row = plain(given)
            converted = to_example(row, self._format, self._reading)
        except RowError as e:
            own = row.get(self._reading.id_column or "id") if isinstance(row, dict) else None
            self._rejections.append(Rejection(with_id(where, own), str(e), row))
        except RecursionError:
            self._rejections.append(Rejection(where, "nested too deeply", None))
        else:
            self._keep(where, given, row, converted)

    def _keep(self, where: str, given: Any, row: Row, converted: ReadRow) -> None:
        """Adds an example, unless there is one with its id."""
        example = converted.example
        if (number := self._number_of.get(example.id)) is not None:
            same, place = example.messages == self._examples[number].messages, self._places[number]
            reason = f"{DUPLICATE}{example.id} ({place})" if same else f"id {example.id} is taken ({place})"
            self._rejections.append(Rejection(where, reason, row))
            return
        self._number_of[example.id] = len(self._examples)
        self._examples.append(example)
        self._places.append(where)
        self._columns.update(dict.fromkeys(row))
        self._spelling.add(row)
        self.of_ours.append(is_ours(row))
        if self._rows is not None:
            self._rows.append(given)
        self._repairs += (Repair(where, what) for what in converted.repairs)
        self.unkept |= converted.unkept

    def data(self) -> UserRows:
        """What was read so far."""
        return UserRows(
            self._examples,
            self._places,
            self._rejections,
            self._repairs,
            self._format,
            columns=list(self._columns),
            spelling=self._spelling,
            rows=self._rows,
        )


def give_user_ids(
    examples: list[Example], places: Sequence[str], of_ours: Sequence[int], column: str | None, path: str
) -> None:
    """Gives the examples the ids that their rows have in `column`, or in `id` if these are unique.

    Args:
      examples: they are replaced in place.
      places: of their rows.
      of_ours: whether each is a row of dataset.jsonl, which itself says whether it has an id of the user's.
      column: `data.id_column`.
      path: of the dataset.

    Raises:
      DataError: `column` was named, and its values are not unique texts or whole numbers.
    """
    name = column or "id"
    first: dict[str, int] = {}  # id -> number of its example
    for number, example in enumerate(examples):
        value = example.user_id if example.user_id is not None else _id_of(example.extra.get(name))
        if value is None:
            continue
        fault = None
        if isinstance(value, bool) or not isinstance(value, str | int):
            fault = "is neither text nor a whole number"
        elif str(value) in first:
            fault = f"is also that of {places[first[str(value)]]}"
        if fault is None:
            first[str(value)] = number
        elif column is None:
            return
        else:
            raise DataError(f"{path}: data.id_column={column}: the id {value!r} of {places[number]} {fault}")
    if column is not None and not first and examples:
        raise DataError(f"{path}: data.id_column={column}: no row has such a column")
    if not first:
        return
    for number, example in enumerate(examples):
        if not of_ours[number]:
            examples[number] = _with_user_id(example, name)


def _id_of(value: Any) -> Any:
    """A cell as an id: None of an empty one; 1 of 1.0, which is how columns with empty cells have it."""
    if (isinstance(value, str) and not value.strip()) or value != value:  # NaN
        return None
    return int(value) if isinstance(value, float) and value.is_integer() else value


def with_ids_of(examples: Sequence[Example], column: str) -> list[Example]:
    """Examples whose ids are in a column, if any of them has it; ids need not be unique."""
    if not any(column in example.extra for example in examples):
        return list(examples)
    return [_with_user_id(id_as_extra(example, "id"), column) for example in examples]


def id_as_extra(example: Example, column: str) -> Example:
    """An example without an id of the user's; the id is in an ordinary column."""
    if example.user_id is None:
        return example
    return dataclasses.replace(example, extra={column: example.user_id, **example.extra}, user_id=None)


def _with_user_id(example: Example, column: str) -> Example:
    if column not in example.extra:
        return example
    extra = {name: value for name, value in example.extra.items() if name != column}
    return dataclasses.replace(example, extra=extra or NO_COLUMNS, user_id=_id_of(example.extra[column]))
