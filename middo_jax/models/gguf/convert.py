"""Converts a GGUF file's tensors and metadata to the files of a Hugging Face directory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from middo_jax.models.config import DecoderConfig, from_hugging_face
from middo_jax.models.gguf.architectures import TENSOR_NAMES, config_json, rotates_neighbours
from middo_jax.models.gguf.header import require_sane
from middo_jax.models.gguf.tokenizer import build_tokenizer, tokenizer_config
from middo_jax.models.hf import CheckpointError, LazyTensor, new_directory, tensor_table, write_weights
from middo_jax.models.parameters import ParameterSpec
from middo_jax.rundir import write_json
from middo_jax.rundir.files import own_files

if TYPE_CHECKING:
    from gguf import GGUFReader, ReaderTensor

_ROPE_FACTORS = "rope_freqs.weight"


def convert(gguf_path: str | Path, out_dir: str | Path, *, weights: bool = True) -> Path:
    """Writes a GGUF model as a Hugging Face directory and returns it.

    Args:
      gguf_path: GGUF file of any quantization that the `gguf` package can dequantize.
      out_dir: directory that is missing or empty; it appears only once it is complete.
      weights: whether the weights are written too; without them, only tokenizer and config files are.

    Raises:
      CheckpointError: it is not a GGUF file, or its architecture, a tensor or the tokenizer is unsupported.
      FileExistsError: out_dir is not empty.
    """
    gguf_path, out_dir = Path(gguf_path), Path(out_dir)
    reader = _open(gguf_path)
    try:
        metadata = {name: field.contents() for name, field in reader.fields.items()}
        stored = {tensor.name: tensor for tensor in reader.tensors}
        # Not a parameter: the RoPE scaling, which config.json expresses as settings.
        factors = stored.pop(_ROPE_FACTORS, None)
        config = config_json(metadata, stored.keys(), None if factors is None else _dequantized(factors))
        tensors = _lazy_tensors(stored, from_hugging_face(config), rotates_neighbours(metadata))
        tokenizer = build_tokenizer(metadata)
        tokenizer_fields = tokenizer_config(metadata)
    except KeyError as error:
        raise CheckpointError(f"{gguf_path}: metadata field {error} is missing") from error
    except (
        ValueError,
        IndexError,
        ArithmeticError,
        TypeError,
        AttributeError,
    ) as error:  # fields of other types
        raise CheckpointError(f"{gguf_path}: its metadata do not make a model: {error}") from error
    with own_files(), new_directory(out_dir) as directory:
        write_json(directory / "config.json", config)
        write_json(directory / "generation_config.json", _generation_config(config, metadata))
        write_json(directory / "tokenizer_config.json", tokenizer_fields)
        tokenizer.save(str(directory / "tokenizer.json"))
        if weights:
            write_weights(directory, tensors, max_shard_bytes=5_000_000_000)
    return out_dir


def _open(path: Path) -> GGUFReader:
    try:
        from gguf import GGUFReader  # an optional package
    except ImportError as error:
        raise CheckpointError(f"{path}: reading GGUF needs the gguf package: pip install gguf") from error
    try:
        require_sane(path)
        return GGUFReader(path)
    except (ValueError, LookupError, OverflowError, OSError) as error:
        raise CheckpointError(f"{path}: missing, truncated or not a GGUF file: {error}") from error


def _generation_config(config: dict[str, Any], metadata: dict[str, Any]) -> dict[str, Any]:
    """The special tokens; the end of turn ends an answer, as the end of text does."""
    ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in config}
    end_of_turn = metadata.get("tokenizer.ggml.eot_token_id")
    if end_of_turn is not None and end_of_turn != ids.get("eos_token_id", end_of_turn):
        ids["eos_token_id"] = [ids["eos_token_id"], end_of_turn]
    return ids


def _lazy_tensors(
    stored: dict[str, ReaderTensor], config: DecoderConfig, neighbours: bool
) -> list[LazyTensor]:
    """The Hugging Face tensors, each dequantized when it is written.

    Args:
      stored: the GGUF file's tensors by name; all must be used.
      config: the model's config.
      neighbours: whether the rows of q and k are ordered for RoPE on neighbours.
    """
    unused = dict(stored)

    def lazy(name: str, shape: tuple[int, ...], spec: ParameterSpec, layer: int | None) -> LazyTensor:
        gguf_name = TENSOR_NAMES[spec.path[-1]].format(layer=layer)
        if gguf_name not in unused:
            raise ValueError(f"tensor {gguf_name} is missing")
        tensor = unused.pop(gguf_name)
        found = tuple(int(size) for size in reversed(tensor.shape))  # GGUF lists the fastest axis first
        if found != shape:
            raise ValueError(f"tensor {gguf_name} has shape {found}, the metadata imply {shape}")

        def read() -> np.ndarray:
            weight = _dequantized(tensor)
            if neighbours and spec.path[-1] in ("q_proj", "k_proj"):
                return _halves_from_neighbours(weight, config.head_dim)
            if spec.init == "scale" and config.norm_offset:
                return weight - np.float32(config.norm_offset)  # GGUF stores the scale with the offset added
            return weight

        return LazyTensor(name, shape, np.dtype(np.float32), read)

    tensors = [lazy(*row) for row in tensor_table(config)]
    if unused:
        raise ValueError(f"tensor {min(unused)} is not supported")
    return tensors


def _dequantized(tensor: ReaderTensor) -> np.ndarray:
    from gguf.quants import dequantize  # an optional package

    return dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)


def _halves_from_neighbours(weight: np.ndarray, head_dim: int) -> np.ndarray:
    """Reorders q's or k's rows [heads * head_dim, in]: GGUF rotates (2i, 2i+1), Hugging Face (i, i+d/2)."""
    return weight.reshape(-1, head_dim // 2, 2, weight.shape[-1]).swapaxes(1, 2).reshape(weight.shape)
