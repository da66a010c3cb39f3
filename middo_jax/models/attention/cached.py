"""Attention of new positions to a KV cache.

Axes: b batch, t query position, s cache slot, h query heads, k key/value heads, g query heads a key head,
d head dimension, l layer.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from middo_jax.models.attention import triton_cached
from middo_jax.models.attention.arguments import AttentionSpec, CachedLayer
from middo_jax.models.attention.placement import platform, shards
from middo_jax.models.attention.xla import masked

# Cache slots read at a time.
CACHE_BLOCK = 128

# Of each query, over the slots so far: highest score, sum of exponentials, weighted sum of values.
_Softmax = tuple[jax.Array, jax.Array, jax.Array]


def cached_attention(
    q_bthd: jax.Array, cached: CachedLayer, positions_bt: jax.Array, spec: AttentionSpec
) -> jax.Array:
    """Attention of new positions to one layer's cache slots up to themselves.

    The softmax is accumulated over blocks of slots (arXiv 2205.14135), from the first that any row still sees
    to the last that the longest row reaches: a step costs what is seen and not what fits. A block that a row
    does not see changes nothing in it, to the bit: rows do not see how long their neighbours are. Positions
    >= s (idle rows) get numbers without meaning.

    Args:
      q_bthd: queries, RoPE applied.
      cached: the layer and its rows.
      positions_bt: slot of each query, whose key and value are already in the cache.
      spec: scale, window and soft cap; a window counts slots.

    Returns:
      [b, t, h, d] in q's dtype; softmax in float32.
    """
    if not triton_cached.refusal(platform(), cached.keys_lbskd.shape):
        return triton_cached.triton_cached_attention(q_bthd, cached, positions_bt, spec)
    b, t, h, d = q_bthd.shape
    s, kv_heads = cached.keys_lbskd.shape[2:4]
    block, window = min(CACHE_BLOCK, s), spec.window
    q_btkgd = q_bthd.reshape(b, t, kv_heads, h // kv_heads, d)

    def read(index: jax.Array, state: _Softmax) -> _Softmax:
        # The last block is moved back to fit; what the one before has read is masked.
        start = jnp.minimum(index * block, s - block)
        keys_bskd, values_bskd = _blocks(cached, b, start, block)
        slots = start + jnp.arange(block)
        visible_bts = (slots >= index * block) & (slots <= positions_bt[..., None])
        if window is not None:
            visible_bts &= slots > positions_bt[..., None] - window
        scores = jnp.einsum("btkgd,bskd->bkgts", q_btkgd, keys_bskd, preferred_element_type=jnp.float32)
        return _accumulated(state, masked(scores, visible_bts, spec), values_bskd)

    last = jnp.max(jnp.where(positions_bt < s, positions_bt, 0))
    # Idle rows are behind all others, so that they do not count here; if all are idle, one block is read.
    first = jnp.int32(0) if window is None else jnp.clip(jnp.min(positions_bt) - window + 1, 0, last)
    shape = (b, kv_heads, h // kv_heads, t)
    state = (jnp.full(shape, jnp.finfo(jnp.float32).min), jnp.zeros(shape), jnp.zeros((*shape, d)))
    _, total_bkgt, sum_bkgtd = jax.lax.fori_loop(first // block, last // block + 1, read, state)
    attended_bkgtd = (sum_bkgtd / total_bkgt[..., None]).astype(q_bthd.dtype)
    return jnp.moveaxis(attended_bkgtd, 3, 1).reshape(b, t, h, d)


def _blocks(cached: CachedLayer, b: int, start: jax.Array, block: int) -> tuple[jax.Array, jax.Array]:
    """Keys and values [b, block, k, d] of the b rows, from slot `start` on."""
    _, rows, _, kv_heads, d = cached.keys_lbskd.shape

    def block_of(cache_lbskd: jax.Array) -> jax.Array:
        if b < rows and shards("batch") > 1:
            # Devices keep different rows: they exchange the rows that are read, and not the whole cache.
            corner, size = (cached.layer, 0, start, 0, 0), (1, rows, block, kv_heads, d)
            all_bskd = jax.lax.dynamic_slice(cache_lbskd, corner, size)[0]
            return all_bskd[cached.first_row + jnp.arange(b)]
        corner, size = (cached.layer, cached.first_row, start, 0, 0), (1, b, block, kv_heads, d)
        return jax.lax.dynamic_slice(cache_lbskd, corner, size)[0]

    return block_of(cached.keys_lbskd), block_of(cached.values_lbskd)


def _accumulated(state: _Softmax, scores_bkgts: jax.Array, values_bskd: jax.Array) -> _Softmax:
    """The softmax after one more block of slots."""
    highest_bkgt, total_bkgt, sum_bkgtd = state
    new_highest_bkgt = jnp.maximum(highest_bkgt, scores_bkgts.max(axis=-1))
    # 0 for a row's first visible block: what blocks before its window have left is forgotten.
    rescale_bkgt = jnp.exp(highest_bkgt - new_highest_bkgt)
    weights = jnp.exp(scores_bkgts - new_highest_bkgt[..., None])
    added_bkgtd = jnp.einsum(
        "bkgts,bskd->bkgtd",
        weights.astype(values_bskd.dtype),
        values_bskd,
        preferred_element_type=jnp.float32,
    )
    return (
        new_highest_bkgt,
        total_bkgt * rescale_bkgt + weights.sum(axis=-1),
        sum_bkgtd * rescale_bkgt[..., None] + added_bkgtd,
    )
