"""A model as a value: its config, structure, parameters and mesh.

    model = load(locate(path), "bfloat16", mesh=mesh)     # models/loading.py
    hidden_btd = model.decoder().hidden(tokens_bt, segment_ids_bt, positions_bt)

Flax NNX declares the decoder (decoder.py); this module wraps it. Other modules use a `Model`, or its
parameters as a JAX pytree. A jitted function takes `graphdef` as a static argument and calls `bound`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Mapping
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from middo_jax.config import ConfigError
from middo_jax.models.config import DecoderConfig
from middo_jax.models.decoder import Decoder, abstract
from middo_jax.models.parameters import adapters, parameters

Params = nnx.State
Structure = nnx.GraphDef[Decoder]
Path = tuple[Any, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A decoder with its parameters on a mesh.

    Attributes:
      config: the decoder's config.
      graphdef: the decoder's static structure, for the same config.
      params: parameters by their paths in models/parameters.py; in an abstract model, shapes with shardings.
      mesh: mesh of the parameters and of all computations with them.
    """

    config: DecoderConfig
    graphdef: Structure
    params: Params
    mesh: Mesh

    @classmethod
    def of(cls, config: DecoderConfig, params: Params, mesh: Mesh) -> Model:
        """The model of a config and its parameters."""
        return cls(config, structure(config), params, mesh)

    def with_params(self, params: Params) -> Model:
        """The same decoder with other parameters, such as trained ones."""
        return dataclasses.replace(self, params=params)

    def with_config(self, config: DecoderConfig) -> Model:
        """The same parameters in a decoder with another config, such as another kernel."""
        return Model.of(config, self.params, self.mesh)

    def decoder(self) -> Decoder:
        """The decoder with its parameters."""
        return bound(self.graphdef, self.params)


@functools.cache
def structure(config: DecoderConfig) -> Structure:
    """The static structure of a config's decoder."""
    return abstract(config)[0]


def bound(graphdef: Structure, *params: Params) -> Decoder:
    """The decoder with its parameters, which may come in several trees."""
    return nnx.merge(graphdef, *params)


def with_values(params: Params, values: Mapping[Path, Any]) -> Params:
    """The same tree with new values; `values` must contain every path."""
    return nnx.map_state(lambda path, param: param.replace(values[path]), params)


def by_path(params: Params) -> dict[Path, jax.Array]:
    """The values by their paths."""
    return {path: param[...] for path, param in params.flat_state()}


def parted(params: Params, paths: Collection[Path]) -> tuple[Params, Params]:
    """(the tree of these paths, the tree of all others)."""
    chosen, others = nnx.split_state(params, lambda path, _: path in paths, ...)
    return chosen, others


def joined(*parts: Params) -> Params:
    """Merges trees that have no path in common."""
    return nnx.merge_state(*parts)


def as_dict(params: Params) -> dict[Any, Any]:
    """The same values as nested dicts, the form that a checkpoint stores."""
    return nnx.to_pure_dict(params)


def of_dict(shapes: Params, values: Mapping[Any, Any]) -> Params:
    """The inverse of `as_dict`: `shapes` with its values replaced."""
    filled = jax.tree.map(lambda x: x, shapes)
    nnx.replace_by_pure_dict(filled, dict(values))
    return filled


def abstract_model(config: DecoderConfig, mesh: Mesh, dtype: str = "float32") -> Model:
    """The model without any array: its parameters are shapes with dtypes and their shardings on the mesh.

    Raises:
      ConfigError: a parameter does not divide by the mesh.
    """
    graphdef, shapes = abstract(config)
    targets: dict[Path, Any] = {}
    for spec in (*parameters(config), *adapters(config)):
        shape, sharding = spec.shape(config), spec.sharding(mesh)
        try:
            sharding.shard_shape(shape)
        except ValueError as error:
            sizes = ", ".join(f"mesh.{axis}={size}" for axis, size in mesh.shape.items())
            name = ".".join(spec.path)
            raise ConfigError(f"config: {sizes} does not divide parameter {name} {list(shape)}") from error
        targets[spec.path] = jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
    return Model(config, graphdef, with_values(shapes, targets), mesh)
