"""Diversity: exact nearest neighbours by cosine similarity, on the mesh.

Axes: docs/contributing.md#axes; u row that has a direction, a row of u, r row of a device's share.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from middo_jax.parallel.hosts import to_host
from middo_jax.signals.neighbours.nearest import Neighbours
from middo_jax.signals.neighbours.ring import (
    PADDING,
    ROWS,
    Best,
    Rows,
    Shares,
    blocks_of,
    k_nearest,
    k_nearest_both_ways,
)

BLOCK = 1024  # similarities of a block: 1024 x 1024 take 4 MB, which fits into a CPU's cache
STRANGER = -2  # group of a query that is not one of the samples


def nearest_neighbours(
    embedding_nd: np.ndarray,
    k: int,
    mesh: Mesh,
    *,
    query_qd: np.ndarray | None = None,
    group_n: np.ndarray | None = None,
    block: int = BLOCK,
    on_progress: Callable[[int, int], None] | None = None,
) -> Neighbours:
    """The exact k nearest neighbours by cosine similarity, without the sample itself.

    Each device stores two shares of the samples and one block of similarities, for any n. A row that is zero
    or not finite has no direction: it has no neighbours and is not a neighbour of any sample.

    Args:
      embedding_nd: float32, any norm.
      k: number of neighbours.
      mesh: the samples are split over all its devices.
      query_qd: float32 rows, not among the samples, whose neighbours are searched. None: the samples
        themselves.
      group_n: int32 >= 0; samples of one group are not each other's neighbours. None: each has its own group.
      block: rows and columns of a block of similarities.
      on_progress: called with (queries done, all queries).
    """
    directed = _Directed.of(embedding_nd)
    usable = directed.usable_u
    number_u = np.arange(len(usable), dtype=np.int32)
    group_u = number_u if group_n is None else group_n[usable]
    samples = queries = _spread(directed, usable, number_u, group_u, mesh, block)
    asking = usable
    if query_qd is not None:
        asked = _Directed.of(query_qd)
        asking = asked.usable_u
        stranger_u = np.full(len(asking), STRANGER, np.int32)
        queries = _spread(asked, asking, stranger_u, stranger_u, mesh, block)

    def progress(share: float) -> None:
        if on_progress is not None:
            on_progress(round(share * len(asking)), len(asking))

    best = k_nearest(queries, samples, k, mesh, on_progress=progress)
    return _gathered(best, asking, usable, len(embedding_nd if query_qd is None else query_qd))


def neighbours_through(
    embedding_nd: np.ndarray,
    chosen_q: np.ndarray,
    k: int,
    mesh: Mesh,
    *,
    group_n: np.ndarray | None = None,
    block: int = BLOCK,
    on_progress: Callable[[int, int], None] | None = None,
) -> tuple[Neighbours, Neighbours]:
    """Neighbours from the pairs with a chosen sample only: those of the chosen samples, and those among them.

    Args:
      embedding_nd, k, mesh, group_n, block: see `nearest_neighbours`.
      chosen_q: rows of the chosen samples, ascending.
      on_progress: called with (chosen samples done, all chosen samples).

    Returns:
      (the k nearest samples of each of the chosen ones, the k nearest chosen ones of each of the n
      samples).
    """
    directed = _Directed.of(embedding_nd)
    usable = directed.usable_u
    number_u = np.arange(len(usable), dtype=np.int32)
    group_u = number_u if group_n is None else group_n[usable]
    samples = _spread(directed, usable, number_u, group_u, mesh, block)
    is_usable_q = np.isin(chosen_q, usable)
    asking = chosen_q[is_usable_q]
    number_a = np.searchsorted(usable, asking)
    queries = _spread(directed, asking, number_a, group_u[number_a], mesh, block)

    def progress(share: float) -> None:
        if on_progress is not None:
            on_progress(round(share * len(chosen_q)), len(chosen_q))

    found, brought = k_nearest_both_ways(queries, samples, k, mesh, on_progress=progress)
    return (
        _gathered(found, np.flatnonzero(is_usable_q), usable, len(chosen_q)),
        _gathered(brought, usable, usable, len(embedding_nd)),
    )


class _Directed(NamedTuple):
    """Rows, and which of them have a direction, that is, are neither zero nor infinite nor NaN.

    Attributes:
      row_nd: float32, any norm.
      norm_n: Euclidean norms.
      usable_u: indices of the rows with a direction.
    """

    row_nd: np.ndarray
    norm_n: np.ndarray
    usable_u: np.ndarray

    @classmethod
    def of(cls, row_nd: np.ndarray) -> _Directed:
        """Finds the rows with a direction, without storing their squares."""
        norm_n = np.sqrt(np.einsum("nd,nd->n", row_nd, row_nd))
        return cls(row_nd, norm_n, np.flatnonzero(np.isfinite(norm_n) & (norm_n > 0)))


def _gathered(best: Best, row_u: np.ndarray, usable: np.ndarray, n: int) -> Neighbours:
    """The neighbours of n rows: those found for `row_u`, as indices of samples; none for the other rows."""
    similarity_uj, number_uj = (best_ju[:, : len(row_u)].T for best_ju in to_host(best))
    index_nj = np.full((n, similarity_uj.shape[1]), -1, np.int32)
    similarity_nj = np.full(index_nj.shape, np.nan, np.float32)
    u, j = np.nonzero(number_uj >= 0)
    index_nj[row_u[u], j] = usable[number_uj[u, j]]
    similarity_nj[row_u[u], j] = similarity_uj[u, j]
    return Neighbours(index_nj, similarity_nj)


def _spread(
    directed: _Directed,
    chosen_u: np.ndarray,
    number_u: np.ndarray,
    group_u: np.ndarray,
    mesh: Mesh,
    block: int,
) -> Shares:
    """The unit vectors of the chosen rows in equal shares. Each process makes those of its own devices."""
    count, width = len(chosen_u), directed.row_nd.shape[1]
    block, blocks = blocks_of(count, mesh.size, block)
    padded, place = mesh.size * blocks * block, NamedSharding(mesh, ROWS)

    def unit(index: Any) -> np.ndarray:
        start, stop, _ = index[0].indices(padded)
        unit_nd = np.zeros((stop - start, width), np.float32)
        chosen_r = chosen_u[start:stop]
        real_rd = unit_nd[: len(chosen_r)]
        # Any other mode makes another copy.
        np.take(directed.row_nd, chosen_r, axis=0, out=real_rd, mode="clip")
        real_rd /= directed.norm_n[chosen_r, None]
        return unit_nd

    def put(array_u: np.ndarray) -> jax.Array:
        padded_u = np.pad(array_u.astype(np.int32), (0, padded - count), constant_values=PADDING)
        return jax.make_array_from_callback((padded,), place, lambda index: padded_u[index])

    unit_ud = jax.make_array_from_callback((padded, width), place, unit)
    return Shares(Rows(unit_ud, put(number_u), put(group_u)), block, blocks)
