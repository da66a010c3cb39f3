"""Rows in memory: a list of dicts, a pyarrow Table, a pandas DataFrame or a Hugging Face Dataset.

pandas and `datasets` are not imported: their objects are recognised by their methods.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from middo_jax.data.formats import DataError

if TYPE_CHECKING:
    import pyarrow as pa

IN_MEMORY = "rows in memory"  # used in messages in place of a path
_AT_A_TIME = 4096  # rows that are Python objects at the same time, beside their table


class ArrowTable(Protocol):
    """The part of a pyarrow Table that is read. Its own class has no types, so it would allow any value."""

    @property
    def schema(self) -> Any:
        """Names and types of the columns."""
        ...

    @property
    def to_batches(self) -> Any:
        """Returns record batches."""
        ...


class DataFrame(Protocol):
    """The part of a pandas DataFrame that is read."""

    @property
    def iloc(self) -> Any:
        """Selects rows by position."""
        ...

    @property
    def to_dict(self) -> Any:
        """Converts rows to dicts."""
        ...


class HubDataset(Protocol):
    """The part of `datasets.Dataset` and `datasets.IterableDataset` that is read."""

    @property
    def with_format(self) -> Any:
        """Returns the dataset in another format."""
        ...

    @property
    def iter(self) -> Any:
        """Iterates over batches."""
        ...


# What the public functions take as `rows`: a path or the name of a dataset, or rows in memory.
RowsLike = str | os.PathLike[str] | Iterable[Mapping[str, Any]] | ArrowTable | DataFrame | HubDataset


def rows_in_memory(rows: Any) -> Iterator[Any]:
    """The rows one after the other. A usable row is a dict.

    Raises:
      DataError: `rows` is not a table, or is a mapping of several tables.
    """
    if hasattr(rows, "to_batches"):  # pyarrow.Table, pyarrow.RecordBatchReader
        return arrow_rows(rows.to_batches(), rows.schema)
    if hasattr(rows, "with_format") and hasattr(rows, "iter"):  # datasets.Dataset and IterableDataset
        batches = rows.with_format("arrow").iter(batch_size=_AT_A_TIME)
        return (row for batch in batches for row in batch.to_pylist())
    if hasattr(rows, "iloc") and hasattr(rows, "to_dict"):  # pandas.DataFrame
        starts = range(0, len(rows), _AT_A_TIME)
        return (row for i in starts for row in rows.iloc[i : i + _AT_A_TIME].to_dict("records"))
    if isinstance(rows, Mapping):
        raise DataError(
            f"{IN_MEMORY}: a mapping with {', '.join(map(str, list(rows)[:5]))} is not a table; "
            "give a list of rows, or one split of it"
        )
    if isinstance(rows, Iterable) and not isinstance(rows, str | bytes):
        return iter(rows)
    raise DataError(
        f"{IN_MEMORY}: {type(rows).__name__} is not a table; give a path, a list of dicts, a pyarrow Table, "
        "a pandas DataFrame or a Hugging Face Dataset"
    )


def arrow_rows(batches: Iterable[pa.RecordBatch], schema: pa.Schema) -> Iterator[dict[str, Any]]:
    """The rows of Arrow batches. Columns that `sources.write` encoded as JSON are decoded."""
    encoded = [field.name for field in schema if (field.metadata or {}).get(b"middo") == b"json"]
    for batch in batches:
        for start in range(0, len(batch), _AT_A_TIME):
            for row in batch.slice(start, _AT_A_TIME).to_pylist():
                decoded = {name: json.loads(row[name]) for name in encoded if row[name] is not None}
                yield {**row, **decoded}
