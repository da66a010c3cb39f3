"""Several datasets as one: how many rows of each are taken, and which."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from typing import TypeVar

from middo_jax.config.settings import DataSettings, Source
from middo_jax.data.files import Rejection
from middo_jax.data.formats import DataError
from middo_jax.data.id_columns import distinct_in_each
from middo_jax.data.places import Places
from middo_jax.data.reading import Reading
from middo_jax.data.sources import read_rows
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


def chosen(n: int, count: int, seed: int, source: int) -> list[int]:
    """`count` of the numbers 0..n-1 in order; which ones depends on the seed and the place of the source."""
    if count >= n:
        return list(range(n))
    return sorted(random.Random(f"{seed}:{source}").sample(range(n), count))


def read_configured(settings: DataSettings, seed: int, keep_rows: bool = False) -> UserRows:
    """The dataset that the settings name: `data.path`, or `data.sources` as one.

    Args:
      settings: of the data.
      seed: of the choice of rows, where several sources are mixed.
      keep_rows: whether the rows are returned too, as they were read.

    Raises:
      DataError: see `read_rows` and `read_sources`.
    """
    reading = Reading.of(settings)
    if not settings.sources:
        return read_rows(settings.path, settings.format, settings.limit, reading, keep_rows)
    data, said = read_sources(settings.sources, settings.limit, reading, seed, keep_rows)
    return data._replace(said=tuple(said))


def read_sources(
    sources: Sequence[Source], limit: int | None, reading: Reading, seed: int, keep_rows: bool = False
) -> tuple[UserRows, list[str]]:
    """(several datasets as one, what was taken of each, in words).

    A row whose conversation an earlier source has too is a rejection. Ids that are not unique over all
    sources are kept as an ordinary column.

    Raises:
      DataError: see `read_rows`, or a source has too few rows.
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
    repairs, places, said = list[Repair](), Places(), list[str]()
    merged = _empty(parts, keep_rows)._replace(places=places, repairs=repairs)
    first: dict[str, int] = {}  # id -> number of its example
    counts = shares([len(part.examples) for part in parts], sources)
    for number, (part, source, count) in enumerate(zip(parts, sources, counts, strict=True)):
        merged.rejections.extend(placed(source.path, rejection) for rejection in part.rejections)
        taken = chosen(len(part.examples), count, seed, number)
        said.append(f"{source.path}: {len(taken):,} of {len(part.examples):,} rows taken")
        if part.repairs:
            here = {part.places[i] for i in taken}
            repairs += (placed(source.path, repair) for repair in part.repairs if repair.where in here)
        for i in taken:
            example, where = part.examples[i], _place(source.path, part.places[i])
            if example.id in first:
                reason = f"{DUPLICATE}{example.id} ({places[first[example.id]]})"
                merged.rejections.append(Rejection(where, reason, example.to_json()))
                continue
            first[example.id] = len(places)
            merged.examples.append(example)
            places.append(where)
            if merged.rows is not None and part.rows is not None:
                merged.rows.append(part.rows[i])
    ids = [str(e.user_id) for e in merged.examples if e.user_id is not None]
    if len(set(ids)) < len(ids):
        column = reading.id_column or "id"
        merged = merged._replace(examples=[id_as_extra(example, column) for example in merged.examples])
        said.append(f"column {column!r} is not unique over all sources: results do not carry it as the id")
    return merged, said


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
