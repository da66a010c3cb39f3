"""The platform that attention runs on, and running a single-device kernel on a mesh.

Axes: docs/contributing.md#axes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from middo_jax.parallel.mesh import RULES

Platform = Literal["cpu", "gpu", "tpu"]
# (q_bthe, k_bpke, v_bpke, *ids_bt) of one device -> [b, t, h, e]
LocalKernel = Callable[..., jax.Array]


def platform() -> Platform:
    """The platform that the program being traced will run on.

    It is that of the mesh in use (`jax.set_mesh`), since a program may be compiled for a TPU topology on a
    host without TPUs. Without a mesh, it is that of the first device.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    # From device_kind: jax 0.10.0 has no other property of an abstract mesh's devices.
    kind = (device or jax.devices()[0]).device_kind
    if kind == "cpu":
        return "cpu"
    return "tpu" if kind.startswith("TPU") else "gpu"


def shards(logical_axis: Literal["batch", "heads"]) -> int:
    """Number of parts into which the mesh in use splits this axis; 1 without a mesh."""
    sizes = jax.sharding.get_abstract_mesh().shape
    return math.prod(sizes.get(axis, 1) for axis in getattr(RULES, logical_axis) or ())


def over_mesh(
    kernel: LocalKernel, q_bthe: jax.Array, k_bpke: jax.Array, v_bpke: jax.Array, *ids_bt: jax.Array
) -> jax.Array:
    """Runs a kernel on every device's own rows and heads, since XLA cannot partition a custom call.

    The devices along the batch must divide the number of rows; those along the heads, that of query heads.
    With fewer key/value heads than devices along the heads, each device gets the one that its query heads
    read.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return kernel(q_bthe, k_bpke, v_bpke, *ids_bt)
    kv_heads = k_bpke.shape[2]
    if kv_heads % shards("heads"):
        copies = shards("heads") // kv_heads
        k_bpke, v_bpke = jnp.repeat(k_bpke, copies, axis=2), jnp.repeat(v_bpke, copies, axis=2)
    heads, rows = RULES.spec("batch", "length", "heads", None), RULES.spec("batch", "length")
    keys = RULES.spec("batch", "length", "kv_heads", None)
    specs: tuple[PartitionSpec, ...] = (heads, keys, keys, *(rows for _ in ids_bt))
    # check_vma is off: a Pallas call does not declare along which mesh axes its result varies.
    mapped = jax.shard_map(kernel, in_specs=specs, out_specs=heads, check_vma=False)
    return mapped(q_bthe, k_bpke, v_bpke, *ids_bt)
