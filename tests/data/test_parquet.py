"""Parquet files in several row groups have the same columns as in one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from middo_jax.data import parquet
from middo_jax.data.in_memory import arrow_rows
from middo_jax.data.parquet import write_parquet

# Values of five rows -> whether they become JSON text.
COLUMNS: dict[str, tuple[list[Any], bool]] = {
    "texts": (["a", "b", None, "d", "e"], False),
    "late": ([None, None, None, None, 4], False),
    "empty lists first": ([[], [], [], ["x"], ["y", None]], False),
    "int, then float": ([1, 2, 3.5, 4, None], False),
    "too large for a float": ([1, 2, 2**62 + 1, 0.5, 1], True),
    "int, then text": ([1, 2, 3, "x", None], True),
    "objects": ([{"a": 1}, {"a": 2}, {"a": None}, {"a": 4}, {"a": 5}], False),
    "other objects": ([{"a": 1}, {"a": 2}, {"b": 1}, {"a": 4}, {"a": 5}], True),
    "empty objects": ([{}, {}, {}, {}, {}], True),
}


@pytest.mark.parametrize("rows_per_group", [1, 2, 100])
def test_values_come_back_whatever_the_groups(
    tmp_path: Path, rows_per_group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet, "_GROUP_ROWS", rows_per_group)
    rows = [{name: values[n] for name, (values, _) in COLUMNS.items()} for n in range(5)]
    rows[1]["only here"] = "x"
    del rows[2]["late"]

    def again() -> Iterator[dict[str, Any]]:
        return (dict(row) for row in rows)

    path = tmp_path / "rows.parquet"
    write_parquet(path, again)
    file = pq.ParquetFile(path)
    assert file.num_row_groups == -(-5 // rows_per_group)
    schema = file.schema_arrow
    assert schema.names == [*COLUMNS, "only here"]
    encoded = {name for name in COLUMNS if (schema.field(name).metadata or {}).get(b"middo") == b"json"}
    assert encoded == {name for name, (_, is_encoded) in COLUMNS.items() if is_encoded}
    back = list(arrow_rows(file.iter_batches(), schema))
    assert back == [{**dict.fromkeys(schema.names), **row} for row in rows]
