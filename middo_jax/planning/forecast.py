"""The plan of a whole run: memory, hours, chip-hours and money of every stage."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any

from middo_jax.config import Config, ConfigError
from middo_jax.models.config import DecoderConfig
from middo_jax.planning.amounts import Amounts, Refining, refining
from middo_jax.planning.automatic import changed_settings
from middo_jax.planning.chips import GIB, Slices
from middo_jax.planning.compiling import mesh_of
from middo_jax.planning.search import (
    MeshShape,
    Remedy,
    best_mesh,
    nearest_fitting,
    plan_passes,
    with_training,
)
from middo_jax.planning.stages import STAGES, PlannedStage, Workload, plan_stage
from middo_jax.progress import Progress
from middo_jax.refinement.endpoint.usage import cost_usd
from middo_jax.rundir.plan_rows import PlanFile, PlannedStageRow
from middo_jax.rundir.schemas import PLAN
from middo_jax.training.flops import training_flops


@dataclasses.dataclass(frozen=True)
class Plan:
    """A planned run.

    Attributes:
      workload: what was planned, with values in place of settings that were auto.
      chosen: those values.
      slices: the chips.
      mesh: devices along data, fsdp and tensor.
      stages: the stages of one round.
      remedies: for each stage that does not fit, the nearest settings with which it does, or None.
      refiner: the refiner's work in one round.
      price: dollars per chip-hour, or None.
    """

    workload: Workload
    chosen: Sequence[str]
    slices: Slices
    mesh: MeshShape
    stages: list[PlannedStage]
    remedies: dict[str, Remedy | None]
    refiner: Refining
    price: float | None

    @property
    def fits(self) -> bool:
        """Whether all stages fit."""
        return all(stage.seconds is not None for stage in self.stages)

    @property
    def hours(self) -> float:
        """Hours of all rounds, of the stages that fit."""
        return self.workload.config.rounds * sum(stage.seconds or 0.0 for stage in self.stages) / 3600

    @property
    def mfu(self) -> float | None:
        """FLOPs that training needs at least over those of all devices in its time."""
        stage = next((one for one in self.stages if one.name == "train"), None)
        if stage is None or not stage.seconds:
            return None
        amounts = self.workload.amounts
        targets = int(amounts.lengths_n.sum() * amounts.target_share)
        least = training_flops(self.workload.decoder, amounts.lengths_n.tolist(), targets) * amounts.scale
        peak = self.slices.devices * self.workload.chip.matmul_flops
        return least * self.workload.config.train.num_epochs / stage.seconds / peak

    def to_json(self) -> PlanFile:
        """All numbers, for `--json` and plan.json."""
        config, rounds = self.workload.config, self.workload.config.rounds
        return {
            "version": PLAN.version,
            "topology": self.slices.name + (f"x{self.slices.count}" if self.slices.count > 1 else ""),
            "chips": self.slices.chips,
            "mesh": dict(zip(("data", "fsdp", "tensor"), self.mesh, strict=True)),
            "rows": self.workload.amounts.rows,
            "tokens": self.workload.amounts.tokens,
            "lengths": self.workload.amounts.source,
            "rounds": rounds,
            "chosen": list(self.chosen),
            "fits": self.fits,
            "training_mfu": self.mfu,
            "hours": self.hours,
            "chip_hours": self.hours * self.slices.chips,
            "usd": None if self.price is None else self.hours * self.slices.chips * self.price,
            "refiner_per_round": {
                "rows": self.refiner.rows,
                "requests": self.refiner.requests,
                "prompt_tokens": self.refiner.prompt_tokens,
                "completion_tokens": self.refiner.completion_tokens,
                "usd": cost_usd(config.refine.prices, *self._refiner_tokens()),
            },
            "stages": [self._stage(stage) for stage in self.stages],
        }

    def _refiner_tokens(self) -> tuple[int, int]:
        return round(self.refiner.prompt_tokens), round(self.refiner.completion_tokens)

    def _stage(self, stage: PlannedStage) -> PlannedStageRow:
        cost, chip = stage.cost, self.workload.chip
        remedy = self.remedies.get(stage.name)
        return {
            "stage": stage.name,
            "note": stage.note,
            "fits": stage.seconds is not None,
            "memory_gib": {k: v / GIB for k, v in stage.memory.parts.items()},
            "used_gib": stage.memory.used / GIB,
            "usable_gib": stage.memory.usable / GIB,
            "remedy": None if remedy is None else list(remedy.changes),
            "seconds_per_round": stage.seconds,
            "compiler_seconds_per_round": cost.compiler_seconds(chip) if stage.seconds is not None else None,
            "limited_by": cost.limit if stage.seconds is not None else None,
            "seconds_by_limit": {
                "matmuls": cost.matmul_s,
                "memory": cost.memory_s,
                "network": cost.network_s,
            },
            "flops": cost.flops,
            "bytes": cost.bytes,
            "network": [
                {"kind": kind, "axes": list(axes), "runs": runs, "bytes": size, "seconds": seconds}
                for (kind, axes), (runs, size, seconds) in sorted(cost.network_by().items())
            ],
            "notes": list(cost.notes),
            "programs": [
                {
                    "name": one.program.name,
                    "runs": one.program.runs,
                    "seconds": None if one.cost is None else one.cost.seconds,
                    "compiled_in": one.compile_seconds,
                }
                for one in stage.compiled
            ],
        }


@dataclasses.dataclass(frozen=True)
class PlanRequest:
    """What to plan.

    Attributes:
      topology: such as v5e:8x8.
      mesh: devices along data, fsdp and tensor; None: the fastest that fits.
      stages: names of the stages.
      price: dollars per chip-hour.
    """

    topology: str
    mesh: MeshShape | None = None
    stages: Collection[str] = STAGES
    price: float | None = None

    @classmethod
    def parse(
        cls, topology: str, mesh: str | None, stages: Collection[str] | None, price: float | None
    ) -> PlanRequest:
        """Reads the texts of the command line.

        Raises:
          ConfigError: the mesh is not three whole numbers, or a stage is unknown.
        """
        shape = None
        if mesh is not None:
            sizes = mesh.split(",")
            if len(sizes) != 3 or not all(size.strip().isdigit() and int(size) for size in sizes):
                raise ConfigError(f"--mesh {mesh}: must be DATA,FSDP,TENSOR, such as 1,16,4")
            shape = int(sizes[0]), int(sizes[1]), int(sizes[2])
        if unknown := [name for name in stages or () if name not in STAGES]:
            raise ConfigError(f"--stages: {unknown[0]!r} is none of {', '.join(STAGES)}")
        return cls(topology, shape, STAGES if stages is None else stages, price)


def plan_run(
    config: Config, decoder: DecoderConfig, amounts: Amounts, request: PlanRequest, progress: Progress
) -> Plan:
    """Plans all stages of a round.

    Args:
      config: the settings.
      decoder: the model, with the adapters of the settings.
      amounts: rows and lengths.
      request: chips, mesh, stages and price.
      progress: shows stages and compilations.

    Raises:
      TopologyError, ConfigError, PlanError: the message says what to change.
    """
    slices = Slices.parse(request.topology)
    workload = Workload(config, decoder, amounts, slices.chip, slices)

    def make(shape: MeshShape) -> Any:
        return mesh_of(slices, shape)

    shape, known = request.mesh, dict[str, PlannedStage]()
    if shape is None:
        best = best_mesh(workload, make, progress.say)
        shape = (slices.count, slices.devices // slices.count, 1) if best is None else best[0]
        known = {} if best is None else {"train": best[1]}
    mesh, names = make(shape), _planned(config, request.stages)
    workload = with_training(workload, mesh)
    passes = [name for name in names if name in ("score", "rate")]
    remedies = {}
    with progress.task("plan", "stages") as advance:
        advance(0, len(names), "passes")
        workload, planned = plan_passes(passes, workload, mesh, progress.say)
        known |= dict(zip(passes, planned, strict=True))
        for name in names:
            advance(len(known), len(names), name)
            if name not in known:
                known[name] = plan_stage(name, workload, mesh, progress.say)
            if known[name].compiled and known[name].seconds is None:
                remedies[name] = nearest_fitting(name, workload, mesh, make, progress.say)
        advance(len(names), len(names))
    stages = [known[name] for name in names if known[name].compiled]
    chosen = changed_settings(config, workload.config)
    return Plan(workload, chosen, slices, shape, stages, remedies, refining(amounts, config), request.price)


def _planned(config: Config, stages: Collection[str]) -> list[str]:
    """The stages that run on these chips; another server may be the refiner."""
    return [
        name for name in STAGES if name in stages and (name != "refine" or config.refine.base_url is None)
    ]


def text_of(plan: Plan) -> str:
    """The plan as a table for the terminal."""
    facts = plan.to_json()
    mesh = " ".join(f"{axis}={size}" for axis, size in facts["mesh"].items())
    lines = [
        f"{facts['topology']}: {facts['chips']} chips, mesh {mesh}; {facts['lengths']}; "
        f"{facts['rounds']} round{'s' if facts['rounds'] > 1 else ''}",
        *([f"in place of auto: {' '.join(facts['chosen'])}"] if facts["chosen"] else []),
        "",
        f"{'stage':<11} {'fits':<5} {'GiB per chip':>16} {'per round':>10} {'compiler':>10}  limited by",
    ]
    for stage in facts["stages"]:
        memory = f"{stage['used_gib']:.2f} of {stage['usable_gib']:.2f}"
        ours = _duration(stage["seconds_per_round"])
        theirs = _duration(stage["compiler_seconds_per_round"])
        fits = "yes" if stage["fits"] else "NO"
        limit = stage["limited_by"] or ""
        lines.append(f"{stage['stage']:<11} {fits:<5} {memory:>16} {ours:>10} {theirs:>10}  {limit}".rstrip())
        lines += [f"  {detail}" for detail in _details(stage)]
    lines += ["", *_totals(plan, facts)]
    return "\n".join(lines)


def _details(stage: PlannedStageRow) -> list[str]:
    found = [stage["note"]] if stage["note"] else []
    if stage["memory_gib"]:
        largest = sorted(stage["memory_gib"].items(), key=lambda item: -item[1])
        found.append("memory: " + ", ".join(f"{name} {size:.2f}" for name, size in largest if size >= 0.005))
    found += [
        f"{each['kind']} along {'+'.join(each['axes']) or 'nothing'}: {each['runs']:.0f} times, "
        f"{each['bytes'] / GIB:.1f} GiB per chip, {_duration(each['seconds'])}"
        for each in sorted(stage["network"], key=lambda each: -each["seconds"])[:4]
    ]
    if not stage["fits"]:
        over = stage["used_gib"] - stage["usable_gib"]
        what = " ".join(stage["remedy"]) if stage["remedy"] else "none of the settings that were tried"
        found.append(f"does not fit by {over:.2f} GiB; fits with: {what}")
    return found + stage["notes"]


def _totals(plan: Plan, facts: PlanFile) -> list[str]:
    found = [f"total: {facts['hours']:.2f} hours, {facts['chip_hours']:.1f} chip-hours"]
    if facts["usd"] is not None:
        found[0] += f", ${facts['usd']:.2f} at ${plan.price:g} per chip-hour"
    if facts["training_mfu"] is not None:
        found.append(f"training: {facts['training_mfu']:.1%} MFU")
    refiner = facts["refiner_per_round"]
    found.append(
        f"refiner, per round: {refiner['rows']:.0f} rows, {refiner['requests']:.0f} requests, "
        f"{refiner['prompt_tokens']:.3g} prompt and {refiner['completion_tokens']:.3g} completion tokens, "
        f"${refiner['usd']:.2f} at refine.prices"
    )
    if not plan.fits:
        found.append("stages that do not fit are not in the total")
    return found


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    if seconds >= 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.3g} s"
