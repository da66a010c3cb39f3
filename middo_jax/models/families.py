"""The model families that the decoder computes, one row each.

A row contains the decoder's options that a `model_type` implies. `models.config` reads everything else from
the checkpoint's config.json. To add a family whose layers are made of the same parts:

    register(Family("ministral", "MinistralForCausalLM"))
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Family:
    """One row of the table.

    Attributes:
      model_type: as in config.json; transformers must have a config class for it.
      architecture: the one supported architecture of this type, as in config.json.
      activation: the field of config.json that names the activation of the MLP.
      qkv_bias: queries, keys and values have a bias.
      qk_norm: each head's query and key are normed before RoPE.
      post_norms: the outputs of attention and MLP are normed again before they are added.
      norm_offset: added to the scale of every norm: 1 where checkpoints store the difference from 1.
      scaled_embeddings: embeddings are multiplied by sqrt(hidden_size) before the first layer.
      query_scale: the field of config.json whose value ** -0.5 scales the attention scores; None: head_dim.
    """

    model_type: str
    architecture: str
    activation: str = "hidden_act"
    qkv_bias: bool = False
    qk_norm: bool = False
    post_norms: bool = False
    norm_offset: float = 0.0
    scaled_embeddings: bool = False
    query_scale: str | None = None


def _gemma(model_type: str, architecture: str, *, qk_norm: bool = False) -> Family:
    return Family(
        model_type,
        architecture,
        activation="hidden_activation",
        qk_norm=qk_norm,
        post_norms=True,
        norm_offset=1.0,
        scaled_embeddings=True,
        query_scale="query_pre_attn_scalar",
    )


_TABLE = {
    row.model_type: row
    for row in (
        Family("llama", "LlamaForCausalLM"),
        Family("mistral", "MistralForCausalLM"),
        Family("qwen2", "Qwen2ForCausalLM", qkv_bias=True),
        Family("qwen3", "Qwen3ForCausalLM", qk_norm=True),
        _gemma("gemma2", "Gemma2ForCausalLM"),
        _gemma("gemma3_text", "Gemma3ForCausalLM", qk_norm=True),
    )
}


def families() -> tuple[Family, ...]:
    """All rows."""
    return tuple(_TABLE.values())


def family(model_type: object) -> Family | None:
    """The row of a model type; None if there is none."""
    return _TABLE.get(model_type) if isinstance(model_type, str) else None


def register(row: Family) -> None:
    """Adds a family.

    Raises:
      ValueError: a family of that model type exists already.
    """
    if row.model_type in _TABLE:
        raise ValueError(f"there is a family with model_type {row.model_type!r} already")
    _TABLE[row.model_type] = row


def unregister(model_type: str) -> None:
    """Removes a family.

    Raises:
      KeyError: no family has that model type.
    """
    del _TABLE[model_type]
