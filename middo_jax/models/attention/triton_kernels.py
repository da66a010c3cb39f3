"""The attention kernels for GPUs: forward, gradient of the queries, gradients of keys and values.

A program handles one block of queries of one head, or one block of keys of one key/value head. Axes: as in
`triton`; docs/contributing.md#axes.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

LOG2_E = math.log2(math.e)
UNSEEN = -1e30  # finite: the difference of two such scores is 0 and not NaN


class Blocks(NamedTuple):
    """Sizes of one kernel: queries and keys per block, warps per block, and loads in flight."""

    queries: int
    keys: int
    warps: int
    stages: int


class Constants(NamedTuple):
    """Compile-time constants of a kernel; the fields are arguments of `packed_attention`."""

    scale: float
    window: int | None
    soft_cap: float | None
    prefix: int
    has_trees: bool
    interpret: bool


def pallas() -> tuple[Any, Any]:
    """The modules (pallas, pallas.triton)."""
    # Pallas takes half a second to import, and only GPUs need it.
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton as plgpu

    return pl, plgpu


def dot(x: jax.Array, y: jax.Array) -> jax.Array:
    """x y in float32. HIGHEST: Triton would otherwise round float32 operands to TF32."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    return jnp.dot(x, y, precision=precision, preferred_element_type=jnp.float32)


class _Scores(NamedTuple):
    """Scores of a block of queries and a block of keys, times log2(e) for exp2, and their mask."""

    scores_qp: jax.Array
    visible_qp: jax.Array
    slope_qp: jax.Array | float  # derivative of the soft cap


def _scores(
    constants: Constants,
    q_qe: jax.Array,
    k_pe: jax.Array,
    i_q: jax.Array,
    j_p: jax.Array,
    until_p: jax.Array,
    positions: tuple[jax.Array, jax.Array] | None,
) -> _Scores:
    scores_qp = dot(q_qe, k_pe.T) * constants.scale
    slope_qp: jax.Array | float = 1.0
    if constants.soft_cap is not None:
        tanh_qp = jnp.tanh(scores_qp / constants.soft_cap)
        scores_qp, slope_qp = constants.soft_cap * tanh_qp, 1.0 - tanh_qp * tanh_qp
    visible_qp = (j_p[None, :] <= i_q[:, None]) & (i_q[:, None] < until_p[None, :])
    if positions is not None and constants.window is not None:
        position_q, position_p = positions
        visible_qp &= position_q[:, None] - position_p[None, :] < constants.window
    return _Scores(jnp.where(visible_qp, scores_qp * LOG2_E, UNSEEN), visible_qp, slope_qp)


def _over_keys(constants: Constants, sizes: Blocks, first: jax.Array, body: Any, carry: Any) -> Any:
    """Runs `body` over the blocks of keys that this program's block of queries sees, in order."""
    pl, _ = pallas()
    end = jax.lax.div((pl.program_id(0) + 1) * sizes.queries + sizes.keys - 1, sizes.keys)
    near = jax.lax.div(first, sizes.keys)
    if constants.prefix:
        shared = -(-constants.prefix // sizes.keys)
        carry = jax.lax.fori_loop(0, jnp.minimum(shared, end), body, carry)
        near = jnp.maximum(near, shared)
    return jax.lax.fori_loop(near, end, body, carry)


def forward_kernel(
    constants: Constants,
    sizes: Blocks,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    positions_ref: Any,
    until_ref: Any,
    first_ref: Any,
    out_ref: Any,
    log_sum_ref: Any,
) -> None:
    """Computes the attention of a block of queries, and log2 of the sum of its scores' exponentials."""
    pl, _ = pallas()
    c = pl.program_id(0)
    here = pl.ds(c * sizes.queries, sizes.queries)
    q_qe = q_ref[...]
    i_q = c * sizes.queries + jnp.arange(sizes.queries)
    position_q = positions_ref[here] if constants.window is not None else None

    def body(block: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        sum_qe, highest_q, total_q = carry
        there = pl.ds(block * sizes.keys, sizes.keys)
        j_p = block * sizes.keys + jnp.arange(sizes.keys)
        positions = None if position_q is None else (position_q, positions_ref[there])
        v_pe = v_ref[there, :]
        found = _scores(constants, q_qe, k_ref[there, :], i_q, j_p, until_ref[there], positions)
        new_highest_q = jnp.maximum(highest_q, found.scores_qp.max(axis=1))
        # 0 at a query's first visible key: this discards what masked blocks have accumulated.
        rescale_q = jnp.exp2(highest_q - new_highest_q)
        weights_qp = jnp.exp2(found.scores_qp - new_highest_q[:, None])
        return (
            sum_qe * rescale_q[:, None] + dot(weights_qp.astype(v_pe.dtype), v_pe),
            new_highest_q,
            total_q * rescale_q + weights_qp.sum(axis=1),
        )

    carry = (
        jnp.zeros(q_qe.shape, jnp.float32),
        jnp.full((sizes.queries,), UNSEEN, jnp.float32),
        jnp.zeros((sizes.queries,), jnp.float32),
    )
    sum_qe, highest_q, total_q = _over_keys(constants, sizes, first_ref[c], body, carry)
    total_q = jnp.maximum(total_q, 1e-30)  # not 0 for a query without keys
    out_ref[...] = (sum_qe / total_q[:, None]).astype(out_ref.dtype)
    log_sum_ref[...] = highest_q + jnp.log2(total_q)


def dq_kernel(
    constants: Constants,
    sizes: Blocks,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    positions_ref: Any,
    until_ref: Any,
    first_ref: Any,
    grad_out_ref: Any,
    log_sum_ref: Any,
    common_ref: Any,
    dq_ref: Any,
) -> None:
    """Computes a block of queries' gradient; `common` is the output times its gradient, summed over e."""
    pl, _ = pallas()
    c = pl.program_id(0)
    here = pl.ds(c * sizes.queries, sizes.queries)
    q_qe, grad_out_qe = q_ref[...], grad_out_ref[...]
    log_sum_q, common_q = log_sum_ref[...], common_ref[...]
    i_q = c * sizes.queries + jnp.arange(sizes.queries)
    position_q = positions_ref[here] if constants.window is not None else None

    def body(block: jax.Array, dq_qe: jax.Array) -> jax.Array:
        there = pl.ds(block * sizes.keys, sizes.keys)
        j_p = block * sizes.keys + jnp.arange(sizes.keys)
        positions = None if position_q is None else (position_q, positions_ref[there])
        k_pe = k_ref[there, :]
        found = _scores(constants, q_qe, k_pe, i_q, j_p, until_ref[there], positions)
        weights_qp = jnp.where(found.visible_qp, jnp.exp2(found.scores_qp - log_sum_q[:, None]), 0.0)
        grad_weights_qp = dot(grad_out_qe, v_ref[there, :].T) - common_q[:, None]
        grad_scores_qp = weights_qp * grad_weights_qp * found.slope_qp
        return dq_qe + dot(grad_scores_qp.astype(k_pe.dtype), k_pe)

    dq_qe = _over_keys(constants, sizes, first_ref[c], body, jnp.zeros(q_qe.shape, jnp.float32))
    dq_ref[...] = (dq_qe * constants.scale).astype(dq_ref.dtype)


def dkv_kernel(
    constants: Constants,
    sizes: Blocks,
    group: int,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    positions_ref: Any,
    until_ref: Any,
    end_ref: Any,
    grad_out_ref: Any,
    log_sum_ref: Any,
    common_ref: Any,
    dk_ref: Any,
    dv_ref: Any,
) -> None:
    """Computes a block of keys' and values' gradients, summed over the `group` query heads that read them."""
    pl, _ = pallas()
    c = pl.program_id(0)
    here = pl.ds(c * sizes.keys, sizes.keys)
    k_pe, v_pe = k_ref[...], v_ref[...]
    j_p, until_p = c * sizes.keys + jnp.arange(sizes.keys), until_ref[here]
    position_p = positions_ref[here] if constants.window is not None else None
    begin = jax.lax.div(c * sizes.keys, sizes.queries)
    end = jax.lax.div(end_ref[c] + sizes.queries - 1, sizes.queries)

    def of_head(g: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        def body(block: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            dk_pe, dv_pe = carry
            there = pl.ds(block * sizes.queries, sizes.queries)
            i_q = block * sizes.queries + jnp.arange(sizes.queries)
            positions = None if position_p is None else (positions_ref[there], position_p)
            q_qe, grad_out_qe = q_ref[there, g, :], grad_out_ref[there, g, :]
            found = _scores(constants, q_qe, k_pe, i_q, j_p, until_p, positions)
            weights_qp = jnp.where(
                found.visible_qp, jnp.exp2(found.scores_qp - log_sum_ref[g, there][:, None]), 0.0
            )
            grad_weights_qp = dot(grad_out_qe, v_pe.T) - common_ref[g, there][:, None]
            grad_scores_qp = weights_qp * grad_weights_qp * found.slope_qp
            return (
                dk_pe + dot(grad_scores_qp.astype(q_qe.dtype).T, q_qe),
                dv_pe + dot(weights_qp.astype(grad_out_qe.dtype).T, grad_out_qe),
            )

        return jax.lax.fori_loop(begin, end, body, carry)

    zeros = jnp.zeros(k_pe.shape, jnp.float32)
    dk_pe, dv_pe = jax.lax.fori_loop(0, group, of_head, (zeros, zeros))
    dk_ref[...] = (dk_pe * constants.scale).astype(dk_ref.dtype)
    dv_ref[...] = dv_pe.astype(dv_ref.dtype)
