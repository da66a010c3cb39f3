"""AdamW, global-norm clipping and the learning-rate schedule, from the settings."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from middo_jax.config import TrainSettings
from middo_jax.parallel.mesh import named_sharding

# Step, counted from 0 -> float32 learning rate.
Schedule = Callable[[jax.typing.ArrayLike], jax.Array]


def learning_rate_schedule(settings: TrainSettings, total_steps: int) -> Schedule:
    """Step, counted from 0 -> learning rate.

    Rises linearly over ceil(warmup_ratio * total_steps) steps to the peak, then stays (`constant`) or falls
    towards 0, which it would reach one step after the last (`linear`, `cosine`). The first step already
    learns: a rate of 0 there, as in transformers, would waste a good part of a short training.
    """
    warmup_steps = math.ceil(settings.warmup_ratio * total_steps)

    def learning_rate(step: jax.typing.ArrayLike) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        rising = (step + 1) / max(1, warmup_steps)
        done = jnp.clip((step - warmup_steps) / max(1, total_steps - warmup_steps), 0.0, 1.0)
        match settings.schedule:
            case "cosine":
                falling = 0.5 * (1 + jnp.cos(jnp.pi * done))
            case "linear":
                falling = 1 - done
            case "constant":
                falling = jnp.ones_like(done)
        return settings.learning_rate * jnp.where(step < warmup_steps, rising, falling)

    return learning_rate


def make_optimizer(settings: TrainSettings, total_steps: int) -> optax.GradientTransformation:
    """AdamW (arXiv 1711.05101) after global-norm clipping; the last link of the chain counts the steps.

    Weight decay leaves norms and embeddings alone: see `decayed`.
    """
    return optax.chain(
        optax.clip_by_global_norm(settings.max_grad_norm),
        optax.scale_by_adam(b1=settings.beta1, b2=settings.beta2),
        optax.add_decayed_weights(settings.weight_decay, mask=decayed),
        optax.scale_by_learning_rate(learning_rate_schedule(settings, total_steps)),
    )


def steps_taken(opt_state: optax.OptState) -> jax.Array:
    """int32: steps that a state of `make_optimizer` has counted, which is the number of the step to come."""
    assert isinstance(opt_state, tuple)
    scaling = opt_state[-1]
    assert isinstance(scaling, optax.ScaleByScheduleState)
    return jnp.asarray(scaling.count)


def decayed(params: nnx.State) -> nnx.State:
    """True for each matrix that projects a hidden state, adapters too; False for norms, biases, embedding."""
    return nnx.map_state(lambda path, _: "_proj" in str(path[-1]) or path[-1] == "lm_head", params)


def abstract_opt_state(
    optimizer: optax.GradientTransformation, params: nnx.State, mesh: Mesh
) -> optax.OptState:
    """Shapes, dtypes and shardings of the optimizer's state: moments lie where their parameters do.

    Args:
      optimizer: of `make_optimizer`.
      params: arrays, or shapes with shardings.
      mesh: where everything else, which is small, is replicated.
    """

    def of_moment(moment: jax.ShapeDtypeStruct, param: jax.Array) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(moment.shape, moment.dtype, sharding=param.sharding)

    def of_rest(value: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=named_sharding(mesh))

    shapes = jax.eval_shape(optimizer.init, params)
    return optax.tree.map_params(optimizer, of_moment, shapes, params, transform_non_params=of_rest)
