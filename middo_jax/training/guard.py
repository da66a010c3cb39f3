"""Skips bad steps: loss or gradient is not finite, or the loss is far above the usual loss.

The decision is made on the device, as part of the step: the device does not wait for the host.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

_WINDOW = 64  # losses whose median is the usual one
_LEAST = 8  # of them; before, none is usual
# Nats that a spike is over the usual loss at least: once a dataset is known by heart, a rare batch is at
# three times the usual 0.1 without any harm.
SPIKE_MARGIN = 1.0


class GuardState(NamedTuple):
    """State of `guarded`.

    Attributes:
      inner: state of the guarded optimizer, a chain whose last transformation counts the steps.
      recent_w: float32 [w], losses of the last w steps that were taken; NaN where there is none yet.
      was_bad: bool scalar, whether the last step was skipped.
    """

    inner: tuple[Any, ...]
    recent_w: jax.Array
    was_bad: jax.Array


def usual_loss(recent_w: jax.Array) -> jax.Array:
    """Returns the median of `GuardState.recent_w`, a float32 scalar; NaN while there are too few losses."""
    return jnp.where(jnp.isfinite(recent_w).sum() < _LEAST, jnp.nan, jnp.nanmedian(recent_w))


def guarded(
    inner: optax.GradientTransformation, spike_factor: float | None
) -> optax.GradientTransformationExtraArgs:
    """Wraps an optimizer: a bad step changes neither parameters nor moments, but it counts as a step.

    A step is bad if its loss or the gradient's norm is not finite or, with a factor, if the loss is over that
    many times the median of the last steps' (NaN, which compares as False, while these are too few) and at
    least `SPIKE_MARGIN` above it.

    `update` takes the step's `loss` as an extra argument. Without it, only the gradient is checked.
    """

    def init(params: Any) -> GuardState:
        # The moments are float32, whatever the dtype of the parameters.
        state = inner.init(jax.tree.map(lambda x: x.astype(jnp.float32), params))
        assert isinstance(state, tuple)
        return GuardState(state, jnp.full(_WINDOW, jnp.nan, jnp.float32), jnp.zeros((), bool))

    def update(
        updates: Any, state: Any, params: Any = None, *, loss: jax.typing.ArrayLike = 0.0, **_: Any
    ) -> tuple[Any, GuardState]:
        loss = jnp.asarray(loss, jnp.float32)
        is_bad = ~(jnp.isfinite(loss) & jnp.isfinite(optax.tree.norm(updates)))
        if spike_factor is not None:
            usual = usual_loss(state.recent_w)
            is_bad |= loss > jnp.maximum(spike_factor * usual, usual + SPIKE_MARGIN)

        def unless_bad(new: jax.Array, old: jax.typing.ArrayLike) -> jax.Array:
            return jnp.where(is_bad, old, new)

        steps, taken = inner.update(updates, state.inner, params)
        assert isinstance(taken, tuple)
        *rest, count = taken
        rest = jax.tree.map(unless_bad, rest, list(state.inner[:-1]))
        recent_w = unless_bad(jnp.append(state.recent_w[1:], loss), state.recent_w)
        return jax.tree.map(lambda step: unless_bad(step, 0.0), steps), GuardState(
            (*rest, count), recent_w, is_bad
        )

    return optax.GradientTransformationExtraArgs(init, update)
