"""Attention of new positions to a KV cache.

Axes: docs/contributing.md#axes.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from middo_jax.models.attention import triton_cached
from middo_jax.models.attention.arguments import AttentionSpec, CachedLayer
from middo_jax.models.attention.placement import platform, shards
from middo_jax.models.attention.xla import masked

# Cache slots per block.
CACHE_BLOCK = 128

# Per query, over the slots read so far: highest score, sum of exponentials, weighted sum of values.
_Softmax = tuple[jax.Array, jax.Array, jax.Array]


def cached_attention(
    q_bthe: jax.Array, cached: CachedLayer, positions_bt: jax.Array, spec: AttentionSpec
) -> jax.Array:
    """Attention of new positions to one layer's cache slots, up to their own.

    The softmax is accumulated over blocks of slots (arXiv 2205.14135), from the first slot that any row still
    sees to the last that the longest row reaches. So a step's cost depends on the slots in use, not on the
    cache's capacity. A block that a row does not see leaves the row's result unchanged, bit for bit; so the
    result does not depend on other rows' lengths. Positions past the last slot (idle rows) get values without
    meaning.

    Args:
      q_bthe: queries, RoPE applied.
      cached: the layer and its rows.
      positions_bt: slot of each query; its key and value are already in the cache.
      spec: scale, window and soft cap; a window counts slots.

    Returns:
      [b, t, h, e] in q's dtype; softmax in float32.
    """
    if not triton_cached.refusal(platform(), cached.keys_lbpke.shape):
        return triton_cached.triton_cached_attention(q_bthe, cached, positions_bt, spec)
    b, t, h, e = q_bthe.shape
    n_slots, kv_heads = cached.keys_lbpke.shape[2:4]
    block, window = min(CACHE_BLOCK, n_slots), spec.window
    q_btkge = q_bthe.reshape(b, t, kv_heads, h // kv_heads, e)

    def read(index: jax.Array, state: _Softmax) -> _Softmax:
        # The last block is shifted back to fit; slots that the block before it has read are masked.
        start = jnp.minimum(index * block, n_slots - block)
        keys_bpke, values_bpke = _blocks(cached, b, start, block)
        slots = start + jnp.arange(block)
        visible_btp = (slots >= index * block) & (slots <= positions_bt[..., None])
        if window is not None:
            visible_btp &= slots > positions_bt[..., None] - window
        scores = jnp.einsum("btkge,bpke->bkgtp", q_btkge, keys_bpke, preferred_element_type=jnp.float32)
        return _accumulated(state, masked(scores, visible_btp, spec), values_bpke)

    last = jnp.max(jnp.where(positions_bt < n_slots, positions_bt, 0))
    # Idle rows have the largest positions, so they do not affect the minimum; if all are idle, one block is
    # read.
    first = jnp.int32(0) if window is None else jnp.clip(jnp.min(positions_bt) - window + 1, 0, last)
    shape = (b, kv_heads, h // kv_heads, t)
    state = (jnp.full(shape, jnp.finfo(jnp.float32).min), jnp.zeros(shape), jnp.zeros((*shape, e)))
    _, total_bkgt, sum_bkgte = jax.lax.fori_loop(first // block, last // block + 1, read, state)
    attended_bkgte = (sum_bkgte / total_bkgt[..., None]).astype(q_bthe.dtype)
    return jnp.moveaxis(attended_bkgte, 3, 1).reshape(b, t, h, e)


def _blocks(cached: CachedLayer, b: int, start: jax.Array, block: int) -> tuple[jax.Array, jax.Array]:
    """Keys and values [b, block, k, e] of the b rows, from slot `start` on."""
    _, rows, _, kv_heads, d = cached.keys_lbpke.shape

    def block_of(cache_lbpke: jax.Array) -> jax.Array:
        if b < rows and shards("batch") > 1:
            # The rows are sharded: devices exchange only this block of the rows, not the whole cache.
            corner, size = (cached.layer, 0, start, 0, 0), (1, rows, block, kv_heads, d)
            all_bpke = jax.lax.dynamic_slice(cache_lbpke, corner, size)[0]
            return all_bpke[cached.first_row + jnp.arange(b)]
        corner, size = (cached.layer, cached.first_row, start, 0, 0), (1, b, block, kv_heads, d)
        return jax.lax.dynamic_slice(cache_lbpke, corner, size)[0]

    return block_of(cached.keys_lbpke), block_of(cached.values_lbpke)


def _accumulated(state: _Softmax, scores_bkgtp: jax.Array, values_bpke: jax.Array) -> _Softmax:
    """The softmax state after one more block of slots."""
    highest_bkgt, total_bkgt, sum_bkgte = state
    new_highest_bkgt = jnp.maximum(highest_bkgt, scores_bkgtp.max(axis=-1))
    # 0 at a row's first visible block: this discards what masked blocks have accumulated.
    rescale_bkgt = jnp.exp(highest_bkgt - new_highest_bkgt)
    weights = jnp.exp(scores_bkgtp - new_highest_bkgt[..., None])
    added_bkgte = jnp.einsum(
        "bkgtp,bpke->bkgte",
        weights.astype(values_bpke.dtype),
        values_bpke,
        preferred_element_type=jnp.float32,
    )
    return (
        new_highest_bkgt,
        total_bkgt * rescale_bkgt + weights.sum(axis=-1),
        sum_bkgte * rescale_bkgt[..., None] + added_bkgte,
    )
