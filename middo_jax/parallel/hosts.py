"""Moves arrays between this host and the mesh, the same way in one process or many."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from middo_jax.parallel.mesh import named_sharding


def to_mesh(mesh: Mesh, array: np.ndarray, *logical_axes: str | None) -> jax.Array:
    """Puts an array that every process has in full onto the mesh; each device receives only its part."""
    sharding = named_sharding(mesh, *logical_axes)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def to_host(tree: Any) -> Any:
    """Gathers the arrays of a pytree as numpy, in full on every process."""

    def gather(x: jax.Array) -> np.ndarray:
        if x.is_fully_addressable or x.is_fully_replicated:
            return np.asarray(x)
        return multihost_utils.process_allgather(x, tiled=True)

    return jax.tree.map(gather, tree)
