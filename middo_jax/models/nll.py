"""Token negative log-likelihoods without the whole logits: [b, t, v] never exists.

Axes: b row, t position, n target slot within a row, d model width, v vocabulary.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from middo_jax.models.decoder import Decoder
from middo_jax.parallel.mesh import constrain


def target_nll(
    model: Decoder, hidden_btd: jax.Array, next_bt: jax.Array, is_target_bt: jax.Array, chunk: int
) -> jax.Array:
    """-log p(next token) where that is a target, 0 elsewhere.

    Only targets are unembedded: each row's target positions are moved to its front, and a scan takes
    `chunk / b` of every row at a time and skips chunks in which no row has any. The backward pass
    recomputes a chunk's logits, so that they exist for one chunk only there too.

    Args:
      model: whose `unembed` is used.
      hidden_btd: last hidden state of each position.
      next_bt: int32, the token that follows in the text; any where that is no target.
      is_target_bt: bool; the next token is a target.
      chunk: target positions of all rows whose logits exist at one time.

    Returns:
      [b, t] float32.
    """
    b, t = next_bt.shape
    width = min(t, max(1, chunk // b))
    steps = -(-t // width)
    order_bn = jnp.argsort(~is_target_bt, axis=1, stable=True)  # targets first, in their order
    order_bn = jnp.pad(order_bn, ((0, 0), (0, steps * width - t)))
    in_use_bn = jnp.arange(steps * width) < is_target_bt.sum(axis=1, keepdims=True)

    def chunk_nll(position_bn: jax.Array, in_use_bn: jax.Array) -> jax.Array:
        hidden_bnd = jnp.take_along_axis(hidden_btd, position_bn[..., None], axis=1)
        logits = model.unembed(hidden_bnd.reshape(b * width, -1))
        logits_bnv = constrain(logits.reshape(b, width, -1), "batch", None, "vocab")
        target_bn = jnp.take_along_axis(next_bt, position_bn, axis=1)
        chosen_bn = jnp.take_along_axis(logits_bnv, target_bn[..., None], axis=2)[..., 0]
        return jnp.where(in_use_bn, jax.nn.logsumexp(logits_bnv, axis=-1) - chosen_bn, 0.0)

    def no_nll(*_: jax.Array) -> jax.Array:
        return jnp.zeros((b, width), jnp.float32)

    # Around the condition: within, what the backward pass needs, the whole head too, would be kept a chunk.
    @jax.checkpoint
    def step(_: None, inputs: tuple[jax.Array, jax.Array]) -> tuple[None, jax.Array]:
        position_bn, in_use_bn = inputs
        return None, jax.lax.cond(in_use_bn.any(), chunk_nll, no_nll, position_bn, in_use_bn)

    def by_step(x_bn: jax.Array) -> jax.Array:
        return x_bn.reshape(b, steps, width).swapaxes(0, 1)

    _, nll_sbn = jax.lax.scan(step, None, (by_step(order_bn), by_step(in_use_bn)))
    nll_bn = nll_sbn.swapaxes(0, 1).reshape(b, -1)
    # Slots not in use hold 0 and may repeat a position: adding them changes nothing.
    return jnp.zeros((b, t), jnp.float32).at[jnp.arange(b)[:, None], order_bn].add(nll_bn)
