"""Writes rows as a Parquet file in row groups, so that one group at a time is in memory."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from middo_jax.data.shapes import filled, turn_fields
from middo_jax.data.turns import Row
from middo_jax.rundir import atomic

_GROUP_ROWS = 1 << 15
_CHUNK_ROWS = 1 << 12  # one Arrow text array is limited to 2 GiB
_UNFIT = (pa.ArrowException, ValueError, TypeError, OverflowError)


class _NotExact(Exception):
    """The type of a column changes its values."""

    def __init__(self, column: str) -> None:
        super().__init__(column)
        self.column = column


def write_parquet(path: Path, rows: Callable[[], Iterator[Row]]) -> None:
    """Writes rows whole or not at all.

    A column without a type that keeps all its values is written as JSON text; `in_memory.arrow_rows` finds it
    by its metadata. All turns get the same fields, see `shapes.filled`.

    Args:
      path: of the file.
      rows: returns the rows from the first one on. It is called at least three times: for the fields of
        turns, for the types of columns, and to write.
    """
    fields = turn_fields(rows())

    def groups() -> Iterator[list[Row]]:
        every = (filled(row, fields) for row in rows())
        while group := list(itertools.islice(every, _GROUP_ROWS)):
            yield group

    types = _types(groups())
    while True:
        try:
            return _write(path, groups(), types)
        except _NotExact as e:
            types[e.column] = None


def _types(groups: Iterator[list[Row]]) -> dict[str, pa.DataType | None]:
    """The types of all columns in order; None for values that have no common type."""
    types: dict[str, pa.DataType | None] = {}
    for group in groups:
        for name in dict.fromkeys(name for row in group for name in row):
            known = types.get(name, pa.null())
            types[name] = None if known is None else _common(known, [row.get(name) for row in group])
    return types


def _common(known: pa.DataType, values: list[Any]) -> pa.DataType | None:
    try:
        schemas = [pa.schema([("column", type_)]) for type_ in (known, pa.infer_type(values))]
        found = pa.unify_schemas(schemas, promote_options="permissive").field("column").type
    except _UNFIT:
        return None
    return None if "struct<>" in str(found) else found  # Parquet has no such type


def _write(path: Path, groups: Iterator[list[Row]], types: Mapping[str, pa.DataType | None]) -> None:
    schema = pa.schema(
        pa.field(name, pa.string(), metadata={"middo": "json"}) if type_ is None else pa.field(name, type_)
        for name, type_ in types.items()
    )
    with atomic(path, "wb") as file, pq.ParquetWriter(file, schema) as writer:
        for group in groups:
            columns = [_column(name, [row.get(name) for row in group], types[name]) for name in types]
            writer.write_table(pa.table(columns, schema=schema))


def _column(name: str, values: list[Any], type_: pa.DataType | None) -> pa.ChunkedArray:
    if type_ is None:
        texts = [None if value is None else json.dumps(value, allow_nan=False) for value in values]
        return _array(texts, pa.string())
    try:
        column = _array(values, type_)
        if column.to_pylist() == values:
            return column
    except _UNFIT:
        pass
    raise _NotExact(name)


def _array(values: list[Any], type_: pa.DataType) -> pa.ChunkedArray:
    starts = range(0, len(values), _CHUNK_ROWS)
    return pa.chunked_array([pa.array(values[i : i + _CHUNK_ROWS], type_) for i in starts], type_)
