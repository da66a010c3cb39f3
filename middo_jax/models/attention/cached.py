"""Attention of new positions to a KV cache.

Axes: b batch, t query position, s cache slot, h query heads, k key/value heads, g query heads a key head,
d head dimension, l layer.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from middo_jax.models.attention import triton_cached
from middo_jax.models.attention.placement import platform, shards
from middo_jax.models.attention.xla import masked

# Cache slots read at a time.
CACHE_BLOCK = 128


def cached_attention(
    q_bthd: jax.Array,
    keys_lbskd: jax.Array,
    values_lbskd: jax.Array,
    layer: jax.Array,
    positions_bt: jax.Array,
    first_row: jax.Array | int = 0,
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
) -> jax.Array:
    """Attention of new positions to one layer's cache slots up to themselves.

    The softmax is accumulated over blocks of slots (arXiv 2205.14135), from the first that any row still sees
    to the last that the longest row reaches: a step costs what is seen and not what fits. A block that a row
    does not see changes nothing in it, to the bit: rows do not see how long their neighbours are. Positions
    >= s (idle rows) get numbers without meaning.

    Args:
      q_bthd: queries, RoPE applied.
      keys_lbskd: all layers' keys, RoPE applied; sliced here, since a slice outside would be a copy.
      values_lbskd: all layers' values.
      layer: index of the layer.
      positions_bt: slot of each query, whose key and value are already in the cache.
      first_row: row of the cache that the first of the b rows reads; the others read those after it.
      scale: factor of the scores, usually 1 / sqrt(d).
      window: slots that a position sees, itself included; None is all up to itself.
      soft_cap: c of c tanh(score / c), after scaling; None is off.

    Returns:
      [b, t, h, d] in q's dtype; softmax in float32.
    """
    if not triton_cached.refusal(platform(), keys_lbskd.shape):
        cache = keys_lbskd, values_lbskd, layer, positions_bt, first_row
        asked = {"scale": scale, "window": window, "soft_cap": soft_cap}
        return triton_cached.triton_cached_attention(q_bthd, *cache, **asked)
    b, t, h, d = q_bthd.shape
    _, rows, s, kv_heads, _ = keys_lbskd.shape
    block = min(CACHE_BLOCK, s)
    q_btkgd = q_bthd.reshape(b, t, kv_heads, h // kv_heads, d)

    def block_of(cache_lbskd: jax.Array, start: jax.Array) -> jax.Array:
        if b < rows and shards("batch") > 1:
            # Devices keep different rows: they exchange the rows that are read, and not the whole cache.
            all_bskd = jax.lax.dynamic_slice(
                cache_lbskd, (layer, 0, start, 0, 0), (1, rows, block, kv_heads, d)
            )[0]
            return all_bskd[first_row + jnp.arange(b)]
        corner, size = (layer, first_row, start, 0, 0), (1, b, block, kv_heads, d)
        return jax.lax.dynamic_slice(cache_lbskd, corner, size)[0]

    def read(index: jax.Array, state: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
        highest_bkgt, total_bkgt, sum_bkgtd = state
        # The last block is moved back to fit; what the one before has read is masked.
        start = jnp.minimum(index * block, s - block)
        keys_bskd, values_bskd = block_of(keys_lbskd, start), block_of(values_lbskd, start)
        slots = start + jnp.arange(block)
        visible_bts = (slots >= index * block) & (slots <= positions_bt[..., None])
        if window is not None:
            visible_bts &= slots > positions_bt[..., None] - window
        scores = jnp.einsum("btkgd,bskd->bkgts", q_btkgd, keys_bskd, preferred_element_type=jnp.float32)
        scores = masked(scores, visible_bts, scale=scale, soft_cap=soft_cap)
        new_highest_bkgt = jnp.maximum(highest_bkgt, scores.max(axis=-1))
        # 0 for a row's first visible block: what blocks before its window have left is forgotten.
        rescale_bkgt = jnp.exp(highest_bkgt - new_highest_bkgt)
        weights = jnp.exp(scores - new_highest_bkgt[..., None])
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

    last = jnp.max(jnp.where(positions_bt < s, positions_bt, 0))
    # Idle rows stand behind all others, so that they do not count here; all idle, one block is read.
    first = jnp.int32(0) if window is None else jnp.clip(jnp.min(positions_bt) - window + 1, 0, last)
    shape = (b, kv_heads, h // kv_heads, t)
    state = (jnp.full(shape, jnp.finfo(jnp.float32).min), jnp.zeros(shape), jnp.zeros((*shape, d)))
    _, total_bkgt, sum_bkgtd = jax.lax.fori_loop(first // block, last // block + 1, read, state)
    attended_bkgtd = (sum_bkgtd / total_bkgt[..., None]).astype(q_bthd.dtype)
    return jnp.moveaxis(attended_bkgtd, 3, 1).reshape(b, t, h, d)
