"""Limits of what a config.json may ask for. They are checked before anything is made of its numbers.

The limits are far above every published model. They only keep a wrong number from filling the memory.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
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


def _short(value: float) -> str:
    if isinstance(value, int) and abs(value) >= 10**15:  # an int may have more digits than Python prints
        return f"a number of {int(math.log10(abs(value))) + 1} digits"
    return f"{value:,}"
