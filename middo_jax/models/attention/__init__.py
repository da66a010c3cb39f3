"""Exact attention for packed sequences: a token attends to its own segment, up to itself."""

from middo_jax.models.attention.arguments import ATTENDED, AttentionSpec, CachedLayer, Packing
from middo_jax.models.attention.cached import CACHE_BLOCK, cached_attention
from middo_jax.models.attention.dispatch import (
    AttentionError,
    Kernel,
    choose,
    packed_attention,
    shares_prefixes,
)
from middo_jax.models.attention.workload import Workload
from middo_jax.models.attention.xla import QUERY_BLOCK

__all__ = [
    "ATTENDED",
    "CACHE_BLOCK",
    "QUERY_BLOCK",
    "AttentionError",
    "AttentionSpec",
    "CachedLayer",
    "Kernel",
    "Packing",
    "Workload",
    "cached_attention",
    "choose",
    "packed_attention",
    "shares_prefixes",
]
