"""GGUF's metadata -> config.json. Missing fields get llama.cpp's defaults."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import numpy as np

from middo_jax.models.limits import wrong_size

# The last part of a parameter's path -> its name in a GGUF file.
TENSOR_NAMES = {
    "embed": "token_embd.weight",
    "attention_norm": "blk.{layer}.attn_norm.weight",
    "q_proj": "blk.{layer}.attn_q.weight",
    "k_proj": "blk.{layer}.attn_k.weight",
    "v_proj": "blk.{layer}.attn_v.weight",
    "o_proj": "blk.{layer}.attn_output.weight",
    "q_bias": "blk.{layer}.attn_q.bias",
    "k_bias": "blk.{layer}.attn_k.bias",
    "v_bias": "blk.{layer}.attn_v.bias",
    "q_norm": "blk.{layer}.attn_q_norm.weight",
    "k_norm": "blk.{layer}.attn_k_norm.weight",
    "post_attention_norm": "blk.{layer}.post_attention_norm.weight",
    "mlp_norm": "blk.{layer}.ffn_norm.weight",
    "gate_proj": "blk.{layer}.ffn_gate.weight",
    "up_proj": "blk.{layer}.ffn_up.weight",
    "down_proj": "blk.{layer}.ffn_down.weight",
    "post_mlp_norm": "blk.{layer}.post_ffw_norm.weight",
    "final_norm": "output_norm.weight",
    "lm_head": "output.weight",
}


class Fields:
    """The metadata of one architecture: `fields["block_count"]` is `llama.block_count`."""

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        self.architecture: str = metadata["general.architecture"]
        self._metadata = metadata

    def __getitem__(self, name: str) -> Any:
        return self._metadata[f"{self.architecture}.{name}"]

    def get(self, name: str, default: Any) -> Any:
        """The field, or the default if it is missing."""
        return self._metadata.get(f"{self.architecture}.{name}", default)

    def only(self, name: str, *allowed: Any) -> None:
        """Raises ValueError unless the field is absent or has one of these values."""
        if (value := self.get(name, allowed[0])) not in allowed:
            supported = " or ".join(map(repr, allowed))
            raise ValueError(f"{self.architecture}.{name} {value!r} is not supported, only {supported}")


def _qwen2(fields: Fields, head_dim: int) -> dict[str, Any]:
    return {"use_sliding_window": False}


def _gemma2(fields: Fields, head_dim: int) -> dict[str, Any]:
    return {
        **_gemma(fields, head_dim, period=2, layers_of_27b=46),
        "attn_logit_softcapping": _number(fields.get("attn_logit_softcapping", 50.0)),
        "final_logit_softcapping": _number(fields.get("final_logit_softcapping", 30.0)),
    }


def _gemma3(fields: Fields, head_dim: int) -> dict[str, Any]:
    fields.only("attn_logit_softcapping", None)
    cap = fields.get("final_logit_softcapping", None)
    return {
        **_gemma(fields, head_dim, period=6, layers_of_27b=62),
        "rope_local_base_freq": _number(fields.get("rope.freq_base_swa", 10_000.0)),
        "final_logit_softcapping": None if cap is None else _number(cap),
    }


def _gemma(fields: Fields, head_dim: int, period: int, layers_of_27b: int) -> dict[str, Any]:
    """Every `period`-th layer has full attention; queries are scaled by a head's width, except in the 27B."""
    layers = fields["block_count"]
    period = fields.get("attention.sliding_window_pattern", period)
    if not isinstance(period, int):
        raise ValueError(f"{fields.architecture}.attention.sliding_window_pattern is not one whole number")
    is_27b = layers == layers_of_27b
    return {
        "sliding_window": fields["attention.sliding_window"],
        "layer_types": [
            "sliding_attention" if (layer + 1) % period else "full_attention" for layer in range(layers)
        ],
        "query_pre_attn_scalar": fields["embedding_length"] // fields["attention.head_count"]
        if is_27b
        else head_dim,
    }


class _Architecture(NamedTuple):
    """A GGUF architecture in Hugging Face's terms.

    Attributes:
      model_type: config.json's `model_type`.
      class_name: class in config.json's `architectures`.
      neighbours: whether RoPE rotates pairs (2i, 2i+1), for which llama.cpp's converter reorders q and k.
      activation: config.json's field for the activation, and its value.
      more: function that returns further fields of config.json.
    """

    model_type: str
    class_name: str
    neighbours: bool = False
    activation: tuple[str, str] = ("hidden_act", "silu")
    more: Callable[[Fields, int], dict[str, Any]] = lambda fields, head_dim: {}


_GELU = ("hidden_activation", "gelu_pytorch_tanh")
_ARCHITECTURES = {
    "llama": _Architecture("llama", "LlamaForCausalLM", neighbours=True),
    "qwen2": _Architecture("qwen2", "Qwen2ForCausalLM", more=_qwen2),
    "qwen3": _Architecture("qwen3", "Qwen3ForCausalLM"),
    "gemma2": _Architecture("gemma2", "Gemma2ForCausalLM", activation=_GELU, more=_gemma2),
    "gemma3": _Architecture("gemma3_text", "Gemma3ForCausalLM", activation=_GELU, more=_gemma3),
}


def rotates_neighbours(metadata: Mapping[str, Any]) -> bool:
    """Whether q and k are ordered for RoPE on neighbours (2i, 2i+1), not on halves (i, i+d/2)."""
    return _ARCHITECTURES[metadata["general.architecture"]].neighbours


def config_json(
    metadata: Mapping[str, Any], tensor_names: Collection[str], rope_factors_h: np.ndarray | None
) -> dict[str, Any]:
    """config.json of a GGUF file.

    Args:
      metadata: the file's metadata.
      tensor_names: the file's tensors; without a head among them, the embedding is the head.
      rope_factors_h: its `rope_freqs.weight` [head_dim / 2], if it has one.

    Raises:
      KeyError: a metadata field is missing.
      ValueError: the file has a property that config.json cannot express.
    """
    fields = Fields(metadata)
    if fields.architecture not in _ARCHITECTURES:
        raise ValueError(
            f"architecture {fields.architecture!r} is not supported; "
            f"supported: {', '.join(map(repr, _ARCHITECTURES))}"
        )
    architecture = _ARCHITECTURES[fields.architecture]
    layers, heads = fields["block_count"], fields["attention.head_count"]
    # Before a list of all layers is made.
    if wrong := wrong_size({"num_hidden_layers": layers, "num_attention_heads": heads}):
        raise ValueError(wrong)
    head_dim = fields.get("attention.key_length", fields["embedding_length"] // heads)
    fields.only("expert_count", 0)
    fields.only("rope.dimension_count", head_dim)
    fields.only("attention.value_length", head_dim)
    return {
        "architectures": [architecture.class_name],
        "model_type": architecture.model_type,
        "vocab_size": len(metadata["tokenizer.ggml.tokens"]),
        "hidden_size": fields["embedding_length"],
        "intermediate_size": fields["feed_forward_length"],
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": fields.get("attention.head_count_kv", heads),
        "head_dim": head_dim,
        architecture.activation[0]: architecture.activation[1],
        "max_position_embeddings": fields["context_length"],
        "rope_theta": _number(fields.get("rope.freq_base", 10_000.0)),
        "rope_scaling": _rope_scaling(fields, head_dim, rope_factors_h),
        "rms_norm_eps": _number(fields["attention.layer_norm_rms_epsilon"]),
        "tie_word_embeddings": TENSOR_NAMES["lm_head"] not in tensor_names,
        "dtype": "float32",
        **architecture.more(fields, head_dim),
        **{
            key: metadata[f"tokenizer.ggml.{name}_token_id"]
            for key, name in (("bos_token_id", "bos"), ("eos_token_id", "eos"), ("pad_token_id", "padding"))
            if f"tokenizer.ggml.{name}_token_id" in metadata
        },
    }


def _number(stored: float) -> float:
    """The decimal number that was rounded to a float32: 9.999999974752427e-07 is 1e-06."""
    return float(str(np.float32(stored)))


def _rope_scaling(fields: Fields, head_dim: int, factors_h: np.ndarray | None) -> dict[str, Any] | None:
    fields.only("rope.scaling.type", "linear", "none")
    fields.only("rope.scale_linear", 1.0)
    factor = _number(fields.get("rope.scaling.factor", 1.0))
    if factors_h is not None:
        fields.only("rope.scaling.factor", 1.0)
        return _llama3_scaling(fields, head_dim, factors_h)
    if fields.get("rope.scaling.type", "linear") == "none" or factor == 1:
        return None
    return {"rope_type": "linear", "factor": factor}


def _llama3_scaling(fields: Fields, head_dim: int, factors_h: np.ndarray) -> dict[str, Any]:
    """Llama 3.1's RoPE parameters, recovered from the divisors of the frequencies.

    GGUF stores only the divisors. All published models differ in `factor` alone, which is the divisor of the
    lowest frequencies. If the formula then reproduces all divisors, the other parameters are right too.

    Raises:
      ValueError: the formula does not reproduce them.
    """
    scaling = {
        "rope_type": "llama3",
        "factor": round(float(factors_h.max()), 4),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    exponents_h = np.arange(0, head_dim, 2) / head_dim
    wavelengths_h = 2 * math.pi * _number(fields.get("rope.freq_base", 10_000.0)) ** exponents_h
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    kept_h = (scaling["original_max_position_embeddings"] / wavelengths_h - low) / (high - low)
    kept_h = np.clip(kept_h, 0, 1)
    expected_h = 1 / ((1 - kept_h) / scaling["factor"] + kept_h)
    if factors_h.shape != expected_h.shape or not np.allclose(factors_h, expected_h, rtol=1e-4):
        raise ValueError("tensor rope_freqs.weight is not supported: it is not the RoPE scaling of Llama 3")
    return scaling
