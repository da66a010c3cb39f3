"""Arguments shared by the kernels: the packing of rows, a layer's constants, one layer of a KV cache.

Axes: docs/contributing.md#axes.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax

# Name of the values that a layer may save for the backward pass: attention's output and log-sum-exp.
ATTENDED = "attended"


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("segment_ids_bt", "positions_bt", "until_bt"),
    meta_fields=("prefix", "longest"),
)
@dataclasses.dataclass(frozen=True)
class Packing:
    """How the rows of a batch are packed; `packed_attention` derives the mask from it.

    A JAX pytree of its arrays; `prefix` and `longest` are static.

    Attributes:
      segment_ids_bt: each position's example; padding is -1 and sees only padding. Not read with trees.
      positions_bt: each position's index within its example; it counts up from 0 in a segment.
      until_bt: for trees: the end (exclusive) of the positions in the row that see this one. None: segments.
      prefix: number of positions at the start of a row that all its trees share.
      longest: upper bound of a segment's length, and of a tree's without the prefix. It changes no result;
        kernels skip keys that are further back. None: no bound.
    """

    segment_ids_bt: jax.Array
    positions_bt: jax.Array
    until_bt: jax.Array | None = None
    prefix: int = 0
    longest: int | None = None


class AttentionSpec(NamedTuple):
    """Constants of a layer's attention, static when a program is compiled.

    Attributes:
      scale: factor of the scores, usually 1 / sqrt(head_dim).
      window: i sees j only if positions_i - positions_j < window; None: no limit.
      soft_cap: c of c tanh(score / c), applied after scaling and before masking; None: off.
    """

    scale: float
    window: int | None = None
    soft_cap: float | None = None


class CachedLayer(NamedTuple):
    """One layer of a KV cache, and which of its rows are read.

    Attributes:
      keys_lbpke: keys of all layers, RoPE applied; slicing them outside the kernel would copy.
      values_lbpke: values of all layers.
      layer: index of the layer.
      first_row: index of the first row that is read; the others follow it.
    """

    keys_lbpke: jax.Array
    values_lbpke: jax.Array
    layer: jax.Array
    first_row: jax.Array | int = 0
