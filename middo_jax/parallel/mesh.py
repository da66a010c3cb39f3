"""The device mesh, and the one table that maps array axes to mesh axes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from middo_jax.config import ConfigError, MeshSettings

MESH_AXES = ("data", "fsdp", "tensor")


@dataclasses.dataclass(frozen=True)
class ShardingRules:
    """Logical axis -> mesh axes. `data` may span slices (the slow network); `fsdp` and `tensor` may not."""

    batch: tuple[str, ...] | None = ("data", "fsdp")
    length: tuple[str, ...] | None = None
    layers: tuple[str, ...] | None = None
    embed: tuple[str, ...] | None = ("fsdp",)
    norm: tuple[str, ...] | None = None
    head_dim: tuple[str, ...] | None = None
    rank: tuple[str, ...] | None = None
    vocab: tuple[str, ...] | None = ("tensor",)
    heads: tuple[str, ...] | None = ("tensor",)
    kv_heads: tuple[str, ...] | None = ("tensor",)
    mlp: tuple[str, ...] | None = ("tensor",)
    # A hidden vector stays whole on each device: only parameters are sharded along `embed`.
    hidden: tuple[str, ...] | None = None

    def spec(self, *logical_axes: str | None) -> PartitionSpec:
        """The PartitionSpec of an array whose axes have these names; None: a replicated axis."""
        return PartitionSpec(*(None if axis is None else getattr(self, axis) for axis in logical_axes))


RULES = ShardingRules()


def make_mesh(settings: MeshSettings | None = None, devices: Sequence[Any] | None = None) -> Mesh:
    """A (data, fsdp, tensor) mesh over all devices; one axis may be -1 and gets the remaining devices.

    Raises:
      ConfigError: the axes' product is not the number of devices.
    """
    settings = settings or MeshSettings()
    devices = jax.devices() if devices is None else devices
    sizes = [settings.data, settings.fsdp, settings.tensor]
    fixed = math.prod(size for size in sizes if size != -1)
    if (
        sizes.count(-1) > 1
        or 0 in sizes
        or len(devices) % fixed
        or (-1 not in sizes and fixed != len(devices))
    ):
        wanted = ", ".join(f"mesh.{axis}={size}" for axis, size in zip(MESH_AXES, sizes, strict=True))
        raise ConfigError(f"config: {wanted} does not fit {len(devices)} devices; at most one axis may be -1")
    shape = tuple(len(devices) // fixed if size == -1 else size for size in sizes)
    return Mesh(_arranged(shape, devices), MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def _arranged(shape: tuple[int, ...], devices: Sequence[Any]) -> np.ndarray:
    """The devices as an array in which neighbours are near each other in the network.

    `jax.make_mesh` refuses a mesh axis that is a part of an axis of the network, such as fsdp=8, tensor=4 on
    4 x 8 chips of v6e, and any mesh over several slices.
    """
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices > 1 and shape[0] % slices == 0:
        inside, across = (shape[0] // slices, *shape[1:]), (slices, 1, 1)
        return mesh_utils.create_hybrid_device_mesh(inside, across, devices, allow_split_physical_axes=True)
    return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)


def one_device() -> Mesh:
    """A mesh of the first device alone."""
    return make_mesh(MeshSettings(data=1, fsdp=1, tensor=1), jax.devices()[:1])


def named_sharding(mesh: Mesh, *logical_axes: str | None) -> NamedSharding:
    """The sharding of an array with these logical axes on the mesh."""
    return NamedSharding(mesh, RULES.spec(*logical_axes))


def constrain(x: jax.Array, *logical_axes: str | None) -> jax.Array:
    """Constrains an intermediate's sharding on the mesh set by `jax.set_mesh`; without a mesh, identity.

    It acts on every platform, so tests on simulated devices exercise what a pod runs.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return x
    if logical_axes[0] == "batch" and batch_shards(x.shape[0]) == 1:
        logical_axes = (None, *logical_axes[1:])  # such as a single prompt: it is replicated
    return jax.lax.with_sharding_constraint(x, RULES.spec(*logical_axes))


def fitting_spec(mesh: Mesh | AbstractMesh, shape: Sequence[int], *logical_axes: str | None) -> PartitionSpec:
    """Like `RULES.spec`, without mesh axes that do not divide the array.

    An axis is sharded over as many of its leading mesh axes as together divide its size.

    8 slots over data=2, fsdp=2 -> ("data", "fsdp"); 6 slots -> ("data",); 3 slots -> ()
    """

    def fitting(size: int, names: tuple[str, ...]) -> tuple[str, ...]:
        while names and size % math.prod(mesh.shape[name] for name in names):
            names = names[:-1]
        return names

    wanted = [() if axis is None else getattr(RULES, axis) or () for axis in logical_axes]
    return PartitionSpec(*(fitting(size, names) or None for size, names in zip(shape, wanted, strict=True)))


def batch_shards(batch: int) -> int:
    """Number of parts into which the mesh set by `jax.set_mesh` splits `batch` rows; 1 if it does not."""
    mesh = jax.sharding.get_abstract_mesh()
    ways = 1 if mesh.empty else batch_divisor(mesh)
    return 1 if batch % ways else ways


def batch_divisor(mesh: Mesh | AbstractMesh) -> int:
    """Number of parts into which `data` and `fsdp` split a batch; it must divide the number of rows."""
    return math.prod(mesh.shape[axis] for axis in RULES.batch or ())
