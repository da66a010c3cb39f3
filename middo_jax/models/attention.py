"""Attention, exact for packed sequences: a token sees what its own segment holds up to itself.

Axes: b batch, t query position, s key position, h query heads, k key/value heads, g query heads a key head,
d head dimension, l layer.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

# Query positions handled at a time. A block needs only the keys up to its own end, so that shorter blocks
# waste less on the upper triangle, and the scores [b, h, block, s] never grow with t squared.
QUERY_BLOCK = 128

# Cache slots read at a time by `cached_attention`.
CACHE_BLOCK = 128


def packed_attention(
    q_bthd: jax.Array,
    k_bskd: jax.Array,
    v_bskd: jax.Array,
    segment_ids_bt: jax.Array,
    branch_ids_bt: jax.Array | None = None,
) -> jax.Array:
    """Causal attention inside segments; with branches, a segment is a tree.

    Position i sees position j <= i if both are of one segment, and j is of the stem (branch 0) or of i's own
    branch. So several continuations of one text can share its keys and values:

      tokens       [S S S A A B B]      segment_ids  [0 0 0 0 0 0 0]
      branch_ids   [0 0 0 1 1 2 2]      B sees S and B, never A.

    Args:
      q_bthd: queries, RoPE applied.
      k_bskd: keys, RoPE applied; heads a multiple of k.
      v_bskd: values.
      segment_ids_bt: which example a position belongs to; padding is -1 and sees only padding.
      branch_ids_bt: branch within the segment, None if all is stem.

    Returns:
      [b, t, h, d] in q's dtype; softmax in float32.
    """
    length = q_bthd.shape[1]
    blocks = []
    for start in range(0, length, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, length)
        query, keys = slice(start, stop), slice(0, stop)
        visible_bts = segment_ids_bt[:, query, None] == segment_ids_bt[:, None, keys]
        visible_bts &= jnp.arange(start, stop)[:, None] >= jnp.arange(stop)
        if branch_ids_bt is not None:
            key_branch_b1s = branch_ids_bt[:, None, keys]
            visible_bts &= (key_branch_b1s == 0) | (key_branch_b1s == branch_ids_bt[:, query, None])
        blocks.append(masked_attention(q_bthd[:, query], k_bskd[:, keys], v_bskd[:, keys], visible_bts))
    return jnp.concatenate(blocks, axis=1)


def masked_attention(
    q_bthd: jax.Array, k_bskd: jax.Array, v_bskd: jax.Array, visible_bts: jax.Array
) -> jax.Array:
    """softmax(q k / sqrt(d)) v over the visible keys; every query must see at least one.

    Returns:
      [b, t, h, d] in q's dtype; softmax in float32.
    """
    b, t, h, d = q_bthd.shape
    kv_heads = k_bskd.shape[2]
    q_btkgd = q_bthd.reshape(b, t, kv_heads, h // kv_heads, d)
    scores = jnp.einsum("btkgd,bskd->bkgts", q_btkgd, k_bskd, preferred_element_type=jnp.float32)
    scores = jnp.where(visible_bts[:, None, None], scores / math.sqrt(d), jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v_bskd.dtype)
    return jnp.einsum("bkgts,bskd->btkgd", weights, v_bskd).reshape(b, t, h, d)


def cached_attention(
    q_bthd: jax.Array,
    keys_lbskd: jax.Array,
    values_lbskd: jax.Array,
    layer: jax.Array,
    positions_bt: jax.Array,
) -> jax.Array:
    """Attention of new positions to one layer's cache slots up to themselves.

    The softmax is accumulated over blocks of slots (arXiv 2205.14135) as far as the longest row reaches, so
    that a step costs what is cached and not what fits. A block that lies behind a row's position changes
    nothing in it, to the bit: rows do not see how long their neighbours are. Positions >= s (idle rows) get
    numbers without meaning.

    Args:
      q_bthd: queries, RoPE applied.
      keys_lbskd: all layers' keys, RoPE applied; sliced here, since a slice outside would be a copy.
      values_lbskd: all layers' values.
      layer: index of the layer.
      positions_bt: slot of each query, whose key and value are already in the cache.

    Returns:
      [b, t, h, d] in q's dtype; softmax in float32.
    """
    b, t, h, d = q_bthd.shape
    _, _, s, kv_heads, _ = keys_lbskd.shape
    block = min(CACHE_BLOCK, s)
    lowest = jnp.finfo(jnp.float32).min
    q_btkgd = q_bthd.reshape(b, t, kv_heads, h // kv_heads, d)

    def read(index: jax.Array, state: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
        highest_bkgt, total_bkgt, sum_bkgtd = state
        # The last block is moved back to fit; what the one before has read is masked.
        start = jnp.minimum(index * block, s - block)
        corner, size = (layer, 0, start, 0, 0), (1, b, block, kv_heads, d)
        keys_bskd = jax.lax.dynamic_slice(keys_lbskd, corner, size)[0]
        values_bskd = jax.lax.dynamic_slice(values_lbskd, corner, size)[0]
        slots = start + jnp.arange(block)
        visible_bts = (slots >= index * block) & (slots <= positions_bt[..., None])
        scores = jnp.einsum("btkgd,bskd->bkgts", q_btkgd, keys_bskd, preferred_element_type=jnp.float32)
        scores = jnp.where(visible_bts[:, None, None], scores / math.sqrt(d), lowest)
        new_highest_bkgt = jnp.maximum(highest_bkgt, scores.max(axis=-1))
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
    shape = (b, kv_heads, h // kv_heads, t)
    state = (jnp.full(shape, lowest), jnp.zeros(shape), jnp.zeros((*shape, d)))
    _, total_bkgt, sum_bkgtd = jax.lax.fori_loop(0, last // block + 1, read, state)
    attended_bkgtd = (sum_bkgtd / total_bkgt[..., None]).astype(q_bthd.dtype)
    return jnp.moveaxis(attended_bkgtd, 3, 1).reshape(b, t, h, d)
