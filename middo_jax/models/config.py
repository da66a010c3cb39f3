"""DecoderConfig: shapes and constants of the dense decoder, read from a Hugging Face config."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from transformers import AutoConfig

from middo_jax.models.families import families, family
from middo_jax.models.limits import shown, wrong_labels, wrong_rope, wrong_size
from middo_jax.rundir.nesting import require_flat

# Fields of any family that would change the computation, and their only supported value.
_ONLY: tuple[tuple[str, Any], ...] = (
    ("attention_bias", False),
    ("mlp_bias", False),
    ("use_bidirectional_attention", False),
    ("quantization_config", None),
)
_ACTIVATIONS: dict[str, Literal["silu", "gelu_tanh"]] = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


_MOST_BYTES = 1 << 22  # of config.json
_INT, _NUMBER, _BOOL, _TEXT = (int,), (int, float), (bool,), (str,)
# Per field: its types, their name in messages, whether null is allowed. Missing: transformers' default.
_FIELDS: dict[str, tuple[tuple[type, ...], str, bool]] = {
    **dict.fromkeys(
        (
            *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
            *("max_position_embeddings", "max_window_layers", "sliding_window_pattern"),
        ),
        (_INT, "a whole number", False),
    ),
    **dict.fromkeys(("num_key_value_heads", "head_dim", "sliding_window"), (_INT, "a whole number", True)),
    **dict.fromkeys(
        ("rms_norm_eps", "rope_theta", "rope_local_base_freq", "query_pre_attn_scalar"),
        (_NUMBER, "a number", False),
    ),
    **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping"), (_NUMBER, "a number", True)),
    **dict.fromkeys(("tie_word_embeddings", "use_sliding_window"), (_BOOL, "a boolean", False)),
    **dict.fromkeys(
        ("attention_bias", "mlp_bias", "use_bidirectional_attention"), (_BOOL, "a boolean", True)
    ),
    **dict.fromkeys(("hidden_act", "hidden_activation", "model_type"), (_TEXT, "text", True)),
    **dict.fromkeys(("layer_types", "architectures"), ((list,), "a list", True)),
    **dict.fromkeys(("rope_scaling", "rope_parameters"), ((dict,), "an object", True)),
}


class UnsupportedModel(ValueError):
    """The config requires something that the decoder does not compute; the message names the field."""


@dataclasses.dataclass(frozen=True)
class LinearRope:
    """RoPE with all positions divided by `factor` (arXiv 2306.15595)."""

    factor: float


@dataclasses.dataclass(frozen=True)
class Llama3Rope:
    """Llama 3.1's stretching of long RoPE wavelengths."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


_SCALINGS = {"linear": LinearRope, "llama3": Llama3Rope}
_ROPE_TYPES = ("default", *_SCALINGS)
_LAYER_TYPES = ("full_attention", "sliding_attention")


@dataclasses.dataclass(frozen=True)
class LayerKind:
    """Properties that may differ between the layers of a model.

    Attributes:
      window: a position sees the last `window` positions, itself included; None: all up to itself.
      rope_theta: base of the rotary angles.
      rope_scaling: scaling of the rotary angles; None: not scaled.
    """

    window: int | None = None
    rope_theta: float = 10_000.0
    rope_scaling: LinearRope | Llama3Rope | None = None


@dataclasses.dataclass(frozen=True)
class Lora:
    """Low-rank adapters (arXiv 2106.09685): W x + alpha / rank * B A x.

    Attributes:
      rank: width of A and B.
      alpha: numerator of the adapters' weight.
      target_modules: names of the matrices that have an adapter, such as q_proj.
    """

    rank: int
    alpha: float
    target_modules: tuple[str, ...]

    @property
    def scale(self) -> float:
        """Weight of the adapters' output, alpha / rank."""
        return self.alpha / self.rank


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Shapes and constants of a decoder. Hashable: it is a static argument of jitted functions.

    Attributes:
      kinds: the model's kinds of layer.
      kind_of_layer: each layer's index into `kinds`; empty if there is only one kind.
      qkv_bias: whether queries, keys and values have a bias.
      qk_norm: whether each head's query and key are normed before RoPE.
      post_norms: whether the outputs of attention and MLP are normed again before they are added.
      norm_offset: added to every norm's scale: 1 where checkpoints store the difference from 1.
      embed_scale: factor of the embeddings before the first layer.
      query_scale: factor of the attention scores; None: head_dim ** -0.5.
      attention_soft_cap: c of c * tanh(scores / c); None: off.
      final_soft_cap: the same for the logits.
      lora: shape of the adapters; None: no adapters.
      attention: kernel of the attention in `hidden`; see `packed_attention`.
      dtype: dtype of activations; parameters are cast to it where they are used.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    kinds: tuple[LayerKind, ...] = (LayerKind(),)
    kind_of_layer: tuple[int, ...] = ()
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = False
    hidden_act: Literal["silu", "gelu_tanh"] = "silu"
    qkv_bias: bool = False
    qk_norm: bool = False
    post_norms: bool = False
    norm_offset: float = 0.0
    embed_scale: float = 1.0
    query_scale: float | None = None
    attention_soft_cap: float | None = None
    final_soft_cap: float | None = None
    lora: Lora | None = None
    attention: Literal["auto", "xla", "tiled", "splash", "triton"] = "auto"
    dtype: str = "float32"

    @property
    def attention_scale(self) -> float:
        """Factor of the attention scores."""
        return self.head_dim**-0.5 if self.query_scale is None else self.query_scale


def from_hugging_face(config: Mapping[str, Any], dtype: str = "float32") -> DecoderConfig:
    """Reads the fields of a config.json, written by transformers 4 or 5.

    Missing fields get the defaults of transformers' config class.

    Raises:
      UnsupportedModel: a model type or field that the decoder would not compute exactly.
    """
    model_type = config.get("model_type")
    row = family(model_type)
    if row is None:
        hint = "; of Gemma 3, only the text models (gemma3_text) are" if model_type == "gemma3" else ""
        raise UnsupportedModel(
            f"config.json: model_type {shown(model_type)} is not supported; supported: "
            f"{', '.join(row.model_type for row in families())}{hint}"
        )
    if (named := config.get("architectures")) and list(named) != [row.architecture]:
        raise UnsupportedModel(
            f"config.json: architectures {shown(named)} is not supported, only {row.architecture!r}"
        )
    if wrong := _wrong(config):  # before transformers makes a list of all layers
        raise UnsupportedModel(f"config.json: {wrong}")
    fields = _with_defaults(config)
    if wrong := _wrong(fields):
        raise UnsupportedModel(f"config.json: {wrong}")
    for field, only in _ONLY:
        if fields.get(field, only) not in (only, None):
            raise UnsupportedModel(
                f"config.json: {field}={shown(fields[field])} is not supported, only {only!r}"
            )
    heads = fields["num_attention_heads"]
    kinds, kind_of_layer = _layers(fields)
    return DecoderConfig(
        vocab_size=fields["vocab_size"],
        hidden_size=fields["hidden_size"],
        intermediate_size=fields["intermediate_size"],
        num_layers=fields["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=fields.get("num_key_value_heads") or heads,
        head_dim=fields.get("head_dim") or fields["hidden_size"] // heads,
        max_position_embeddings=fields["max_position_embeddings"],
        kinds=kinds,
        kind_of_layer=kind_of_layer,
        rms_norm_eps=float(fields["rms_norm_eps"]),
        tie_word_embeddings=bool(fields["tie_word_embeddings"]),
        hidden_act=_activation(fields, row.activation),
        qkv_bias=row.qkv_bias,
        qk_norm=row.qk_norm,
        post_norms=row.post_norms,
        norm_offset=row.norm_offset,
        embed_scale=fields["hidden_size"] ** 0.5 if row.scaled_embeddings else 1.0,
        query_scale=None if row.query_scale is None else fields[row.query_scale] ** -0.5,
        attention_soft_cap=fields.get("attn_logit_softcapping"),
        final_soft_cap=fields.get("final_logit_softcapping"),
        dtype=dtype,
    )


def _wrong(fields: Mapping[str, Any]) -> str | None:
    """What is wrong with the values of a config.json, in words; None if nothing is."""
    for name in ("rope_scaling", "rope_parameters"):
        rope = fields.get(name)
        if rope is not None and (wrong := wrong_rope(rope, _ROPE_TYPES, _LAYER_TYPES)):
            return f"{name}: {wrong}"
    return wrong_size(fields) or wrong_labels(fields)


def _with_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """All fields as transformers reads them, with the RoPE parameters in version 5's form."""
    for field in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"):
        if not isinstance(config.get(field), int):  # a class's default would be wrong for these
            raise UnsupportedModel(f"config.json: {field} is missing or not a whole number")
    try:
        # A copy, because the class modifies dictionaries passed to it.
        return AutoConfig.for_model(**copy.deepcopy(dict(config))).to_dict()
    except Exception as error:  # its validation raises many unrelated classes
        # They have several lines, of which not the first gives the reason, and repeat the value whole.
        said = " ".join(str(error)[:1000].split())
        raise UnsupportedModel(f"config.json: {type(error).__name__}: {said[:300]}") from error


def _activation(fields: Mapping[str, Any], name: str) -> Literal["silu", "gelu_tanh"]:
    if fields[name] not in _ACTIVATIONS:
        raise UnsupportedModel(
            f"config.json: {name}={shown(fields[name])} is not supported, only {', '.join(_ACTIVATIONS)}"
        )
    return _ACTIVATIONS[fields[name]]


def _layers(fields: Mapping[str, Any]) -> tuple[tuple[LayerKind, ...], tuple[int, ...]]:
    """The kinds of layer, and each layer's index into them."""
    window = fields.get("sliding_window")
    everywhere = "full_attention" if window is None else "sliding_attention"
    names = fields.get("layer_types") or [everywhere] * fields["num_hidden_layers"]
    if len(names) != fields["num_hidden_layers"]:
        raise UnsupportedModel(
            f"config.json: layer_types names {len(names)} layers, num_hidden_layers is "
            f"{fields['num_hidden_layers']}"
        )
    kinds: dict[str, LayerKind] = {}
    for name in names:
        if name not in _LAYER_TYPES:
            raise UnsupportedModel(
                f"config.json: layer_types {shown(name)} is not supported, only {', '.join(_LAYER_TYPES)}"
            )
        if name == "sliding_attention" and not window:
            raise UnsupportedModel(
                "config.json: layer_types has sliding_attention, but sliding_window is not set"
            )
        if name not in kinds:
            rope = fields["rope_parameters"]
            kinds[name] = LayerKind(
                window=window if name == "sliding_attention" else None, **_rope(rope.get(name, rope))
            )
    if len(kinds) == 1:
        return tuple(kinds.values()), ()
    return tuple(kinds.values()), tuple(list(kinds).index(name) for name in names)


def _rope(rope: Mapping[str, Any]) -> dict[str, Any]:
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise UnsupportedModel("config.json: partial_rotary_factor is not supported")
    name = rope.get("rope_type", rope.get("type", "default"))
    wanted = [field.name for field in dataclasses.fields(_SCALINGS[name])] if name != "default" else []
    if missing := [field for field in ("rope_theta", *wanted) if field not in rope]:
        raise UnsupportedModel(f"config.json: the {name} RoPE parameters lack {', '.join(missing)}")
    if not wanted:
        return {"rope_theta": float(rope["rope_theta"])}
    scaling = _SCALINGS[name](*(rope[field] for field in wanted))
    return {"rope_theta": float(rope["rope_theta"]), "rope_scaling": scaling}


def read_fields(directory: str | Path) -> dict[str, Any]:
    """Reads the fields of DIRECTORY/config.json and checks their types.

    Raises:
      FileNotFoundError: the file is missing.
      UnsupportedModel: it is not a JSON object, or a field has the wrong type; names file and field.
    """
    path = Path(directory) / "config.json"
    if (size := path.stat().st_size) > _MOST_BYTES:
        raise UnsupportedModel(f"{path}: {size:,} bytes, which no config.json has; at most {_MOST_BYTES:,}")
    text = path.read_bytes()
    try:
        require_flat(text)
        fields = json.loads(text.decode())
    except ValueError as e:
        raise UnsupportedModel(f"{path}: not valid JSON: {e}") from e
    if not isinstance(fields, dict):
        raise UnsupportedModel(f"{path}: must be a JSON object")
    for name in fields.keys() & _FIELDS.keys():
        value, (types, wanted, nullable) = fields[name], _FIELDS[name]
        of_type = isinstance(value, types) and (types is _BOOL or not isinstance(value, bool))
        if not of_type and not (value is None and nullable):
            raise UnsupportedModel(f"{path}: {name} must be {wanted}, not {json.dumps(value)[:100]}")
    if fields.get("configuration_files"):
        raise UnsupportedModel(
            f"{path}: configuration_files is not supported: config.json must be the only one"
        )
    if wrong := wrong_size(fields) or wrong_labels(fields):
        raise UnsupportedModel(f"{path}: {wrong}")
    return fields


def read_config(directory: str | Path, dtype: str = "float32") -> DecoderConfig:
    """Reads DIRECTORY/config.json.

    Raises:
      FileNotFoundError: the file is missing.
      UnsupportedModel: see `from_hugging_face`.
    """
    return from_hugging_face(read_fields(directory), dtype)
