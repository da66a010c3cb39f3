"""Where attention runs, and how a kernel that sees one device is run on a mesh.

Axes: docs/contributing.md#axes; p key position, e head dimension.
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
    """What the program that is being traced will run on.

    That is the mesh in use (`jax.set_mesh`), since a program may be compiled for a TPU topology on a host
    that has none; without a mesh, the first device.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    # By its kind: jax 0.10.0 knows no other property of a mesh's devices.
    kind = (device or jax.devices()[0]).device_kind
    if kind == "cpu":
        return "cpu"
    return "tpu" if kind.startswith("TPU") else "gpu"


def shards(logical_axis: Literal["batch", "heads"]) -> int:
    """Into how many parts the mesh in use splits this axis; 1 without a mesh."""
    sizes = jax.sharding.get_abstract_mesh().shape
    return math.prod(sizes.get(axis, 1) for axis in getattr(RULES, logical_axis) or ())


def over_mesh(
    kernel: LocalKernel, q_bthe: jax.Array, k_bpke: jax.Array, v_bpke: jax.Array, *ids_bt: jax.Array
) -> jax.Array:
    """Runs a kernel on every device's own rows and heads: XLA cannot split a custom call by itself.

    Rows must be a multiple of the devices along them, query heads too. Where there are fewer key/value heads
    than devices along the heads, each device gets the one that its query heads read.
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
    # check_vma is off: a Pallas call does not say along which axes its result varies.
    mapped = jax.shard_map(kernel, in_specs=specs, out_specs=heads, check_vma=False)
    return mapped(q_bthe, k_bpke, v_bpke, *ids_bt)
