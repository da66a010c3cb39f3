"""The values that every kernel takes: how rows are packed, what attention computes, one layer of a KV cache.

Axes: docs/contributing.md#axes; p cache slot, e head dimension.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("segment_ids_bt", "positions_bt", "until_bt"),
    meta_fields=("prefix", "longest"),
)
@dataclasses.dataclass(frozen=True)
class Packing:
    """How the rows of a batch are packed: who sees whom, by `packed_attention`'s rule.

    A JAX tree of its arrays; the numbers are known when a program is compiled.

    Attributes:
      segment_ids_bt: the example of each position; padding is -1 and sees only padding. Not read with trees.
      positions_bt: the position within the example; a segment counts up from 0, row by row.
      until_bt: for trees: the place in the row behind the last position that sees this one. None: segments.
      prefix: number of positions at the start of a row that all its trees share.
      longest: no segment is longer, nor a tree without the prefix. It changes no result; kernels skip what
        lies further back.
    """

    segment_ids_bt: jax.Array
    positions_bt: jax.Array
    until_bt: jax.Array | None = None
    prefix: int = 0
    longest: int | None = None


class AttentionSpec(NamedTuple):
    """What a layer's attention computes; known when a program is compiled.

    Attributes:
      scale: factor of the scores, usually 1 / sqrt(head_dim).
      window: i sees j only if positions_i - positions_j < window; None is no limit.
      soft_cap: c of c tanh(score / c), after scaling and before masking; None is off.
    """

    scale: float
    window: int | None = None
    soft_cap: float | None = None


class CachedLayer(NamedTuple):
    """One layer of a KV cache, and the rows of it that are read.

    Attributes:
      keys_lbpke: keys of all layers, RoPE applied; a slice outside the kernel would be a copy.
      values_lbpke: values of all layers.
      layer: index of the layer.
      first_row: the first row that is read; the others follow it.
    """

    keys_lbpke: jax.Array
    values_lbpke: jax.Array
    layer: jax.Array
    first_row: jax.Array | int = 0
