"""Compiles programs for chips that are not there: their memory per device, and their cost."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import os
import re
import time
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from middo_jax.config import MeshSettings
from middo_jax.parallel.mesh import make_mesh
from middo_jax.planning.chips import Chip, Slices
from middo_jax.planning.network import Network
from middo_jax.planning.programs import Program
from middo_jax.planning.roofline import Cost, Machine, cost

_UNITS = {"B": 1.0, "K": 2.0**10, "M": 2.0**20, "G": 2.0**30, "T": 2.0**40}
# The compiler's two messages of a program that does not fit: bytes needed, bytes there.
_USED = re.compile(
    r"(?:Used |required for HLO temporaries \()([\d.]+)([BKMGT])\)?"
    r"(?: of | exceeds available HBM \()([\d.]+)([BKMGT])"
)


class PlanError(RuntimeError):
    """The plan cannot be made; the message says why and what to do."""


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes per device of a program.

    Attributes:
      used: all that it needs.
      usable: what the chip has.
      parts: `used` by kind; empty if the compiler stopped because the program does not fit.
    """

    used: float
    usable: float
    parts: dict[str, float]

    @property
    def fits(self) -> bool:
        """Whether the program fits."""
        return self.used <= self.usable


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A compiled program: its memory, its cost per run (None if it does not fit), seconds of compilation."""

    program: Program
    memory: Memory
    cost: Cost | None
    compile_seconds: float


def devices_of(slices: Slices) -> list[Any]:
    """The devices of slices that are not there.

    Raises:
      PlanError: the `tpu` extra is not installed, or the compiler does not have this topology.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise PlanError(
            "middo plan compiles with the real TPU compiler, which is not installed: "
            "pip install 'middo-jax[tpu]'. It needs no TPU"
        )
    # Without a chip, several compilers may run at a time, and there is no metadata server to ask.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    several: dict[str, Any] = {} if slices.count == 1 else {"num_slices": slices.count}
    if slices.chip.name == "v4":  # as JAX uses it: the two cores of a chip are one device
        several["chip_config_name"] = "megacore"
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=slices.name, **several)
    except (jax.errors.JaxRuntimeError, ValueError, RuntimeError) as error:
        first = str(error).partition("\n")[0]
        raise PlanError(f"the TPU compiler has no topology {slices.name}: {first}") from error
    return list(found.devices)


def mesh_of(slices: Slices, shape: tuple[int, int, int]) -> Mesh:
    """The mesh (data, fsdp, tensor) of slices that are not there, as a run on them would make it."""
    data, fsdp, tensor = shape
    return make_mesh(MeshSettings(data=data, fsdp=fsdp, tensor=tensor), devices_of(slices))


def compile_program(program: Program, mesh: Mesh, chip: Chip, slices: Slices | None) -> Compiled:
    """Compiles a program and reads its memory and cost.

    Args:
      program: lowered on the mesh.
      mesh: of devices of this host, or of a topology.
      chip: rates of one device.
      slices: the topology; None on this host.
    """
    began = time.monotonic()
    compiled = _compiled(program, mesh)
    memory = _memory(program, compiled, chip.usable_bytes)
    counted = None
    if not isinstance(compiled, _TooLarge):
        machine = Machine(chip, Network.of(mesh, slices), program.loops, program.window)
        counted = cost(compiled.text, machine)
    return Compiled(program, memory, counted, time.monotonic() - began)


def memory_of_program(program: Program, mesh: Mesh, usable: float) -> Memory:
    """Compiles a program and reads its memory; `usable` is that of a device."""
    return _memory(program, _compiled(program, mesh), usable)


class _TooLarge(NamedTuple):
    """What the compiler says of a program that does not fit: bytes needed, bytes of the device."""

    used: float
    usable: float


class _Text(NamedTuple):
    """A compiled program, and its sizes in memory."""

    text: str
    sizes: Any


# `auto`, the search for the nearest setting that fits, and the plan itself ask for the same programs.
_compiled_before: dict[str, _Text | _TooLarge] = {}


def _compiled(program: Program, mesh: Mesh) -> _Text | _TooLarge:
    """The compiled program; one that this process has compiled before is not compiled again."""
    with jax.set_mesh(mesh):
        lowered = program.lower()
    devices = [(d.platform, d.device_kind, d.id) for d in mesh.devices.flat]
    key = hashlib.sha256(f"{devices}{lowered.as_text()}".encode()).hexdigest()
    if key not in _compiled_before:
        _compiled_before[key] = _compile(lowered)
    return _compiled_before[key]


def _compile(lowered: jax.stages.Lowered) -> _Text | _TooLarge:
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        found = _USED.search(str(error))
        if found is None:
            raise
        return _TooLarge(*(float(found[i]) * _UNITS[found[i + 1]] for i in (1, 3)))  # number and unit
    sizes = compiled.memory_analysis()
    if sizes is None:
        raise PlanError("the compiler does not report the memory of a program")
    return _Text(compiled.as_text() or "", sizes)


def _memory(program: Program, compiled: _Text | _TooLarge, usable: float) -> Memory:
    if isinstance(compiled, _TooLarge):
        return Memory(compiled.used, compiled.usable, {})
    return memory_of(program, compiled.sizes, usable)


def memory_of(program: Program, sizes: Any, usable: float) -> Memory:
    """The memory of a compiled program by kind, from the compiler's `memory_analysis()`.

    Gradients are counted in float32, as large as the trained parameters; the rest of the temporaries are
    activations and buffers of collectives.
    """
    parts = dict(program.parts)
    gradients = min(parts.pop("gradients", 0.0), sizes.temp_size_in_bytes)
    parts["other arguments"] = max(0.0, sizes.argument_size_in_bytes - sum(parts.values()))
    parts["results"] = max(0, sizes.output_size_in_bytes - sizes.alias_size_in_bytes)
    if gradients:
        parts["gradients"] = gradients
    parts["activations and temporaries"] = sizes.temp_size_in_bytes - gradients
    parts["program"] = sizes.generated_code_size_in_bytes
    return Memory(sum(parts.values()), usable, {k: v for k, v in parts.items() if v})
