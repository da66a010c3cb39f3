"""Chips and slices: published rates, usable memory, and how the chips of a slice are linked.

    Slices.parse("v5e:16x16x2")     two slices of 16 x 16 chips of TPU v5e

Rates are published: cloud.google.com/tpu/docs/v4, /v5e, /v5p, /v6e, /tpu7x. A slice's own network is a torus
only along some axes (`wraps`).
"""

from __future__ import annotations

import dataclasses
import math
import re

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One JAX device: a chip, or half of one on TPU7x. Rates per second, at their published maximum.

    Attributes:
      name: as in a topology's name.
      matmul_flops: FLOP/s of bfloat16 matmuls.
      memory_bytes: bytes per second of its memory.
      usable_bytes: memory that a program may use.
      link_bytes: bytes per second of one link in one direction.
      axes: number of axes of the network.
      dcn_bytes: bytes per second of the network between slices, per device and direction.
      matmul_tile: width of a matrix unit; smaller contractions leave a part of it empty.
      clock: cycles per second of the compiler's estimates.
      matmul_efficiency: attainable share of `matmul_flops`.
      memory_efficiency: attainable share of `memory_bytes`.
      devices: number of JAX devices per chip.
    """

    name: str
    matmul_flops: float
    memory_bytes: float
    usable_bytes: float
    link_bytes: float = 0.0
    axes: int = 2
    dcn_bytes: float = 0.0
    matmul_tile: int = 128
    clock: float = 1e9
    matmul_efficiency: float = 0.90
    memory_efficiency: float = 0.83
    devices: int = 1

    @property
    def matmul_rate(self) -> float:
        """Attainable FLOP/s of large matmuls."""
        return self.matmul_flops * self.matmul_efficiency

    @property
    def memory_rate(self) -> float:
        """Attainable bytes per second of memory."""
        return self.memory_bytes * self.memory_efficiency


# Efficiencies: v6e 90 % of matmuls and 83 % of memory, TPU7x 77 % of matmuls at n = 4,096 are published; the
# others are assumed to be like v6e. Links: the published total of both directions over two times the number
# of ports. A clock is the published FLOP/s over those of all matrix units per cycle.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", 275e12, 1200e9, 30.75 * GIB, 50e9, 3, 6.25e9, clock=1.05e9),
        Chip("v5e", 197e12, 800 * GIB, 15.75 * GIB, 50e9, 2, 3.125e9, clock=1.5e9),
        Chip("v5p", 459e12, 2765e9, 95.74 * GIB, 100e9, 3, 6.25e9, clock=1.75e9),
        Chip("v6e", 918e12, 1638e9, 31.25 * GIB, 100e9, 2, 12.5e9, matmul_tile=256, clock=1.75e9),
        Chip(
            "tpu7x",
            1153.5e12,
            3690e9,
            94.75 * GIB,
            50e9,
            3,
            6.25e9,
            matmul_tile=256,
            clock=2.2e9,
            matmul_efficiency=0.77,
            devices=2,
        ),
    )
}


class TopologyError(ValueError):
    """A topology's name is wrong; the message names those that are possible."""


@dataclasses.dataclass(frozen=True)
class Slices:
    """Equal slices of one kind of chip.

    Attributes:
      chip: the kind.
      shape: chips along each axis of a slice's network.
      count: number of slices.
    """

    chip: Chip
    shape: tuple[int, ...]
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> Slices:
        """Reads v5e:8x8, v5p:4x4x8, or with the number of slices at the end v5e:16x16x2.

        Raises:
          TopologyError: an unknown chip, or a wrong number of sizes.
        """
        name, _, sizes = text.strip().lower().partition(":")
        chip = CHIPS.get({"v7x": "tpu7x"}.get(name, name))
        if chip is None or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)+", sizes):
            raise TopologyError(
                f"topology {text!r}: must be CHIP:SHAPE, such as v5e:8x8, v5p:4x4x8 or, for two slices, "
                f"v5e:16x16x2; chips: {', '.join(CHIPS)}"
            )
        shape = tuple(int(size) for size in sizes.split("x"))
        if len(shape) not in (chip.axes, chip.axes + 1):
            raise TopologyError(
                f"topology {text!r}: a slice of {chip.name} has {chip.axes} sizes, and one more number for "
                "several slices"
            )
        return cls(chip, shape[: chip.axes], *shape[chip.axes :])

    @property
    def name(self) -> str:
        """The name that JAX has for one slice, such as v5e:8x8."""
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def chips(self) -> int:
        """Number of chips of all slices."""
        return math.prod(self.shape) * self.count

    @property
    def devices(self) -> int:
        """Number of JAX devices of all slices."""
        return self.chips * self.chip.devices

    @property
    def wraps(self) -> tuple[bool, ...]:
        """Whether each axis is a ring: an axis of 16 on v5e and v6e; elsewhere full cubes of 4 x 4 x 4."""
        if self.chip.axes == 2:
            return tuple(size == 16 for size in self.shape)
        return (all(size % 4 == 0 for size in self.shape),) * 3
