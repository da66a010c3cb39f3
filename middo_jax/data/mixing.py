"""Several datasets as one: how many rows of each are taken, and which."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Container, Sequence
from typing import TypeVar

from middo_jax.config.settings import DataSettings, Source
from middo_jax.data.example import Example
from middo_jax.data.files import Rejection
from middo_jax.data.formats import DataError
from middo_jax.data.id_columns import distinct_in_each
from middo_jax.data.places import Places
from middo_jax.data.reading import Reading
from middo_jax.data.sources import commonest_reasons, read_rows
from middo_jax.data.spelling import SpellingCount
from middo_jax.data.user_rows import DUPLICATE, Repair, UserRows, id_as_extra


def shares(sizes: Sequence[int], sources: Sequence[Source]) -> list[int]:
    """How many usable rows of each source are taken.

    Sources with weights are mixed in the ratio of their weights, with as many rows as that allows. A source
    with neither weight nor count is taken whole.

    sizes [1000, 300], weights 1 and 1  ->  [300, 300];  weights 3 and 1  ->  [900, 300]

    Raises:
      DataError: a source has fewer usable rows than its count.
    """
    for n, source in zip(sizes, sources, strict=True):
        if source.count is not None and source.count > n:
            raise DataError(
                f"{source.path}: data.sources wants {source.count:,} rows of it, and {n:,} can be used; "
                "lower its count"
            )
    weighted = [(n, s.weight) for n, s in zip(sizes, sources, strict=True) if s.weight is not None]
    unit = min((n / weight for n, weight in weighted), default=0.0)  # rows per unit of weight
    return [
        s.count if s.count is not None else n if s.weight is None else min(n, max(1, round(unit * s.weight)))
        for n, s in zip(sizes, sources, strict=True)
    ]


Refuses = Callable[[Example], str | None]  # why an example cannot be used; None if it can


@dataclasses.dataclass
class _Drawn:
    """One of several datasets, from which usable rows are taken in the order of a draw.

    Only rows that may be taken are checked, since a template is slow and a source may be much larger than
    its share.

    Attributes:
      source: its settings.
      data: its rows.
      order: the numbers of its rows, in the order in which they are taken.
      refuses: why an example cannot be used.
      refused: number of a row that was checked and cannot be used -> why.
      checked: for each row, whether it was checked.
    """

    source: Source
    data: UserRows
    order: Sequence[int]
    refuses: Refuses
    refused: dict[int, str] = dataclasses.field(default_factory=dict)
    checked: bytearray = dataclasses.field(default_factory=bytearray)

    def __post_init__(self) -> None:
        self.checked.extend(bytes(len(self.data.examples)))

    def take(self, count: int, taken: Container[str]) -> list[int]:
        """The numbers of `count` usable rows, fewer if there are no more, in the order of the dataset.

        Args:
          count: number of rows.
          taken: ids of the rows that are taken of earlier sources.
        """
        found = []
        for number in self.order:
            if len(found) == count:
                break
            example = self.data.examples[number]
            if example.id in taken:
                continue
            if not self.checked[number]:
                self.checked[number] = True
                if (why := self.refuses(example)) is not None:
                    self.refused[number] = why
            if number not in self.refused:
                found.append(number)
        return sorted(found)

    @property
    def is_whole(self) -> bool:
        """Whether all rows are taken that can be."""
        return self.source.weight is None and self.source.count is None

    def rejections(self) -> list[Rejection]:
        """The rows that cannot be used, with their places in all sources."""
        return [placed(self.source.path, each) for each in self.data.without(self.refused).rejections]

    def require_some(self, n: int) -> int:
        """Returns `n`, the number of usable rows, if the source may have so few.

        Raises:
          DataError: it has none, or fewer than its count.
        """
        if n and self.source.count is None:
            return n
        wanted = "a share" if self.source.count is None else f"{self.source.count:,} rows"
        raise DataError(
            f"{self.source.path}: data.sources wants {wanted} of it, and {n:,} rows can be used that no "
            f"earlier source has; lower its count or leave it out{_why(self.rejections())}"
        )


def drawn(n: int, seed: int, source: int) -> list[int]:
    """The numbers 0..n-1 in an order that depends on the seed and the place of the source."""
    return random.Random(f"{seed}:{source}").sample(range(n), n)


def _taken(parts: Sequence[_Drawn]) -> list[list[int]]:
    """The numbers of the rows that are taken of each source, see `shares`.

    Raises:
      DataError: a source has fewer usable rows than its count, or none of a source with a weight.
    """
    sizes = [len(part.data.examples) for part in parts]
    while True:
        counts, ids, found = shares(sizes, [part.source for part in parts]), set[str](), list[list[int]]()
        for number, (part, count) in enumerate(zip(parts, counts, strict=True)):
            found.append(part.take(count, ids))
            ids.update(part.data.examples[i].id for i in found[-1])
            if len(found[-1]) < count and not part.is_whole:
                # No rows are left to draw, so the source is smaller than it seemed: all shares shrink.
                sizes[number] = part.require_some(len(found[-1]))
                break
        else:
            return found


def accept(example: Example) -> None:
    """No reason to refuse an example: without a model, every row that was read can be used."""


def read_configured(
    settings: DataSettings, seed: int, keep_rows: bool = False, refuses: Refuses = accept
) -> UserRows:
    """The dataset that the settings name: `data.path`, or `data.sources` as one.

    Args:
      settings: of the data.
      seed: of the choice of rows, where several sources are mixed.
      keep_rows: whether the rows are returned too, as they were read.
      refuses: why an example cannot be used, where several sources are mixed.

    Raises:
      DataError: see `read_rows` and `read_sources`.
    """
    reading = Reading.of(settings)
    if not settings.sources:
        return read_rows(settings.path, settings.format, settings.limit, reading, keep_rows)
    data, said = read_sources(settings.sources, settings.limit, reading, seed, keep_rows, refuses)
    return data._replace(said=tuple(said))


def read_sources(
    sources: Sequence[Source],
    limit: int | None,
    reading: Reading,
    seed: int,
    keep_rows: bool = False,
    refuses: Refuses = accept,
) -> tuple[UserRows, list[str]]:
    """(several datasets as one, what was taken of each, in words).

    A row whose conversation is taken of an earlier source is a rejection. Ids that are not unique over all
    sources are kept as an ordinary column.

    Raises:
      DataError: see `read_rows`; a source has too few usable rows, or all have none.
    """
    parts = [
        read_rows(
            s.path,
            s.format,
            limit,
            reading if s.columns is None else dataclasses.replace(reading, columns=s.columns),
            keep_rows,
        )
        for s in sources
    ]
    draws = [
        _Drawn(source, part, drawn(len(part.examples), seed, number), refuses)
        for number, (source, part) in enumerate(zip(sources, parts, strict=True))
    ]
    merged, said = _merged(draws, keep_rows)
    if not merged.examples:
        raise DataError(f"data.sources: no row can be used{_why(merged.rejections)}")
    ids = [str(e.user_id) for e in merged.examples if e.user_id is not None]
    if len(set(ids)) < len(ids):
        column = reading.id_column or "id"
        merged = merged._replace(examples=[id_as_extra(example, column) for example in merged.examples])
        said.append(f"column {column!r} is not unique over all sources: results do not carry it as the id")
    return merged, said


def _merged(draws: Sequence[_Drawn], keep_rows: bool) -> tuple[UserRows, list[str]]:
    """(the rows that are taken of all sources, what was taken of each, in words)."""
    repairs, places, said = list[Repair](), Places(), list[str]()
    merged = _empty([draw.data for draw in draws], keep_rows)._replace(places=places, repairs=repairs)
    first: dict[str, int] = {}  # id -> number of its example
    for draw, numbers in zip(draws, _taken(draws), strict=True):
        source, part = draw.source, draw.data
        merged.rejections.extend(draw.rejections())
        for example, place in zip(part.examples, part.places, strict=True):
            if (earlier := first.get(example.id)) is not None:
                reason = f"{DUPLICATE}{example.id} ({places[earlier]})"
                merged.rejections.append(Rejection(_place(source.path, place), reason, example.to_json()))
        said.append(f"{source.path}: {len(numbers):,} of {len(part.examples):,} rows taken")
        if part.repairs:
            here = {part.places[i] for i in numbers}
            repairs += (placed(source.path, repair) for repair in part.repairs if repair.where in here)
        for i in numbers:
            first[part.examples[i].id] = len(places)
            merged.examples.append(part.examples[i])
            places.append(_place(source.path, part.places[i]))
            if merged.rows is not None and part.rows is not None:
                merged.rows.append(part.rows[i])
    return merged, said


def _why(rejections: Sequence[Rejection]) -> str:
    """The end of a message: why rows cannot be used."""
    lines = "".join(f"\n{line}" for line in commonest_reasons(rejections))
    return f". The commonest reasons:{lines}" if lines else ""


def _empty(parts: Sequence[UserRows], keep_rows: bool) -> UserRows:
    """No rows yet, with the format, the columns and the spelling that some datasets have together."""
    formats, spelling = {part.format for part in parts}, SpellingCount()
    form = formats.pop() if len(formats) == 1 else "messages"
    for part in parts:
        if part.format == form:
            spelling.add_all(part.spelling)
    columns = list(dict.fromkeys(name for part in parts for name in part.columns))
    rows, distinct = [] if keep_rows else None, distinct_in_each([part.distinct for part in parts])
    return UserRows([], (), [], (), form, (), columns, spelling, distinct, rows)


def _place(path: str, where: str) -> str:
    return f"{path} {where}" if where.startswith("row ") else where


_Placed = TypeVar("_Placed", Rejection, Repair)


def placed(path: str, item: _Placed) -> _Placed:
    """A rejection or repair whose place names the dataset, also where it is only `row N`."""
    where = _place(path, item.where)
    return item._replace(where=where) if isinstance(item, Repair) else dataclasses.replace(item, where=where)
