"""Every parameter of the decoder, one row each: name, axes, Hugging Face name, initial value.

Shape, sharding, initialisation, loading and export are all read off this table. Layers are stacked on a
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
      path: where it stands in the parameter tree.
      axes: logical axes, which give both its shape and its place on the mesh.
      hf_name: its name in a Hugging Face checkpoint; `{layer}` where there is one tensor a layer.
      transposed: whether Hugging Face stores the last two axes swapped.
      init: how a random model starts.
    """

    path: tuple[str, ...]
    axes: tuple[str, ...]
    hf_name: str
    transposed: bool = False
    init: Literal["normal", "ones"] = "normal"

    def shape(self, config: DecoderConfig) -> tuple[int, ...]:
        """Its shape; `heads` and `kv_heads` count heads times head_dim."""
        size = {
            "layers": config.num_layers,
            "vocab": config.vocab_size,
            "embed": config.hidden_size,
            "norm": config.hidden_size,
            "heads": config.num_heads * config.head_dim,
            "kv_heads": config.num_kv_heads * config.head_dim,
            "mlp": config.intermediate_size,
        }
        return tuple(size[axis] for axis in self.axes)

    def size(self, config: DecoderConfig) -> int:
        """Number of elements."""
        return math.prod(self.shape(config))

    def sharding(self, mesh: Mesh) -> NamedSharding:
        """Its place on the mesh."""
        return named_sharding(mesh, *self.axes)

    @property
    def is_stacked(self) -> bool:
        """Whether it holds one tensor a layer."""
        return self.axes[0] == "layers"

    def initial(self, key: jax.Array, config: DecoderConfig, dtype: Any = jnp.float32) -> jax.Array:
        """Ones for norms, normal with standard deviation 0.02 for matrices, as Hugging Face does."""
        shape = self.shape(config)
        return jnp.ones(shape, dtype) if self.init == "ones" else 0.02 * jax.random.normal(key, shape, dtype)


def _layer(name: str, axes: tuple[str, ...], hf_name: str) -> ParameterSpec:
    is_norm = axes == ("norm",)
    return ParameterSpec(
        ("layers", name),
        ("layers", *axes),
        f"model.layers.{{layer}}.{hf_name}.weight",
        transposed=not is_norm,
        init="ones" if is_norm else "normal",
    )


_EMBED = ParameterSpec(("embed",), ("vocab", "embed"), "model.embed_tokens.weight")
_LAYERS = (
    _layer("attention_norm", ("norm",), "input_layernorm"),
    _layer("q_proj", ("embed", "heads"), "self_attn.q_proj"),
    _layer("k_proj", ("embed", "kv_heads"), "self_attn.k_proj"),
    _layer("v_proj", ("embed", "kv_heads"), "self_attn.v_proj"),
    _layer("o_proj", ("heads", "embed"), "self_attn.o_proj"),
    _layer("mlp_norm", ("norm",), "post_attention_layernorm"),
    _layer("gate_proj", ("embed", "mlp"), "mlp.gate_proj"),
    _layer("up_proj", ("embed", "mlp"), "mlp.up_proj"),
    _layer("down_proj", ("mlp", "embed"), "mlp.down_proj"),
)
_FINAL_NORM = ParameterSpec(("final_norm",), ("norm",), "model.norm.weight", init="ones")
_LM_HEAD = ParameterSpec(("lm_head",), ("vocab", "embed"), "lm_head.weight")


def parameters(config: DecoderConfig) -> tuple[ParameterSpec, ...]:
    """All rows of the table that a model of this config has; a tied head is the embedding itself."""
    return (_EMBED, *_LAYERS, _FINAL_NORM) + (() if config.tie_word_embeddings else (_LM_HEAD,))


def num_params(config: DecoderConfig) -> int:
    """All elements of all parameters; a tied embedding counts once."""
    return sum(spec.size(config) for spec in parameters(config))
