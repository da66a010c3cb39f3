"""Supervised fine-tuning: a deterministic plan of batches, run step by step, that can be killed at any time.

A batch is a function of its step's number alone, so that to resume is to know that number.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import optax

from middo_jax.config import TrainSettings
from middo_jax.data.tokenize import TokenizedExample
from middo_jax.models.checkpoint import read_metadata, restore_params
from middo_jax.models.lora import partition
from middo_jax.models.model import Model, Params, abstract_model, joined
from middo_jax.training.checkpoint import TrainingCheckpoints, TrainState, another_training, remove_steps
from middo_jax.training.checks import check_batch, check_examples, check_fill
from middo_jax.training.evaluations import Evaluate, Evaluations
from middo_jax.training.feed import feed, longest_example, plan_training
from middo_jax.training.identity import identity as training_identity
from middo_jax.training.memory import out_of_memory_explained
from middo_jax.training.metrics import MetricsLog, StepMetrics
from middo_jax.training.optimizer import abstract_opt_state, make_optimizer
from middo_jax.training.step import abstract_batch, make_train_step
from middo_jax.training.stopping import deferred_stops
from middo_jax.training.trackers import require_trackers, trackers


def train(
    model: Model,
    tokenized: Sequence[TokenizedExample],
    settings: TrainSettings,
    *,
    seed: int,
    pack_length: int,
    out_dir: str | Path,
    chunk: int,
    metadata: Mapping[str, Any] | None = None,
    on_step: Callable[[StepMetrics], None] | None = None,
    evaluate: Evaluate | None = None,
) -> Model:
    """Fine-tunes, and goes on where an earlier call with the same arguments was stopped.

    All parameters are trained, or the adapters alone if the decoder has some: then no other has a gradient or
    optimizer state, and checkpoints hold the adapters only.

    Killed and called again, it ends with the parameters and the metrics.jsonl (but for its speeds) of an
    uninterrupted run, bit for bit on a CPU. Told to stop, by Ctrl-C or a SIGTERM, it ends the step under way,
    saves and raises, see `stopping`. Called again when done, it returns what was saved.

    Args:
      model: where training starts, and on which mesh; its config's dtype is what forward passes compute in.
        What is trained is cast to `settings.param_dtype`, adapters to float32. That is consumed: its memory
        is reused, the arrays are gone.
      tokenized: the examples.
      settings: see TrainSettings.
      seed: of the order of the examples, and of stochastic rounding.
      pack_length: tokens of a packed sequence.
      out_dir: gets checkpoint/, metrics.jsonl and, if anything is evaluated, evaluations.jsonl.
      chunk: target positions of a device whose logits exist at one time.
      metadata: small JSON values to keep beside the final parameters, such as {"base": path of the model};
        a checkpoint with other ones is of another training.
      on_step: told of every finished step.
      evaluate: model -> held-out loss; asked every `settings.eval_every` steps and after the last.

    Returns:
      The model after training; what was not trained is what came in.

    Raises:
      TrainingDataError: no examples, nothing to learn in them, or tokens that the model does not know.
      ConfigError: an example is longer than `pack_length`, the mesh does not divide the batch, the examples
        do not fill one, or a package is missing.
      TrainingDiverged: a bad step, or too many of them in a row.
      OutOfMemory: a step does not fit the devices.
      RunError: `out_dir` holds a checkpoint of another training.
      KeyboardInterrupt, Preempted: told to stop; all is saved.
    """
    config, mesh, out_dir = model.config, model.mesh, Path(out_dir)
    check_examples(tokenized, pack_length, config.vocab_size)
    check_batch(settings, mesh)
    require_trackers(settings)
    checkpoint = out_dir / "checkpoint"
    metadata = metadata or {}
    identity = training_identity(config, model.params, tokenized, settings, seed, pack_length, metadata)
    trained, frozen = partition(model.params, config)
    finished = read_metadata(checkpoint)
    if finished is not None:
        if finished.get("identity") != identity:
            raise another_training(checkpoint)
        remove_steps(checkpoint)
        _consume(trained)
        return model.with_params(joined(restore_params(checkpoint, config, mesh), frozen))

    plan = plan_training(tokenized, settings, seed, pack_length)
    check_fill(len(tokenized), sum(len(rows) for epoch, rows in plan if epoch == 0), settings, mesh)
    optimizer = make_optimizer(settings, len(plan))
    param_dtype = settings.param_dtype if config.lora is None else "float32"
    target, frozen_target = partition(abstract_model(config, mesh, param_dtype).params, config)
    frozen = jax.tree.map(lambda x, to: jax.device_put(x, to.sharding), frozen, frozen_target)
    opt_target = abstract_opt_state(optimizer, target, mesh)
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.set_mesh(mesh))
        checkpoints = stack.enter_context(TrainingCheckpoints(checkpoint, identity, asynchronous=not on_cpu))
        stop_if_told = stack.enter_context(deferred_stops())
        state = checkpoints.restore(target, opt_target)
        with out_of_memory_explained(settings, mesh):
            if state is None:
                state = _beginning(trained, target, optimizer, opt_target)
            else:
                _consume(trained)
            whole, longest = (target, opt_target), longest_example(tokenized, pack_length)
            step = make_train_step(
                model.graphdef,
                optimizer,
                settings,
                len(plan),
                chunk=chunk,
                state=whole,
                longest=longest,
                seed=seed,
            )
            compiled = step.lower(*whole, frozen, abstract_batch(settings, pack_length, mesh)).compile()
        track = stack.enter_context(trackers(settings, out_dir, state.step, identity))
        evaluations = Evaluations(
            out_dir / "evaluations.jsonl", evaluate, settings.eval_every, len(plan), track
        )
        evaluations.resume(state.step)
        log = stack.enter_context(
            MetricsLog(
                out_dir / "metrics.jsonl", state.step, plan, tokenized, settings, config, mesh, track, on_step
            )
        )
        batches = stack.enter_context(
            contextlib.closing(feed(tokenized, plan[state.step :], settings, pack_length, mesh))
        )

        def evaluate_and_save(state: TrainState) -> None:
            is_due = state.step % settings.save_every == 0 and 0 < state.step < len(plan)
            if evaluations.is_due(state.step):
                log.catch_up()
                evaluations.run(state.step, model.with_params(joined(state.trained, frozen)))
            if settings.keep_best:
                checkpoints.keep_best(evaluations.best_step)
                is_due |= evaluations.best_step == state.step
            if is_due:
                log.catch_up()
                checkpoints.save(state)

        try:
            with out_of_memory_explained(settings, mesh, compiled):
                evaluate_and_save(state)  # an evaluation for which there was no time at the last stop
                for batch, wait_s in batches:
                    log.fetched(wait_s)
                    trained, opt_state, outputs = compiled(state.trained, state.opt_state, frozen, batch)
                    state = TrainState(state.step + 1, trained, opt_state)
                    log.dispatched(outputs)
                    stop_if_told(state.step)
                    evaluate_and_save(state)
                log.catch_up()
        except (KeyboardInterrupt, SystemExit):
            log.catch_up(quietly=True)
            checkpoints.save(state)
            raise
        checkpoints.finish(state, metadata)
        stop_if_told()
    return model.with_params(joined(state.trained, frozen))


def _beginning(
    trained: Params,
    target: Params,
    optimizer: optax.GradientTransformationExtraArgs,
    opt_target: optax.OptState,
) -> TrainState:
    """Before the first step: parameters and moments as the targets say."""
    trained = jax.tree.map(lambda x, to: jax.device_put(x.astype(to.dtype), to.sharding), trained, target)
    init = jax.jit(optimizer.init, out_shardings=jax.tree.map(lambda x: x.sharding, opt_target))
    return TrainState(0, trained, init(trained))


def _consume(params: Params) -> None:
    # As donation would have done: callers see one behaviour, and the memory is free before it is needed.
    for x in jax.tree.leaves(params):
        x.delete()
