"""Token negative log-likelihoods without the full logits: [b, t, v] never exists.

Only targets are unembedded. The rows on the same devices form a share, whose targets are moved to its front.
A loop processes one chunk of every share per iteration, until no share has targets left. Shares are
independent: in the loop, devices exchange only data that is sharded along `tensor`.

Axes: docs/contributing.md#axes; w device's share of the positions; here n is a position within it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero

from middo_jax.models.config import DecoderConfig
from middo_jax.models.decoder import Decoder, head_product, soft_capped
from middo_jax.parallel.mesh import RULES, batch_shards, constrain

# Gradients by the head [v, d] and by the hidden states [b, t, d]; None where not needed.
Gradient = tuple[jax.Array | None, jax.Array | None]


@jax.named_scope("head")
def target_nll(
    model: Decoder, hidden_btd: jax.Array, next_bt: jax.Array, is_target_bt: jax.Array, chunk: int
) -> jax.Array:
    """-log p(next token) where it is a target, 0 elsewhere. Not differentiable; see `target_nll_sum`.

    Args:
      model: decoder whose head is used.
      hidden_btd: last hidden state of each position.
      next_bt: int32, the next token in the text; any value where it is not a target.
      is_target_bt: bool, whether the next token is a target.
      chunk: number of targets per share whose logits exist at the same time.

    Returns:
      [b, t] float32.
    """
    head_vd = _gathered(model.head(), hidden_btd)
    cap = functools.partial(soft_capped, cap=model.config.final_soft_cap)

    def of_share(chunks: _Chunks, hidden_nd: jax.Array) -> jax.Array:
        def step(i: jax.Array, nll_n: jax.Array) -> jax.Array:
            at = chunks.at(i)
            return at.added(nll_n, at.nll(cap(head_product(head_vd, hidden_nd[at.position_m]))))

        return jax.lax.fori_loop(0, chunks.n_chunks, step, jnp.zeros(len(hidden_nd), jnp.float32))

    return _each_share(of_share, next_bt, is_target_bt, chunk, hidden_btd).reshape(next_bt.shape)


class TargetScores(NamedTuple):
    """What `target_scores` gives, [b, t] each; 0 and False where there is no target."""

    nll_bt: jax.Array
    is_likeliest_bt: jax.Array


@jax.named_scope("head")
def target_scores(
    model: Decoder, hidden_btd: jax.Array, next_bt: jax.Array, is_target_bt: jax.Array, chunk: int
) -> TargetScores:
    """`target_nll`, and whether the target is the likeliest token; of equally likely ones the first is."""
    head_vd = _gathered(model.head(), hidden_btd)
    cap = functools.partial(soft_capped, cap=model.config.final_soft_cap)

    def of_share(chunks: _Chunks, hidden_nd: jax.Array) -> tuple[jax.Array, jax.Array]:
        def step(i: jax.Array, found: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            at, (nll_n, likeliest_n) = chunks.at(i), found
            logits_mv = cap(head_product(head_vd, hidden_nd[at.position_m]))
            return at.added(nll_n, at.nll(logits_mv)), at.added(likeliest_n, at.is_likeliest(logits_mv))

        n = len(hidden_nd)
        nothing = jnp.zeros(n, jnp.float32), jnp.zeros(n, jnp.int32)
        return jax.lax.fori_loop(0, chunks.n_chunks, step, nothing)

    nll_wn, likeliest_wn = _each_share(of_share, next_bt, is_target_bt, chunk, hidden_btd)
    return TargetScores(nll_wn.reshape(next_bt.shape), likeliest_wn.reshape(next_bt.shape) > 0)


def target_nll_sum(
    model: Decoder, hidden_btd: jax.Array, next_bt: jax.Array, is_target_bt: jax.Array, chunk: int
) -> jax.Array:
    """Sum of `target_nll`, a float32 scalar. Its gradient is computed while a chunk's logits exist.

    So logits are computed once; a separate backward pass would recompute them. The values saved for the
    backward pass are as large as the head and the hidden states (as in arXiv 2410.10989). The head's gradient
    is accumulated in float32; products are in the hidden states' dtype.
    """
    return _nll_sum(model.config, chunk, model.head(), hidden_btd, next_bt, is_target_bt)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
@jax.named_scope("head")
def _nll_sum(config: DecoderConfig, chunk: int, *arrays: jax.Array) -> jax.Array:
    """The sum without a gradient; `arrays` is (head_vd, hidden_btd, next_bt, is_target_bt)."""
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
    head_vd = _gathered(head.value, hidden.value)
    cap = functools.partial(soft_capped, cap=config.final_soft_cap)

    def of_share(chunks: _Chunks, hidden_nd: jax.Array) -> tuple[jax.Array, Gradient]:
        def step(i: jax.Array, sums: tuple[jax.Array, Gradient]) -> tuple[jax.Array, Gradient]:
            nll, (grad_head, grad_hidden) = sums
            at = chunks.at(i)
            hidden_md = hidden_nd[at.position_m]
            logits_mv, grad_product = jax.vjp(cap, head_product(head_vd, hidden_md))
            nll_m, grad_logits_mv = at.nll_and_gradient(logits_mv)
            grad_product_mv = grad_product(grad_logits_mv)[0].astype(hidden_md.dtype)
            if grad_head is not None:
                grad_head += jnp.einsum(
                    "mv,md->vd", grad_product_mv, hidden_md, preferred_element_type=jnp.float32
                )
            if grad_hidden is not None:
                grad_hidden = at.added(grad_hidden, grad_product_mv @ head_vd)
            return nll + nll_m.sum(), (grad_head, grad_hidden)

        # Each share accumulates its own gradient of the head; the shares' are summed once, at the end.
        grad_head = (
            constrain(jnp.zeros(head_vd.shape, jnp.float32), "vocab", None) if head.perturbed else None
        )
        grad_hidden = jnp.zeros_like(hidden_nd) if hidden.perturbed else None
        return jax.lax.fori_loop(0, chunks.n_chunks, step, (jnp.float32(0), (grad_head, grad_hidden)))

    nll_s, (grad_head, grad_hidden) = _each_share(of_share, next_.value, is_target.value, chunk, hidden.value)
    return nll_s.sum(), (
        None if grad_head is None else constrain(grad_head.sum(0), "vocab", "embed").astype(head.value.dtype),
        None if grad_hidden is None else grad_hidden.reshape(hidden.value.shape),
    )


def _scaled(config: DecoderConfig, chunk: int, gradient: Gradient, grad_nll: jax.Array) -> tuple:
    if isinstance(grad_nll, SymbolicZero):
        grad_nll = jnp.float32(0)
    return *(None if g is None else (grad_nll * g).astype(g.dtype) for g in gradient), None, None


_nll_sum.defvjp(_with_gradient, _scaled, symbolic_zeros=True)


def _gathered(head_vd: jax.Array, hidden_btd: jax.Array) -> jax.Array:
    """The head in the hidden states' dtype, gathered once on every device and used for all chunks."""
    return constrain(head_vd.astype(hidden_btd.dtype), "vocab", None)


class _Chunk(NamedTuple):
    """Some targets of a share. Unused slots repeat a position and have no loss."""

    position_m: jax.Array
    next_m: jax.Array
    in_use_m: jax.Array

    def nll(self, logits_mv: jax.Array) -> jax.Array:
        """The slots' losses, [m] float32; 0 where the slot is unused."""
        return self.nll_and_gradient(logits_mv)[0]

    def is_likeliest(self, logits_mv: jax.Array) -> jax.Array:
        """[m] int32: 1 where the next token has the highest logit, 0 elsewhere and where not in use."""
        logits_mv = constrain(logits_mv, None, "vocab")
        return ((jnp.argmax(logits_mv, axis=1) == self.next_m) & self.in_use_m).astype(jnp.int32)

    def nll_and_gradient(self, logits_mv: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The same, and its gradient by the logits [m, v]: the probabilities, minus 1 at the target."""
        logits_mv = constrain(logits_mv, None, "vocab")
        highest_m = logits_mv.max(axis=1)
        weight_mv = jnp.exp(logits_mv - highest_m[:, None])  # used by the loss and the gradient
        total_m = weight_mv.sum(axis=1)
        chosen_m = jnp.take_along_axis(logits_mv, self.next_m[:, None], axis=1)[:, 0]
        is_chosen_mv = jnp.arange(logits_mv.shape[1]) == self.next_m[:, None]
        gradient_mv = weight_mv / total_m[:, None] - is_chosen_mv
        return (
            jnp.where(self.in_use_m, jnp.log(total_m) + highest_m - chosen_m, 0.0),
            jnp.where(self.in_use_m[:, None], gradient_mv, 0.0),
        )

    def added(self, x_n: jax.Array, y_m: jax.Array) -> jax.Array:
        """x [n, ...] with y [m, ...] added at the targets."""
        return x_n.at[self.position_m].add(y_m)


class _Chunks(NamedTuple):
    """The targets of a share, chunk by chunk."""

    n_chunks: jax.Array  # that of the share with the most targets
    width: int
    position_n: jax.Array  # targets first, in order; padded to a multiple of the width
    next_n: jax.Array
    n_targets: jax.Array

    def at(self, i: jax.Array) -> _Chunk:
        """The i-th chunk."""
        start = i * self.width
        position_m = jax.lax.dynamic_slice_in_dim(self.position_n, start, self.width)
        in_use_m = start + jnp.arange(self.width) < self.n_targets
        return _Chunk(position_m, self.next_n[position_m], in_use_m)


def _each_share(
    of_share: Callable[[_Chunks, jax.Array], Any],
    next_bt: jax.Array,
    is_target_bt: jax.Array,
    chunk: int,
    hidden_btd: jax.Array,
) -> Any:
    """Computes `of_share(chunks, hidden_nd)` of each share on the devices of its rows; stacks the results."""
    shares = batch_shards(len(next_bt))
    next_wn, is_target_wn, hidden_wnd = (
        x.reshape(shares, -1, *x.shape[2:]) for x in (next_bt, is_target_bt, hidden_btd)
    )
    n = next_wn.shape[1]
    width = min(n, chunk)
    count = -(-is_target_wn.sum(axis=1).max() // width)

    def one(next_n: jax.Array, is_target_n: jax.Array, hidden_nd: jax.Array) -> Any:
        position_n = _targets_first(is_target_n)
        position_n = jnp.pad(position_n, (0, -n % width))
        return of_share(_Chunks(count, width, position_n, next_n, is_target_n.sum()), hidden_nd)

    where = RULES.batch if shares > 1 else None
    return jax.vmap(one, spmd_axis_name=where)(next_wn, is_target_wn, hidden_wnd)


def _targets_first(is_target_n: jax.Array) -> jax.Array:
    """int32 [n]: the positions, targets first, both in order. A sort takes a TPU's compiler minutes."""
    at_n, n_before_n = jnp.arange(len(is_target_n)), jnp.cumsum(is_target_n)
    place_n = jnp.where(is_target_n, n_before_n - 1, n_before_n[-1] + at_n - n_before_n)
    return jnp.zeros_like(at_n).at[place_n].set(at_n, unique_indices=True)
