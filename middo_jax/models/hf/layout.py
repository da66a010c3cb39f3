"""A checkpoint's layout of the stacked parameters: one tensor per layer, matrices as [out, in]."""

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
      name: its name in the checkpoint.
      shape: its shape in the checkpoint, [out, in] for a matrix.
      spec: its parameter.
      layer: its layer within the parameter; None if the parameter is not stacked.
    """

    name: str
    shape: tuple[int, ...]
    spec: ParameterSpec
    layer: int | None


def tensor_table(config: DecoderConfig) -> Iterator[TensorRow]:
    """All tensors of a model: those before the layers, then layer by layer, then those after the layers."""

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
    """Converts a tensor between the checkpoint's layout and the decoder's, on its devices; always copies."""
    tensor = jnp.array(tensor, dtype, copy=True)
    return tensor.T if transposed else tensor
