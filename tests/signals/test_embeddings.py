"""Laws of embeddings.parquet: rows are found by id, wherever the file has them, and held once."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from middo_jax.rundir import RunError
from middo_jax.signals import embeddings
from middo_jax.signals.embeddings import read_embeddings, write_embeddings

IDS = [f"id{i}" for i in range(10)]


@pytest.fixture
def embedding_nd() -> np.ndarray:
    values = np.random.default_rng(0).normal(size=(10, 6)).astype(np.float32)
    values[3] = np.nan  # of a sample whose prompt was cut off
    return values


@pytest.fixture(autouse=True)
def several_row_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embeddings, "_GROUP_BYTES", 3 * 6 * 4)


def test_the_rows_are_those_of_the_ids_that_are_asked_for(tmp_path: Path, embedding_nd: np.ndarray) -> None:
    path = tmp_path / "embeddings.parquet"
    write_embeddings(path, IDS, embedding_nd)
    assert pq.ParquetFile(path).num_row_groups == 4
    assert pq.read_schema(path).field("embedding").type == pa.list_(pa.float32(), 6)
    found = read_embeddings(path, IDS)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, embedding_nd)
    order = np.random.default_rng(1).permutation(10)
    np.testing.assert_array_equal(read_embeddings(path, [IDS[i] for i in order]), embedding_nd[order])
    # The same with the file's rows in another order.
    write_embeddings(path, [IDS[i] for i in order], embedding_nd[order])
    np.testing.assert_array_equal(read_embeddings(path, IDS), embedding_nd)
    write_embeddings(path, [], np.empty((0, 6), np.float32))
    assert read_embeddings(path, []).shape == (0, 6)


@pytest.mark.parametrize("ids", [IDS[:-1], [*IDS, "more"], [*IDS[:-1], "other"], [*IDS[:-1], IDS[0]]])
def test_other_samples_are_refused(tmp_path: Path, embedding_nd: np.ndarray, ids: list[str]) -> None:
    path = tmp_path / "embeddings.parquet"
    write_embeddings(path, IDS, embedding_nd)
    with pytest.raises(RunError, match=r"embeddings\.parquet: sample .* run `middo score` again"):
        read_embeddings(path, ids)
    write_embeddings(path, ids, np.zeros((len(ids), 6), np.float32))
    with pytest.raises(RunError, match="is not in both the file and the dataset, or is there twice"):
        read_embeddings(path, IDS)


def test_what_is_no_file_of_embeddings_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "embeddings.parquet"
    with pytest.raises(RunError, match=r"no embeddings\.parquet there"):
        read_embeddings(path, IDS)
    path.write_bytes(b"PAR1 is how it begins")
    with pytest.raises(RunError, match="not a file of embeddings"):
        read_embeddings(path, IDS)
    pq.write_table(pa.table({"id": IDS}), path)
    with pytest.raises(RunError, match=r"run `middo score` again"):
        read_embeddings(path, IDS)
    path.unlink()
    np.save(tmp_path / "embeddings.npy", np.zeros((10, 6), np.float32))
    with pytest.raises(RunError, match=r"embeddings\.npy was written by an earlier version.*`middo score`"):
        read_embeddings(path, IDS)


def test_reading_holds_one_copy_and_a_row_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embeddings, "_GROUP_BYTES", 1 << 20)
    path, values = tmp_path / "embeddings.parquet", np.ones((4096, 2048), np.float32)  # 32 MiB
    ids = [str(i) for i in range(len(values))]
    write_embeddings(path, ids, values)
    pool = pa.default_memory_pool()
    tracemalloc.start()
    before = pool.bytes_allocated()
    peaks: list[int] = []
    read_row_group = pq.ParquetFile.read_row_group

    def watched(self: pq.ParquetFile, *args: Any, **how: Any) -> pa.Table:
        table = read_row_group(self, *args, **how)
        peaks.append(pool.bytes_allocated() - before)
        return table

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", watched)
    read_embeddings(path, ids)
    _, numpy_peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(peaks) == 32
    assert max(peaks) < 6 << 20
    assert numpy_peak < values.nbytes + (8 << 20)
