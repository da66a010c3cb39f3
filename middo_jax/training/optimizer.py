"""Optimizers, global-norm clipping and learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from middo_jax.config import Adafactor, AdamW, TrainSettings
from middo_jax.parallel.mesh import named_sharding
from middo_jax.training.guard import GuardState, guarded

# Step, counted from 0 -> float32 learning rate.
Schedule = Callable[[jax.typing.ArrayLike], jax.Array]


def learning_rate_schedule(settings: TrainSettings, total_steps: int) -> Schedule:
    """Returns the function from step, counted from 0, to learning rate.

    The rate rises linearly over ceil(warmup_ratio * total_steps) steps to the peak. It then stays
    (`constant`) or falls towards 0, which it would reach one step after the last (`linear`, `cosine`). The
    first step already has a positive rate: a rate of 0, as in transformers, would waste a good part of a
    short training.
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


def make_optimizer(settings: TrainSettings, total_steps: int) -> optax.GradientTransformationExtraArgs:
    """Returns global-norm clipping and the optimizer, guarded against bad steps.

    The last transformation of the chain counts the steps. `update` expects float32 parameters and gradients,
    whatever dtype the model is stored in. Weight decay excludes norms and embeddings, see `decayed`.

    `adamw` (arXiv 1711.05101) keeps two float32 moments per parameter. `adafactor` (arXiv 1804.04235) keeps
    no first moment, and only row and column means of the second, which take next to no memory. It is used
    without scaling by parameter size and with AdamW's decay, so that learning rates mean much the same for
    both. What remains of Adafactor is the factored moment and the clipping of updates with a root mean square
    over 1; a stack of layers is clipped as one array. (AdamW with bfloat16 moments would only halve its
    state, and a second moment that changes by a thousandth per step never changes in 8 bits.)
    """
    match settings.optimizer:
        case AdamW(betas=(beta1, beta2)):
            scaling = (optax.scale_by_adam(b1=beta1, b2=beta2),)
        case Adafactor():
            scaling = (optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0))
    chain = optax.chain(
        optax.clip_by_global_norm(settings.max_grad_norm),
        *scaling,
        optax.add_decayed_weights(settings.optimizer.weight_decay, mask=decayed),
        optax.scale_by_learning_rate(learning_rate_schedule(settings, total_steps)),
    )
    return guarded(chain, settings.on_bad_step.spike_factor)


def steps_taken(opt_state: optax.OptState) -> jax.Array:
    """Returns the steps that a state of `make_optimizer` has counted, int32: the number of the next step."""
    assert isinstance(opt_state, GuardState)
    scaling = opt_state.inner[-1]
    assert isinstance(scaling, optax.ScaleByScheduleState)
    return jnp.asarray(scaling.count)


def decayed(params: nnx.State) -> nnx.State:
    """Returns the mask of weight decay: True for projections, adapters and head; False for all others.

    Norms, biases and embeddings are not decayed.
    """
    return nnx.map_state(lambda path, _: "_proj" in str(path[-1]) or path[-1] == "lm_head", params)


def abstract_opt_state(
    optimizer: optax.GradientTransformation, params: nnx.State, mesh: Mesh
) -> optax.OptState:
    """Returns shapes, dtypes and shardings of the optimizer state: a moment is sharded like its parameter.

    A factored moment lacks one axis of its parameter; its other axes are sharded like the parameter's.

    Args:
      optimizer: optimizer from `make_optimizer`.
      params: arrays, or shapes with shardings.
      mesh: device mesh; the rest of the state is small and is replicated over it.
    """
    of_path = {tuple(map(str, path)): param for path, param in jax.tree.leaves_with_path(params)}

    def place(path: tuple[Any, ...], value: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        # A moment's path ends with its parameter's path.
        names = tuple(map(str, path))
        param = next((of_path[names[i:]] for i in range(len(names)) if names[i:] in of_path), None)
        spec = None if param is None else _spec_of_moment(value.shape, param)
        sharding = named_sharding(mesh) if spec is None else NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=sharding)

    return jax.tree.map_with_path(place, jax.eval_shape(optimizer.init, params))


def _spec_of_moment(shape: tuple[int, ...], param: jax.Array) -> PartitionSpec | None:
    assert isinstance(param.sharding, NamedSharding)
    axes = [*param.sharding.spec, *[None] * (param.ndim - len(param.sharding.spec))]
    if shape == param.shape:
        return PartitionSpec(*axes)
    for left_out in range(param.ndim):
        if shape == param.shape[:left_out] + param.shape[left_out + 1 :]:
            return PartitionSpec(*axes[:left_out], *axes[left_out + 1 :])
    return None
