"""How a checkpoint lays out what we stack: a tensor a layer, a matrix as [out, in]."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from middo_jax.models.config import DecoderConfig
from middo_jax.models.parameters import ParameterSpec, parameters


class TensorRow(NamedTuple):
    """One tensor of a Hugging Face checkpoint.

    Attributes:
      name: its name there.
      shape: its shape there, [out, in] of a matrix.
      spec: the parameter that it is, or is a layer of.
      layer: which layer of it; None of a parameter that is not stacked.
    """

    name: str
    shape: tuple[int, ...]
    spec: ParameterSpec
    layer: int | None


def tensor_table(config: DecoderConfig) -> Iterator[TensorRow]:
    """All tensors of a model: what stands before the layers, then layer by layer, then what stands behind."""

    def row(spec: ParameterSpec, layer: int | None = None) -> TensorRow:
        shape = spec.shape(config)[spec.is_stacked :]
        name = spec.hf_name.format(layer=layer)
        return TensorRow(name, shape[::-1] if spec.transposed else shape, spec, layer)

    specs = parameters(config)
    stacked = [spec for spec in specs if spec.is_stacked]
    first = specs.index(stacked[0])
    yield from (row(spec) for spec in specs[:first])
    yield from (row(spec, layer) for layer in range(config.num_layers) for spec in stacked)
    yield from (row(spec) for spec in specs[first + len(stacked) :])


@functools.partial(jax.jit, static_argnums=(1, 2))
def turned(tensor: jax.Array, transposed: bool, dtype: np.dtype) -> jax.Array:
    """One tensor from their layout into ours, or back; always a copy, where the tensor lies."""
    tensor = jnp.array(tensor, dtype, copy=True)
    return tensor.T if transposed else tensor
