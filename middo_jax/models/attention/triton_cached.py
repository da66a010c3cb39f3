"""Attention of new positions to a KV cache on GPUs: one kernel, in which each row reads the slots it sees.

An XLA loop would wait for the host at every iteration, to decide whether another one follows.

Axes: docs/contributing.md#axes; here q is a pair of a position and one of the g heads of a key/value head.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from middo_jax.models.attention.arguments import AttentionSpec, CachedLayer
from middo_jax.models.attention.placement import shards
from middo_jax.models.attention.triton import MAX_HEAD_DIM, MIN_HEAD_DIM
from middo_jax.models.attention.triton_kernels import LOG2_E, UNSEEN, dot, pallas

SLOTS = 64  # cache slots per block
# Queries per program; a tensor core multiplies at least 16 rows.
FEWEST_QUERIES, MOST_QUERIES = 16, 64
_ADDRESSABLE = 2**31  # elements of an array that the kernel's offsets can address


def refusal(platform: str, keys_shape: tuple[int, ...]) -> str | None:
    """Why the kernel cannot read a cache [l, b, p, k, e]; None if it can."""
    if platform != "gpu":
        return f"a {platform}: it is a GPU kernel"
    d = keys_shape[-1]
    if d & (d - 1) or not MIN_HEAD_DIM <= d <= MAX_HEAD_DIM:
        return f"head_dim={d}: it takes powers of two from {MIN_HEAD_DIM} to {MAX_HEAD_DIM}"
    if (devices := shards("batch") * shards("heads")) > 1:
        return f"a mesh of {devices} devices: it runs on one"
    elements = functools.reduce(int.__mul__, keys_shape)
    if elements >= _ADDRESSABLE:
        return f"a cache of {elements} elements: its offsets reach {_ADDRESSABLE}"
    return None


def triton_cached_attention(
    q_bthe: jax.Array,
    cached: CachedLayer,
    positions_bt: jax.Array,
    spec: AttentionSpec,
    *,
    interpret: bool = False,
) -> jax.Array:
    """`cached_attention` on one GPU; idle rows read nothing and get zeros.

    Arguments and result are those of `cached_attention`; `interpret` runs the kernel in JAX's interpreter.
    """
    pl, plgpu = pallas()
    b, t, h, d = q_bthe.shape
    keys_lbpke, values_lbpke, layer, first_row = cached
    kv_heads = keys_lbpke.shape[3]
    group = h // kv_heads
    q_bkqe = q_bthe.reshape(b, t, kv_heads, group, d).swapaxes(1, 2).reshape(b, kv_heads, t * group, d)
    count = t * group
    queries = min(MOST_QUERIES, max(FEWEST_QUERIES, pl.next_power_of_2(count)))
    missing = -count % queries
    # The added queries are idle: their position is past the end of the cache.
    slots = keys_lbpke.shape[2]
    positions_bq = jnp.repeat(positions_bt.astype(jnp.int32), group, axis=1)
    positions_bq = jnp.pad(positions_bq, ((0, 0), (0, missing)), constant_values=slots)
    q_bkqe = jnp.pad(q_bkqe, ((0, 0), (0, 0), (0, missing), (0, 0)))
    at_2 = jnp.stack([jnp.asarray(layer, jnp.int32), jnp.asarray(first_row, jnp.int32)])
    of_queries = pl.BlockSpec((None, None, queries, d), lambda c, b, k: (b, k, c, 0))
    whole = pl.BlockSpec(keys_lbpke.shape, lambda c, b, k: (0, 0, 0, 0, 0))
    out_bkqe = pl.pallas_call(
        functools.partial(_kernel, spec),
        grid=((count + missing) // queries, b, kv_heads),
        in_specs=[
            pl.BlockSpec((2,), lambda c, b, k: (0,)),
            pl.BlockSpec((None, queries), lambda c, b, k: (b, c)),
            of_queries,
            whole,
            whole,
        ],
        out_specs=of_queries,
        out_shape=jax.ShapeDtypeStruct(q_bkqe.shape, q_bkqe.dtype),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="attention_cached",
    )(at_2, positions_bq, q_bkqe, keys_lbpke, values_lbpke)
    out_bktge = out_bkqe[:, :, :count].reshape(b, kv_heads, t, group, d)
    return out_bktge.swapaxes(1, 2).reshape(q_bthe.shape)


def _kernel(
    spec: AttentionSpec,
    at_ref: Any,
    positions_ref: Any,
    q_ref: Any,
    keys_ref: Any,
    values_ref: Any,
    out_ref: Any,
) -> None:
    pl, plgpu = pallas()
    slots = keys_ref.shape[2]
    layer, row, head = at_ref[0], at_ref[1] + pl.program_id(1), pl.program_id(2)
    q_qe, position_q = q_ref[...], positions_ref[...]
    is_idle_q = position_q >= slots
    last = jnp.where(is_idle_q, -1, position_q).max()
    first = jnp.int32(0)
    if spec.window is not None:
        first = jnp.maximum(position_q.min() - spec.window + 1, 0)  # idle ones have the largest positions

    def body(block: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        sum_qe, highest_q, total_q = carry
        j_p = block * SLOTS + jnp.arange(SLOTS)
        there = (layer, row, pl.ds(block * SLOTS, SLOTS), head, slice(None))
        exists_p1 = (j_p < slots)[:, None]
        k_pe = plgpu.load(keys_ref.at[there], mask=exists_p1, other=0.0)
        v_pe = plgpu.load(values_ref.at[there], mask=exists_p1, other=0.0)
        scores_qp = dot(q_qe, k_pe.T) * spec.scale
        if spec.soft_cap is not None:
            scores_qp = spec.soft_cap * jnp.tanh(scores_qp / spec.soft_cap)
        visible_qp = j_p[None, :] <= position_q[:, None]
        if spec.window is not None:
            visible_qp &= j_p[None, :] > position_q[:, None] - spec.window
        scores_qp = jnp.where(visible_qp, scores_qp * LOG2_E, UNSEEN)
        new_highest_q = jnp.maximum(highest_q, scores_qp.max(axis=1))
        rescale_q = jnp.exp2(highest_q - new_highest_q)
        weights_qp = jnp.exp2(scores_qp - new_highest_q[:, None])
        return (
            sum_qe * rescale_q[:, None] + dot(weights_qp.astype(v_pe.dtype), v_pe),
            new_highest_q,
            total_q * rescale_q + weights_qp.sum(axis=1),
        )

    carry = (
        jnp.zeros(q_qe.shape, jnp.float32),
        jnp.full(position_q.shape, UNSEEN, jnp.float32),
        jnp.zeros(position_q.shape, jnp.float32),
    )
    end = jax.lax.div(last + SLOTS, SLOTS)
    sum_qe, _, total_q = jax.lax.fori_loop(jax.lax.div(first, SLOTS), end, body, carry)
    out_ref[...] = (sum_qe / jnp.maximum(total_q, 1e-30)[:, None]).astype(out_ref.dtype)
