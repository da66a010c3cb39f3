"""Attention in plain XLA: runs everywhere, honours everything, and is what the kernels are compared with.

Axes: b batch, t query position, s key position, h query heads, k key/value heads, g query heads a key head,
d head dimension.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

# Query positions handled at a time. A block needs only the keys up to its own end, so that shorter blocks
# waste less on the upper triangle, and the scores [b, h, block, s] never grow with t squared.
QUERY_BLOCK = 128


class Places(NamedTuple):
    """Where some positions stand: what decides who sees whom. Each [b, t], rows [1, t]."""

    rows: jax.Array
    segment_ids: jax.Array
    positions: jax.Array
    until: jax.Array | None

    @classmethod
    def of(cls, segment_ids_bt: jax.Array, positions_bt: jax.Array, until_bt: jax.Array | None) -> Places:
        """All of a batch's."""
        return cls(jnp.arange(segment_ids_bt.shape[1])[None], segment_ids_bt, positions_bt, until_bt)


def xla_attention(
    q_bthd: jax.Array,
    k_bskd: jax.Array,
    v_bskd: jax.Array,
    segment_ids_bt: jax.Array,
    positions_bt: jax.Array,
    until_bt: jax.Array | None,
    *,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    prefix: int = 0,
    longest: int | None = None,
) -> jax.Array:
    """`packed_attention` in blocks of queries, whose cost does not grow with the row's length if there is a
    window or a longest text: a block reads the prefix, and what lies no further back than that."""
    length = q_bthd.shape[1]
    # A segment's rows are neighbours and count up: none sees further back than the window. The branches of
    # a tree lie behind each other, so that near positions may be far rows.
    reach = min(
        length if longest is None else longest, length if window is None or until_bt is not None else window
    )
    places = Places.of(segment_ids_bt, positions_bt, until_bt)
    blocks = []
    for start in range(0, length, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, length)
        first = start - reach + 1

        def queries(x_bt: jax.Array, start: int = start, stop: int = stop) -> jax.Array:
            return x_bt[:, start:stop]

        def keys(x_bs: jax.Array, first: int = first, stop: int = stop) -> jax.Array:
            if first <= prefix:
                return x_bs[:, :stop]
            near_bs = x_bs[:, first:stop]
            return jnp.concatenate([x_bs[:, :prefix], near_bs], axis=1) if prefix else near_bs

        visible_bts = visible(jax.tree.map(queries, places), jax.tree.map(keys, places), window)
        blocks.append(
            masked_attention(
                queries(q_bthd), keys(k_bskd), keys(v_bskd), visible_bts, scale=scale, soft_cap=soft_cap
            )
        )
    return jnp.concatenate(blocks, axis=1)


def visible(queries: Places, keys: Places, window: int | None) -> jax.Array:
    """Which keys each query sees, as `packed_attention` says: bool [b, t, s]."""
    visible_bts = queries.rows[:, :, None] >= keys.rows[:, None]
    if keys.until is None:
        visible_bts &= queries.segment_ids[:, :, None] == keys.segment_ids[:, None]
    else:
        visible_bts &= queries.rows[:, :, None] < keys.until[:, None]
    if window is not None:
        visible_bts &= queries.positions[:, :, None] - keys.positions[:, None] < window
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
