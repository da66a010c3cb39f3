"""What a user calls a model -> a Hugging Face directory on this machine."""

from __future__ import annotations

import os
import re
from pathlib import Path

from middo_jax.models.hf import CheckpointError
from middo_jax.run import file_hash


def resolve(path: str) -> Path:
    """Turns what a user calls a model into a Hugging Face directory on this machine.

    A directory is itself. A .gguf file is converted, once, into $XDG_CACHE_HOME/middo-jax/gguf/HASH. Anything
    else is taken for a hub repo id and downloaded (safetensors, JSON and tokenizer files only).

    Raises:
      CheckpointError: there is no such file, and no such repo within reach.
    """
    local = Path(path).expanduser()
    if local.is_dir():
        return local
    if local.suffix == ".gguf" and local.is_file():
        from middo_jax.models.gguf import convert

        cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        converted = cache / "middo-jax" / "gguf" / file_hash(local)
        if not converted.exists():
            try:
                convert(local, converted)
            except OSError:
                if not converted.exists():  # else another process was faster
                    raise
        return converted
    if local.exists():
        raise CheckpointError(f"model {path}: neither a directory nor a .gguf file")
    if local.suffix == ".gguf" or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", path):
        raise CheckpointError(f"model {path}: no such file or directory")
    from huggingface_hub import snapshot_download

    try:
        snapshot = snapshot_download(
            path,
            allow_patterns=[
                "model*.safetensors",
                "adapter_model.safetensors",
                "*.json",
                "*.jinja",
                "tokenizer.model",
            ],
            ignore_patterns=["*/*"],
        )
    except Exception as error:  # the hub's client raises a dozen unrelated classes
        raise CheckpointError(
            f"model {path}: no such directory here (looked in {Path.cwd()}), and downloading it as a hub "
            f"repo failed: {type(error).__name__}: {error}"
        ) from error
    return Path(snapshot)
