"""Resolves the model that a user names to a Hugging Face directory on this machine."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

import huggingface_hub

from middo_jax.buckets import here
from middo_jax.models.config import read_fields
from middo_jax.models.gguf import convert
from middo_jax.models.hf import CheckpointError
from middo_jax.rundir import file_hash

# Large enough for a GGUF file's metadata, including vocabulary and merges, which precede the weights.
_HEAD_BYTES = 64 << 20
# *.model: tokenizer.model, spiece.model, sentencepiece.bpe.model.
_TOKENIZER_FILES = [
    *("*.json", "*.jinja", "*.model", "*.tiktoken", "merges.txt", "vocab.txt"),
    "adapter_model.safetensors",
]
_SNAPSHOT = re.compile(r".*/models--([^/]+)/snapshots/[^/]+/?")  # a model in the hub's cache


def resolve(path: str, *, weights: bool = True) -> Path:
    """Resolves the model that a user names to a Hugging Face directory on this machine.

    A directory is returned unchanged, and for the URL of one in a bucket its copy on this machine. A .gguf
    file is converted once, into $XDG_CACHE_HOME/middo-jax/gguf/HASH. Anything else is treated as a hub repo
    id and downloaded (safetensors, JSON and tokenizer files only).

    Args:
      path: directory or .gguf file, here or in a bucket, or hub repo id.
      weights: whether the weights are needed. Without them nothing is dequantized and no weights are
        downloaded; the directory may lack them.

    Raises:
      CheckpointError: there is no such file, and no such repo can be downloaded.
      BucketError: a bucket cannot be read.
      UnsupportedModel: a field of config.json has the wrong type.
    """
    local = Path(here(path, lambda name: weights or not _is_weights(name))).expanduser()
    if local.is_dir():
        if (local / "config.json").is_file():
            read_fields(local)  # checks types: transformers' error would have many lines
        return local
    if local.suffix == ".gguf" and local.is_file():
        cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        name = file_hash(local) if weights else f"tokenizer-{_head_hash(local)}"
        converted = cache / "middo-jax" / "gguf" / name
        if not converted.exists():
            try:
                convert(local, converted, weights=weights)
            except OSError:
                if not converted.exists():  # else another process has converted it
                    raise
        return converted
    if local.exists():
        raise CheckpointError(f"model {path}: neither a directory nor a .gguf file")
    if local.suffix == ".gguf" or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", path):
        raise CheckpointError(f"model {path}: no such file or directory")
    try:
        snapshot = huggingface_hub.snapshot_download(
            path,
            allow_patterns=[*_TOKENIZER_FILES, *(["model*.safetensors"] if weights else [])],
            ignore_patterns=["*/*"],
        )
    except Exception as error:  # the hub's client raises a dozen unrelated classes
        raise CheckpointError(
            f"model {path}: no such directory here (looked in {Path.cwd()}), and downloading it as a hub "
            f"repo failed: {type(error).__name__}: {error}"
        ) from error
    return resolve(snapshot)


def repo_of(path: str) -> str | None:
    """The hub's name of a model in the hub's cache; None of any other."""
    snapshot = _SNAPSHOT.fullmatch(Path(path).as_posix())
    return snapshot[1].replace("--", "/") if snapshot else None


def served_name(path: str) -> str:
    """The name under which a model is served, from the user's name of it.

    models/SmolLM2-135M-Instruct                            ->  SmolLM2-135M-Instruct
    ~/Qwen2.5-1.5B-Instruct-Q4_K_M.gguf                     ->  Qwen2.5-1.5B-Instruct-Q4_K_M
    Qwen/Qwen2.5-0.5B, or its snapshot in the hub's cache   ->  Qwen/Qwen2.5-0.5B
    gs://bucket/models/mine                                 ->  mine
    """
    place = Path(path).expanduser()
    if (repo := repo_of(path)) is not None:
        return repo
    if place.suffix == ".gguf":
        return place.stem
    if place.is_dir():
        return place.resolve().name
    return place.name if "://" in path else path


def _is_weights(name: str) -> bool:
    return name.endswith((".safetensors", ".bin", ".pt", ".pth")) and name != "adapter_model.safetensors"


def _head_hash(file: Path) -> str:
    """SHA-256 of a file's size and beginning; it avoids reading gigabytes of weights."""
    with file.open("rb") as stream:
        head = stream.read(_HEAD_BYTES)
    return hashlib.sha256(f"{file.stat().st_size} ".encode() + head).hexdigest()
