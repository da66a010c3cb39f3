"""Attention in plain XLA: runs everywhere, honours everything, and is what the kernels are compared with.

Axes: b batch, t query position, s key position, h query heads, k key/value heads, g query heads a key head,
d head dimension.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

# Query positions handled at a time. A block needs only the keys up to its own end, so that shorter blocks
# waste less on the upper triangle, and the scores [b, h, block, s] never grow with t squared.
QUERY_BLOCK = 128


def xla_attention(
    q_bthd: jax.Array,
    k_bskd: jax.Array,
    v_bskd: jax.Array,
    segment_ids_bt: jax.Array,
    positions_bt: jax.Array,
    branch_ids_bt: jax.Array | None,
    *,
    scale: float,
    window: int | None,
    soft_cap: float | None,
) -> jax.Array:
    """`packed_attention` in blocks of queries; with a window, a block's cost does not grow with length."""
    length = q_bthd.shape[1]
    blocks = []
    for start in range(0, length, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, length)
        # A segment's rows are neighbours and count up: none sees further back than the window. The branches
        # of a tree lie behind each other, so that near positions may be far rows.
        first = 0 if window is None or branch_ids_bt is not None else max(0, start - window + 1)
        query, keys = slice(start, stop), slice(first, stop)
        visible_bts = visible_keys(query, keys, segment_ids_bt, positions_bt, branch_ids_bt, window=window)
        blocks.append(
            masked_attention(
                q_bthd[:, query],
                k_bskd[:, keys],
                v_bskd[:, keys],
                visible_bts,
                scale=scale,
                soft_cap=soft_cap,
            )
        )
    return jnp.concatenate(blocks, axis=1)


def visible_keys(
    query: slice,
    keys: slice,
    segment_ids_bt: jax.Array,
    positions_bt: jax.Array,
    branch_ids_bt: jax.Array | None = None,
    *,
    window: int | None,
) -> jax.Array:
    """Which of the positions `keys` each of the positions `query` sees: bool [b, t, s]."""
    visible_bts = segment_ids_bt[:, query, None] == segment_ids_bt[:, None, keys]
    visible_bts &= jnp.arange(query.start, query.stop)[:, None] >= jnp.arange(keys.start, keys.stop)
    if window is not None:
        visible_bts &= positions_bt[:, query, None] - positions_bt[:, None, keys] < window
    if branch_ids_bt is not None:
        key_branch_b1s = branch_ids_bt[:, None, keys]
        visible_bts &= (key_branch_b1s == 0) | (key_branch_b1s == branch_ids_bt[:, query, None])
    return visible_bts


def masked_attention(
    q_bthd: jax.Array,
    k_bskd: jax.Array,
    v_bskd: jax.Array,
    visible_bts: jax.Array,
    *,
    scale: float,
    soft_cap: float | None = None,
) -> jax.Array:
    """softmax(q k * scale) v over the visible keys; every query must see at least one.

    Returns:
      [b, t, h, d] in q's dtype; softmax in float32.
    """
    b, t, h, d = q_bthd.shape
    kv_heads = k_bskd.shape[2]
    q_btkgd = q_bthd.reshape(b, t, kv_heads, h // kv_heads, d)
    scores = masked_scores(q_btkgd, k_bskd, visible_bts, scale=scale, soft_cap=soft_cap)
    weights = jax.nn.softmax(scores, axis=-1).astype(v_bskd.dtype)
    return jnp.einsum("bkgts,bskd->btkgd", weights, v_bskd).reshape(b, t, h, d)


def masked_scores(
    q_btkgd: jax.Array, k_bskd: jax.Array, visible_bts: jax.Array, *, scale: float, soft_cap: float | None
) -> jax.Array:
    """Scores [b, k, g, t, s] in float32: scaled, capped to c tanh(score / c), float32's minimum where unseen.

    The cap is that of arXiv 2408.00118, section 2. The minimum is finite, so that no gradient is NaN.
    """
    scores = scale * jnp.einsum("btkgd,bskd->bkgts", q_btkgd, k_bskd, preferred_element_type=jnp.float32)
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    return jnp.where(visible_bts[:, None, None], scores, jnp.finfo(jnp.float32).min)
