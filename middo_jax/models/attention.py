"""Attention, exact for packed sequences: a token sees what its own segment holds up to itself.

Axes: b batch, t query position, s key position, h query heads, k key/value heads, g query heads a key head,
d head dimension.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

# Query positions handled at a time. A block needs only the keys up to its own end, so that shorter blocks
# waste less on the upper triangle, and the scores [b, h, block, s] never grow with t squared.
QUERY_BLOCK = 128


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
