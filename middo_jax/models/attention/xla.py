"""Attention in plain XLA: runs everywhere, honours everything, and is what the kernels are compared with.

Axes: b batch, t query position, s key position, h query heads, k key/value heads, g query heads a key head,
m queries of all heads of a key head, d head dimension.
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
    b, _, h, d = q_bthd.shape
    kv_heads = k_bskd.shape[2]
    # Turned here, once: a product of what lies otherwise would turn the scores, which are larger.
    q_bkgtd = q_bthd.reshape(b, length, kv_heads, h // kv_heads, d).transpose(0, 2, 3, 1, 4)
    k_bksd, v_bksd = k_bskd.swapaxes(1, 2), v_bskd.swapaxes(1, 2)
    blocks = []
    for start in range(0, length, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, length)
        first = start - reach + 1

        def queries(x: jax.Array, axis: int = 1, start: int = start, stop: int = stop) -> jax.Array:
            return jax.lax.slice_in_dim(x, start, stop, axis=axis)

        def keys(x: jax.Array, axis: int = 1, first: int = first, stop: int = stop) -> jax.Array:
            if first <= prefix:
                return jax.lax.slice_in_dim(x, 0, stop, axis=axis)
            near = jax.lax.slice_in_dim(x, first, stop, axis=axis)
            shared = jax.lax.slice_in_dim(x, 0, prefix, axis=axis)
            return jnp.concatenate([shared, near], axis=axis) if prefix else near

        visible_bts = visible(jax.tree.map(queries, places), jax.tree.map(keys, places), window)
        blocks.append(
            _attention(
                queries(q_bkgtd, 3),
                keys(k_bksd, 2),
                keys(v_bksd, 2),
                visible_bts,
                scale=scale,
                soft_cap=soft_cap,
            )
        )
    return jnp.concatenate(blocks, axis=3).transpose(0, 3, 1, 2, 4).reshape(q_bthd.shape)


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


def _attention(
    q_bkgtd: jax.Array,
    k_bksd: jax.Array,
    v_bksd: jax.Array,
    visible_bts: jax.Array,
    *,
    scale: float,
    soft_cap: float | None,
) -> jax.Array:
    """softmax(q k * scale) v over the visible keys; every query must see at least one.

    Returns:
      [b, k, g, t, d] in q's dtype; softmax in float32.
    """
    b, kv_heads, g, t, d = q_bkgtd.shape
    q_bkmd = q_bkgtd.reshape(b, kv_heads, g * t, d)
    scores_bkgts = _product(q_bkmd, k_bksd, 3).reshape(b, kv_heads, g, t, -1)
    scores_bkgts = masked(scores_bkgts, visible_bts, scale=scale, soft_cap=soft_cap)
    weights_bkgts = jnp.exp(scores_bkgts - jax.lax.stop_gradient(scores_bkgts.max(axis=-1, keepdims=True)))
    weights_bkms = weights_bkgts.astype(v_bksd.dtype).reshape(b, kv_heads, g * t, -1)
    sum_bkgtd = _product(weights_bkms, v_bksd, 2).reshape(q_bkgtd.shape)
    return (sum_bkgtd / weights_bkgts.sum(axis=-1, keepdims=True)).astype(q_bkgtd.dtype)


def _multiply(x_bkmn: jax.Array, y: jax.Array, axis: int) -> jax.Array:
    """Over the last axis of x and one of y's, [b, k, s, d], in float32.

    einsum may swap the two, and turns scores then. The gradient's products are of the operands' dtype, where
    JAX would make them of float32, as what comes out is: slow on accelerators.
    """
    return _dot(x_bkmn, y, 3, axis)


def _product_and_operands(
    x_bkmn: jax.Array, y: jax.Array, axis: int
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _multiply(x_bkmn, y, axis), (x_bkmn, y)


def _product_gradient(
    axis: int, operands: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x_bkmn, y = operands
    gradient = gradient.astype(x_bkmn.dtype)
    by_x = _dot(gradient, y, 3, 5 - axis)
    # Of the two only one is as wide as a head: first, so that it is what XLA turns.
    narrow, wide = (x_bkmn, gradient) if axis == 3 else (gradient, x_bkmn)
    by_y = _dot(narrow, wide, 2, 2).swapaxes(2, 3)
    return by_x.astype(x_bkmn.dtype), by_y.astype(y.dtype)


_product = jax.custom_vjp(_multiply, nondiff_argnums=(2,))
_product.defvjp(_product_and_operands, _product_gradient)


def _dot(x: jax.Array, y: jax.Array, axis_of_x: int, axis_of_y: int) -> jax.Array:
    dimensions = ((axis_of_x,), (axis_of_y,)), ((0, 1), (0, 1))
    return jax.lax.dot_general(x, y, dimensions, preferred_element_type=jnp.float32)


def masked(
    scores_bkgts: jax.Array, visible_bts: jax.Array, *, scale: float, soft_cap: float | None
) -> jax.Array:
    """Scores: scaled, capped to c tanh(score / c), and float32's minimum where unseen.

    The cap is that of arXiv 2408.00118, section 2. The minimum is finite, so that no gradient is NaN.
    """
    scores_bkgts = scale * scores_bkgts
    if soft_cap is not None:
        scores_bkgts = soft_cap * jnp.tanh(scores_bkgts / soft_cap)
    return jnp.where(visible_bts[:, None, None], scores_bkgts, jnp.finfo(jnp.float32).min)
