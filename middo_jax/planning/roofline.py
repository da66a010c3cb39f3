"""The time of a compiled program: its instructions in their order, against the rates of a chip.

An instruction takes as long as its matmuls or its memory traffic takes, whichever is longer. Asynchronous
copies and collectives run beside the instructions that follow, until the one that waits for them, and so do
the collectives that the compiler gives to the SparseCores. Each loop counts as often as it runs. Elementwise
work counts by its memory traffic only.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from middo_jax.planning import work
from middo_jax.planning.chips import Chip
from middo_jax.planning.hlo import Computation, Instruction, Module, parse, trip_count
from middo_jax.planning.network import KINDS, Collective, Network


class Loop(NamedTuple):
    """How often a loop runs whose length depends on data.

    Attributes:
      pattern: regular expression that its JAX scopes contain; the first one that matches counts.
      trips: number of iterations.
    """

    pattern: str
    trips: float


class Machine(NamedTuple):
    """What a program runs on, and what its text does not contain.

    Attributes:
      chip: rates of a device.
      network: links of the mesh.
      loops: lengths of loops that depend on data.
      window: how far back the attention of known kernels looks; None: to the beginning.
    """

    chip: Chip
    network: Network
    loops: Sequence[Loop] = ()
    window: int | None = None


@dataclasses.dataclass
class Cost:
    """Cost of a program, or of a part of it, per device.

    Attributes:
      seconds: time.
      flops: of matmuls, kernels included.
      bytes: of memory read and written.
      matmul_s: time of the instructions that matmuls limit.
      memory_s: time of the instructions that memory limits.
      network_s: time in which nothing but the network works.
      collectives: (number of runs, seconds per run) of each collective.
      copies: (number of runs, bytes moved per run) of copies and transposes in memory, by their JAX scopes.
      cycles: the compiler's estimated cycles of everything but kernels and collectives.
      kernels_s: time of the kernels.
      notes: parts of the program that could not be counted.
    """

    seconds: float = 0.0
    flops: float = 0.0
    bytes: float = 0.0
    matmul_s: float = 0.0
    memory_s: float = 0.0
    network_s: float = 0.0
    collectives: dict[Collective, tuple[float, float]] = dataclasses.field(default_factory=dict)
    copies: dict[str, tuple[float, float]] = dataclasses.field(default_factory=dict)
    cycles: float = 0.0
    kernels_s: float = 0.0
    notes: tuple[str, ...] = ()

    def add(self, other: Cost, times: float = 1.0) -> None:
        """Adds another part that runs `times` times, one after the other."""
        for name in ("seconds", "flops", "bytes", "matmul_s", "memory_s", "network_s", "cycles", "kernels_s"):
            setattr(self, name, getattr(self, name) + times * getattr(other, name))
        for collective, (runs, seconds) in other.collectives.items():
            before, _ = self.collectives.get(collective, (0.0, seconds))
            self.collectives[collective] = before + times * runs, seconds
        for name, (runs, size) in other.copies.items():
            before, _ = self.copies.get(name, (0.0, size))
            self.copies[name] = before + times * runs, size
        self.notes = tuple(dict.fromkeys((*self.notes, *other.notes)))

    def compiler_seconds(self, chip: Chip) -> float:
        """The second opinion: the compiler's cycles, plus kernels and exposed network, which it omits."""
        return self.cycles / chip.clock + self.kernels_s + self.network_s

    @property
    def limit(self) -> str:
        """What takes most of the time: matmuls, memory or network."""
        parts = {"matmuls": self.matmul_s, "memory": self.memory_s, "network": self.network_s}
        return max(parts, key=parts.__getitem__)

    def network_by(self) -> dict[tuple[str, tuple[str, ...]], tuple[float, float, float]]:
        """(runs, bytes per device, seconds) of the collectives by kind and mesh axes."""
        found: dict[tuple[str, tuple[str, ...]], tuple[float, float, float]] = {}
        for collective, (runs, seconds) in self.collectives.items():
            key = collective.kind, collective.axes
            all_runs, size, total = found.get(key, (0.0, 0.0, 0.0))
            found[key] = all_runs + runs, size + runs * collective.bytes, total + runs * seconds
        return found


def cost(text: str, machine: Machine) -> Cost:
    """The cost of one run of a compiled program, from its text.

    Raises:
      HloError: the text cannot be read.
    """
    module = parse(text)
    return _Reader(module, machine).of(module.entry)


class _Clock:
    """The time while a computation runs, and until when the network and the memory are busy."""

    def __init__(self) -> None:
        self.now = 0.0
        self.free: dict[tuple[str, int], float] = {}
        self.ends: dict[str, float] = {}

    def begin(self, resources: Iterable[tuple[str, int]], seconds: float) -> float:
        """Occupies resources as soon as all of them are free; returns the end."""
        resources = list(resources)
        end = max([self.now, *(self.free.get(one, 0.0) for one in resources)]) + seconds
        for one in resources:
            self.free[one] = end
        return end

    def wait(self, end: float) -> float:
        """Waits until `end`; returns how long."""
        waited = max(0.0, end - self.now)
        self.now += waited
        return waited


_MEMORY = ("memory", 0)


def _links(collective: Collective) -> list[tuple[str, int]]:
    directions = (collective.direction,) if collective.direction else (1, -1)
    return [(axis, direction) for axis in collective.axes for direction in directions]


class _Reader:
    def __init__(self, module: Module, machine: Machine) -> None:
        self.module, self.machine = module, machine
        self.known: dict[str, Cost] = {}

    def of(self, computation: Computation) -> Cost:
        """The cost of one run of a computation."""
        if computation.name not in self.known:
            clock, total = _Clock(), Cost()
            for one in computation.instructions.values():
                self._add(computation, one, clock, total)
            total.seconds = clock.now
            self.known[computation.name] = total
        return self.known[computation.name]

    def _add(self, computation: Computation, one: Instruction, clock: _Clock, total: Cost) -> None:
        kind = one.opcode.removesuffix("-start").removesuffix("-done").removesuffix("-update")
        if one.opcode in work.FREE or one.opcode.endswith("-update"):
            if one.opcode == "async-update":
                clock.ends[one.name] = clock.ends.pop(one.operands[0], clock.now)
            return
        total.cycles += one.cycles
        if one.opcode in ("while", "conditional", "call"):
            inner, times = self._inner(computation, one)
            total.add(inner, times)
            clock.now += times * inner.seconds
        elif one.opcode.endswith("-done"):
            waited = clock.wait(clock.ends.pop(one.operands[0], clock.now) if one.operands else clock.now)
            if kind in ("copy", "slice", "dynamic-slice"):
                total.memory_s += waited
            else:
                total.network_s += waited
        elif kind in KINDS:
            self._collective(computation, one, kind, clock, total)
        elif one.opcode in ("async-start", "call-start"):  # a call is run by another core
            self._asynchronous(computation, one, clock, total)
        elif one.opcode.endswith("-start"):  # a copy between memories
            size = work.memory_bytes(self.module, computation, one)
            total.bytes += size
            clock.ends[one.name] = clock.begin([_MEMORY], size / self.machine.chip.memory_rate)
        else:
            self._compute(computation, one, clock, total)

    def _inner(self, computation: Computation, one: Instruction) -> tuple[Cost, float]:
        """(the cost of what an instruction runs, how often)."""
        if one.opcode == "call":
            return self.of(self.module.called(one, "to_apply")), 1.0
        if one.opcode == "conditional":
            names = one.names("branch_computations") or (
                *one.names("true_computation"),
                *one.names("false_computation"),
            )
            return max((self.of(self.module.computations[n]) for n in names), key=lambda c: c.seconds), 1.0
        body = dataclasses.replace(self.of(self.module.called(one, "body")))
        trips = trip_count(self.module, computation, one)
        if trips is not None:
            return body, float(trips)
        for loop in self.machine.loops:
            if re.search(loop.pattern, one.op_name):
                return body, loop.trips
        note = f"a loop of unknown length counts once: {one.op_name or one.name}"
        body.notes = (*body.notes, note)
        return body, 1.0

    def _collective(
        self, computation: Computation, one: Instruction, kind: str, clock: _Clock, total: Cost
    ) -> None:
        end = self._transfer(computation, one, kind, clock, total)
        if one.opcode.endswith("-start"):
            clock.ends[one.name] = end
        else:
            total.network_s += clock.wait(end)

    def _transfer(
        self, computation: Computation, one: Instruction, kind: str, clock: _Clock, total: Cost
    ) -> float:
        """Counts a collective and starts it; returns its end."""
        operands = (computation.instructions[name] for name in one.operands)
        size = sum(shape.bytes for operand in operands for shape in operand.shapes if shape.dims)
        collective = self.machine.network.collective(kind, size, one)
        seconds = self.machine.network.seconds(collective)
        runs, _ = total.collectives.get(collective, (0.0, seconds))
        total.collectives[collective] = runs + 1, seconds
        return clock.begin(_links(collective), seconds)

    def _inside(self, computation: Computation) -> list[tuple[Computation, Instruction, str]]:
        """The collectives inside a fusion or an asynchronous computation."""
        found = []
        for one in computation.instructions.values():
            kind = one.opcode.removesuffix("-start")
            if kind in KINDS:
                scatters = kind == "all-reduce" and "reduce-scatter" in computation.name
                found.append((computation, one, "reduce-scatter" if scatters else kind))
            elif one.opcode in ("fusion", "async-start"):
                found += self._inside(self.module.called(one))
        return found

    def _asynchronous(self, computation: Computation, one: Instruction, clock: _Clock, total: Cost) -> None:
        called = self.module.called(one, "calls" if one.opcode == "async-start" else "to_apply")
        found = self._inside(called)
        if found:
            clock.ends[one.name] = max(self._transfer(*each, clock, total) for each in found)
            return
        inner = self.of(called)
        total.add(inner)
        clock.ends[one.name] = clock.begin([("async", 0)], inner.seconds)

    def _compute(self, computation: Computation, one: Instruction, clock: _Clock, total: Cost) -> None:
        """An instruction that computes: a fusion, a matmul, a kernel or a copy."""
        chip, found, is_kernel = self.machine.chip, [], False
        end = clock.now
        if one.opcode == "fusion":
            called = self.module.called(one)
            found = work.matmuls(self.module, called)
            for each in self._inside(called):
                end = max(end, self._transfer(*each, clock, total))
        elif one.opcode in ("dot", "convolution"):
            found = [work.matmul(computation, one)]
        elif one.opcode == "custom-call":
            target = (one.attribute("custom_call_target") or "").strip('"')
            is_kernel = target == "tpu_custom_call"
            if is_kernel:
                found = work.kernel(computation, one, self.machine.window)
            elif target in _CHEAP:
                return
            elif target not in _BY_MEMORY:
                total.notes = tuple(dict.fromkeys((*total.notes, f"not counted: custom call {target}")))
                return
        size = work.memory_bytes(self.module, computation, one)
        if size and one.opcode in ("copy", "transpose"):
            name = f"{one.op_name or one.name} {one.shapes[0].dtype}{list(one.shapes[0].dims)}"
            runs, _ = total.copies.get(name, (0.0, size))
            total.copies[name] = runs + 1, size
        compute_s = sum(each.seconds(chip) for each in found)
        memory_s = size / chip.memory_rate
        memory_end = clock.begin([_MEMORY], memory_s) if size else clock.now
        seconds = max(clock.now + compute_s, memory_end) - clock.now
        total.flops += sum(each.flops for each in found)
        total.bytes += size
        if compute_s >= memory_s:
            total.matmul_s += seconds
        else:
            total.memory_s += seconds
        total.kernels_s += seconds if is_kernel else 0.0
        clock.now += seconds
        total.network_s += clock.wait(end)


# Custom calls that cost the memory that they read and write.
_BY_MEMORY = frozenset({"TopK", "PartialReduce"})
# Custom calls that compute nothing.
_CHEAP = frozenset(
    {
        *("AllocateBuffer", "Sharding", "SPMDFullToShardShape", "SPMDShardToFullShape", "ConcatBitcast"),
        *("AssumeGatherIndicesInBound", "GatherScatterIndicesBitpacked", "AssumeAligned"),
        *("PrepareAsyncCallStart", "PrepareAsyncCallDone"),
    }
)
