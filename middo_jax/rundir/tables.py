"""Parquet files of a run: their pyarrow schemas, and the version in a table's metadata."""

from __future__ import annotations

import pyarrow as pa

from middo_jax.rundir.manifest import RunError
from middo_jax.rundir.schemas import ArrowType, Schema, newer

VERSION = b"middo_jax.version"  # key of a table's metadata
_TYPES: dict[ArrowType, pa.DataType] = {
    "string": pa.string(),
    "bool": pa.bool_(),
    "int32": pa.int32(),
    "int64": pa.int64(),
    "float32": pa.float32(),
    "float64": pa.float64(),
    "list<string>": pa.list_(pa.string()),
    "list<float32>": pa.list_(pa.float32()),
}


def arrow_schema(of: Schema, width: int = 0) -> pa.Schema:
    """Returns the pyarrow schema of a public Parquet file, with the format version in its metadata.

    Args:
      of: the file's schema.
      width: size of the vectors, if the file has a column of vectors.
    """
    types = _TYPES | {"vector<float32>": pa.list_(pa.float32(), width)}
    fields = [pa.field(column.name, types[column.type]) for column in of.columns]
    return pa.schema(fields, {VERSION: str(of.version).encode()})


def refuse_newer(schema: pa.Schema, of: Schema, where: object) -> None:
    """Raises RunError if a table was written in a newer version. A table without a version is older.

    Args:
      schema: pyarrow schema of the table, with the metadata of its file.
      of: the file's schema.
      where: the file, for the message.
    """
    said = (schema.metadata or {}).get(VERSION, b"0")
    if not said.isdigit():
        raise RunError(f"{where}: its format version is {said!r}, not a number; the file is damaged")
    if (reason := newer(of.name, int(said), where)) is not None:
        raise RunError(reason)
