"""Collectives of a program: over which mesh axes, and how long they take on the slice's links.

The formulas are those of "How to scale your model" (jax-ml.github.io/scaling-book/sharding): an all-gather
moves every device's part over the links of the axes that its group spans, in both directions on a ring, in
one on a line.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from middo_jax.planning.chips import Slices
from middo_jax.planning.hlo import HloError, Instruction

HOP_S = 1e-6  # of latency per link
LINK_EFFICIENCY = 0.9  # of the published rate; 45 of 50 GB/s is the measured rate that the book gives for v5e
KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "ragged-all-to-all",
)


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a program, per device.

    Attributes:
      kind: one of KINDS.
      axes: names of the mesh axes along which its groups extend.
      bytes: bytes of its input on each device.
      size: devices per group.
      direction: of a permute along one axis, +1 or -1; otherwise 0.
      op_name: the scopes and primitive of JAX that it comes from.
    """

    kind: str
    axes: tuple[str, ...]
    bytes: float
    size: int
    direction: int = 0
    op_name: str = ""


@dataclasses.dataclass(frozen=True)
class Network:
    """The links of a mesh.

    Attributes:
      axis_names: names of the mesh axes.
      shape: devices along each.
      slices: the chips, or None if there are no links (one device, or a CPU).
      coords: int [*shape, axes of the torus + 1], each device's place and, last, its slice.
    """

    axis_names: tuple[str, ...]
    shape: tuple[int, ...]
    slices: Slices | None = None
    coords: np.ndarray | None = dataclasses.field(default=None, repr=False)

    @classmethod
    def of(cls, mesh: Any, slices: Slices | None) -> Network:
        """The network of a mesh whose devices are those of a topology."""
        coords = None
        if slices is not None:
            places = [
                (*d.coords[: slices.chip.axes], getattr(d, "slice_index", 0) or 0) for d in mesh.devices.flat
            ]
            coords = np.asarray(places).reshape(*mesh.devices.shape, -1)
        return cls(tuple(mesh.axis_names), mesh.devices.shape, slices, coords)

    def collective(self, kind: str, size: float, instruction: Instruction) -> Collective:
        """Reads a collective's groups.

        Args:
          kind: one of KINDS.
          size: bytes of its input.
          instruction: with replica_groups or source_target_pairs.

        Raises:
          HloError: it has neither.
        """
        if kind == "collective-permute":
            pairs = _pairs(instruction)
            moved = [(self._place(a), self._place(b)) for a, b in pairs if a != b]
            axes = [i for i in range(len(self.shape)) if any(a[i] != b[i] for a, b in moved)]
            direction = 0
            if len(axes) == 1:
                steps = {(b[axes[0]] - a[axes[0]]) % self.shape[axes[0]] for a, b in moved}
                direction = 1 if min(steps) <= self.shape[axes[0]] // 2 else -1
            group = math.prod(self.shape[i] for i in axes)
        else:
            groups = _groups(instruction, math.prod(self.shape))
            places = [self._place(device) for device in groups[0]]
            axes = [i for i in range(len(self.shape)) if len({place[i] for place in places}) > 1]
            direction, group = 0, len(groups[0])
        names = tuple(self.axis_names[i] for i in axes)
        return Collective(kind, names, size, group, direction, instruction.op_name)

    def _place(self, device: int) -> tuple[int, ...]:
        return tuple(int(i) for i in np.unravel_index(device, self.shape))

    def seconds(self, collective: Collective) -> float:
        """How long a collective takes if nothing else uses its links."""
        if self.slices is None or self.coords is None or collective.size == 1:
            return 0.0
        chip = self.slices.chip
        axes = tuple(slice(None) if name in collective.axes else 0 for name in self.axis_names)
        place_gx = self.coords[axes].reshape(-1, self.coords.shape[-1])
        crossed = len(set(place_gx[:, -1].tolist()))
        extents = [len(set(place_gx[:, i].tolist())) for i in range(chip.axes)]
        wraps = [
            wrap and extent == whole
            for wrap, extent, whole in zip(self.slices.wraps, extents, self.slices.shape, strict=True)
        ]
        inside = collective.size // crossed
        seconds = self._inside(collective, inside, extents, wraps) if inside > 1 else 0.0
        if crossed > 1:
            seconds += _moved(collective, crossed) / inside / chip.dcn_bytes
        return seconds

    def _inside(
        self, collective: Collective, size: int, extents: Sequence[int], wraps: Sequence[bool]
    ) -> float:
        """The time within a slice: that of the bytes, or of the hops if that is longer."""
        assert self.slices is not None
        link = self.slices.chip.link_bytes * LINK_EFFICIENCY
        spanned = [(extent, wrap) for extent, wrap in zip(extents, wraps, strict=True) if extent > 1]
        if not spanned:  # the two devices of one chip
            return collective.bytes / link
        hops = sum(extent // 2 if wrap else extent - 1 for extent, wrap in spanned)
        if collective.kind == "collective-permute":
            closes = all(wrap for _, wrap in spanned)
            return collective.bytes / link + HOP_S * (1 if closes else hops)
        rate = sum(link * (2 if wrap else 1) for _, wrap in spanned)
        return max(_moved(collective, size) / rate, HOP_S * hops)


def _moved(collective: Collective, size: int) -> float:
    """Bytes that pass each device in a group of `size`."""
    match collective.kind:
        case "all-gather":
            return collective.bytes * (size - 1)
        case "all-reduce":
            return 2 * collective.bytes * (size - 1) / size
        case "reduce-scatter":
            return collective.bytes * (size - 1) / size
        case "all-to-all" | "ragged-all-to-all":
            return collective.bytes * (size - 1) / 4
    return collective.bytes


def _groups(instruction: Instruction, devices: int) -> list[list[int]]:
    text = instruction.attribute("replica_groups")
    if text is None:
        raise HloError(f"{instruction.name}: a collective without replica_groups")
    if text.startswith("{"):
        groups = [[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", text)]
        return groups or [list(range(devices))]
    if text.startswith("mesh["):
        # Up to the axes in braces; device ids may be between, with commas.
        whole = re.search(r"replica_groups=(mesh\[.*?\{[^}]*\})", instruction.attributes)
        return _mesh_groups(whole.group(1) if whole else text)
    found = re.fullmatch(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if found is None:
        raise HloError(f"{instruction.name}: cannot read replica_groups={text}")
    shape, reshape, order = ([int(n) for n in part.split(",")] if part else None for part in found.groups())
    ids = np.arange(math.prod(reshape or ())).reshape(reshape or ())
    return ids.transpose(order).reshape(shape or ()).tolist()


def _mesh_groups(text: str) -> list[list[int]]:
    """Groups along axes of a mesh, mesh['a'=2,'b'=8] {'b'}, or along a part of one, {'b':(2)4}."""
    shape, _, rest = text.partition("]")
    ids, brace, along = rest.rpartition("{")
    listed = [int(n) for n in re.findall(r"\d+", ids)]
    if turned := re.search(
        r"\[([\d,]+)\]T\(([\d,]+)\)", ids
    ):  # all devices in order, reshaped and transposed
        dims, order = ([int(n) for n in part.split(",")] for part in turned.groups())
        listed = np.arange(math.prod(dims)).reshape(dims).transpose(order).reshape(-1).tolist()
    if not brace:
        raise HloError(f"cannot read replica_groups={text}")
    names = re.findall(r"'(\w+)'=(\d+)", shape)
    chosen = re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", along)
    if not names or not chosen:
        raise HloError(f"cannot read replica_groups={text}")
    parts: list[tuple[str, int]] = []  # each axis, split where only a part of it is chosen
    for name, size in names:
        split = [(int(a), int(b)) for axis, a, b in chosen if axis == name and a]
        before = 1
        for a, b in sorted(split):
            parts += [("", a // before), (f"{name}:{a}", b)]
            before = a * b
        parts.append(("" if split else name, int(size) // before))
    wanted = [f"{axis}:{a}" if a else axis for axis, a, _ in chosen]
    axes = [i for i, (name, _) in enumerate(parts) if name not in wanted]
    axes += [next(i for i, (name, _) in enumerate(parts) if name == one) for one in wanted]
    sizes = [size for _, size in parts]
    group = math.prod(size for name, size in parts if name in wanted)
    devices = np.asarray(listed or range(math.prod(sizes)))
    if len(devices) != math.prod(sizes):
        raise HloError(f"cannot read replica_groups={text}")
    return devices.reshape(sizes).transpose(axes).reshape(-1, group).tolist()


def _pairs(instruction: Instruction) -> list[tuple[int, int]]:
    text = instruction.attribute("source_target_pairs")
    if text is None:
        raise HloError(f"{instruction.name}: a permute without source_target_pairs")
    return [(int(a), int(b)) for a, b in re.findall(r"\{(\d+),(\d+)\}", text)]
