"""Measurements of an earlier round, or of a folder's earlier scores, that need not be made again.

Axes: docs/contributing.md#axes; o sample of the earlier scores.
"""

from __future__ import annotations

from typing import NamedTuple, overload

import numpy as np
import pyarrow as pa

from middo_jax.rundir import RoundDir
from middo_jax.signals.embeddings import read_embeddings
from middo_jax.signals.neighbours.incremental import Earlier, rows_before
from middo_jax.signals.table import as_floats, neighbours_of, read_scores
from middo_jax.stages.passes import Texts


class Standing(NamedTuple):
    """The reusable measurements of an earlier round, or of a folder's earlier scores.

    Attributes:
      table: its scores; None if nothing is reusable.
      embedding_od: its embeddings, one row per row of the table; None if nothing is reusable or wanted.
      row_n: row of each sample in the earlier round, -1 if it is new or changed.
    """

    table: pa.Table | None
    embedding_od: np.ndarray | None
    row_n: np.ndarray

    @classmethod
    def nothing(cls, n: int) -> Standing:
        """The value for n samples of which nothing is reusable."""
        return cls(None, None, np.full(n, -1))

    @classmethod
    def of(cls, folder: RoundDir, texts: Texts, embeddings: bool) -> Standing:
        """The measurements of a folder. Its embeddings are read only if they are wanted."""
        table = read_scores(folder.scores)
        ids = table["id"].to_pylist()
        keys = list(zip(ids, table["prompt_hash"].to_pylist(), strict=True))
        row_n = rows_before(list(zip(texts.ids, texts.hashes, strict=True)), keys)
        return cls(table, read_embeddings(folder.embeddings, ids) if embeddings else None, row_n)

    @property
    def new(self) -> list[int]:
        """Indices of the samples to measure."""
        return np.flatnonzero(self.row_n < 0).tolist()

    @property
    def n_kept(self) -> int:
        """Number of samples whose measurements are reused."""
        return int((self.row_n >= 0).sum())

    def earlier(self, k: int) -> Earlier:
        """The samples that are reused, and their k neighbours in the earlier round."""
        if self.table is None:
            return Earlier.nothing(len(self.row_n), k)
        return Earlier(neighbours_of(self.table, k), self.row_n)

    @overload
    def column(self, name: str, of_new: np.ndarray) -> np.ndarray: ...
    @overload
    def column(self, name: str, of_new: np.ndarray | None) -> np.ndarray | None: ...
    def column(self, name: str, of_new: np.ndarray | None) -> np.ndarray | None:
        """Returns [n]: new measurements and, for all other samples, a column of the earlier scores.

        None, which is what was not measured, stays None.
        """
        if of_new is None:
            return None
        return self.of_all(of_new, None if self.table is None else as_floats(self.table, name))

    def of_all(self, of_new: np.ndarray, of_earlier: np.ndarray | None) -> np.ndarray:
        """Returns [n, ...]: new measurements and, for all other samples, those of the earlier round."""
        values = np.empty((len(self.row_n), *of_new.shape[1:]), of_new.dtype)
        values[self.row_n < 0] = of_new
        if of_earlier is not None:
            kept_n = self.row_n >= 0
            values[kept_n] = of_earlier[self.row_n[kept_n]]
        return values
