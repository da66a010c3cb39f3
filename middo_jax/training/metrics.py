"""metrics.jsonl: one line per step, in order, even if the training was interrupted."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import jax
from jax.sharding import Mesh

from middo_jax.models.config import DecoderConfig
from middo_jax.rundir import json_line, write_text
from middo_jax.rundir.files import full_disk_named
from middo_jax.rundir.rows import MetricsRow, SpeedRow
from middo_jax.training.flops import peak_flops, training_flops
from middo_jax.training.plan import TrainingPlan
from middo_jax.training.step import StepOutputs

_log = logging.getLogger(__name__)

_MOST_SKIPPED = 10  # bad steps in a row: then it is not the data of one of them
# A training is wrecked if the mean of its last losses is over its first loss by this factor and these nats.
_WRECKED, _WRECKED_MARGIN = 1.5, 1.0
_LAST = 8


class TrainingDiverged(RuntimeError):
    """A step was bad: its loss or gradient norm is not finite, or its loss is a spike. The step is not saved.

    Attributes:
      step: number of the step, counted from 1.
      ids: IDs of the examples of its batch.
    """

    def __init__(self, step: int, why: str, ids: Sequence[str]) -> None:
        super().__init__(
            f"training diverged at step {step}: {why}; look at the examples of its batch ({_shown(ids)}), "
            "lower train.learning_rate, or leave such steps out with train.on_bad_step=skip"
        )
        self.step = step
        self.ids = tuple(ids)


@dataclasses.dataclass(frozen=True)
class Speed:
    """Measurements that differ between machines and between starts.

    Attributes:
      seconds: time since the previous step was read, everything included except compilation.
      tokens_per_second: tokens of examples, without padding, all devices together.
      tokens_per_second_device: `tokens_per_second` per device.
      mfu: share of the devices' published FLOP/s, see `training_flops`; None for an unknown device.
      waited_for_data: share of `seconds` in which the device may have been idle for lack of a batch.
      memory_bytes: peak memory of the first device so far; None if the device does not report it.
      memory_limit_bytes: memory limit of the first device; None if the device does not report it.
      seconds_left: estimated time to the end of the training, at the mean speed since this start.
    """

    seconds: float
    tokens_per_second: float
    tokens_per_second_device: float
    mfu: float | None
    waited_for_data: float
    memory_bytes: int | None
    memory_limit_bytes: int | None
    seconds_left: float

    def row(self) -> SpeedRow:
        """Returns the object `speed` of a line of metrics.jsonl."""
        return {
            "seconds": self.seconds,
            "tokens_per_second": self.tokens_per_second,
            "tokens_per_second_device": self.tokens_per_second_device,
            "mfu": self.mfu,
            "waited_for_data": self.waited_for_data,
            "memory_bytes": self.memory_bytes,
            "memory_limit_bytes": self.memory_limit_bytes,
            "seconds_left": self.seconds_left,
        }


@dataclasses.dataclass(frozen=True)
class StepMetrics:
    """Metrics of a finished step.

    Attributes:
      step: number of the step, counted from 1.
      total_steps: number of steps of the whole training.
      epoch: number of the epoch, counted from 0.
      loss: mean negative log-likelihood of the batch's target tokens, before the update.
      n_target_tokens: number of target tokens in the batch.
      grad_norm: global norm of the gradient before clipping.
      learning_rate: learning rate of this step.
      skipped: IDs of the batch's examples if the step was bad and therefore skipped, else empty.
      speed: speed on this machine.
    """

    step: int
    total_steps: int
    epoch: int
    loss: float
    n_target_tokens: int
    grad_norm: float
    learning_rate: float
    skipped: tuple[str, ...]
    speed: Speed

    def row(self) -> MetricsRow:
        """Returns the line of metrics.jsonl. All values outside `speed` are the same in every run."""
        learnt: MetricsRow = {
            "step": self.step,
            "epoch": self.epoch,
            "loss": self.loss if math.isfinite(self.loss) else None,
            "n_target_tokens": self.n_target_tokens,
            "grad_norm": self.grad_norm if math.isfinite(self.grad_norm) else None,
            "learning_rate": self.learning_rate,
            "speed": self.speed.row(),
        }
        return learnt if not self.skipped else {**learnt, "skipped": list(self.skipped)}

    def scalars(self) -> dict[str, float]:
        """Returns all numbers under names that TensorBoard and wandb show in groups, such as "train/loss"."""
        row = self.row()
        speed = {f"speed/{name}": value for name, value in row["speed"].items()}
        learnt = {f"train/{name}": value for name, value in row.items() if name != "step"}
        return {k: float(v) for k, v in (learnt | speed).items() if isinstance(v, int | float)}

    def note(self) -> str:
        """For a live line: "loss 1.234, grad norm 0.8, lr 2.00e-05, 3,210 tokens/s per device, MFU 41.0%"."""
        speed = self.speed
        parts = [
            f"loss {self.loss:.3f}",
            f"grad norm {self.grad_norm:.3g}",
            f"lr {self.learning_rate:.2e}",
            f"{speed.tokens_per_second_device:,.0f} tokens/s per device",
            "MFU not known for this device" if speed.mfu is None else f"MFU {speed.mfu:.1%}",
            f"data wait {speed.waited_for_data:.1%}",
        ]
        if speed.memory_bytes is not None:
            limit = f" of {speed.memory_limit_bytes / 2**30:.1f}" if speed.memory_limit_bytes else ""
            parts.append(f"memory {speed.memory_bytes / 2**30:.1f}{limit} GiB")
        return ", ".join(["step left out", *parts] if self.skipped else parts)


def wrecked_from(before: float) -> float:
    """The loss from which a model counts as wrecked, if it was `before` before training."""
    return max(_WRECKED * before, before + _WRECKED_MARGIN)


class TrainingWrecked(RuntimeError):
    """The last losses of a training are far above its first one: the model has lost what it knew."""

    def __init__(self, first: float, last: float) -> None:
        super().__init__(
            f"training wrecked the model: its first loss was {first:.4f}, its last ones are {last:.4f} on "
            "average; nothing is scored or rewritten with it. Lower train.learning_rate or look at the data; "
            "train.on_bad_step=stop or skip, without a number, lets such a training pass"
        )


class MetricsLog:
    """Writes metrics.jsonl; a context manager. A step's outputs are read after the next step's dispatch."""

    def __init__(self, path: Path, done: int, plan: TrainingPlan, config: DecoderConfig, mesh: Mesh) -> None:
        """Keeps the lines of the first `done` steps. Later steps are repeated, so their lines are dropped."""
        self._path = path
        self._step = self._first = done
        self._plan = plan
        self._config = config
        self._devices = mesh.devices.size
        self._device = mesh.local_devices[0]
        self._peak = peak_flops(self._device.device_kind)
        self._pending: StepOutputs | None = None
        self._skipped_running = 0
        self._waited = 0.0
        self._losses: list[float] = []  # finite ones, of all steps

    def __enter__(self) -> MetricsLog:
        # Line n describes step n. Lines after the checkpoint's step describe steps that are repeated.
        lines = (
            self._path.read_text(encoding="utf-8").splitlines(keepends=True) if self._path.exists() else []
        )
        self._losses = [
            row["loss"] for line in lines[: self._step] if (row := json.loads(line))["loss"] is not None
        ]
        if jax.process_index() == 0:
            write_text(self._path, "".join(lines[: self._step]))
        # All processes share one folder, so only the first writes.
        path = self._path if jax.process_index() == 0 else Path(os.devnull)
        self._file: IO[str] = path.open("a", encoding="utf-8", newline="\n")
        self._started = self._last_read = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        with full_disk_named(self._path):  # what could not be written is tried again here
            self._file.close()

    def fetched(self, seconds: float) -> None:
        """Records the seconds that the host waited for a batch.

        They count only if the device had finished the previous step by then: it was idle for at most as long.
        """
        if self._pending is not None:
            loss: Any = self._pending.loss  # `is_ready` is public, but the stub of jax.Array lacks it
            self._waited += seconds if loss.is_ready() else 0.0

    def dispatched(self, outputs: StepOutputs) -> StepMetrics | None:
        """Stores a new step's outputs, then reads those of the previous step if they are still unread."""
        before, self._pending = self._pending, outputs
        return None if before is None else self._read(before)

    def catch_up(self) -> StepMetrics | None:
        """Reads the outputs of the last step if they are still unread, and flushes the file to the disk."""
        last, self._pending = self._pending, None
        metrics = None if last is None else self._read(last)
        with full_disk_named(self._path):
            self._file.flush()
            if jax.process_index() == 0:
                os.fsync(self._file.fileno())
        return metrics

    def _read(self, outputs: StepOutputs) -> StepMetrics:
        epoch, rows = self._plan.steps[self._step]
        loss, n_targets, grad_norm, learning_rate, is_bad, usual = (x.item() for x in jax.device_get(outputs))
        self._step += 1
        facts, examples = self._plan.facts, [i for row in rows for i in row]
        ids = tuple(facts.ids[i] for i in examples)
        self._skipped_running = self._skipped_running + 1 if is_bad else 0
        if is_bad:
            self._bad_step(loss, grad_norm, usual, ids)
        speed = self._speed(facts.length_n[examples].tolist(), n_targets)
        metrics = StepMetrics(
            step=self._step,
            total_steps=len(self._plan.steps),
            epoch=epoch,
            loss=loss,
            n_target_tokens=n_targets,
            grad_norm=grad_norm,
            learning_rate=learning_rate,
            skipped=ids if is_bad else (),
            speed=speed,
        )
        with full_disk_named(self._path):
            self._file.write(json_line(metrics.row()))
            self._file.flush()
        if math.isfinite(loss):
            self._losses.append(loss)
        return metrics

    def check_end(self) -> None:
        """Raises TrainingWrecked if the training ends far above its start, and settings look for such."""
        if self._plan.settings.on_bad_step.spike_factor is None or len(self._losses) < 2:
            return
        first, last = self._losses[0], statistics.fmean(self._losses[1:][-_LAST:])
        if last > wrecked_from(first):
            raise TrainingWrecked(first, last)

    def _bad_step(self, loss: float, grad_norm: float, usual: float, ids: Sequence[str]) -> None:
        why = f"loss {loss}, gradient norm {grad_norm}"
        settings = self._plan.settings
        if math.isfinite(loss) and math.isfinite(grad_norm):
            factor = settings.on_bad_step.spike_factor
            why += f", over {factor} times the usual loss {usual:.4f} (train.on_bad_step.spike_factor)"
        if settings.on_bad_step.action == "stop":
            raise TrainingDiverged(self._step, why, ids)
        if self._skipped_running > _MOST_SKIPPED:
            raise TrainingDiverged(
                self._step, f"{why}, and the {_MOST_SKIPPED} steps before it were left out", ids
            )
        _log.warning("step %d is left out: %s; its examples: %s", self._step, why, _shown(ids))

    def _speed(self, lengths: Sequence[int], n_targets: int) -> Speed:
        now = time.perf_counter()
        seconds, self._last_read = now - self._last_read, now
        waited, self._waited = min(self._waited, seconds), 0.0
        rate, flops = sum(lengths) / seconds, training_flops(self._config, lengths, n_targets)
        memory = self._device.memory_stats() or {}
        mean = (now - self._started) / (self._step - self._first)
        return Speed(
            seconds=seconds,
            tokens_per_second=rate,
            tokens_per_second_device=rate / self._devices,
            mfu=None if self._peak is None else flops / (seconds * self._devices * self._peak),
            waited_for_data=waited / seconds,
            memory_bytes=memory.get("peak_bytes_in_use"),
            memory_limit_bytes=memory.get("bytes_limit"),
            seconds_left=mean * (len(self._plan.steps) - self._step),
        )


def _shown(ids: Sequence[str]) -> str:
    return ", ".join(ids[:8]) + (f" and {len(ids) - 8} more" if len(ids) > 8 else "")
