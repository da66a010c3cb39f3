"""Limits of what a config.json may ask for. They are checked before anything is made of its numbers.

The limits are far above every published model. They only keep a wrong number from filling the memory.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

# Field -> (smallest, largest). A field that is missing or null is not checked.
_SIZES = {
    "vocab_size": (1, 1 << 24),
    "hidden_size": (1, 1 << 18),
    "intermediate_size": (1, 1 << 21),
    "num_hidden_layers": (1, 4096),
    "num_attention_heads": (1, 4096),
    "num_key_value_heads": (1, 4096),
    "head_dim": (2, 1 << 14),
    "max_position_embeddings": (1, 1 << 31),
    "max_window_layers": (0, 1 << 20),
    "sliding_window": (0, 1 << 31),
    "sliding_window_pattern": (1, 4096),
}
_POSITIVE = (
    *("rms_norm_eps", "rope_theta", "rope_local_base_freq", "query_pre_attn_scalar"),
    *("attn_logit_softcapping", "final_logit_softcapping"),
)
_LARGEST_NUMBER = 1e12
_LABELS, _MOST_LABELS = ("num_labels", "id2label", "label2id"), 1 << 16
# Numbers within rope_scaling and rope_parameters.
_ROPE_NUMBERS = ("rope_theta", "factor", "low_freq_factor", "high_freq_factor")
_ROPE_POSITIONS = "original_max_position_embeddings"
MAX_PATH = 4096  # characters of a path or hub repo id in a file
_SHOWN = 100  # characters of a value in a message


def wrong_size(fields: Mapping[str, Any]) -> str | None:
    """What is wrong with the numbers of a config.json, in words; None if nothing is.

    Types are not checked here, see `config.read_fields`.
    """
    for name, (smallest, largest) in _SIZES.items():
        value = fields.get(name)
        if isinstance(value, int) and not smallest <= value <= largest:
            return f"{name} must be between {smallest:,} and {largest:,}, not {_short(value)}"
    for name in _POSITIVE:
        value = fields.get(name)
        if isinstance(value, int | float) and not 0 < value <= _LARGEST_NUMBER:
            return f"{name} must be a finite number above 0, not {_short(value)}"
    heads, width = fields.get("num_attention_heads"), fields.get("hidden_size")
    if not isinstance(heads, int):
        return None
    kv_heads, head_dim = fields.get("num_key_value_heads"), fields.get("head_dim")
    if isinstance(kv_heads, int) and heads % kv_heads:
        return f"num_key_value_heads={kv_heads} does not divide num_attention_heads={heads}"
    if head_dim is None and isinstance(width, int):
        if width % heads:
            return f"num_attention_heads={heads} does not divide hidden_size={width}"
        head_dim = width // heads
    if isinstance(head_dim, int) and head_dim % 2:
        return f"head_dim={head_dim} is odd; rotary positions need pairs"
    return None


def wrong_labels(value: Any) -> str | None:
    """What is wrong with the number of labels, at any depth of a config.json; None if nothing is.

    A decoder has no labels. But transformers makes a list of them for any class of model, also where it
    only looks for the tokenizer, and for the configs within a config.
    """
    if isinstance(value, list):
        return next(filter(None, map(wrong_labels, value)), None)
    if not isinstance(value, Mapping):
        return None
    for name in _LABELS:
        labels = value.get(name)
        count = len(labels) if isinstance(labels, Mapping | list) else labels
        if isinstance(count, int | float) and not 0 <= count <= _MOST_LABELS:
            return f"{name} must be of at most {_MOST_LABELS:,} labels, not {_short(count)}"
    return next(filter(None, map(wrong_labels, value.values())), None)


def wrong_rope(rope: Any, types: Collection[str], layer_types: Collection[str]) -> str | None:
    """What is wrong with a value of rope_scaling or rope_parameters, in words; None if nothing is.

    Args:
      rope: the value: an object of parameters, or of one such object per type of layer.
      types: the supported values of rope_type.
      layer_types: names of the types of layer.
    """
    if not isinstance(rope, Mapping):
        return f"must be an object, not {shown(rope)}"
    for layer_type in layer_types:
        if layer_type in rope and (wrong := wrong_rope(rope[layer_type], types, ())):
            return f"{layer_type}: {wrong}"
    for name in ("rope_type", "type"):  # the latter in older files
        if name in rope and rope[name] not in tuple(types):
            return f"rope_type {shown(rope[name])} is not supported; supported: {', '.join(types)}"
    for name in _ROPE_NUMBERS:
        value = rope.get(name, 1)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= _LARGEST_NUMBER:
            return f"{name} must be a finite number above 0, not {shown(value)}"
    positions, largest = rope.get(_ROPE_POSITIONS, 1), _SIZES["max_position_embeddings"][1]
    if isinstance(positions, bool) or not isinstance(positions, int) or not 1 <= positions <= largest:
        return f"{_ROPE_POSITIONS} must be a whole number between 1 and {largest:,}, not {shown(positions)}"
    low, high = rope.get("low_freq_factor"), rope.get("high_freq_factor")
    if low is not None and high is not None and not low < high:
        return f"low_freq_factor={low} must be below high_freq_factor={high}"
    return None


def shown(value: Any) -> str:
    """A value of a config.json for a message: one line of about a hundred characters at most."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return _short(value)
    return repr(value[:_SHOWN] if isinstance(value, str | list) else value)[:_SHOWN]


def _short(value: float) -> str:
    if isinstance(value, int) and abs(value) >= 10**15:  # an int may have more digits than Python prints
        return f"a number of {int(math.log10(abs(value))) + 1} digits"
    return f"{value:,}"
