"""embeddings.parquet: one row per sample, keyed by id, `embedding` a list of d numbers.

Axes: docs/contributing.md#axes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from middo_jax.rundir import RunError, atomic
from middo_jax.rundir.schemas import EMBEDDINGS
from middo_jax.rundir.tables import arrow_schema, refuse_newer

_GROUP_BYTES = 64 << 20  # of a row group: what a reader holds beside its result


def write_embeddings(path: Path, ids: Sequence[str], embedding_nd: np.ndarray) -> None:
    """Writes the embeddings of samples whole or not at all.

    Args:
      path: of the file.
      ids: of the n samples.
      embedding_nd: float32 [n, d], the same rows.
    """
    width = embedding_nd.shape[1]
    flat = np.ascontiguousarray(embedding_nd, np.float32).reshape(-1)
    values = pa.FixedSizeListArray.from_arrays(pa.array(flat), width)
    table = pa.table({"id": list(ids), "embedding": values}, schema=arrow_schema(EMBEDDINGS, width))
    rows = max(1, _GROUP_BYTES // (4 * width))
    with atomic(path, "wb") as file:
        # Hidden states neither repeat nor compress, and nobody looks for their least.
        pq.write_table(
            table, file, row_group_size=rows, compression="none", use_dictionary=False, write_statistics=False
        )


def read_embeddings(path: Path, ids: Sequence[str]) -> np.ndarray:
    """The embeddings of samples by id, float32 [n, d]: row i is that of `ids[i]`, wherever the file has it.

    One row group at a time is held beside the result.

    Raises:
      RunError: the file is missing or no file of embeddings, or its samples are others.
    """
    require_embeddings(path)
    row_of = {id_: row for row, id_ in enumerate(ids)}
    try:
        file = pq.ParquetFile(path)
        refuse_newer(file.schema_arrow, EMBEDDINGS, path)
        width = file.schema_arrow.field("embedding").type.list_size
        embedding_nd, n_found = np.empty((len(ids), width), np.float32), 0
        for group in range(file.num_row_groups):
            table = file.read_row_group(group, columns=["id", "embedding"])
            rows = [row_of.pop(id_) for id_ in table["id"].to_pylist()]
            chunks = [np.asarray(chunk.flatten()).reshape(-1, width) for chunk in table["embedding"].chunks]
            embedding_nd[rows] = np.concatenate(chunks)
            n_found += len(rows)
    except KeyError as error:
        raise RunError(f"{path}: {_other(str(error))}; run `middo score` again") from error
    except (OSError, pa.ArrowException, AttributeError, ValueError) as error:
        raise RunError(f"{path}: not a file of embeddings ({error}); run `middo score` again") from error
    if row_of:
        raise RunError(f"{path}: {_other(next(iter(row_of)))}; run `middo score` again")
    return embedding_nd


def require_embeddings(path: Path) -> None:
    """Raises RunError if there is no file of embeddings, or one of an earlier version."""
    if path.exists():
        return
    if path.with_suffix(".npy").exists():
        raise RunError(
            f"{path.parent}: its embeddings.npy was written by an earlier version of middo-jax, without the "
            "samples' ids: run `middo score` again (`middo run` does it for a run)"
        )
    raise RunError(f"{path.parent}: no {path.name} there; run `middo score` again")


def _other(id_: str) -> str:
    return f"sample {id_} is not in both the file and the dataset, or is there twice"
