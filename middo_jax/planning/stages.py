"""The stages of a round: their programs on one mesh, how often each runs, compiled and counted."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from jax.sharding import Mesh

from middo_jax.config import Config, SampledRating
from middo_jax.inference.programs import CHUNK
from middo_jax.models.config import DecoderConfig
from middo_jax.parallel.mesh import batch_divisor
from middo_jax.planning import programs
from middo_jax.planning.amounts import (
    Amounts,
    Batches,
    rating_batches,
    refining,
    scoring_batches,
    training_steps,
)
from middo_jax.planning.automatic import with_changes
from middo_jax.planning.chips import Chip, Slices
from middo_jax.planning.compiling import Compiled, Memory, compile_program
from middo_jax.planning.programs import BatchShape, Program
from middo_jax.planning.roofline import Cost

STAGES = ("train", "score", "rate", "neighbours", "refine", "export")
SHAPES = 2  # of a pass that are compiled: those with the most positions
Tell = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Workload:
    """What is planned.

    Attributes:
      config: the settings.
      decoder: the model; with adapters if the settings have some.
      amounts: rows and lengths.
      chip: rates of a device.
      slices: the topology; None for the devices of this host.
    """

    config: Config
    decoder: DecoderConfig
    amounts: Amounts
    chip: Chip
    slices: Slices | None

    @property
    def base(self) -> DecoderConfig:
        """The model without adapters."""
        return dataclasses.replace(self.decoder, lora=None)

    def changed(self, changes: Sequence[str]) -> Workload:
        """The workload with other settings, written as on the command line."""
        return dataclasses.replace(self, config=with_changes(self.config, changes))


@dataclasses.dataclass(frozen=True)
class PlannedStage:
    """One stage of a round.

    Attributes:
      name: one of STAGES.
      compiled: its programs.
      seconds: time of all its runs; None if a program does not fit.
      note: what was assumed or left out.
    """

    name: str
    compiled: list[Compiled]
    seconds: float | None
    note: str = ""

    @property
    def memory(self) -> Memory:
        """Of the program that needs the most."""
        return max((one.memory for one in self.compiled), key=lambda memory: memory.used)

    @property
    def cost(self) -> Cost:
        """Of all runs of all programs together."""
        total = Cost()
        for one in self.compiled:
            if one.cost is not None:
                total.add(one.cost, one.program.runs)
        return total


def plan_stage(name: str, workload: Workload, mesh: Mesh, tell: Tell = lambda text: None) -> PlannedStage:
    """Compiles and counts the programs of one stage.

    Args:
      name: one of STAGES.
      workload: what is planned.
      mesh: the devices.
      tell: called with a line before each compilation.
    """
    planned, note = _PROGRAMS[name](workload, mesh)
    compiled = []
    for program in planned:
        tell(f"{name}: {program.name}")
        compiled.append(compile_program(program, mesh, workload.chip, workload.slices))
    costs = [(one.cost, one.program.runs) for one in compiled]
    seconds = None
    if all(one.memory.fits for one in compiled):
        seconds = sum(cost.seconds * runs for cost, runs in costs if cost is not None)
    return PlannedStage(name, compiled, seconds, note)


def _training(workload: Workload, mesh: Mesh) -> tuple[list[Program], str]:
    steps = training_steps(workload.amounts, workload.config)
    share = workload.amounts.target_share
    return [programs.training(workload.config, workload.decoder, mesh, share, steps)], f"{steps} steps"


def _merged(batches: list[Batches]) -> tuple[list[tuple[Batches, float]], str]:
    """The batches to compile and how often each runs: others count as positions of the last compiled one."""
    taken, rest = batches[:SHAPES], batches[SHAPES:]
    left = sum(b.count * b.bucket.batch * b.bucket.length for b in rest)
    runs = [b.count for b in taken]
    runs[-1] += left / (taken[-1].bucket.batch * taken[-1].bucket.length)
    note = f"{len(taken)} of {len(batches)} shapes compiled, the others like the last" if rest else ""
    return list(zip(taken, runs, strict=True)), note


def _passes(config: Config) -> int:
    """Passes over all rows: losses before and after training, and those that `scoring.readings` adds."""
    readings = set(config.scoring.readings)
    return 2 + bool(readings & {"ifd", "pmi", "consistency"}) + ("reverse_ifd" in readings)


def _scoring(workload: Workload, mesh: Mesh) -> tuple[list[Program], str]:
    config, passes = workload.config, float(_passes(workload.config))
    if config.refine.accept == "measured":  # the loss of the rewrites, before they are accepted
        passes += refining(workload.amounts, config).rows / max(workload.amounts.rows, 1)
    merged, note = _merged(scoring_batches(workload.amounts, config, batch_divisor(mesh)))
    with_prompts = not {"prompt_nll", "reverse_ifd"}.isdisjoint(config.scoring.readings)
    unembedded = 1.0 if with_prompts else workload.amounts.target_share
    found = [
        programs.scoring(config, workload.base, mesh, _rows(b, unembedded), passes * runs)
        for b, runs in merged
    ]
    return found, "; ".join(part for part in (f"{passes:.2g} passes", note) if part)


def _rows(batches: Batches, target_share: float) -> BatchShape:
    bucket = batches.bucket
    return BatchShape(bucket.batch, bucket.length, bucket.longest, target_share)


def _rating(workload: Workload, mesh: Mesh) -> tuple[list[Program], str]:
    if isinstance(workload.config.quality.rating, SampledRating):
        settings = workload.config.quality.rating
        requests = 6.0 * workload.amounts.rows
        length = workload.amounts.tokens / workload.amounts.rows + 150
        tokens = settings.max_new_tokens / 2
        return _engine(workload, mesh, requests, length, tokens), "sampled by the engine"
    batches, prefix = rating_batches(workload.amounts, workload.config, batch_divisor(mesh))
    merged, note = _merged(batches)
    passes = 1.0
    if workload.config.refine.accept == "measured":
        passes += refining(workload.amounts, workload.config).rows / max(workload.amounts.rows, 1)
    found = [
        programs.rating(workload.config, workload.base, mesh, _rows(b, 0.0), prefix, passes * runs)
        for b, runs in merged
    ]
    return found, "; ".join(part for part in (f"{passes:.2g} passes", note) if part)


def _neighbours(workload: Workload, mesh: Mesh) -> tuple[list[Program], str]:
    k = workload.config.diversity.k
    return programs.neighbours(
        workload.amounts.rows, workload.decoder.hidden_size, k, mesh
    ), "all rows are searched"


def _engine(workload: Workload, mesh: Mesh, requests: float, prompt: float, answer: float) -> list[Program]:
    """The engine with all slots full; a prompt's last chunk counts as a whole one."""
    chunks = requests * -(-prompt // CHUNK)
    steps = requests * answer / workload.config.serve.max_batch
    context = min(prompt + answer / 2, workload.config.serve.max_context)
    return programs.engine(workload.config, workload.base, mesh, context, chunks, steps)


def _refining(workload: Workload, mesh: Mesh) -> tuple[list[Program], str]:
    work = refining(workload.amounts, workload.config)
    if not work.requests:
        return [], "nothing is selected"
    prompt, answer = work.prompt_tokens / work.requests, work.completion_tokens / work.requests
    found = _engine(workload, mesh, work.requests, prompt, answer)
    return found, f"{work.requests:.0f} requests by the embedded engine, first attempts only"


def _export(workload: Workload, mesh: Mesh) -> tuple[list[Program], str]:
    return programs.export(
        workload.base, mesh, workload.config.train.param_dtype
    ), "the gather; disks are not counted"


_PROGRAMS = {
    "train": _training,
    "score": _scoring,
    "rate": _rating,
    "neighbours": _neighbours,
    "refine": _refining,
    "export": _export,
}
