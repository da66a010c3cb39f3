"""Every parameter of the decoder, one row each: name, axes, Hugging Face name, initial value.

Shape, sharding, initialisation, loading and export are all derived from this table. Layers are stacked on a
leading `layers` axis; a matrix is stored [in, out], the transpose of Hugging Face's [out, in].
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from middo_jax.models.config import DecoderConfig
from middo_jax.parallel.mesh import named_sharding


@dataclasses.dataclass(frozen=True)
class ParameterSpec:
    """One parameter.

    Attributes:
      path: its path in the parameter tree.
      axes: logical axes, which determine its shape and its sharding.
      hf_name: its name in a Hugging Face checkpoint, with `{layer}` where there is one tensor per layer; for
        an adapter, its name in a PEFT directory.
      transposed: whether Hugging Face stores the last two axes swapped.
      init: initial value: `scale` for a norm, `fan_in` uniform within 1 / sqrt(inputs).
    """

    path: tuple[str, ...]
    axes: tuple[str, ...]
    hf_name: str
    transposed: bool = False
    init: Literal["normal", "scale", "zeros", "fan_in"] = "normal"

    def shape(self, config: DecoderConfig) -> tuple[int, ...]:
        """The parameter's shape; `heads` and `kv_heads` count heads times head_dim."""
        size = {
            "layers": config.num_layers,
            "vocab": config.vocab_size,
            "embed": config.hidden_size,
            "norm": config.hidden_size,
            "head_dim": config.head_dim,
            "heads": config.num_heads * config.head_dim,
            "kv_heads": config.num_kv_heads * config.head_dim,
            "mlp": config.intermediate_size,
            "rank": config.lora.rank if config.lora else 0,
        }
        return tuple(size[axis] for axis in self.axes)

    def size(self, config: DecoderConfig) -> int:
        """Number of elements."""
        return math.prod(self.shape(config))

    def sharding(self, mesh: Mesh) -> NamedSharding:
        """The parameter's sharding on the mesh."""
        return named_sharding(mesh, *self.axes)

    @property
    def is_stacked(self) -> bool:
        """Whether it stacks one tensor per layer."""
        return self.axes[0] == "layers"

    def initial(self, key: jax.Array, config: DecoderConfig, dtype: Any = jnp.float32) -> jax.Array:
        """The parameter's value in an untrained model, as Hugging Face and PEFT initialise it."""
        shape = self.shape(config)
        match self.init:
            case "normal":
                return 0.02 * jax.random.normal(key, shape, dtype)
            case "scale":
                return jnp.full(shape, 1 - config.norm_offset, dtype)
            case "zeros":
                return jnp.zeros(shape, dtype)
            case "fan_in":
                bound = shape[-2] ** -0.5
                return jax.random.uniform(key, shape, dtype, -bound, bound)


def _matrix(name: str, inputs: str, outputs: str, module: str) -> ParameterSpec:
    hf_name = f"model.layers.{{layer}}.{module}.weight"
    return ParameterSpec(("layers", name), ("layers", inputs, outputs), hf_name, transposed=True)


def _bias(name: str, axis: str, module: str) -> ParameterSpec:
    hf_name = f"model.layers.{{layer}}.{module}.bias"
    return ParameterSpec(("layers", name), ("layers", axis), hf_name, init="zeros")


def _norm(name: str, module: str, axis: str = "norm") -> ParameterSpec:
    hf_name = f"model.layers.{{layer}}.{module}.weight"
    return ParameterSpec(("layers", name), ("layers", axis), hf_name, init="scale")


_EMBED = ParameterSpec(("embed",), ("vocab", "embed"), "model.embed_tokens.weight")
_MATRICES = (
    _matrix("q_proj", "embed", "heads", "self_attn.q_proj"),
    _matrix("k_proj", "embed", "kv_heads", "self_attn.k_proj"),
    _matrix("v_proj", "embed", "kv_heads", "self_attn.v_proj"),
    _matrix("o_proj", "heads", "embed", "self_attn.o_proj"),
    _matrix("gate_proj", "embed", "mlp", "mlp.gate_proj"),
    _matrix("up_proj", "embed", "mlp", "mlp.up_proj"),
    _matrix("down_proj", "mlp", "embed", "mlp.down_proj"),
)
_QKV_BIASES = (
    _bias("q_bias", "heads", "self_attn.q_proj"),
    _bias("k_bias", "kv_heads", "self_attn.k_proj"),
    _bias("v_bias", "kv_heads", "self_attn.v_proj"),
)
_QK_NORMS = (
    _norm("q_norm", "self_attn.q_norm", axis="head_dim"),
    _norm("k_norm", "self_attn.k_norm", axis="head_dim"),
)
_NORMS = (
    _norm("attention_norm", "input_layernorm"),
    _norm("mlp_norm", "post_attention_layernorm"),
)
# Without post-norms, post_attention_layernorm precedes the MLP; with them, it norms attention's output.
_NORMS_WITH_POST = (
    _norm("attention_norm", "input_layernorm"),
    _norm("post_attention_norm", "post_attention_layernorm"),
    _norm("mlp_norm", "pre_feedforward_layernorm"),
    _norm("post_mlp_norm", "post_feedforward_layernorm"),
)
_FINAL_NORM = ParameterSpec(("final_norm",), ("norm",), "model.norm.weight", init="scale")
_LM_HEAD = ParameterSpec(("lm_head",), ("vocab", "embed"), "lm_head.weight")

LORA_TARGETS = tuple(spec.path[-1] for spec in _MATRICES)


def parameters(config: DecoderConfig) -> tuple[ParameterSpec, ...]:
    """All rows of a model of this config, without adapters; a tied head is the embedding and has no row."""
    return (
        _EMBED,
        *(_NORMS_WITH_POST if config.post_norms else _NORMS),
        *_MATRICES,
        *(_QKV_BIASES if config.qkv_bias else ()),
        *(_QK_NORMS if config.qk_norm else ()),
        _FINAL_NORM,
        *(() if config.tie_word_embeddings else (_LM_HEAD,)),
    )


def adapters(config: DecoderConfig) -> tuple[ParameterSpec, ...]:
    """The rows of the model's LoRA adapters: per target matrix A, initially random, and B, initially 0."""
    targets = config.lora.target_modules if config.lora else ()
    return tuple(row for spec in _MATRICES if spec.path[-1] in targets for row in _adapter(spec))


def _adapter(spec: ParameterSpec) -> tuple[ParameterSpec, ParameterSpec]:
    layers, inputs, outputs = spec.axes
    path, module = spec.path, f"base_model.model.{spec.hf_name.removesuffix('.weight')}"

    def row(
        suffix: str, axes: tuple[str, ...], hf_name: str, init: Literal["fan_in", "zeros"]
    ) -> ParameterSpec:
        path_of_row = (*path[:-1], f"{path[-1]}_{suffix}")
        return ParameterSpec(path_of_row, axes, f"{module}.{hf_name}.weight", transposed=True, init=init)

    return (
        row("lora_a", (layers, inputs, "rank"), "lora_A", "fan_in"),
        row("lora_b", (layers, "rank", outputs), "lora_B", "zeros"),
    )


def num_params(config: DecoderConfig) -> int:
    """Number of elements of all parameters, without adapters; a tied embedding counts once."""
    return sum(spec.size(config) for spec in parameters(config))
