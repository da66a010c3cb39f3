"""Checkpoints of trained models: parameters, written by Orbax, and metadata.

    checkpoint/
      params/         the trained parameters by their names in models/parameters.py: all, or only the adapters
      metadata.json   marks params/ as complete: {"base": "path of the source model", "step": 120, ...}

`base` is a Hugging Face directory. It supplies the config and the tokenizer and, where only adapters were
trained, the base weights. Orbax writes to a temporary name and renames it, so an interrupted save leaves
nothing that looks complete.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.sharding import Mesh

from middo_jax.config import ConfigError
from middo_jax.models.config import DecoderConfig
from middo_jax.models.finite import is_finite, not_finite, not_finite_names
from middo_jax.models.lora import partition
from middo_jax.models.model import Params, abstract_model, as_dict, by_path, of_dict
from middo_jax.parallel.coordination import barrier, has_own_disk
from middo_jax.rundir import RunError, write_json
from middo_jax.rundir.elsewhere import bring
from middo_jax.rundir.files import full_disk_named
from middo_jax.rundir.layout import has_checkpoint_metadata
from middo_jax.rundir.nesting import require_flat

# Errors of the machine, not of the files: the checkpoint may be intact.
NOT_THE_FILES = (MemoryError, jax.errors.JaxRuntimeError)


class DamagedCheckpoint(RunError):
    """The files of a finished checkpoint cannot be read.

    Attributes:
      directory: the checkpoint, an absolute path.
    """

    def __init__(self, directory: Path, why: str) -> None:
        super().__init__(f"{directory} is damaged, or of another model than its config describes: {why}")
        self.directory = directory


def save_params(directory: str | Path, params: Params, metadata: Mapping[str, Any]) -> None:
    """Writes DIRECTORY/params and then DIRECTORY/metadata.json, which marks the former as complete.

    Args:
      directory: directory of the checkpoint; an earlier save in it is replaced.
      params: the trained parameters, on any mesh.
      metadata: JSON values. Loading and exporting need `base` and, where only adapters were trained, `lora`,
        such as {"rank": 8, "alpha": 16, "target_modules": ["q_proj"]}. `step` is only informative.
    """
    directory = Path(directory).absolute()
    (directory / "metadata.json").unlink(missing_ok=True)
    with (
        full_disk_named(directory),
        ocp.Checkpointer(arrays_handler(), multiprocessing_options=writers()) as checkpointer,
    ):
        arrays = ocp.args.PyTreeSave(as_dict(params))
        checkpointer.save(directory / "params", args=arrays, force=True)
    if has_own_disk():  # all must have pushed their pieces before the mark says that they are complete
        barrier("checkpoint: saved")
    write_json(directory / "metadata.json", dict(metadata))


def read_metadata(directory: str | Path) -> dict[str, Any] | None:
    """What `save_params` was told, or None if there is no finished checkpoint of this package.

    Raises:
      RunError: the file is damaged.
    """
    path = Path(directory) / "metadata.json"
    if not has_checkpoint_metadata(path.parent):
        return None
    try:
        text = path.read_bytes()
        require_flat(text)
        metadata = json.loads(text.decode())
    except ValueError as error:
        metadata = error
    if not isinstance(metadata, dict):
        raise RunError(
            f"{path}: damaged, it is not what a training writes ({str(metadata)[:100]}): train again, which "
            "`middo run CONFIG --repair` does for a run"
        )
    return metadata


def restore_params(
    directory: str | Path, config: DecoderConfig, mesh: Mesh, dtype: str | None = None
) -> Params:
    """Reads what `save_params` wrote. Each device reads only its part; the saving mesh may be another one.

    Args:
      directory: a round's `checkpoint` folder.
      config: config of the trained model.
      mesh: mesh to put the parameters on.
      dtype: dtype that the parameters are cast to; None keeps the stored one.

    Returns:
      The model's parameters; only the adapters if the config has any.

    Raises:
      DamagedCheckpoint: its files are damaged, or it is of another model.
      RunError: no finished checkpoint is there, or a parameter is not finite.
      ConfigError: a parameter does not divide by the mesh.
    """
    directory = Path(directory).absolute()
    if read_metadata(directory) is None:
        raise RunError(
            f"{directory} holds no finished checkpoint; train again: an interrupted training resumes"
        )
    bring(directory / "params")
    with ocp.Checkpointer(arrays_handler()) as checkpointer:
        try:
            stored = checkpointer.metadata(directory / "params").item_metadata.tree
            wanted = dtype or str(jax.tree.leaves(stored)[0].dtype)
            target, _ = partition(abstract_model(config, mesh, wanted).params, config)
            restored = checkpointer.restore(directory / "params", args=arrays_into(as_dict(target)))
        except (ConfigError, *NOT_THE_FILES):
            raise
        except Exception as error:  # Orbax raises even plain `Exception` on a damaged file
            raise DamagedCheckpoint(directory, reason(error)) from error
    params = of_dict(target, restored)
    flags = {".".join(map(str, path)): is_finite(value) for path, value in by_path(params).items()}
    if wrong := not_finite_names(flags):
        raise RunError(not_finite(directory, wrong))
    return params


def writers() -> ocp.options.MultiprocessingOptions:
    """Which processes complete a checkpoint: the first, or each in its own folder (`has_own_disk`)."""
    return ocp.options.MultiprocessingOptions(primary_host=None if has_own_disk() else 0)


def arrays_handler() -> ocp.PyTreeCheckpointHandler:
    """The Orbax handler for arrays.

    Where each process has its own folder, a chunk of an array is a file of one process, so that the files
    of all together are the checkpoint. OCDBT would need one folder to merge the files of the processes.
    """
    # Compression saves a tenth of float32 weights' size, but doubles time and memory.
    return ocp.PyTreeCheckpointHandler(
        use_compression=False, use_ocdbt=not has_own_disk(), multiprocessing_options=writers()
    )


def arrays_into(target: Any) -> ocp.args.PyTreeRestore:
    """Arguments that restore into shapes with dtypes and shardings; each device reads only its part."""
    return ocp.args.PyTreeRestore(target, restore_args=ocp.checkpoint_utils.construct_restore_args(target))


def reason(error: Exception) -> str:
    """The error's first line; in Orbax's messages, pages of its own settings follow."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
