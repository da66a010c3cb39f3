"""Diversity: exact nearest neighbours by cosine similarity, in blocks, on the mesh.

Axes: q query, c candidate, k neighbour, d embedding width, n sample.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from middo_jax.parallel.hosts import to_host
from middo_jax.parallel.mesh import MESH_AXES

QUERY_BLOCK = 1024  # queries a device at a time
CANDIDATE_BLOCK = 8192  # candidates at a time: the similarities that exist are one block by the other


class Neighbours(NamedTuple):
    """The k nearest other samples of each sample, nearest first; ties go to the lower index.

    Attributes:
      index_nk: int32, -1 where there is no k-th neighbour.
      similarity_nk: float32 cosine similarity, NaN where there is none.
    """

    index_nk: np.ndarray
    similarity_nk: np.ndarray

    def mean_similarity(self) -> np.ndarray:
        """s_i [n]: mean over the k neighbours, NaN where one is missing."""
        return self.similarity_nk.mean(axis=1)


@functools.partial(jax.jit, static_argnames="k", donate_argnames=("best_qk", "index_qk"))
def _merge_block(
    best_qk: jax.Array,
    index_qk: jax.Array,
    query_qd: jax.Array,
    query_index_q: jax.Array,
    candidate_cd: jax.Array,
    first: jax.Array,
    count: jax.Array,
    *,
    k: int,
) -> tuple[jax.Array, jax.Array]:
    """The running k best of each query after one more block of candidates."""
    similarity_qc = jnp.einsum(
        "qd,cd->qc", query_qd, candidate_cd, precision=jax.lax.Precision.HIGHEST
    )  # float32 all the way: bfloat16 cannot tell near neighbours apart
    number_c = jnp.arange(candidate_cd.shape[0])
    is_other_qc = (number_c < count) & (first + number_c != query_index_q[:, None])
    block_best_qk, block_at_qk = jax.lax.top_k(jnp.where(is_other_qc, similarity_qc, -jnp.inf), k)
    # Earlier blocks stand first: top_k prefers the lower position, which then is the lower index.
    joined_best = jnp.concatenate([best_qk, block_best_qk], axis=1)
    joined_index = jnp.concatenate([index_qk, first + block_at_qk], axis=1)
    best_qk, at_qk = jax.lax.top_k(joined_best, k)
    index_qk = jnp.take_along_axis(joined_index, at_qk, axis=1)
    return best_qk, jnp.where(jnp.isfinite(best_qk), index_qk, -1)


def nearest_neighbours(
    embedding_nd: np.ndarray,
    k: int,
    mesh: Mesh,
    *,
    query_block: int = QUERY_BLOCK,
    candidate_block: int = CANDIDATE_BLOCK,
    on_progress: Callable[[int, int], None] | None = None,
) -> Neighbours:
    """Exact k nearest neighbours by cosine similarity, the sample itself left out.

    Memory on a device is O(block x (block + d)), whatever N. A row that is zero or not finite has no
    direction: it has no neighbours and is nobody's neighbour.

    Args:
      embedding_nd: float32, any norm.
      k: neighbours.
      mesh: queries are split over all its devices.
      query_block: queries a device at a time.
      candidate_block: candidates at a time.
      on_progress: called with (queries done, all queries).
    """
    n = len(embedding_nd)
    index_nk = np.full((n, k), -1, np.int32)
    similarity_nk = np.full((n, k), np.nan, np.float32)
    norm_n = np.linalg.norm(embedding_nd.astype(np.float32), axis=1)
    usable = np.flatnonzero(np.isfinite(norm_n) & (norm_n > 0))
    unit_ud = (embedding_nd[usable] / norm_n[usable, None]).astype(np.float32)
    split = NamedSharding(mesh, PartitionSpec(MESH_AXES))
    whole = NamedSharding(mesh, PartitionSpec())
    block = min(query_block * mesh.size, mesh.size * -(-len(usable) // mesh.size)) or mesh.size
    candidates = max(k, min(candidate_block, len(usable)))

    def put(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
        return jax.make_array_from_callback(array.shape, sharding, lambda i: array[i])

    for start in range(0, len(usable), block):
        query_index_q = np.arange(start, start + block, dtype=np.int32)
        query_qd = put(_padded(unit_ud[start : start + block], block), split)
        numbers = put(query_index_q, split)
        best = put(np.full((block, k), -np.inf, np.float32), split)
        index = put(np.full((block, k), -1, np.int32), split)
        for first in range(0, len(usable), candidates):
            chunk = unit_ud[first : first + candidates]
            candidate_cd = put(_padded(chunk, candidates), whole)
            best, index = _merge_block(
                best, index, query_qd, numbers, candidate_cd, np.int32(first), np.int32(len(chunk)), k=k
            )
        best_qk, index_qk = to_host((best, index))
        rows = usable[start : start + block]
        found_qk = index_qk[: len(rows)] >= 0
        index_nk[rows] = np.where(found_qk, usable[index_qk[: len(rows)]], -1)
        similarity_nk[rows] = np.where(found_qk, best_qk[: len(rows)], np.nan)
        if on_progress is not None:
            on_progress(min(start + block, len(usable)), len(usable))
    return Neighbours(index_nk, similarity_nk)


def _padded(rows: np.ndarray, count: int) -> np.ndarray:
    return np.pad(rows, ((0, count - len(rows)), (0, 0)))
