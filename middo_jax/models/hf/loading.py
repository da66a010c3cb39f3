"""A Hugging Face directory -> parameters, read directly onto the mesh.

Tensors are read one at a time, in the order of the files. This process reads only the rows of which its
devices have a part, in the file's layout and dtype. The devices transpose and cast, and fill a stacked
parameter in place, layer by layer. So host memory contains one tensor of one layer at a time, whatever the
model's size. On a CPU, whose device memory is the host's, it also contains a copy of it in the final dtype.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from middo_jax.config import ConfigError
from middo_jax.models.config import DecoderConfig, read_config
from middo_jax.models.decoder import abstract
from middo_jax.models.finite import is_finite, not_finite, not_finite_names
from middo_jax.models.hf.files import DTYPES, CheckpointError, Weights
from middo_jax.models.hf.layout import TensorRow, tensor_table, turned
from middo_jax.models.model import Model, with_values
from middo_jax.models.parameters import parameters
from middo_jax.parallel.mesh import RULES, named_sharding, one_device


def load(
    directory: str | Path, dtype: str = "float32", param_dtype: str | None = None, mesh: Mesh | None = None
) -> Model:
    """Loads a Hugging Face directory.

    In a program of several processes all must call it.

    Args:
      directory: directory with config.json and safetensors in float32, float16 or bfloat16, one file or more.
      dtype: dtype of forward passes.
      param_dtype: dtype of the parameters in memory; None: `dtype`.
      mesh: mesh to shard the parameters over; None: the first device alone.

    Raises:
      CheckpointError: a file or tensor is missing, surplus, damaged, of the wrong shape or dtype, or not
        finite.
      UnsupportedModel: the config asks for what the decoder does not compute.
      ConfigError: a parameter does not divide by the mesh.
    """
    directory = Path(directory)
    if not (directory / "config.json").is_file():
        raise CheckpointError(f"{directory}: no config.json there; it is not a Hugging Face model directory")
    config, mesh = read_config(directory, dtype), mesh or one_device()
    _check_divisible(config, mesh)
    weights = Weights(directory)
    _check(weights, config)
    stored = np.dtype(param_dtype or dtype)
    values = {
        spec.path: _zeros(spec.shape(config), stored, spec.sharding(mesh))
        for spec in parameters(config)
        if spec.is_stacked
    }
    flags = {}
    for row in sorted(tensor_table(config), key=lambda row: _place(weights, row)):
        # `turned` always copies: on a CPU, `_put`'s array is the reader's memory, which JAX does not own.
        tensor, path = turned(_put(weights, row, mesh), row.spec.transposed, stored), row.spec.path
        flags[row.name] = is_finite(tensor)
        values[path] = tensor if row.layer is None else _with_layer(values[path], tensor, row.layer)
        # Waits before the next read: where reading is faster than the devices, tensors would pile up.
        values[path].block_until_ready()
    if wrong := not_finite_names(flags):
        raise CheckpointError(not_finite(weights.tensors[wrong[0]].file, wrong))
    graphdef, shapes = abstract(config)
    return Model(config, graphdef, with_values(shapes, values), mesh)


def _check_divisible(config: DecoderConfig, mesh: Mesh) -> None:
    for spec in parameters(config):
        for axis, size in zip(spec.axes, spec.shape(config), strict=True):
            mesh_axes = getattr(RULES, axis) or ()
            if size % math.prod(mesh.shape[name] for name in mesh_axes):
                wanted = ", ".join(f"mesh.{name}={mesh.shape[name]}" for name in mesh_axes)
                raise ConfigError(
                    f"config: {wanted} does not divide axis {axis!r} ({size}) "
                    f"of parameter {'.'.join(spec.path)}"
                )


def _check(weights: Weights, config: DecoderConfig) -> None:
    """Raises CheckpointError unless the tensors and their shapes are exactly the config's."""
    wanted = {row.name: row.shape for row in tensor_table(config)}
    for name, shape in wanted.items():
        if name not in weights.tensors:
            raise CheckpointError(f"{weights.listing}: tensor {name} is missing")
        tensor = weights.tensors[name]
        if tensor.shape != shape:
            raise CheckpointError(
                f"{tensor.file}: tensor {name} has shape {tensor.shape}, config.json implies {shape}"
            )
        if tensor.dtype not in DTYPES:
            raise CheckpointError(
                f"{tensor.file}: tensor {name} has dtype {tensor.dtype}, supported: {', '.join(DTYPES)}"
            )
    embedding = next(row.name for row in tensor_table(config) if row.spec.path == ("embed",))
    untied = {row.name for row in tensor_table(dataclasses.replace(config, tie_word_embeddings=False))}
    for name in weights.tensors.keys() - wanted.keys():
        if name in untied:
            _check_tied(weights, name, embedding)
        elif not name.endswith(".rotary_emb.inv_freq"):  # a constant in old exports
            raise CheckpointError(
                f"{weights.tensors[name].file}: tensor {name} is not part of config.json's model"
            )


def _check_tied(weights: Weights, head: str, embedding: str) -> None:
    """Raises CheckpointError if a tied model contains a different head, which only some readers would use."""
    a, b = weights.tensors[head], weights.tensors[embedding]
    same = (a.shape, a.dtype) == (b.shape, b.dtype) and all(
        np.array_equal(x.view(np.uint8), y.view(np.uint8))
        for (_, x), (_, y) in zip(
            weights.blocks(head, 0, a.shape[0]), weights.blocks(embedding, 0, b.shape[0]), strict=True
        )
    )
    if not same:
        raise CheckpointError(
            f"{a.file}: tensor {head} differs from {embedding}, to which config.json ties it; remove it, or "
            "set tie_word_embeddings to false"
        )


def _place(weights: Weights, row: TensorRow) -> tuple[Path, int]:
    tensor = weights.tensors[row.name]
    return tensor.file, tensor.start


def _put(weights: Weights, row: TensorRow, mesh: Mesh) -> jax.Array:
    """A tensor on the devices in the file's layout and dtype, sharded as its parameter is."""
    axes = row.spec.axes[row.spec.is_stacked :]
    sharding = named_sharding(mesh, *(axes[::-1] if row.spec.transposed else axes))

    def part(index: Sequence[slice] | None) -> tuple[range, ...]:
        return tuple(range(size)[cut] for cut, size in zip(index or (), row.shape, strict=True))

    # Devices along `data` have the same part, which is read once.
    parts = list(set(map(part, sharding.addressable_devices_indices_map(row.shape).values())))
    arrays = dict(zip(parts, weights.read(row.name, parts), strict=True))
    return jax.make_array_from_callback(row.shape, sharding, lambda index: arrays[part(index)])


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _zeros(shape: tuple[int, ...], dtype: np.dtype, sharding: NamedSharding) -> jax.Array:
    return jax.lax.with_sharding_constraint(jnp.zeros(shape, dtype), sharding)


# Compiled separately from `turned`: on a CPU, a transpose fused into the update takes four times as long.
@functools.partial(jax.jit, donate_argnums=0)
def _with_layer(stacked: jax.Array, tensor: jax.Array, layer: int) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(stacked, tensor, layer, axis=0)
