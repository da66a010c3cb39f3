"""A checkpoint of ours: what a training ends with, on Orbax, and what it says about itself.

    checkpoint/
      params/         what was trained, by the names of models/parameters.py: all parameters, or the adapters
      metadata.json   says that params/ is complete: {"base": "path of the source model", "step": 120, ...}

The base is a Hugging Face directory: of a model with adapters it is the rest of the model, of any other it
is where config and tokenizer stand. Orbax writes to a temporary name and renames, so that a save cut short
leaves nothing that looks whole.
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
from middo_jax.rundir import RunError, write_json
from middo_jax.rundir.files import full_disk_named

# The machine's trouble: a checkpoint that cannot be read for it is a good one.
NOT_THE_FILES = (MemoryError, jax.errors.JaxRuntimeError)


def save_params(directory: str | Path, params: Params, metadata: Mapping[str, Any]) -> None:
    """Writes DIRECTORY/params and then DIRECTORY/metadata.json, which says that the former is complete.

    Args:
      directory: what stood there of an earlier save is replaced.
      params: what was trained, on whatever mesh.
      metadata: JSON values: `base` is what loading and exporting need, `lora` too where only adapters were
        trained, such as {"rank": 8, "alpha": 16, "target_modules": ["q_proj"]}; `step` is what is worth
        knowing.
    """
    directory = Path(directory).absolute()
    (directory / "metadata.json").unlink(missing_ok=True)
    with full_disk_named(directory), ocp.Checkpointer(arrays_handler()) as checkpointer:
        arrays = ocp.args.PyTreeSave(as_dict(params))
        checkpointer.save(directory / "params", args=arrays, force=True)
    write_json(directory / "metadata.json", dict(metadata))


def read_metadata(directory: str | Path) -> dict[str, Any] | None:
    """What `save_params` was told, or None if there is no finished checkpoint.

    Raises:
      RunError: the file is damaged.
    """
    path = Path(directory) / "metadata.json"
    if not path.is_file():
        return None
    try:
        metadata = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        metadata = error
    if not isinstance(metadata, dict):
        raise RunError(
            f"{path}: damaged, it is not what a training writes ({metadata}): train again, which "
            "`middo run CONFIG --repair` does for a run"
        )
    return metadata


def restore_params(
    directory: str | Path, config: DecoderConfig, mesh: Mesh, dtype: str | None = None
) -> Params:
    """Reads what `save_params` wrote, each device its part only, on whatever mesh it was saved.

    Args:
      directory: a round's `checkpoint` folder.
      config: of the model that was trained.
      mesh: where the parameters shall lie.
      dtype: what they are cast to; None keeps what is stored.

    Returns:
      The model's parameters; where the config has adapters, these alone.

    Raises:
      RunError: no finished checkpoint is there, it is of another model, its files are damaged, or a
        parameter is not finite.
      ConfigError: a parameter does not divide by the mesh.
    """
    directory = Path(directory).absolute()
    if read_metadata(directory) is None:
        raise RunError(
            f"{directory} holds no finished checkpoint; train again, an interrupted training goes on"
        )
    with ocp.Checkpointer(arrays_handler()) as checkpointer:
        try:
            stored = checkpointer.metadata(directory / "params").item_metadata.tree
            wanted = dtype or str(jax.tree.leaves(stored)[0].dtype)
            target, _ = partition(abstract_model(config, mesh, wanted).params, config)
            restored = checkpointer.restore(directory / "params", args=arrays_into(as_dict(target)))
        except (ConfigError, *NOT_THE_FILES):
            raise
        except Exception as error:  # Orbax raises even plain `Exception` on a damaged file
            raise RunError(
                f"{directory} is damaged or of another model than its config describes: {reason(error)}"
            ) from error
    params = of_dict(target, restored)
    flags = {".".join(map(str, path)): is_finite(value) for path, value in by_path(params).items()}
    if wrong := not_finite_names(flags):
        raise RunError(not_finite(directory, wrong))
    return params


def arrays_handler() -> ocp.PyTreeCheckpointHandler:
    """How arrays are written."""
    # Compression takes a tenth off float32 weights, for twice the time and as much memory again.
    return ocp.PyTreeCheckpointHandler(use_compression=False)


def arrays_into(target: Any) -> ocp.args.PyTreeRestore:
    """Restores into shapes with dtypes and shardings, each device reading its part."""
    return ocp.args.PyTreeRestore(target, restore_args=ocp.checkpoint_utils.construct_restore_args(target))


def reason(error: Exception) -> str:
    """The first line: what follows in Orbax's messages is pages of its own settings."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
