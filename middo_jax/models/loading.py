"""Locates a model's parts, a Hugging Face directory and possibly weights trained from it, and loads them.

source = locate(path)                                # a directory, a middo-jax checkpoint, a PEFT adapter
model = load(source, "bfloat16", mesh=mesh)
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from middo_jax.buckets.places import url_of
from middo_jax.models import hf
from middo_jax.models.checkpoint import read_metadata, restore_params
from middo_jax.models.config import DecoderConfig, Lora, read_config, read_fields
from middo_jax.models.limits import MAX_PATH, shown
from middo_jax.models.lora import with_adapters
from middo_jax.models.model import Model, Params
from middo_jax.models.resolve import resolve
from middo_jax.parallel.mesh import one_device
from middo_jax.rundir import RunError


@dataclasses.dataclass(frozen=True)
class ModelSource:
    """The directories of a model's parts.

    Attributes:
      base: Hugging Face directory of the config, the tokenizer and, unless all were trained, the weights.
      trained: a middo-jax checkpoint or a PEFT directory; None if the model is the base itself.
      lora: shape of the adapters in `trained`; None if it contains all weights.
    """

    base: Path
    trained: Path | None = None
    lora: Lora | None = None

    @property
    def weights(self) -> Path:
        """Directory of the weights without adapters; models with the same directory can share them."""
        return (self.base if self.trained is None or self.lora else self.trained).resolve()


def locate(path: Path, *, weights: bool = True, base: str | None = None) -> ModelSource:
    """What a directory that `resolve` gives is made of.

    Args:
      path: the directory.
      weights: see `resolve`, of an adapter's base.
      base: what the user calls the base of a checkpoint of ours, if that was moved; else it is looked for
        where it was, and where it is if both were moved together.

    Raises:
      CheckpointError: the base is not to be found, or it is an adapter that cannot be used.
      RunError: metadata.json is damaged, or not of a checkpoint of ours.
      UnsupportedModel: a field of the base's config.json has a wrong type or size.
    """
    if (metadata := read_metadata(path)) is not None:
        shape = _adapters_of(path, metadata)
        return ModelSource(_base_of(path, metadata, base), path, shape)
    if hf.is_adapter(path):
        base, lora = hf.read_adapter_config(path)
        return ModelSource(resolve(base, weights=weights), path, lora)
    return ModelSource(path)


def _adapters_of(path: Path, metadata: Mapping[str, Any]) -> Lora | None:
    """The shape of a checkpoint's adapters, None if it has none.

    Raises:
      RunError: the metadata are not what a training writes.
    """
    try:
        for path_of in (metadata["base"], metadata.get("base_from_here", "")):
            if not isinstance(path_of, str) or len(path_of) > MAX_PATH:
                raise TypeError(f"{shown(path_of)} is no path")
        lora = metadata.get("lora")
        return lora and Lora(lora["rank"], lora["alpha"], tuple(lora["target_modules"]))
    except (KeyError, TypeError) as error:
        raise RunError(
            f"{path / 'metadata.json'}: not what a training writes ({type(error).__name__}: {error}); it is "
            "no checkpoint of middo-jax: name another folder, such as that of the model itself"
        ) from error


def _base_of(path: Path, metadata: Mapping[str, Any], named: str | None) -> Path:
    recorded = Path(metadata["base"])
    places = [recorded]
    if from_here := metadata.get("base_from_here"):
        places.append(Path(os.path.normpath(path.absolute() / from_here)))
    # os.path: a name that no system allows is a missing file, not an OSError.
    found = next((place for place in places if os.path.isfile(place / "config.json")), None)
    if found is not None:
        read_fields(found)  # before the tokenizer's library reads the same file; `resolve` does the same
    named = named or url_of(recorded)  # a URL: the copy of a model in a bucket may be gone
    if found is None and named is not None:
        found = resolve(named)
    if found is None or not found.is_dir():
        raise hf.CheckpointError(
            f"{path} was trained from the base model {recorded}, which is not there any more: move it back, "
            "make a link to it there, or name its new place with model.path=DIR"
        )
    return found


def tokenizer_directory(path: str) -> Path:
    """The directory of the tokenizer of the model that a user names; it may lack the weights.

    Raises:
      CheckpointError: the model does not exist and cannot be downloaded.
    """
    return locate(resolve(path, weights=False), weights=False).base


def load(
    source: ModelSource,
    dtype: str = "float32",
    param_dtype: str | None = None,
    mesh: Mesh | None = None,
    base: Model | None = None,
) -> Model:
    """Loads a model.

    Args:
      source: as returned by `locate`.
      dtype: dtype of forward passes.
      param_dtype: dtype of the weights in memory; None: `dtype`. Adapters are always float32.
      mesh: mesh to put the parameters on; None: the first device alone. With a `base`, its mesh is used.
      base: the model at `source.weights`, if it is loaded already; the new model shares its arrays.

    Raises:
      CheckpointError, UnsupportedModel, RunError: a part is missing, damaged or invalid.
      ConfigError: a parameter does not divide by the mesh.
    """
    if base is None:
        base = _load_weights(source, dtype, param_dtype or dtype, mesh or one_device())
    if source.lora is None:
        return base
    return with_adapters(base, source.lora, load_adapters(source, base.config, base.mesh))


def load_adapters(source: ModelSource, config: DecoderConfig, mesh: Mesh) -> Params:
    """Loads only a model's adapters, in float32; `config` is the base's.

    Raises:
      RunError: the model has no adapters.
      CheckpointError: a part is missing, damaged or invalid.
    """
    if source.lora is None or source.trained is None:
        raise RunError(f"{source.trained or source.base} contains a whole model, not LoRA adapters")
    restore = hf.load_adapters if hf.is_adapter(source.trained) else restore_params
    return restore(source.trained, dataclasses.replace(config, lora=source.lora), mesh, "float32")


def _load_weights(source: ModelSource, dtype: str, param_dtype: str, mesh: Mesh) -> Model:
    if source.trained is None or source.lora is not None:
        return hf.load(source.base, dtype, param_dtype, mesh)
    config = read_config(source.base, dtype)
    return Model.of(config, restore_params(source.trained, config, mesh, param_dtype), mesh)
