"""The k nearest rows of every row, around the ring of devices: exact, each pair of rows multiplied once.

Every device keeps its share of the rows and is visited by the others' shares in turn. A product of two blocks
serves both sides: queries look for neighbours among the visitors, and visitors among the queries. What the
visitors have found travels with them and is sent home at the end, so that half the ring is enough.

Axes: docs/contributing.md#axes; c candidate, u chunk of candidates, x candidate within it.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from middo_jax.parallel.mesh import MESH_AXES

PADDING = -1  # group of a row that is none
CHUNK = 32  # candidates whose nearest is found first; a block is best a multiple of it


class Rows(NamedTuple):
    """Unit vectors, their numbers, and their groups: rows of one group are not each other's neighbours.

    Attributes:
      unit_nd: float32.
      number_n: int32, ascending; of equally near rows the lower number is the nearer.
      group_n: int32, PADDING where there is no row.
    """

    unit_nd: jax.Array
    number_n: jax.Array
    group_n: jax.Array


class Shares(NamedTuple):
    """Rows on the mesh, split over all its devices: `blocks` blocks of `block` rows on each."""

    rows: Rows
    block: int
    blocks: int


class Best(NamedTuple):
    """The k nearest of each row so far, nearest first; -inf and -1 where there are fewer."""

    similarity_jn: jax.Array
    number_jn: jax.Array


ROWS = PartitionSpec(MESH_AXES)
_BEST = PartitionSpec(None, MESH_AXES)


def k_nearest(
    queries: Shares,
    samples: Shares,
    k: int,
    mesh: Mesh,
    *,
    on_progress: Callable[[float], object],
) -> Best:
    """The k samples with the highest products of every query, its own group left out.

    Args:
      queries: may be `samples` itself, which halves the work.
      samples: what they are compared with.
      k: neighbours.
      mesh: where both are.
      on_progress: called with the share of the work that is done.
    """
    found, brought = _around(queries, samples, k, mesh, queries is samples, on_progress)
    return _merged(found, brought) if queries is samples else found


def k_nearest_both_ways(
    queries: Shares, samples: Shares, k: int, mesh: Mesh, *, on_progress: Callable[[float], object]
) -> tuple[Best, Best]:
    """(`k_nearest` of every query among the samples, of every sample among the queries).

    One product serves both. The queries are some of the samples, with their numbers and groups, as shares of
    their own.
    """
    return _around(queries, samples, k, mesh, True, on_progress)


def _around(
    queries: Shares,
    samples: Shares,
    k: int,
    mesh: Mesh,
    both_ways: bool,
    on_progress: Callable[[float], object],
) -> tuple[Best, Best]:
    """What the queries found among the samples and, if `both_ways`, the samples among the queries."""
    same = queries is samples
    # Half way around, every two shares have met; those opposite each other meet twice, on both devices.
    steps = mesh.size // 2 + 1 if same else mesh.size
    calls = [(step, at) for step in range(steps) for at in range(queries.blocks)]
    tiles = [samples.blocks - (at if same and step == 0 else 0) for step, at in calls]
    visitors, found, brought = samples.rows, _nothing(k, queries, mesh), _nothing(k, samples, mesh)
    for (step, at), done in zip(calls, itertools.accumulate(tiles), strict=True):
        if step and at == 0:
            visitors = _rotate(visitors, mesh=mesh, spec=ROWS, by=1)
            brought = _rotate(brought, mesh=mesh, spec=_BEST, by=1)
        found, brought = _meet(
            queries.rows,
            visitors,
            found,
            brought,
            np.int32(step),
            np.int32(at),
            how=Meeting(
                mesh,
                queries.block,
                samples.block,
                same,
                both_ways and not (same and step and 2 * step == mesh.size),
            ),
        )
        jax.block_until_ready(found)
        on_progress(done / sum(tiles))
    return found, _rotate(brought, mesh=mesh, spec=_BEST, by=1 - steps) if both_ways else brought


def blocks_of(count: int, devices: int, block: int) -> tuple[int, int]:
    """(rows of a block, blocks per device) of `count` rows on a mesh, with at most `block` rows per block."""
    share = max(1, -(-count // devices))
    blocks = -(-share // block)
    return min(block, -(-share // blocks // CHUNK) * CHUNK), blocks


def lowered(
    count: int, width: int, k: int, mesh: Mesh, block: int
) -> list[tuple[jax.stages.Lowered, float, float]]:
    """The programs of `k_nearest` among `count` rows, with shapes only, for an estimate of their time.

    Returns:
      (program, how often it runs, mean number of visitors' blocks per run) of each.
    """
    block, blocks = blocks_of(count, mesh.size, block)
    rows = mesh.size * blocks * block

    def of(spec: PartitionSpec, dtype: Any, *shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    shares = Rows(of(ROWS, jnp.float32, rows, width), of(ROWS, jnp.int32, rows), of(ROWS, jnp.int32, rows))
    best = Best(of(_BEST, jnp.float32, k, rows), of(_BEST, jnp.int32, k, rows))
    steps = mesh.size // 2 + 1
    number = of(PartitionSpec(), jnp.int32)
    how = Meeting(mesh, block, block, same=True, both_ways=True)
    meet = _meet.lower(shares, shares, best, best, number, number, how=how)
    found = [(meet, float(steps * blocks), blocks - (blocks - 1) / 2 / steps)]
    if steps > 1:
        found.append((_rotate.lower(shares, mesh=mesh, spec=ROWS, by=1), steps - 1.0, 0.0))
        found.append((_rotate.lower(best, mesh=mesh, spec=_BEST, by=1), steps - 1.0, 0.0))
    return found


def _nothing(k: int, shares: Shares, mesh: Mesh) -> Best:
    shape, place = (k, len(shares.rows.number_n)), NamedSharding(mesh, _BEST)
    return Best(
        jnp.full(shape, -jnp.inf, jnp.float32, device=place), jnp.full(shape, -1, jnp.int32, device=place)
    )


Arrays = TypeVar("Arrays", Rows, Best)


@functools.partial(jax.jit, static_argnames=("mesh", "spec", "by"))
def _rotate(arrays: Arrays, *, mesh: Mesh, spec: PartitionSpec, by: int) -> Arrays:
    """Each device's share goes `by` devices on."""
    ring = [(device, (device + by) % mesh.size) for device in range(mesh.size)]

    def send(arrays: Arrays) -> Arrays:
        return jax.tree.map(lambda x: jax.lax.ppermute(x, MESH_AXES, ring), arrays)

    return jax.shard_map(send, mesh=mesh, in_specs=spec, out_specs=spec)(arrays)


@dataclasses.dataclass(frozen=True)
class Meeting:
    """What is known of a meeting when its program is compiled.

    Attributes:
      mesh: where both sides are.
      query_block: rows of a block of queries.
      block: rows of a block of visitors.
      same: queries and visitors are the same rows, so that at step 0 each share visits itself.
      both_ways: the visitors look for neighbours too.
    """

    mesh: Mesh
    query_block: int
    block: int
    same: bool
    both_ways: bool


@functools.partial(jax.jit, static_argnames="how", donate_argnames=("found", "brought"))
def _meet(
    queries: Rows,
    visitors: Rows,
    found: Best,
    brought: Best,
    step: jax.Array,
    at: jax.Array,
    *,
    how: Meeting,
) -> tuple[Best, Best]:
    """Block `at` of each device's queries meets its visitors."""

    def on_device(
        queries: Rows, visitors: Rows, found: Best, brought: Best, step: jax.Array, at: jax.Array
    ) -> tuple[Best, Best]:
        query = _block(queries, at, how.query_block, axis=0)

        def tile(b: jax.Array, best: tuple[Best, Best]) -> tuple[Best, Best]:
            ours, brought = best
            candidate = _block(visitors, b, how.block, axis=0)
            # float32 all the way: bfloat16 cannot tell near neighbours apart.
            similarity_qc = jnp.einsum(
                "qd,cd->qc", query.unit_nd, candidate.unit_nd, precision=jax.lax.Precision.HIGHEST
            )
            theirs = _block(brought, b, how.block, axis=1)

            def with_all(similarity_qc: jax.Array) -> tuple[Best, Best]:
                found = _updated(ours, similarity_qc, 1, candidate.number_n)
                if not how.both_ways:
                    return found, theirs
                return found, _updated(theirs, similarity_qc, 0, query.number_n)

            def with_pairs(similarity_qc: jax.Array) -> tuple[Best, Best]:
                is_pair_qc = query.group_n[:, None] != candidate.group_n
                is_pair_qc &= (query.group_n[:, None] != PADDING) & (candidate.group_n != PADDING)
                if how.same:  # a share that visits itself: each pair counts once
                    is_pair_qc &= (step > 0) | (query.number_n[:, None] < candidate.number_n)
                return with_all(jnp.where(is_pair_qc, similarity_qc, -jnp.inf))

            meets_strangers = _are_apart(query.group_n, candidate.group_n)
            ours, theirs = jax.lax.cond(meets_strangers, with_all, with_pairs, similarity_qc)
            return ours, _replaced(brought, theirs, b * how.block) if how.both_ways else brought

        first = jnp.where(step == 0, at, 0) if how.same else 0
        last = len(visitors.number_n) // how.block
        ours = _block(found, at, how.query_block, axis=1)
        ours, brought = jax.lax.fori_loop(first, last, tile, (ours, brought))
        return _replaced(found, ours, at * how.query_block), brought

    here = PartitionSpec()
    return jax.shard_map(
        on_device, mesh=how.mesh, in_specs=(ROWS, ROWS, _BEST, _BEST, here, here), out_specs=(_BEST, _BEST)
    )(queries, visitors, found, brought, step, at)


def _are_apart(group_q: jax.Array, group_c: jax.Array) -> jax.Array:
    """Whether all are rows, and no two of one group for sure: then every product is that of a pair."""
    no_padding = jnp.all(group_q != PADDING) & jnp.all(group_c != PADDING)
    return no_padding & ((group_q.max() < group_c.min()) | (group_c.max() < group_q.min()))


def _block(arrays: Arrays, number: jax.Array, block: int, axis: int) -> Arrays:
    return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, number * block, block, axis), arrays)


def _replaced(best: Best, part: Best, start: jax.Array) -> Best:
    return jax.tree.map(lambda x, y: jax.lax.dynamic_update_slice_in_dim(x, y, start, 1), best, part)


class _Taking(NamedTuple):
    """Candidates of each row, taken in their order; the last that was, and the nearest left in each chunk."""

    n_taken: jax.Array
    best: Best
    last_n: jax.Array
    last_at_n: jax.Array
    nearest_un: jax.Array


def _updated(best: Best, similarity: jax.Array, axis: int, number_c: jax.Array) -> Best:
    """The k best of n rows after some candidates: each row takes its next one, again while any row gains.

    They come in the order of neighbours: the higher similarity first, of equal ones the lower number. All
    candidates are read once, for the nearest of each chunk; then only the chunks that hold the next ones.

    Args:
      best: so far.
      similarity: [n, c] or [c, n].
      axis: that of the candidates.
      number_c: the candidates'.
    """
    k, count = len(best.number_jn), len(number_c)
    chunk = math.gcd(count, CHUNK)
    shape = similarity.shape
    chunks = similarity.reshape(*shape[:axis], count // chunk, chunk, *shape[axis + 1 :])

    def inside(u_n: jax.Array) -> jax.Array:
        """[h, n] similarities in one chunk of each row."""
        inside = jnp.take_along_axis(chunks, jnp.expand_dims(u_n, (axis, axis + 1)), axis)
        return jnp.moveaxis(inside.squeeze(axis), axis, 0)

    def gains(state: _Taking) -> jax.Array:
        next_n = state.nearest_un.max(axis=0)
        return (state.n_taken < k) & jnp.any((next_n >= state.best.similarity_jn[-1]) & (next_n > -jnp.inf))

    def take(state: _Taking) -> _Taking:
        next_n = state.nearest_un.max(axis=0)
        u_u1 = jnp.arange(count // chunk)[:, None]
        u_n = jnp.where(state.nearest_un == next_n, u_u1, count).min(axis=0)
        inside_xn, at_xn = inside(u_n), u_n * chunk + jnp.arange(chunk)[:, None]
        is_later_xn = (next_n < state.last_n) | (at_xn > state.last_at_n)
        at_n = jnp.where((inside_xn == next_n) & is_later_xn, at_xn, count).min(axis=0)
        is_left_xn = (inside_xn < next_n) | ((inside_xn == next_n) & (at_xn > at_n))
        left_n = jnp.where(is_left_xn, inside_xn, -jnp.inf).max(axis=0)
        return _Taking(
            state.n_taken + 1,
            _insert(state.best, next_n, number_c[at_n]),
            next_n,
            at_n,
            jnp.where(u_u1 == u_n, left_n, state.nearest_un),
        )

    none = jnp.full_like(best.similarity_jn[0], jnp.inf), jnp.full_like(best.number_jn[0], -1)
    nearest_un = jnp.moveaxis(chunks.max(axis + 1), axis, 0)
    return jax.lax.while_loop(gains, take, _Taking(jnp.int32(0), best, *none, nearest_un)).best


def _insert(best: Best, similarity_n: jax.Array, number_n: jax.Array) -> Best:
    """One more candidate of each row, put where it belongs; the last falls out."""
    is_before_jn = best.similarity_jn > similarity_n
    is_before_jn |= (best.similarity_jn == similarity_n) & (best.number_jn < number_n)
    is_there_jn = jnp.concatenate([jnp.ones_like(is_before_jn[:1]), is_before_jn[:-1]])

    def inserted(old_jn: jax.Array, new_n: jax.Array) -> jax.Array:
        moved_jn = jnp.concatenate([old_jn[:1], old_jn[:-1]])
        return jnp.where(is_before_jn, old_jn, jnp.where(is_there_jn, new_n, moved_jn))

    return Best(inserted(best.similarity_jn, similarity_n), inserted(best.number_jn, number_n))


@jax.jit
def _merged(best: Best, other: Best) -> Best:
    """The k best of both."""
    return jax.lax.scan(lambda best, one: (_insert(best, *one), None), best, other)[0]
