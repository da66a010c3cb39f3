"""Supervised fine-tuning: a deterministic plan of batches, run step by step, that can be killed at any time.

A batch is a function of its step's number alone, so that to resume is to know that number.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from middo_jax.config import ConfigError, TrainSettings
from middo_jax.data.packing import PackedBatch, first_fit, pack
from middo_jax.data.tokenize import TokenizedExample
from middo_jax.models.checkpoint import abstract_params, read_metadata, restore_params
from middo_jax.models.decoder import Decoder
from middo_jax.models.lora import partition
from middo_jax.parallel.mesh import batch_divisor
from middo_jax.run_dir import write_text
from middo_jax.train.checkpoint import TrainingCheckpoints, TrainState, another_training, remove_steps
from middo_jax.train.identity import identity as training_identity
from middo_jax.train.optimizer import abstract_opt_state, make_optimizer
from middo_jax.train.step import StepOutputs, make_train_step, put_batch

_log = logging.getLogger(__name__)

_BATCHES_AHEAD = 4


class TrainingDataError(ValueError):
    """The examples cannot be trained on; says which and why."""


class TrainingDiverged(RuntimeError):
    """Loss or gradient norm is no finite number; the last checkpoint was made before it.

    Attributes:
      step: the step, counted from 1.
      ids: the examples of its batch.
    """

    def __init__(self, step: int, loss: float, grad_norm: float, ids: Sequence[str]) -> None:
        shown = ", ".join(ids[:8]) + (f" and {len(ids) - 8} more" if len(ids) > 8 else "")
        super().__init__(
            f"training diverged at step {step}: loss {loss}, gradient norm {grad_norm}; look at the examples "
            f"of its batch ({shown}), or lower train.learning_rate"
        )
        self.step = step
        self.ids = tuple(ids)


class PlannedStep(NamedTuple):
    """One optimizer step: rows of indices into the examples, at most train.batch_size of them."""

    epoch: int
    rows: list[list[int]]


@dataclasses.dataclass(frozen=True)
class StepMetrics:
    """What is known of a finished step.

    Attributes:
      step: counted from 1.
      total_steps: of the whole training.
      epoch: counted from 0.
      loss: mean negative log-likelihood of the batch's target tokens, before the update.
      n_target_tokens: of the batch.
      grad_norm: global norm before clipping.
      learning_rate: of this step.
      tokens_per_second: tokens of examples, without padding; the first step after a start also compiles.
    """

    step: int
    total_steps: int
    epoch: int
    loss: float
    n_target_tokens: int
    grad_norm: float
    learning_rate: float
    tokens_per_second: float

    def row(self) -> dict[str, Any]:
        """The line of metrics.jsonl: what is the same in every run, hence without the speed."""
        values = dataclasses.asdict(self)
        del values["total_steps"], values["tokens_per_second"]
        return values


def train(
    graphdef: nnx.GraphDef[Decoder],
    params: nnx.State,
    tokenized: Sequence[TokenizedExample],
    settings: TrainSettings,
    *,
    seed: int,
    mesh: Mesh,
    pack_length: int,
    out_dir: str | Path,
    chunk: int,
    metadata: Mapping[str, Any] | None = None,
    on_step: Callable[[StepMetrics], None] | None = None,
) -> nnx.State:
    """Fine-tunes, and goes on where an earlier call with the same arguments was stopped.

    All parameters are trained, or the adapters alone if the decoder has some: then no other has a gradient or
    optimizer state, and checkpoints hold the adapters only.

    Killed and called again, it ends with the parameters and the metrics.jsonl of an uninterrupted run, bit
    for bit on a CPU. The first Ctrl-C ends the step under way, saves and raises KeyboardInterrupt; the second
    is immediate. Called again when done, it returns what was saved.

    Args:
      graphdef: the decoder's structure; its config's dtype is what forward passes compute in.
      params: where training starts; what is trained is cast to float32. That is consumed: its memory is
        reused, the arrays are gone.
      tokenized: the examples.
      settings: see TrainSettings.
      seed: of the order of the examples.
      mesh: where to train.
      pack_length: tokens of a packed sequence.
      out_dir: gets checkpoint/ and metrics.jsonl.
      chunk: target positions whose logits exist at one time.
      metadata: small JSON values to keep beside the final parameters, such as {"base": path of the model};
        a checkpoint with other ones is of another training.
      on_step: told of every finished step.

    Returns:
      The parameters after training, on the mesh; what was not trained is what came in.

    Raises:
      TrainingDataError: no examples, nothing to learn in them, or tokens that the model does not know.
      ConfigError: an example is longer than `pack_length`, or the mesh does not divide the batch.
      TrainingDiverged: loss or gradient norm is no finite number.
      RunError: `out_dir` holds a checkpoint of another training.
    """
    config = nnx.merge(graphdef, params).config
    check_examples(tokenized, pack_length, config.vocab_size)
    check_batch(settings, mesh)
    checkpoint = Path(out_dir) / "checkpoint"
    metadata = metadata or {}
    identity = training_identity(config, params, tokenized, settings, seed, pack_length, metadata)
    trained, frozen = partition(params, config)
    finished = read_metadata(checkpoint)
    if finished is not None:
        if finished.get("identity") != identity:
            raise another_training(checkpoint)
        remove_steps(checkpoint)
        _consume(trained)
        return nnx.merge_state(restore_params(checkpoint, config, mesh)[1], frozen)

    plan = plan_training(tokenized, settings, seed, pack_length)
    optimizer = make_optimizer(settings, len(plan))
    target, frozen_target = partition(abstract_params(config, mesh)[1], config)
    frozen = jax.tree.map(lambda x, to: jax.device_put(x, to.sharding), frozen, frozen_target)
    opt_target = abstract_opt_state(optimizer, target, mesh)
    step = make_train_step(graphdef, optimizer, settings, len(plan), chunk=chunk, state=(target, opt_target))
    asynchronous = mesh.devices.flat[0].platform != "cpu"
    with (
        jax.set_mesh(mesh),
        TrainingCheckpoints(checkpoint, identity, asynchronous=asynchronous) as checkpoints,
    ):
        state = checkpoints.restore(target, opt_target)
        if state is None:
            trained = jax.tree.map(
                lambda x, to: jax.device_put(x.astype(to.dtype), to.sharding), trained, target
            )
            init = jax.jit(optimizer.init, out_shardings=jax.tree.map(lambda x: x.sharding, opt_target))
            state = TrainState(0, trained, init(trained))
        else:
            _consume(trained)
        log = _MetricsLog(Path(out_dir) / "metrics.jsonl", state.step, plan, tokenized, on_step)
        with log, _deferred_interrupt() as interrupted:
            try:
                for batch in _batches(tokenized, plan[state.step :], settings.batch_size, pack_length):
                    on_mesh = put_batch(batch, settings.gradient_accumulation, mesh)
                    trained, opt_state, outputs = step(state.trained, state.opt_state, frozen, on_mesh)
                    state = TrainState(state.step + 1, trained, opt_state)
                    log.dispatched(outputs)
                    if interrupted.is_set():
                        raise KeyboardInterrupt
                    if state.step % settings.save_every == 0 and state.step < len(plan):
                        log.catch_up()
                        checkpoints.save(state)
                log.catch_up()
            except KeyboardInterrupt:
                log.catch_up(quietly=True)
                checkpoints.save(state)
                raise
        checkpoints.finish(state, metadata)
    return nnx.merge_state(state.trained, frozen)


def plan_epoch(
    tokenized: Sequence[TokenizedExample], settings: TrainSettings, epoch: int, seed: int, pack_length: int
) -> list[list[list[int]]]:
    """Steps of rows of indices: every example once, in an order that (seed, epoch) gives.

    The last step may hold fewer rows than the others; it is padded, never dropped.
    """
    order = np.random.default_rng((seed, epoch)).permutation(len(tokenized)).tolist()
    packed = first_fit([len(tokenized[i]) for i in order], pack_length, max_segments=pack_length)
    rows = [[order[i] for i in row] for row in packed]
    return [rows[i : i + settings.batch_size] for i in range(0, len(rows), settings.batch_size)]


def plan_training(
    tokenized: Sequence[TokenizedExample], settings: TrainSettings, seed: int, pack_length: int
) -> list[PlannedStep]:
    """All steps of all epochs."""
    return [
        PlannedStep(epoch, rows)
        for epoch in range(settings.num_epochs)
        for rows in plan_epoch(tokenized, settings, epoch, seed, pack_length)
    ]


def check_examples(tokenized: Sequence[TokenizedExample], pack_length: int, vocab_size: int) -> None:
    """Raises TrainingDataError or ConfigError, before anything is compiled, if training cannot work."""
    if not tokenized:
        raise TrainingDataError("there are no examples to train on")
    longest = max(tokenized, key=len)
    if len(longest) > pack_length:
        count = sum(len(example) > pack_length for example in tokenized)
        raise ConfigError(
            f"config: {count} of {len(tokenized)} examples are longer than train.pack_length={pack_length} "
            f"(the longest, {longest.id}, has {len(longest)} tokens); raise it, or lower model.max_length"
        )
    # The first token of an example has nothing before it that could predict it.
    if not any(example.is_target_n[1:].any() for example in tokenized):
        raise TrainingDataError(
            f"none of the {len(tokenized)} examples has a token to learn: responses are empty or cut off; "
            "look at the data, model.template and model.max_length"
        )
    for example in tokenized:
        if len(example) and int(example.tokens_n.max()) >= vocab_size:
            raise TrainingDataError(
                f"example {example.id} has token {int(example.tokens_n.max())}, the model's vocabulary "
                f"ends before {vocab_size}: the tokenizer is not this model's"
            )


def check_batch(settings: TrainSettings, mesh: Mesh) -> None:
    """Raises ConfigError unless every micro-batch spreads evenly over the mesh."""
    parts, divisor = settings.gradient_accumulation, batch_divisor(mesh)
    if settings.batch_size % (parts * divisor):
        fitting = math.ceil(settings.batch_size / (parts * divisor)) * parts * divisor
        raise ConfigError(
            f"config: train.batch_size={settings.batch_size} is no multiple of train.gradient_accumulation="
            f"{parts} times the {divisor} devices along mesh.data and mesh.fsdp; {fitting} would fit"
        )


def _consume(params: nnx.State) -> None:
    # As donation would have done: callers see one behaviour, and the memory is free before it is needed.
    for x in jax.tree.leaves(params):
        x.delete()


def _batches(
    tokenized: Sequence[TokenizedExample], steps: Sequence[PlannedStep], batch_size: int, pack_length: int
) -> Iterator[PackedBatch]:
    """Packs batches in a thread, a few ahead of the device."""
    import grain.python as grain

    def make(step: PlannedStep) -> PackedBatch:
        return pack(tokenized, step.rows, batch_size, pack_length, max_segments=pack_length)

    ahead = grain.ReadOptions(num_threads=1, prefetch_buffer_size=_BATCHES_AHEAD)
    return iter(grain.MapDataset.source(steps).map(make).to_iter_dataset(ahead))


class _MetricsLog:
    """metrics.jsonl, each step once; reads a step's outputs when the next is under way."""

    def __init__(
        self,
        path: Path,
        done: int,
        plan: Sequence[PlannedStep],
        tokenized: Sequence[TokenizedExample],
        on_step: Callable[[StepMetrics], None] | None,
    ) -> None:
        self._path = path
        self._step = done
        self._plan = plan
        self._tokenized = tokenized
        self._on_step = on_step
        self._pending: StepOutputs | None = None

    def __enter__(self) -> _MetricsLog:
        # Line n is of step n. What stands behind the checkpoint is of steps that are done again.
        lines = (
            self._path.read_text(encoding="utf-8").splitlines(keepends=True) if self._path.exists() else []
        )
        write_text(self._path, "".join(lines[: self._step]))
        self._file: IO[str] = self._path.open("a", encoding="utf-8", newline="\n")
        self._last_read = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def dispatched(self, outputs: StepOutputs) -> None:
        """Takes a new step's outputs, then reads those of the step before."""
        before, self._pending = self._pending, outputs
        if before is not None:
            self._read(before, quietly=False)

    def catch_up(self, *, quietly: bool = False) -> None:
        """Reads the step under way too and brings the file to the disk: a checkpoint may follow."""
        if self._pending is not None:
            last, self._pending = self._pending, None
            self._read(last, quietly)
        self._file.flush()
        os.fsync(self._file.fileno())

    def _read(self, outputs: StepOutputs, quietly: bool) -> None:
        epoch, rows = self._plan[self._step]
        self._step += 1
        loss, n_targets, grad_norm, learning_rate = (x.item() for x in jax.device_get(outputs))
        examples = [self._tokenized[i] for row in rows for i in row]
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise TrainingDiverged(self._step, loss, grad_norm, [example.id for example in examples])
        now = time.perf_counter()
        speed = sum(len(example) for example in examples) / (now - self._last_read)
        self._last_read = now
        metrics = StepMetrics(
            self._step, len(self._plan), epoch, loss, n_targets, grad_norm, learning_rate, speed
        )
        self._file.write(json.dumps(metrics.row()) + "\n")
        self._file.flush()
        if self._on_step is not None and not quietly:
            self._on_step(metrics)


@contextlib.contextmanager
def _deferred_interrupt() -> Iterator[threading.Event]:
    """Sets the event at the first Ctrl-C instead of raising; the second raises as usual.

    An exception in the middle of a step would find the old parameters donated and the new ones not yet there.
    """
    requested = threading.Event()
    is_ours = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )

    def request(*_: object) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        _log.warning("interrupted: saving after the step under way; once more stops at once")
        requested.set()

    if is_ours:
        signal.signal(signal.SIGINT, request)
    try:
        yield requested
    finally:
        if is_ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)
