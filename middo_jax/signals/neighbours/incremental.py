"""Neighbours after an edit of the dataset, with frozen embeddings: known similarities are not computed again.

If a kept sample lost no neighbour, its k nearest samples are among its earlier neighbours and the changed
samples. A sample that lost a neighbour is searched again among all samples, and so are the changed samples.

Axes: docs/contributing.md#axes; o sample before the edit, u untouched sample.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from middo_jax.signals.neighbours.nearest import Neighbours
from middo_jax.signals.neighbours.search import BLOCK, nearest_neighbours, neighbours_through


class Earlier(NamedTuple):
    """The neighbours before the edit, and the earlier row of each sample.

    Attributes:
      neighbours: [o, j], as `nearest_neighbours` returned them.
      row_n: the earlier row of each sample, ascending; -1 for new and changed samples.
    """

    neighbours: Neighbours
    row_n: np.ndarray

    @classmethod
    def nothing(cls, n: int, k: int) -> Earlier:
        """The value for n samples that are all new."""
        nobody = Neighbours(np.empty((0, k), np.int32), np.empty((0, k), np.float32))
        return cls(nobody, np.full(n, -1))

    def now(self) -> np.ndarray:
        """[o, j] the present rows of the earlier neighbours; -1 for no neighbour, -2 for a lost one."""
        now_o = np.full(len(self.neighbours.index_nj) + 1, -2, np.int32)
        now_o[-1] = -1  # so that index -1 gives -1
        now_o[self.row_n[self.row_n >= 0]] = np.flatnonzero(self.row_n >= 0)
        return now_o[self.neighbours.index_nj]

    def to_search(self) -> np.ndarray:
        """[n] bool: whether a sample changed or lost a neighbour."""
        has_lost_o = (self.now() == -2).any(axis=1)
        return (self.row_n < 0) | np.append(has_lost_o, False)[self.row_n]


def rows_before(keys: Sequence[Hashable], earlier_keys: Sequence[Hashable]) -> np.ndarray:
    """[n] the earlier row of each sample; -1 if its key is new.

    Ties go to the earlier row, so a kept sample that moved behind another one counts as changed.

    ["a", "x", "c", "b"], ["a", "b", "c"]  ->  [0, -1, 2, -1]
    """
    row_of = {key: i for i, key in enumerate(earlier_keys)}
    row_n = np.fromiter((row_of.get(key, -1) for key in keys), np.int64, len(keys))
    highest_n = np.maximum.accumulate(np.r_[-1, row_n])[:-1]
    return np.where(row_n > highest_n, row_n, -1)


def updated_neighbours(
    embedding_nd: np.ndarray,
    k: int,
    mesh: Mesh,
    earlier: Earlier,
    *,
    group_n: np.ndarray | None = None,
    block: int = BLOCK,
    on_progress: Callable[[int, int], None] | None = None,
) -> Neighbours:
    """The result of `nearest_neighbours` with fewer products: only `earlier.to_search()` with all samples.

    Args:
      embedding_nd, k, mesh, group_n, block, on_progress: see `nearest_neighbours`.
      earlier: found with the same k. Kept samples must have the same embeddings and groups as before.
    """
    searched = np.flatnonzero(earlier.to_search())
    if 2 * len(searched) >= len(embedding_nd):  # a full search computes each pair only once
        return nearest_neighbours(
            embedding_nd, k, mesh, group_n=group_n, block=block, on_progress=on_progress
        )
    found, brought = neighbours_through(
        embedding_nd, searched, k, mesh, group_n=group_n, block=block, on_progress=on_progress
    )
    index_nj = np.empty((len(embedding_nd), k), np.int32)
    similarity_nj = np.empty((len(embedding_nd), k), np.float32)
    index_nj[searched], similarity_nj[searched] = found
    untouched = np.setdiff1d(np.arange(len(embedding_nd)), searched)
    row_u = earlier.row_n[untouched]
    before = Neighbours(earlier.now()[row_u], earlier.neighbours.similarity_nj[row_u])
    index_nj[untouched], similarity_nj[untouched] = _nearest_of_both(
        before, Neighbours(brought.index_nj[untouched], brought.similarity_nj[untouched])
    )
    return Neighbours(index_nj, similarity_nj)


def _nearest_of_both(before: Neighbours, brought: Neighbours) -> Neighbours:
    """The k nearest of 2k neighbours; a sample may be in both halves."""
    is_again_uj = (brought.index_nj[:, :, None] == before.index_nj[:, None, :]).any(axis=2)
    index = np.concatenate([before.index_nj, np.where(is_again_uj, -1, brought.index_nj)], axis=1)
    similarity = np.concatenate([before.similarity_nj, brought.similarity_nj], axis=1)
    similarity = np.where(index >= 0, similarity, -np.inf)
    nearest = np.lexsort((index, -similarity), axis=1)[:, : before.index_nj.shape[1]]
    index, similarity = (np.take_along_axis(x, nearest, axis=1) for x in (index, similarity))
    return Neighbours(index, np.where(index >= 0, similarity, np.nan))
