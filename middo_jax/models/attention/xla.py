"""Attention in plain XLA: it runs on every platform, supports every option, and is the kernels' reference.

Axes: docs/contributing.md#axes; here q is a pair of a position and one of the g heads of a key/value head.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from middo_jax.models.attention.arguments import AttentionSpec, Packing

# Query positions per block. A block reads only the keys up to its own end, so shorter blocks waste less on
# the upper triangle. The scores [b, h, block, p] never grow with t squared.
QUERY_BLOCK = 128


class MaskInputs(NamedTuple):
    """Values per position that the mask is computed from. Each is [b, t]; `indices`, of positions in
    the row, is [1, t]."""

    indices: jax.Array
    segment_ids: jax.Array
    positions: jax.Array
    until: jax.Array | None

    @classmethod
    def of(cls, packing: Packing) -> MaskInputs:
        """The values of a whole batch."""
        indices = jnp.arange(packing.segment_ids_bt.shape[1])[None]
        return cls(indices, packing.segment_ids_bt, packing.positions_bt, packing.until_bt)


def xla_attention(
    q_bthe: jax.Array,
    k_bpke: jax.Array,
    v_bpke: jax.Array,
    packing: Packing,
    spec: AttentionSpec,
) -> jax.Array:
    """`packed_attention` in blocks of queries.

    A block reads the prefix and the keys that are within the window and the longest text's length. With
    either limit, a block's cost does not grow with the row's length.
    """
    length, prefix = q_bthe.shape[1], packing.prefix
    # A segment is contiguous, so the window also limits how far back in the row a query sees. The branches
    # of a tree follow one another, so close positions may be far apart in the row.
    window = spec.window if packing.until_bt is None else None
    reach = min(n for n in (length, packing.longest, window) if n is not None)
    mask_inputs = MaskInputs.of(packing)
    b, _, h, d = q_bthe.shape
    kv_heads = k_bpke.shape[2]
    # Transposes once, here: XLA would otherwise transpose the scores, which are larger.
    q_bkgte = q_bthe.reshape(b, length, kv_heads, h // kv_heads, d).transpose(0, 2, 3, 1, 4)
    k_bkpe, v_bkpe = k_bpke.swapaxes(1, 2), v_bpke.swapaxes(1, 2)
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

        visible_btp = visible(
            jax.tree.map(queries, mask_inputs), jax.tree.map(keys, mask_inputs), spec.window
        )
        blocks.append(attend(queries(q_bkgte, 3), keys(k_bkpe, 2), keys(v_bkpe, 2), visible_btp, spec))
    return jnp.concatenate(blocks, axis=3).transpose(0, 3, 1, 2, 4).reshape(q_bthe.shape)


def visible(queries: MaskInputs, keys: MaskInputs, window: int | None) -> jax.Array:
    """Mask of the keys that each query sees, by `packed_attention`'s rule: bool [b, t, p]."""
    visible_btp = queries.indices[:, :, None] >= keys.indices[:, None]
    if keys.until is None:
        visible_btp &= queries.segment_ids[:, :, None] == keys.segment_ids[:, None]
    else:
        visible_btp &= queries.indices[:, :, None] < keys.until[:, None]
    if window is not None:
        visible_btp &= queries.positions[:, :, None] - keys.positions[:, None] < window
    return visible_btp


def attend(
    q_bkgte: jax.Array,
    k_bkpe: jax.Array,
    v_bkpe: jax.Array,
    visible_btp: jax.Array,
    spec: AttentionSpec,
) -> jax.Array:
    """softmax(q k * scale) v over the visible keys; every query must see at least one.

    Returns:
      [b, k, g, t, e] in q's dtype; softmax in float32.
    """
    b, kv_heads, g, t, d = q_bkgte.shape
    scores_bkqp = _scores(q_bkgte.reshape(b, kv_heads, g * t, d), k_bkpe)
    scores_bkgtp = scores_bkqp.reshape(b, kv_heads, g, t, -1)
    scores_bkgtp = masked(scores_bkgtp, visible_btp, spec)
    return _mean(scores_bkgtp.reshape(scores_bkqp.shape), v_bkpe).reshape(q_bkgte.shape).astype(q_bkgte.dtype)


# Gradients are written by hand: JAX would multiply in the result's float32, which is slow on accelerators.


@jax.custom_vjp
def _scores(q_bkqe: jax.Array, k_bkpe: jax.Array) -> jax.Array:
    """q k, [b, k, q, p] float32."""
    return _dot(q_bkqe, k_bkpe, 3, 3)


def _scores_and_operands(q: jax.Array, k: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _scores(q, k), (q, k)


def _scores_gradient(
    operands: tuple[jax.Array, jax.Array], grad_scores_bkqp: jax.Array
) -> tuple[jax.Array, jax.Array]:
    q_bkqe, k_bkpe = operands
    grad_scores_bkqp = grad_scores_bkqp.astype(q_bkqe.dtype)
    grad_q = _dot(grad_scores_bkqp, k_bkpe, 3, 2)
    grad_k = _dot(q_bkqe, grad_scores_bkqp, 2, 2).swapaxes(2, 3)
    return grad_q.astype(q_bkqe.dtype), grad_k.astype(k_bkpe.dtype)


_scores.defvjp(_scores_and_operands, _scores_gradient)


@jax.custom_vjp
def _mean(scores_bkqp: jax.Array, v_bkpe: jax.Array) -> jax.Array:
    """softmax(scores) v, [b, k, q, e] float32."""
    return _mean_and_weights(scores_bkqp, v_bkpe)[0]


def _mean_and_weights(
    scores_bkqp: jax.Array, v_bkpe: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
    weights_bkqp = jnp.exp(scores_bkqp - scores_bkqp.max(axis=-1, keepdims=True))
    total_bkq1 = weights_bkqp.sum(axis=-1, keepdims=True)
    # Divides the mean and not the weights, which are the larger array.
    mean_bkqe = _dot(weights_bkqp.astype(v_bkpe.dtype), v_bkpe, 3, 2) / total_bkq1
    return mean_bkqe, (weights_bkqp, total_bkq1, v_bkpe)


def _mean_gradient(
    residuals: tuple[jax.Array, jax.Array, jax.Array], grad_mean_bkqe: jax.Array
) -> tuple[jax.Array, jax.Array]:
    weights_bkqp, total_bkq1, v_bkpe = residuals
    weights_bkqp /= total_bkq1
    grad_mean_bkqe = grad_mean_bkqe.astype(v_bkpe.dtype)
    grad_weights_bkqp = _dot(grad_mean_bkqe, v_bkpe, 3, 3)
    # Subtracting the common part also removes its rounding error.
    common_bkq1 = (weights_bkqp * grad_weights_bkqp).sum(axis=-1, keepdims=True)
    grad_v = _dot(grad_mean_bkqe, weights_bkqp.astype(v_bkpe.dtype), 2, 2).swapaxes(2, 3)
    return weights_bkqp * (grad_weights_bkqp - common_bkq1), grad_v.astype(v_bkpe.dtype)


_mean.defvjp(_mean_and_weights, _mean_gradient)


def _dot(x: jax.Array, y: jax.Array, axis_of_x: int, axis_of_y: int) -> jax.Array:
    """Contracts one axis of x with one of y, in float32; x's other axis precedes y's in the result.

    Uses `dot_general`: `einsum` may swap the operands, and XLA would then transpose the scores, the larger
    array.
    """
    dimensions = ((axis_of_x,), (axis_of_y,)), ((0, 1), (0, 1))
    return jax.lax.dot_general(x, y, dimensions, preferred_element_type=jnp.float32)


def masked(scores_bkgtp: jax.Array, visible_btp: jax.Array, spec: AttentionSpec) -> jax.Array:
    """The scores, scaled, capped to c tanh(score / c), and set to float32's minimum where masked.

    The cap is that of arXiv 2408.00118, section 2. The minimum is finite, so no gradient is NaN.
    """
    scores_bkgtp = spec.scale * scores_bkgtp
    if spec.soft_cap is not None:
        scores_bkgtp = spec.soft_cap * jnp.tanh(scores_bkgtp / spec.soft_cap)
    return jnp.where(visible_btp[:, None, None], scores_bkgtp, jnp.finfo(jnp.float32).min)
