"""Checkpoints of a training in progress: the newest and optionally the best; removed when it is finished.

checkpoint/
  steps/50/       trained parameters, optimizer state and the training's identity
  best/           a complete checkpoint: the state with the lowest held-out loss
  ...             see models/checkpoint.py
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import jax
import optax
import orbax.checkpoint as ocp

from middo_jax.models.checkpoint import (
    NOT_THE_FILES,
    arrays_handler,
    arrays_into,
    reason,
    save_params,
    writers,
)
from middo_jax.models.model import Params
from middo_jax.parallel.coordination import barrier, from_first, has_own_disk, on_each_disk
from middo_jax.rundir import RunError
from middo_jax.rundir.elsewhere import bring
from middo_jax.rundir.files import full_disk_named
from middo_jax.training.identity import values_of_arrays

_log = logging.getLogger(__name__)


class TrainState(NamedTuple):
    """The state from which a training continues, after `step` optimizer steps."""

    step: int
    trained: Params
    opt_state: optax.OptState


class _NewestAndBest:
    """Orbax preservation policy: keeps the newest step and `best_step`, which the caller sets.

    Orbax's own `BestN` needs the loss when the state is saved, but a state saved on a stop signal is
    evaluated only after the restart.
    """

    def __init__(self) -> None:
        self.best_step: int | None = None

    def should_preserve(
        self,
        checkpoints: Sequence[ocp.checkpoint_managers.PolicyCheckpointInfo],
        *,
        context: ocp.checkpoint_managers.PreservationContext,
    ) -> list[bool]:
        newest = max((info.step for info in checkpoints), default=None)
        return [info.step in (newest, self.best_step) for info in checkpoints]


class _Manager(ocp.CheckpointManager):
    """Orbax's manager without its own check for preemption.

    Orbax would pass the training step to JAX's counter of sync points, but `stop_point` passes the number of
    its calls. A SIGTERM during a save would then name a sync point that is never reached.
    """

    def reached_preemption(self, step: int) -> bool:
        """Always False."""
        return False


class TrainingCheckpoints:
    """The newest checkpoint of a training in progress. A context manager; its exit waits for a pending save.

    An asynchronous `save` returns once the arrays are copied off the device. On a CPU the arrays are not
    copied, so the next step could not reuse their memory and would need twice as much: save synchronously.
    """

    def __init__(
        self, directory: str | Path, identity: str, *, asynchronous: bool, logs: Sequence[Path] = ()
    ) -> None:
        """Opens the checkpoints of a training.

        Args:
          directory: the folder `checkpoint`.
          identity: names the training: a checkpoint with another one is never continued.
          asynchronous: whether a save goes on in the background.
          logs: files of the training that grow at their ends. A checkpoint is continued only if they still
            begin with what they contained when it was saved.
        """
        self._directory = Path(directory).absolute()
        self._identity = identity
        self._logs = tuple(logs)
        self._policy = _NewestAndBest()
        self._orbax = _Manager(
            self._directory / "steps",
            item_handlers={
                "trained": arrays_handler(),
                "optimizer": arrays_handler(),
                "about": ocp.JsonCheckpointHandler(multiprocessing_options=writers()),
            },
            options=ocp.CheckpointManagerOptions(
                preservation_policy=self._policy,
                create=True,
                enable_async_checkpointing=asynchronous and not has_own_disk(),
                multiprocessing_options=writers(),
            ),
        )

    def __enter__(self) -> TrainingCheckpoints:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._orbax.close()

    def keep_best(self, step: int | None) -> None:
        """Sets the best step so far. Its checkpoint is kept until another step is set."""
        self._policy.best_step = step

    def save(self, state: TrainState) -> None:
        """Starts a save unless this step is already saved. Older states are removed when it is complete."""
        if self._orbax.latest_step() == state.step:
            return
        with full_disk_named(self._directory):
            self._orbax.save(
                state.step,
                args=ocp.args.Composite(
                    trained=ocp.args.PyTreeSave(state.trained),
                    optimizer=ocp.args.PyTreeSave(state.opt_state),
                    about=ocp.args.JsonSave(
                        {
                            "identity": self._identity,
                            # Arrays are saved without compression, so Orbax would not notice a flipped bit.
                            "checksums": values_of_arrays((state.trained, state.opt_state)),
                            "logs": {path.name: _start(path) for path in self._logs if path.exists()},
                        }
                    ),
                ),
            )
        if has_own_disk():  # a step is in the bucket once all have pushed their pieces of it
            barrier("checkpoint: step")

    def restore(self, trained: Params, opt_state: optax.OptState) -> TrainState | None:
        """Returns the newest readable state, or None.

        An unreadable state is set aside with a warning. Training is deterministic, so this costs only time.

        Args:
          trained: shapes and the shardings to restore to.
          opt_state: shapes and shardings, as for `trained`.

        Raises:
          RunError: the checkpoint belongs to another training, or a log was edited.
        """
        for step in sorted(self._orbax.all_steps(), reverse=True):
            try:
                wanted = ocp.args.Composite(about=ocp.args.JsonRestore())
                about = dict(self._orbax.restore(step, args=wanted)["about"])
                state = None
                if about["identity"] == self._identity:
                    arrays = {"trained": arrays_into(trained), "optimizer": arrays_into(opt_state)}
                    found = self._orbax.restore(step, args=ocp.args.Composite(**arrays))
                    state = TrainState(step, found["trained"], found["optimizer"])
                    known = about.get("checksums")  # earlier versions saved none
                    if known is not None and known != values_of_arrays((state.trained, state.opt_state)):
                        raise ValueError("its values are not those that were saved")
            except NOT_THE_FILES:
                raise
            except Exception as error:  # Orbax raises even plain `Exception` on a damaged file
                self._set_aside(step, error)
            else:
                if state is None:
                    raise another_training(self._directory)
                self._require_logs(step, about.get("logs", {}))
                return state
        return None

    def _require_logs(self, step: int, known: Mapping[str, Any]) -> None:
        """Raises RunError if a log does not begin as it was when a step was saved."""

        def edited() -> list[str]:
            of = [(path, known[path.name]) for path in self._logs if path.name in known]
            return [str(path) for path, start in of if _start(path, start["bytes"]) != start]

        if wrong := from_first("training: logs", edited):
            raise RunError(
                f"{wrong[0]} was edited or lost since step {step} of this training was saved; put it back, "
                f"or remove {self._directory} to train from the start"
            )

    def _set_aside(self, step: int, error: Exception) -> None:
        found = self._directory / "steps" / str(step)
        aside = self._directory / f"unreadable_step_{step}"

        def move() -> None:
            shutil.rmtree(aside, ignore_errors=True)
            found.rename(aside)

        on_each_disk("checkpoint: set aside", move)
        self._orbax.reload()
        _log.warning("checkpoint %s cannot be read; it is set aside as %s: %s", found, aside, reason(error))

    def finish(self, state: TrainState, metadata: Mapping[str, Any]) -> None:
        """Saves the final parameters and removes the states that only a resumed training would need.

        The best state, if one was kept, becomes best/, a complete checkpoint in the same format. The
        optimizer state is deleted first, to free memory for restoring the best state.
        """
        self._orbax.wait_until_finished()
        for x in jax.tree.leaves(state.opt_state):
            x.delete()
        about = {**metadata, "identity": self._identity}

        def placed(directory: Path) -> dict[str, Any]:
            # Where the base lies from here, for the day when both were moved together.
            base = about.get("base")
            return about if base is None else about | {"base_from_here": os.path.relpath(base, directory)}

        best = self._policy.best_step
        if best is not None and best in self._orbax.all_steps():
            target = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state.trained
            )
            bring(self._directory / "steps" / str(best))
            found = self._orbax.restore(best, args=ocp.args.Composite(trained=arrays_into(target)))
            aside = self._directory / "best"
            save_params(aside, found["trained"], placed(aside) | {"step": best})
        save_params(self._directory, state.trained, placed(self._directory) | {"step": state.step})
        remove_steps(self._directory)


def _start(path: Path, n_bytes: int | None = None) -> dict[str, Any]:
    """Size and SHA-256 of a file, or of its first bytes; of a missing one as of an empty one."""
    start = path.read_bytes()[:n_bytes] if path.exists() else b""
    return {"bytes": len(start), "sha256": hashlib.sha256(start).hexdigest()}


def remove_steps(directory: Path) -> None:
    """Removes the states that only a resumed training would need."""
    for leftover in (directory / "steps", *directory.glob("unreadable_step_*")):
        shutil.rmtree(leftover, ignore_errors=True)


class AnotherTraining(RunError):
    """A checkpoint must not be continued: it has other data, settings, model or seed."""


def another_training(directory: Path) -> AnotherTraining:
    """Returns the error for a checkpoint that belongs to another training."""
    return AnotherTraining(
        f"{directory} holds a checkpoint of another training (its data, settings, model or seed differ); "
        "delete that folder or write to another one"
    )
