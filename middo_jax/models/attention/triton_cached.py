"""Attention of new positions to a KV cache on GPUs: one kernel, each row reads the slots that it sees.

A loop of XLA's would wait for the host at every turn to learn whether another follows.

Axes: b row, t position, s cache slot within a block, h query heads, k key/value heads, g query heads per
key/value head, d head dimension, l layer; m query of a key/value head: a position and one of its g heads.
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
# Queries per program: a tensor core's product has at least 16 rows.
FEWEST_QUERIES, MOST_QUERIES = 16, 64
_ADDRESSABLE = 2**31  # elements of an array that the kernel's offsets reach


def refusal(platform: str, keys_shape: tuple[int, ...]) -> str | None:
    """Why the kernel cannot read a cache [l, b, s, k, d]; None if it can."""
    if platform != "gpu":
        return f"a {platform}: it is a GPU kernel"
    d = keys_shape[-1]
    if d & (d - 1) or not MIN_HEAD_DIM <= d <= MAX_HEAD_DIM:
        return f"head_dim={d}: it takes powers of two from {MIN_HEAD_DIM} to {MAX_HEAD_DIM}"
    if (devices := shards("batch") * shards("heads")) > 1:
        return f"a mesh of {devices} devices: it sees one"
    elements = functools.reduce(int.__mul__, keys_shape)
    if elements >= _ADDRESSABLE:
        return f"a cache of {elements} elements: its offsets reach {_ADDRESSABLE}"
    return None


def triton_cached_attention(
    q_bthd: jax.Array,
    cached: CachedLayer,
    positions_bt: jax.Array,
    spec: AttentionSpec,
    *,
    interpret: bool = False,
) -> jax.Array:
    """`cached_attention` on one GPU; idle rows read nothing, and get zeros.

    Args and result are those of `cached_attention`; `interpret` runs the kernel in JAX's interpreter.
    """
    pl, plgpu = pallas()
    b, t, h, d = q_bthd.shape
    keys_lbskd, values_lbskd, layer, first_row = cached
    kv_heads = keys_lbskd.shape[3]
    group = h // kv_heads
    q_bkmd = q_bthd.reshape(b, t, kv_heads, group, d).swapaxes(1, 2).reshape(b, kv_heads, t * group, d)
    count = t * group
    queries = min(MOST_QUERIES, max(FEWEST_QUERIES, pl.next_power_of_2(count)))
    missing = -count % queries
    # The added queries are idle: their position is behind the cache.
    slots = keys_lbskd.shape[2]
    positions_bm = jnp.repeat(positions_bt.astype(jnp.int32), group, axis=1)
    positions_bm = jnp.pad(positions_bm, ((0, 0), (0, missing)), constant_values=slots)
    q_bkmd = jnp.pad(q_bkmd, ((0, 0), (0, 0), (0, missing), (0, 0)))
    at_2 = jnp.stack([jnp.asarray(layer, jnp.int32), jnp.asarray(first_row, jnp.int32)])
    of_queries = pl.BlockSpec((None, None, queries, d), lambda c, b, k: (b, k, c, 0))
    whole = pl.BlockSpec(keys_lbskd.shape, lambda c, b, k: (0, 0, 0, 0, 0))
    out_bkmd = pl.pallas_call(
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
        out_shape=jax.ShapeDtypeStruct(q_bkmd.shape, q_bkmd.dtype),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="attention_cached",
    )(at_2, positions_bm, q_bkmd, keys_lbskd, values_lbskd)
    out_bktgd = out_bkmd[:, :, :count].reshape(b, kv_heads, t, group, d)
    return out_bktgd.swapaxes(1, 2).reshape(q_bthd.shape)


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
    q_md, at_m = q_ref[...], positions_ref[...]
    is_idle_m = at_m >= slots
    last = jnp.where(is_idle_m, -1, at_m).max()
    first = jnp.int32(0)
    if spec.window is not None:
        first = jnp.maximum(at_m.min() - spec.window + 1, 0)  # idle ones are behind all others

    def body(block: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        sum_md, highest_m, total_m = carry
        j_s = block * SLOTS + jnp.arange(SLOTS)
        there = (layer, row, pl.ds(block * SLOTS, SLOTS), head, slice(None))
        exists_s1 = (j_s < slots)[:, None]
        k_sd = plgpu.load(keys_ref.at[there], mask=exists_s1, other=0.0)
        v_sd = plgpu.load(values_ref.at[there], mask=exists_s1, other=0.0)
        scores_ms = dot(q_md, k_sd.T) * spec.scale
        if spec.soft_cap is not None:
            scores_ms = spec.soft_cap * jnp.tanh(scores_ms / spec.soft_cap)
        visible_ms = j_s[None, :] <= at_m[:, None]
        if spec.window is not None:
            visible_ms &= j_s[None, :] > at_m[:, None] - spec.window
        scores_ms = jnp.where(visible_ms, scores_ms * LOG2_E, UNSEEN)
        new_highest_m = jnp.maximum(highest_m, scores_ms.max(axis=1))
        rescale_m = jnp.exp2(highest_m - new_highest_m)
        weights_ms = jnp.exp2(scores_ms - new_highest_m[:, None])
        return (
            sum_md * rescale_m[:, None] + dot(weights_ms.astype(v_sd.dtype), v_sd),
            new_highest_m,
            total_m * rescale_m + weights_ms.sum(axis=1),
        )

    carry = (
        jnp.zeros(q_md.shape, jnp.float32),
        jnp.full(at_m.shape, UNSEEN, jnp.float32),
        jnp.zeros(at_m.shape, jnp.float32),
    )
    end = jax.lax.div(last + SLOTS, SLOTS)
    sum_md, _, total_m = jax.lax.fori_loop(jax.lax.div(first, SLOTS), end, body, carry)
    out_ref[...] = (sum_md / jnp.maximum(total_m, 1e-30)[:, None]).astype(out_ref.dtype)
