"""Moves arrays between this host and the mesh, the same way in one process or many."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from middo_jax.parallel.coordination import HostsError, gather
from middo_jax.parallel.mesh import named_sharding


def to_mesh(mesh: Mesh, array: np.ndarray, *logical_axes: str | None) -> jax.Array:
    """Puts an array that every process has in full onto the mesh; each device receives only its part."""
    sharding = named_sharding(mesh, *logical_axes)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


Span = tuple[int, int]  # rows of a batch, from the first to the one before the second


def own_spans(mesh: Mesh, batch: int) -> list[Span]:
    """The rows of a batch that devices of this process read, in order; the mesh splits the rows."""
    places = named_sharding(mesh, "batch").addressable_devices_indices_map((batch,))
    return sorted({index[0].indices(batch)[:2] for index in places.values() if index is not None})


def rows_to_mesh(mesh: Mesh, batch: int, parts: Mapping[Span, Any]) -> Any:
    """Puts a batch onto the mesh of which every process has only the rows that its devices read.

    Args:
      mesh: splits the rows, and no other axis.
      batch: rows of the whole batch.
      parts: by the spans of `own_spans`, pytrees of arrays [rows of the span, ...].
    """

    def whole(*of_spans: np.ndarray) -> jax.Array:
        by_span = dict(zip(parts, of_spans, strict=True))
        shape = batch, *of_spans[0].shape[1:]
        sharding = named_sharding(mesh, "batch", *(None,) * (len(shape) - 1))

        def of_device(index: Any) -> np.ndarray:
            return by_span[index[0].indices(batch)[:2]]

        return jax.make_array_from_callback(shape, sharding, of_device)

    return jax.tree.map(whole, *parts.values())


def share_of(n: int) -> range:
    """The indices of this process's share of n examples: every so many-th."""
    return range(jax.process_index(), n, jax.process_count())


def gather_rows(name: str, own: Sequence[int], rows: np.ndarray, n: int) -> np.ndarray:
    """Returns int32 [n, k] in every process; each gives rows [own, k], those with the indices `own`.

    The devices exchange them once all processes have their rows: a collective would not wait for long.

    Raises:
      HostsError: the processes have different n, because they have read different data.
    """
    told = gather(name, [n, len(own)])
    if len({of_process for of_process, _ in told}) > 1:
        numbers = ", ".join(str(of_process) for of_process, _ in told)
        raise HostsError(f"the processes have {numbers} examples ({name}); all must read the same data")
    if n == 0:
        return np.empty((0, rows.shape[1]), np.int32)
    indexed = np.full((max(shares for _, shares in told), 1 + rows.shape[1]), -1, np.int32)
    indexed[: len(own), 0], indexed[: len(own), 1:] = own, rows
    everyone = np.asarray(multihost_utils.process_allgather(indexed)).reshape(-1, indexed.shape[1])
    everyone = everyone[everyone[:, 0] >= 0]
    found = np.empty((n, rows.shape[1]), np.int32)
    found[everyone[:, 0]] = everyone[:, 1:]
    return found


def to_host(tree: Any) -> Any:
    """Gathers the arrays of a pytree as numpy, in full on every process."""

    def gather(x: jax.Array) -> np.ndarray:
        if x.is_fully_addressable or x.is_fully_replicated:
            return np.asarray(x)
        return multihost_utils.process_allgather(x, tiled=True)

    return jax.tree.map(gather, tree)
