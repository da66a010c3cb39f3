"""Checkpoints on Orbax: of a training under way, and of the parameters that it ends with.

    checkpoint/
      steps/50/       params, optimizer state and whose they are; the newest only, gone when training is done
      params/         parameters, by the names of models/parameters.py
      metadata.json   says that params/ is complete: {"step": 120, "base": "path of the source model", ...}

Orbax writes to a temporary name and renames, so that a save cut short leaves nothing that looks whole.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import jax
import optax
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import Mesh

from middo_jax.config import ConfigError
from middo_jax.models.config import DecoderConfig
from middo_jax.models.decoder import Decoder, abstract
from middo_jax.models.parameters import parameters
from middo_jax.run_dir import RunError, write_json

_log = logging.getLogger(__name__)

# The machine's trouble: a checkpoint that cannot be read for it is a good one.
_NOT_THE_FILES = (MemoryError, jax.errors.JaxRuntimeError)


class TrainState(NamedTuple):
    """What a training needs to go on: after `step` optimizer steps."""

    step: int
    params: nnx.State
    opt_state: optax.OptState


def abstract_params(
    config: DecoderConfig, mesh: Mesh, dtype: str = "float32"
) -> tuple[nnx.GraphDef[Decoder], nnx.State]:
    """(static structure, shapes with dtypes and shardings) of a decoder's parameters on a mesh.

    Raises:
      ConfigError: a parameter does not divide by the mesh.
    """
    graphdef, shapes = abstract(config)
    targets = {}
    for spec in parameters(config):
        shape, sharding = spec.shape(config), spec.sharding(mesh)
        try:
            sharding.shard_shape(shape)
        except ValueError as error:
            sizes = ", ".join(f"mesh.{axis}={size}" for axis, size in mesh.shape.items())
            name = ".".join(spec.path)
            raise ConfigError(f"config: {sizes} does not divide parameter {name} {list(shape)}") from error
        targets[spec.path] = jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
    return graphdef, nnx.map_state(lambda path, param: param.replace(targets[path]), shapes)


def save_params(directory: str | Path, params: nnx.State, metadata: Mapping[str, Any]) -> None:
    """Writes DIRECTORY/params and then DIRECTORY/metadata.json, which says that the former is complete.

    Args:
      directory: what stood there of an earlier save is replaced.
      params: on whatever mesh.
      metadata: JSON values: `base`, the Hugging Face directory that the training started from, is what an
        export needs; `step` is what is worth knowing.
    """
    directory = Path(directory).absolute()
    (directory / "metadata.json").unlink(missing_ok=True)
    with ocp.Checkpointer(_arrays_handler()) as checkpointer:
        arrays = ocp.args.PyTreeSave(nnx.to_pure_dict(params))
        checkpointer.save(directory / "params", args=arrays, force=True)
    write_json(directory / "metadata.json", dict(metadata))


def read_metadata(directory: str | Path) -> dict[str, Any] | None:
    """What `save_params` was told, or None if there is no finished checkpoint."""
    path = Path(directory) / "metadata.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def restore_params(
    directory: str | Path, config: DecoderConfig, mesh: Mesh, dtype: str | None = None
) -> tuple[nnx.GraphDef[Decoder], nnx.State]:
    """Reads what `save_params` wrote, each device its part only, on whatever mesh it was saved.

    Args:
      directory: a round's `checkpoint` folder.
      config: of the model that was trained.
      mesh: where the parameters shall lie.
      dtype: what they are cast to; None keeps what is stored.

    Raises:
      RunError: no finished checkpoint is there, it is of another model, or its files are damaged.
      ConfigError: a parameter does not divide by the mesh.
    """
    directory = Path(directory).absolute()
    if read_metadata(directory) is None:
        raise RunError(
            f"{directory} holds no finished checkpoint; train again, an interrupted training goes on"
        )
    with ocp.Checkpointer(_arrays_handler()) as checkpointer:
        try:
            stored = checkpointer.metadata(directory / "params").item_metadata["embed"].dtype
            graphdef, target = abstract_params(config, mesh, dtype or str(stored))
            restored = checkpointer.restore(directory / "params", args=_arrays_into(nnx.to_pure_dict(target)))
        except (ConfigError, *_NOT_THE_FILES):
            raise
        except Exception as error:  # Orbax raises even plain `Exception` on a damaged file
            raise RunError(
                f"{directory} is damaged or of another model than its config describes: {_reason(error)}"
            ) from error
    nnx.replace_by_pure_dict(target, restored)
    return graphdef, target


class TrainingCheckpoints:
    """The newest checkpoint of a training under way, as a context; leaving it waits for a save under way.

    An asynchronous `save` returns once the arrays are out of the next step's way. On a CPU they are written
    from where they lie, and the next step would need as much memory again: better to wait the seconds.
    """

    def __init__(self, directory: str | Path, identity: str, *, asynchronous: bool) -> None:
        """`identity` names the training: a checkpoint with another one is never continued."""
        self._directory = Path(directory).absolute()
        self._identity = identity
        self._orbax = ocp.CheckpointManager(
            self._directory / "steps",
            item_handlers={"state": _arrays_handler(), "about": ocp.JsonCheckpointHandler()},
            options=ocp.CheckpointManagerOptions(
                max_to_keep=1, create=True, enable_async_checkpointing=asynchronous
            ),
        )

    def __enter__(self) -> TrainingCheckpoints:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._orbax.close()

    def save(self, state: TrainState) -> None:
        """Starts to save, unless this step is saved; the state before it goes once this one is complete."""
        if self._orbax.latest_step() == state.step:
            return
        arrays = ocp.args.PyTreeSave((state.params, state.opt_state))
        about = ocp.args.JsonSave({"identity": self._identity})
        self._orbax.save(state.step, args=ocp.args.Composite(state=arrays, about=about))

    def restore(self, params: nnx.State, opt_state: optax.OptState) -> TrainState | None:
        """The newest readable state, or None.

        What cannot be read is set aside with a warning: training is deterministic, so that costs only time.

        Args:
          params: shapes with the shardings that are wanted.
          opt_state: likewise.

        Raises:
          RunError: the checkpoint is of another training.
        """
        for step in sorted(self._orbax.all_steps(), reverse=True):
            try:
                about = ocp.args.Composite(about=ocp.args.JsonRestore())
                if self._orbax.restore(step, args=about)["about"] == {"identity": self._identity}:
                    arrays = ocp.args.Composite(state=_arrays_into((params, opt_state)))
                    return TrainState(step, *self._orbax.restore(step, args=arrays)["state"])
            except _NOT_THE_FILES:
                raise
            except Exception as error:  # Orbax raises even plain `Exception` on a damaged file
                self._set_aside(step, error)
            else:
                raise another_training(self._directory)
        return None

    def _set_aside(self, step: int, error: Exception) -> None:
        found = self._directory / "steps" / str(step)
        aside = self._directory / f"unreadable_step_{step}"
        shutil.rmtree(aside, ignore_errors=True)
        found.rename(aside)
        self._orbax.reload()
        _log.warning("checkpoint %s cannot be read; it is set aside as %s: %s", found, aside, _reason(error))

    def finish(self, state: TrainState, metadata: Mapping[str, Any]) -> None:
        """Saves the parameters for good and removes all that only a continuation would need."""
        self._orbax.wait_until_finished()
        about = {**metadata, "step": state.step, "identity": self._identity}
        save_params(self._directory, state.params, about)
        remove_steps(self._directory)


def remove_steps(directory: Path) -> None:
    """Removes what only the continuation of a training would need."""
    for leftover in (directory / "steps", *directory.glob("unreadable_step_*")):
        shutil.rmtree(leftover, ignore_errors=True)


def another_training(directory: Path) -> RunError:
    """The error that says that a checkpoint is not to be continued."""
    return RunError(
        f"{directory} holds a checkpoint of another training (its data, settings, model or seed differ); "
        "delete that folder or write to another one"
    )


def _arrays_handler() -> ocp.PyTreeCheckpointHandler:
    # Compression takes a tenth off float32 weights, for twice the time and as much memory again.
    return ocp.PyTreeCheckpointHandler(use_compression=False)


def _arrays_into(target: Any) -> ocp.args.PyTreeRestore:
    """Restores into shapes with dtypes and shardings, each device reading its part."""
    return ocp.args.PyTreeRestore(target, restore_args=ocp.checkpoint_utils.construct_restore_args(target))


def _reason(error: Exception) -> str:
    """The first line: what follows in Orbax's messages is pages of its own settings."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
