"""DecoderConfig: what the one dense decoder needs to know, read from a Hugging Face config."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class UnsupportedModel(ValueError):
    """The checkpoint's config asks for something that the decoder does not compute; names the field."""


@dataclasses.dataclass(frozen=True)
class Llama3Rope:
    """Llama 3.1's stretching of long RoPE wavelengths."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Shapes and constants of a decoder. Hashable: it is a static argument of jitted functions."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rope_theta: float = 10_000.0
    rope_scaling: Llama3Rope | None = None
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = False
    dtype: str = "float32"  # of activations; parameters are cast to it where they are used


def from_hugging_face(config: Mapping[str, Any], dtype: str = "float32") -> DecoderConfig:
    """Reads the fields of a config.json, of transformers 4 or 5.

    Raises:
      UnsupportedModel: a model type or field that the decoder would not compute exactly.
    """
    model_type = config.get("model_type")
    if model_type != "llama":
        raise UnsupportedModel(f"config.json: model_type {model_type!r} is not supported; supported: 'llama'")
    for field, only in (("hidden_act", "silu"), ("attention_bias", False), ("mlp_bias", False)):
        if config.get(field, only) != only:
            raise UnsupportedModel(f"config.json: {field}={config[field]!r} is not supported, only {only!r}")
    for field in (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
    ):
        if not isinstance(config.get(field), int):
            raise UnsupportedModel(f"config.json: {field} is missing or no whole number")
    # transformers 5 writes rope_parameters; 4 wrote rope_theta and rope_scaling.
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    theta = rope.get("rope_theta", config.get("rope_theta", 10_000.0))
    heads = config["num_attention_heads"]
    return DecoderConfig(
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        max_position_embeddings=config.get("max_position_embeddings", 2048),
        rope_theta=float(theta),
        rope_scaling=_rope_scaling(rope),
        rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        dtype=dtype,
    )


def _rope_scaling(rope: Mapping[str, Any]) -> Llama3Rope | None:
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise UnsupportedModel("config.json: partial_rotary_factor is not supported")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise UnsupportedModel(
            f"config.json: rope_type {kind!r} is not supported; supported: 'default', 'llama3'"
        )
    fields = [field.name for field in dataclasses.fields(Llama3Rope)]
    if missing := [field for field in fields if field not in rope]:
        raise UnsupportedModel(f"config.json: the llama3 RoPE parameters lack {', '.join(missing)}")
    return Llama3Rope(*(rope[field] for field in fields))


def read_config(directory: str | Path, dtype: str = "float32") -> DecoderConfig:
    """Reads DIRECTORY/config.json.

    Raises:
      FileNotFoundError: it is not there.
      UnsupportedModel: see `from_hugging_face`.
    """
    path = Path(directory) / "config.json"
    try:
        return from_hugging_face(json.loads(path.read_text(encoding="utf-8")), dtype)
    except json.JSONDecodeError as e:
        raise UnsupportedModel(f"{path}: not valid JSON: {e}") from e
