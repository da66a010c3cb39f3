"""Rows in memory: a list of dicts, a pyarrow Table, a pandas DataFrame or a Hugging Face Dataset.

pandas and `datasets` are not imported: their objects are recognised by their methods.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from middo_jax.data.formats import DataError

if TYPE_CHECKING:
    import pyarrow as pa

IN_MEMORY = "rows in memory"  # used in messages in place of a path
_AT_A_TIME = 4096  # rows that are Python objects at the same time, beside their table


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
