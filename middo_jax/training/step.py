"""One optimizer step as a pure function. Axes: docs/contributing.md#axes; a micro-batch.

The parameters are two trees. Only `trained` has gradients and optimizer state. `frozen` is the base of LoRA
adapters, or empty.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jax.typing import DTypeLike

from middo_jax.config import TrainSettings
from middo_jax.data.packing import PackedBatch
from middo_jax.models.decoder import Remat
from middo_jax.models.model import Params, Structure, bound
from middo_jax.models.nll import target_nll_sum
from middo_jax.parallel.hosts import own_spans
from middo_jax.parallel.mesh import batch_divisor, named_sharding
from middo_jax.training.guard import GuardState, usual_loss
from middo_jax.training.optimizer import learning_rate_schedule, make_optimizer, steps_taken
from middo_jax.training.rounding import stochastic_round


class Batch(NamedTuple):
    """The arrays of a `PackedBatch` that the step uses: [b, t] each, or [a, b, t] in micro-batches."""

    tokens_bt: jax.Array
    segment_ids_bt: jax.Array
    positions_bt: jax.Array
    is_target_bt: jax.Array


class StepOutputs(NamedTuple):
    """Metrics of a step: scalars on the device.

    Attributes:
      loss: float32, mean negative log-likelihood of the batch's target tokens, before the update.
      n_target_tokens: int32, number of target tokens in the batch.
      grad_norm: float32, global norm of the gradient before clipping.
      learning_rate: float32, learning rate of this step.
      is_bad: bool, whether the step was skipped, see `guard`.
      usual_loss: float32, the loss that `loss` is compared with; NaN while there are too few steps.
    """

    loss: jax.Array
    n_target_tokens: jax.Array
    grad_norm: jax.Array
    learning_rate: jax.Array
    is_bad: jax.Array
    usual_loss: jax.Array


def batch_nll(
    graphdef: Structure,
    trained: Params,
    frozen: Params,
    batch: Batch,
    chunk: int,
    remat: Remat,
    longest: int | None = None,
) -> jax.Array:
    """Returns the sum of the targets' negative log-likelihoods in packed rows [b, t], a float32 scalar.

    Args:
      graphdef: the decoder's structure.
      trained: the trained parameters.
      frozen: the frozen parameters.
      batch: packed rows.
      chunk: number of target positions per device whose logits exist at one time.
      remat: what each layer saves for the backward pass.
      longest: upper bound of the examples' lengths; attention skips keys further back than this.
    """
    model = bound(graphdef, trained, frozen)
    places = batch.segment_ids_bt, batch.positions_bt
    hidden_btd = model.hidden(batch.tokens_bt, *places, longest=longest, remat=remat)
    next_bt = jnp.roll(batch.tokens_bt, -1, axis=1)
    return target_nll_sum(model, hidden_btd, next_bt, batch.is_target_bt, chunk)


def batch_gradient(
    graphdef: Structure,
    trained: Params,
    frozen: Params,
    batch: Batch,
    chunk: int,
    remat: Remat,
    longest: int | None = None,
) -> tuple[jax.Array, jax.Array, Params]:
    """Returns (loss, n_targets, float32 gradient of `trained`) of micro-batches [a, b, t] as one batch.

    All targets have the same weight: each is divided by the number of targets of the whole batch.
    """
    n_targets = batch.is_target_bt.sum()
    divisor = jnp.maximum(n_targets, 1)

    @jax.value_and_grad
    def share(trained: Params, micro_batch: Batch) -> jax.Array:
        return batch_nll(graphdef, trained, frozen, micro_batch, chunk, remat, longest) / divisor

    def share_in_float32(micro_batch: Batch) -> tuple[jax.Array, Params]:
        return jax.tree.map(lambda x: x.astype(jnp.float32), share(trained, micro_batch))

    def add(sums: tuple[jax.Array, Params], micro_batch: Batch) -> tuple[tuple[jax.Array, Params], None]:
        return jax.tree.map(jnp.add, sums, share_in_float32(micro_batch)), None

    if len(batch.tokens_bt) == 1:  # nothing to accumulate: a scan would need memory for a second gradient
        loss, gradient = share_in_float32(jax.tree.map(lambda x_abt: x_abt[0], batch))
    else:
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), (jnp.float32(0), trained))
        (loss, gradient), _ = jax.lax.scan(add, zeros, batch)
    return loss, n_targets, gradient


def make_train_step(
    graphdef: Structure,
    settings: TrainSettings,
    total_steps: int,
    *,
    state: tuple[Params, optax.OptState],
    chunk: int,
    longest: int | None = None,
    seed: int = 0,
) -> jax.stages.Wrapped:
    """Returns the jitted step `(trained, opt_state, frozen, batch) -> (trained, opt_state, outputs)`.

    The first two arguments are donated. A bad step returns their values unchanged, except for the count of
    steps.

    Args:
      graphdef: the decoder's structure.
      settings: training settings.
      total_steps: number of steps of the whole training.
      state: (trained, opt_state) or their shapes with shardings; `opt_state` is from `make_optimizer` with
        the same settings and steps. The results get the same shardings.
      chunk: number of target positions per device whose logits exist at one time.
      longest: upper bound of the examples' lengths.
      seed: seed of stochastic rounding.
    """
    optimizer = make_optimizer(settings, total_steps)
    schedule = learning_rate_schedule(settings, total_steps)

    def train_step(
        trained: Params, opt_state: GuardState, frozen: Params, batch: Batch
    ) -> tuple[Params, GuardState, StepOutputs]:
        loss, n_targets, gradient = batch_gradient(
            graphdef, trained, frozen, batch, chunk, settings.recomputed, longest
        )
        step, grad_norm, usual = (
            steps_taken(opt_state),
            optax.tree.norm(gradient),
            usual_loss(opt_state.recent_w),
        )
        wide = jax.tree.map(lambda x: x.astype(jnp.float32), trained)
        with jax.named_scope("optimizer"):
            updates, new_state = optimizer.update(gradient, opt_state, wide, loss=loss)
        assert isinstance(new_state, GuardState)
        outputs = StepOutputs(loss, n_targets, grad_norm, schedule(step), new_state.was_bad, usual)
        moved = jax.tree.map(jnp.add, wide, updates)
        key = jax.random.fold_in(jax.random.key(seed), step)
        return _stored_as(trained, moved, key), new_state, outputs

    shardings = jax.tree.map(lambda x: x.sharding, state)
    return jax.jit(train_step, donate_argnums=(0, 1), out_shardings=(*shardings, None))


def _stored_as(like: Params, wide: Params, key: jax.Array) -> Params:
    """Casts float32 values to the dtypes of `like`, with stochastic rounding to bfloat16."""
    leaves, structure = jax.tree.flatten(wide)
    stored = [
        stochastic_round(x, jax.random.fold_in(key, i))
        if before.dtype == jnp.bfloat16
        else x.astype(before.dtype)
        for i, (x, before) in enumerate(zip(leaves, jax.tree.leaves(like), strict=True))
    ]
    return jax.tree.unflatten(structure, stored)


def abstract_batch(settings: TrainSettings, pack_length: int, mesh: Mesh) -> Batch:
    """Returns shapes, dtypes and shardings of the batches that `put_batch` returns."""
    micro_batches = settings.micro_batches
    shape = (micro_batches, settings.batch_size // micro_batches, pack_length)

    def of(dtype: DTypeLike) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=named_sharding(mesh, None, "batch"))

    return Batch(of(jnp.int32), of(jnp.int32), of(jnp.int32), of(jnp.bool_))


def own_rows(settings: TrainSettings, mesh: Mesh) -> list[int]:
    """The rows of a step's batch, a * b, that devices of this process read, in order."""
    micro_batches = settings.micro_batches
    b = settings.batch_size // micro_batches
    of_micro_batch = [row for start, stop in own_spans(mesh, b) for row in range(start, stop)]
    return [a * b + row for a in range(micro_batches) for row in of_micro_batch]


def put_batch(batch: PackedBatch, micro_batches: int, mesh: Mesh) -> Batch:
    """Splits rows [a * b, ...] into [a, b, ...] and shards axis b over the mesh.

    `batch` has the rows of `own_rows`, which are all rows where there is one process.
    """
    ways = batch_divisor(mesh)
    own = [first for first, _ in own_spans(mesh, ways)]  # the parts of axis b that this process has

    def put(x_bt: np.ndarray) -> jax.Array:
        parts = x_bt.reshape(micro_batches, len(own), -1, x_bt.shape[1])
        size = parts.shape[2]
        shape = micro_batches, ways * size, x_bt.shape[1]

        def of_device(index: Any) -> np.ndarray:
            start, _, _ = index[1].indices(shape[1])
            return parts[:, own.index(start // size)]

        return jax.make_array_from_callback(shape, named_sharding(mesh, None, "batch"), of_device)

    return Batch(*(put(getattr(batch, name)) for name in Batch._fields))
