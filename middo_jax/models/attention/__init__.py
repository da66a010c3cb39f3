"""Attention, exact for packed sequences: a token sees what its own segment holds up to itself."""

from middo_jax.models.attention.cached import cached_attention
from middo_jax.models.attention.dispatch import AttentionError, Kernel, packed_attention
from middo_jax.models.attention.xla import QUERY_BLOCK, masked_attention

__all__ = [
    "QUERY_BLOCK",
    "AttentionError",
    "Kernel",
    "cached_attention",
    "masked_attention",
    "packed_attention",
]
