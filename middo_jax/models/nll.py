"""Token negative log-likelihoods without the whole logits: [b, t, v] never exists.

Only targets are unembedded: those of a share, the rows that lie on the same devices, are moved to its front,
and a loop takes a chunk of every share at a time until none has any left.

Axes: b row, t position, s share, n position within it, w slot of a share in a chunk, m slot of a chunk,
d model width, v vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero

from middo_jax.models.config import DecoderConfig
from middo_jax.models.decoder import Decoder, head_product, soft_capped
from middo_jax.parallel.mesh import batch_shards, constrain

# By the head [v, d] and by the hidden states [b, t, d]; None where nobody asks.
Gradient = tuple[jax.Array | None, jax.Array | None]


@jax.named_scope("head")
def target_nll(
    model: Decoder, hidden_btd: jax.Array, next_bt: jax.Array, is_target_bt: jax.Array, chunk: int
) -> jax.Array:
    """-log p(next token) where that is a target, 0 elsewhere; `target_nll_sum` is what has a gradient.

    Args:
      model: whose head is used.
      hidden_btd: last hidden state of each position.
      next_bt: int32, the token that follows in the text; any where that is no target.
      is_target_bt: bool; the next token is a target.
      chunk: targets of a share whose logits exist at one time.

    Returns:
      [b, t] float32.
    """
    hidden_snd = _by_share(hidden_btd)
    count, chunk_at = _chunks(_by_share(next_bt), _by_share(is_target_bt), chunk)

    def step(i: jax.Array, nll_sn: jax.Array) -> jax.Array:
        at = chunk_at(i)
        return at.added(nll_sn, at.nll(model.unembed(at.rows(hidden_snd))))

    nll_sn = jax.lax.fori_loop(0, count, step, jnp.zeros(hidden_snd.shape[:2], jnp.float32))
    return nll_sn.reshape(next_bt.shape)


def target_nll_sum(
    model: Decoder, hidden_btd: jax.Array, next_bt: jax.Array, is_target_bt: jax.Array, chunk: int
) -> jax.Array:
    """Sum of `target_nll`, a float32 scalar, whose gradient is made while a chunk's logits exist.

    Logits are computed once then, where a backward pass of its own would compute them again, and what is
    kept for it is as large as the head and the hidden states (as in arXiv 2410.10989). The head's gradient is
    added up in float32; products are of the hidden states' dtype.
    """
    return _nll_sum(model.config, chunk, model.head(), hidden_btd, next_bt, is_target_bt)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
@jax.named_scope("head")
def _nll_sum(config: DecoderConfig, chunk: int, *arrays: jax.Array) -> jax.Array:
    """Without a gradient, of (head_vd, hidden_btd, next_bt, is_target_bt)."""
    return _with_gradient(config, chunk, *(CustomVJPPrimal(x, perturbed=False) for x in arrays))[0]


@jax.named_scope("head")
def _with_gradient(
    config: DecoderConfig,
    chunk: int,
    head: CustomVJPPrimal,
    hidden: CustomVJPPrimal,
    next_: CustomVJPPrimal,
    is_target: CustomVJPPrimal,
) -> tuple[jax.Array, Gradient]:
    head_vd, hidden_snd = head.value, _by_share(hidden.value)
    count, chunk_at = _chunks(_by_share(next_.value), _by_share(is_target.value), chunk)

    def step(i: jax.Array, sums: tuple[jax.Array, Gradient]) -> tuple[jax.Array, Gradient]:
        nll, (by_head, by_hidden) = sums
        at = chunk_at(i)
        hidden_md = at.rows(hidden_snd)
        cap = functools.partial(soft_capped, cap=config.final_soft_cap)
        logits_mv, by_product = jax.vjp(cap, head_product(head_vd, hidden_md))
        nll_m, by_logits_mv = at.nll_and_gradient(logits_mv)
        by_product_mv = by_product(by_logits_mv)[0].astype(hidden_md.dtype)
        if by_head is not None:
            by_head += jnp.einsum("mv,md->vd", by_product_mv, hidden_md, preferred_element_type=jnp.float32)
        if by_hidden is not None:
            by_hidden = at.added(by_hidden, by_product_mv @ head_vd.astype(hidden_md.dtype))
        return nll + nll_m.sum(), (by_head, by_hidden)

    by_head = jnp.zeros(head_vd.shape, jnp.float32) if head.perturbed else None
    by_hidden = jnp.zeros_like(hidden_snd) if hidden.perturbed else None
    nll, (by_head, by_hidden) = jax.lax.fori_loop(0, count, step, (jnp.float32(0), (by_head, by_hidden)))
    return nll, (
        None if by_head is None else by_head.astype(head_vd.dtype),
        None if by_hidden is None else by_hidden.reshape(hidden.value.shape),
    )


def _scaled(config: DecoderConfig, chunk: int, gradient: Gradient, by_nll: jax.Array) -> tuple:
    if isinstance(by_nll, SymbolicZero):
        by_nll = jnp.float32(0)
    return *(None if g is None else (by_nll * g).astype(g.dtype) for g in gradient), None, None


_nll_sum.defvjp(_with_gradient, _scaled, symbolic_zeros=True)


class _Chunk(NamedTuple):
    """Some targets of every share; slots not in use repeat a position and have no loss."""

    position_sw: jax.Array
    next_m: jax.Array
    in_use_m: jax.Array

    def nll(self, logits_mv: jax.Array) -> jax.Array:
        """[m] float32, 0 where the slot is not in use."""
        return self.nll_and_gradient(logits_mv)[0]

    def nll_and_gradient(self, logits_mv: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The same, and its gradient by the logits [m, v]: the probabilities, less 1 at the target."""
        logits_mv = constrain(logits_mv, "batch", "vocab")
        highest_m = logits_mv.max(axis=1)
        weight_mv = jnp.exp(logits_mv - highest_m[:, None])  # once for both
        total_m = weight_mv.sum(axis=1)
        chosen_m = jnp.take_along_axis(logits_mv, self.next_m[:, None], axis=1)[:, 0]
        is_chosen_mv = jnp.arange(logits_mv.shape[1]) == self.next_m[:, None]
        gradient_mv = weight_mv / total_m[:, None] - is_chosen_mv
        return (
            jnp.where(self.in_use_m, jnp.log(total_m) + highest_m - chosen_m, 0.0),
            jnp.where(self.in_use_m[:, None], gradient_mv, 0.0),
        )

    def rows(self, x_snd: jax.Array) -> jax.Array:
        """[m, d] at the targets."""
        x_swd = jnp.take_along_axis(x_snd, self.position_sw[..., None], axis=1)
        return x_swd.reshape(-1, x_snd.shape[-1])

    def added(self, x_sn: jax.Array, y_m: jax.Array) -> jax.Array:
        """[s, n, ...] with [m, ...] added at the targets."""
        s, width = self.position_sw.shape
        return x_sn.at[jnp.arange(s)[:, None], self.position_sw].add(y_m.reshape(s, width, *y_m.shape[1:]))


def _by_share(x_bt: jax.Array) -> jax.Array:
    """[b, t, ...] -> [s, n, ...]: the rows that lie on the same devices, one behind the other."""
    return x_bt.reshape(batch_shards(len(x_bt)), -1, *x_bt.shape[2:])


def _chunks(
    next_sn: jax.Array, is_target_sn: jax.Array, chunk: int
) -> tuple[jax.Array, Callable[[jax.Array], _Chunk]]:
    """(number of chunks that hold a target, the i-th)."""
    n = next_sn.shape[1]
    width = min(n, chunk)
    position_sn = jnp.argsort(~is_target_sn, axis=1, stable=True)  # targets first, in their order
    position_sn = jnp.pad(position_sn, ((0, 0), (0, -n % width)))
    targets_s1 = is_target_sn.sum(axis=1, keepdims=True)

    def at(i: jax.Array) -> _Chunk:
        position_sw = jax.lax.dynamic_slice_in_dim(position_sn, i * width, width, axis=1)
        next_sw = jnp.take_along_axis(next_sn, position_sw, axis=1)
        in_use_sw = i * width + jnp.arange(width) < targets_s1
        return _Chunk(position_sw, next_sw.reshape(-1), in_use_sw.reshape(-1))

    return -(-targets_s1.max() // width), at
