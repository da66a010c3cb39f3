"""Supervised fine-tuning: runs a deterministic plan of batches step by step; it can be killed at any time.

The plan determines the batch of each step, so the step alone is enough to resume.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import optax

from middo_jax.config import TrainSettings
from middo_jax.models.checkpoint import read_metadata, restore_params
from middo_jax.models.lora import partition
from middo_jax.models.model import Model, Params, abstract_model, joined
from middo_jax.training.checkpoint import TrainingCheckpoints, TrainState, another_training, remove_steps
from middo_jax.training.checks import check_batch, check_examples, check_fill
from middo_jax.training.evaluations import Evaluate, Evaluations
from middo_jax.training.feed import Fed, feed
from middo_jax.training.hooks import Hook, Hooks, every
from middo_jax.training.identity import identity as training_identity
from middo_jax.training.memory import out_of_memory_explained
from middo_jax.training.metrics import MetricsLog
from middo_jax.training.optimizer import abstract_opt_state, make_optimizer
from middo_jax.training.plan import TrainingPlan, longest_example
from middo_jax.training.saving import KeepBest, save_every
from middo_jax.training.step import abstract_batch, make_train_step
from middo_jax.training.stopping import StopCheck, deferred_stops
from middo_jax.training.trackers import require_trackers, trackers, tracking


def train(
    model: Model,
    plan: TrainingPlan,
    out_dir: str | Path,
    *,
    chunk: int,
    evaluate: Evaluate | None = None,
    hooks: Sequence[Hook] = (),
) -> Model:
    """Fine-tunes a model. Resumes where an earlier call with the same arguments was stopped.

    Trains all parameters or, if the decoder has adapters, only these: the others then have neither gradient
    nor optimizer state, and checkpoints contain only the adapters.

    A training that is killed and resumed ends with the same parameters and metrics.jsonl (except `speed`) as
    an uninterrupted one, bit for bit on a CPU. On Ctrl-C or SIGTERM it finishes the current step, saves and
    raises, see `stopping`. If the training is already finished, the saved model is returned.

    Args:
      model: the initial model and its mesh; forward passes compute in the dtype of its config. The trained
        parameters are cast to `train.param_dtype`, adapters to float32. Their arrays are donated: do not use
        them afterwards.
      plan: examples and settings.
      out_dir: folder for checkpoint/, metrics.jsonl and, if anything is evaluated, evaluations.jsonl.
      chunk: number of target positions per device whose logits exist at one time.
      evaluate: model -> held-out loss, called every `train.eval_every` steps and after the last.
      hooks: further hooks to call during training, see `hooks`.

    Returns:
      The model after training; its frozen parameters are those of `model`.

    Raises:
      TrainingDataError: there are no examples, they have no target tokens, or they have token IDs outside the
        model's vocabulary.
      ConfigError: an example is longer than a row, the mesh does not divide the batch, the examples do not
        fill one, or a package is missing.
      TrainingDiverged: a bad step, or too many of them in a row.
      TrainingWrecked: the last losses are far above the first.
      OutOfMemory: a step does not fit the devices.
      RunError: `out_dir` contains a checkpoint of another training.
      KeyboardInterrupt, Preempted: the process was told to stop; everything is saved.
    """
    check_examples(plan.facts, plan.pack_length, model.config.vocab_size)
    check_batch(plan.settings, model.mesh)
    require_trackers(plan.settings)
    identity = training_identity(model, plan)
    finished = _finished(model, Path(out_dir) / "checkpoint", identity)
    return finished or _run(model, plan, Path(out_dir), identity, chunk, evaluate, hooks)


def _finished(model: Model, checkpoint: Path, identity: str) -> Model | None:
    """Returns the saved model if the training is already finished, else None. Donates like a training."""
    finished = read_metadata(checkpoint)
    if finished is None:
        return None
    if finished.get("identity") != identity:
        raise another_training(checkpoint)
    remove_steps(checkpoint)
    trained, frozen = partition(model.params, model.config)
    _consume(trained)
    return model.with_params(joined(restore_params(checkpoint, model.config, model.mesh), frozen))


def _run(
    model: Model,
    plan: TrainingPlan,
    out_dir: Path,
    identity: str,
    chunk: int,
    evaluate: Evaluate | None,
    hooks: Sequence[Hook],
) -> Model:
    settings, mesh = plan.settings, model.mesh
    check_fill(len(plan.facts.ids), plan.rows_of_epoch, settings, mesh)
    in_background = mesh.devices.flat[0].platform != "cpu"
    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.set_mesh(mesh))
        checkpoint, logs = out_dir / "checkpoint", (out_dir / "metrics.jsonl", out_dir / "evaluations.jsonl")
        checkpoints = stack.enter_context(
            TrainingCheckpoints(checkpoint, identity, asynchronous=in_background, logs=logs)
        )
        stop_if_told = stack.enter_context(deferred_stops())
        begun = _begin(model, plan, checkpoints, chunk)
        done = begun.state.step
        track = stack.enter_context(trackers(settings, out_dir, done, identity))
        evaluations = Evaluations(out_dir / "evaluations.jsonl", done, track)
        log = stack.enter_context(MetricsLog(out_dir / "metrics.jsonl", done, plan, model.config, mesh))
        batches = feed(plan.tokenized, plan.steps[done:], settings, plan.pack_length, mesh)
        stack.enter_context(contextlib.closing(batches))
        own = [
            tracking(track),
            *_evaluating(settings, evaluations, evaluate),
            *([KeepBest(checkpoints, evaluations)] if settings.keep_best else []),
            save_every(settings.save_every, checkpoints),
        ]
        all_hooks = Hooks([*own, *hooks], log, len(plan.steps), begun.with_state)
        with out_of_memory_explained(settings, mesh, begun.step):
            state = _steps(begun, batches, log, all_hooks, checkpoints, stop_if_told)
        log.check_end()
        checkpoints.finish(state, plan.metadata)
        stop_if_told()
    return begun.with_state(state)


def _evaluating(settings: TrainSettings, evaluations: Evaluations, evaluate: Evaluate | None) -> list[Hook]:
    if evaluate is None or settings.eval_every is None:
        return []
    return [every(settings.eval_every, functools.partial(evaluations.evaluate, evaluate), and_last=True)]


class _Begun(NamedTuple):
    """A training that was set up or restored, before the first step of this process.

    Attributes:
      model: the initial model; its trained parameters are already donated.
      frozen: the parameters that are not trained.
      state: the restored state, or the state before step 1.
      step: the compiled step.
    """

    model: Model
    frozen: Params
    state: TrainState
    step: jax.stages.Compiled

    def with_state(self, state: TrainState) -> Model:
        """Returns the model with the trained parameters of a state."""
        return self.model.with_params(joined(state.trained, self.frozen))


def _begin(model: Model, plan: TrainingPlan, checkpoints: TrainingCheckpoints, chunk: int) -> _Begun:
    settings, config, mesh = plan.settings, model.config, model.mesh
    trained, frozen = partition(model.params, config)
    param_dtype = settings.param_dtype if config.lora is None else "float32"
    target, frozen_target = partition(abstract_model(config, mesh, param_dtype).params, config)
    frozen = jax.tree.map(lambda x, to: jax.device_put(x, to.sharding), frozen, frozen_target)
    optimizer = make_optimizer(settings, len(plan.steps))
    whole = target, abstract_opt_state(optimizer, target, mesh)
    state = checkpoints.restore(*whole)
    with out_of_memory_explained(settings, mesh):
        if state is None:
            state = _beginning(trained, target, optimizer, whole[1])
        else:
            _consume(trained)
        step = make_train_step(
            model.graphdef,
            settings,
            len(plan.steps),
            state=whole,
            chunk=chunk,
            longest=longest_example(plan.facts.length_n.tolist(), plan.pack_length),
            seed=plan.seed,
        )
        batch = abstract_batch(settings, plan.pack_length, mesh)
        return _Begun(model, frozen, state, step.lower(*whole, frozen, batch).compile())


def _steps(
    begun: _Begun,
    batches: Iterable[Fed],
    log: MetricsLog,
    hooks: Hooks,
    checkpoints: TrainingCheckpoints,
    stop_if_told: StopCheck,
) -> TrainState:
    """Runs the remaining steps. On a stop signal it saves and raises."""
    state = begun.state
    try:
        hooks.after_step(state)  # runs the evaluation that the last stop may have prevented
        for batch, wait_s in batches:
            log.fetched(wait_s)
            trained, opt_state, outputs = begun.step(state.trained, state.opt_state, begun.frozen, batch)
            state = TrainState(state.step + 1, trained, opt_state)
            hooks.dispatched(outputs)
            stop_if_told(state.step)
            hooks.after_step(state)
        hooks.settle()
    except (KeyboardInterrupt, SystemExit):
        metrics = log.catch_up()
        checkpoints.save(state)
        hooks.tell(metrics)  # last, since a hook may raise
        raise
    return state


def _beginning(
    trained: Params,
    target: Params,
    optimizer: optax.GradientTransformationExtraArgs,
    opt_target: optax.OptState,
) -> TrainState:
    """Returns the state before the first step, with the dtypes and shardings of the targets."""
    trained = jax.tree.map(lambda x, to: jax.device_put(x.astype(to.dtype), to.sharding), trained, target)
    init = jax.jit(optimizer.init, out_shardings=jax.tree.map(lambda x: x.sharding, opt_target))
    return TrainState(0, trained, init(trained))


def _consume(params: Params) -> None:
    # Deletes the arrays as donation does, so that callers see one behaviour and the memory is freed early.
    for x in jax.tree.leaves(params):
        x.delete()
