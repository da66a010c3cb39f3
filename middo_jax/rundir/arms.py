"""The folders of a run's control arms, and the stages that fill them.

RUN/controls/ARM/          requests.jsonl  refined.jsonl  candidates.jsonl  merged.jsonl  manifest.json
RUN/controls/ARM/seed_1/   metrics.jsonl  heldout_losses.json  heldout_rows.parquet  manifest.json

All arms begin with round_00: its dataset, model, scores and selection. The arm `loop` is the run itself: its
dataset is that of `final`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from middo_jax.config import Config, Control
from middo_jax.rundir.chain import AFFECTED_BY, chain, refiner_files
from middo_jax.rundir.layout import RoundDir, RunDir
from middo_jax.rundir.link import Link

Arm = Control | Literal["loop"]
LOOP: Literal["loop"] = "loop"
FOLDER = "controls"


class ArmDir(RoundDir):
    """An arm's folder; what round_00 measured is read from there."""

    def __init__(self, run: RunDir, arm: Control) -> None:
        super().__init__(run.path / FOLDER / arm)
        self.arm: Control = arm
        self._run, self._scored = run, run.round(0)

    @property
    def dataset(self) -> Path:
        """That of round_00."""
        return self._scored.dataset

    @property
    def scores(self) -> Path:
        """Those of round_00."""
        return self._scored.scores

    @property
    def embeddings(self) -> Path:
        """Those of round_00."""
        return self._scored.embeddings

    @property
    def selection(self) -> Path:
        """That of round_00: the gates compare with its statistics."""
        return self._scored.selection

    @property
    def checkpoint(self) -> Path:
        """That of round_00, which measures the rewrites."""
        return self._scored.checkpoint

    @property
    def merged(self) -> Path:
        """The dataset that the arm trains on."""
        return self.path / "merged.jsonl"

    @property
    def run(self) -> RunDir:
        """The run that the arm belongs to."""
        return self._run

    @property
    def index(self) -> int:
        """0: an arm rewrites the rows of round_00."""
        return 0

    def stages(self) -> dict[str, Any]:
        """The records of the arm, and round_00's of its scoring."""
        scored = {name: record for name, record in self._scored.stages().items() if name == "score"}
        return scored | super().stages()


class SeedDir(RoundDir):
    """The folder of one training of an arm."""

    def __init__(self, run: RunDir, arm: Arm, number: int) -> None:
        super().__init__(run.path / FOLDER / arm / f"seed_{number}")
        self.arm: Arm = arm
        self._run, self._dataset = run, dataset_of(run, arm)

    @property
    def dataset(self) -> Path:
        """The arm's dataset."""
        return self._dataset

    @property
    def run(self) -> RunDir:
        """The run that the arm belongs to."""
        return self._run


def dataset_of(run: RunDir, arm: Arm) -> Path:
    """The dataset that an arm trains on."""
    if arm == LOOP:
        return run.final.dataset
    return run.round(0).dataset if arm == "none" else ArmDir(run, arm).merged


def with_seed(config: Config, number: int) -> Config:
    """The settings of training `number` of each arm: 0 has the run's own seed."""
    return config.model_copy(update={"seed": config.seed + number})


def shared(run: RunDir, arm: Arm, number: int) -> str | None:
    """The run's model that equals a training of an arm, as heldout_rows.parquet names it; None if none does.

    The first training on round_00's dataset is round_00's, if that had as many steps as the last one.
    """
    if number:
        return None
    if arm == LOOP:
        return run.final.path.name
    steps = [_count_lines(folder.metrics) for folder in (run.round(0), run.final)]
    return run.round(0).path.name if arm == "none" and steps[0] == steps[1] else None


def refine_link(run: RunDir, config: Config, arm: Control, base: Path | None = None) -> Link:
    """round_00's rows and the loop's rewrites -> the arm's rewrites and its dataset."""
    here = ArmDir(run, arm)
    measuring = here.checkpoint if config.refine.accept == "measured" else None
    embedded = () if measuring is None else (here.embeddings,)
    of_loop = [
        path
        for folder in loop_rounds(run, config)
        for path in (
            folder.dataset,
            folder.refined,
            *((folder.verdicts,) if folder.verdicts.exists() else ()),
        )
    ]
    files = dict.fromkeys((here.dataset, here.scores, here.selection, run.heldout, *embedded, *of_loop))
    writes = (here.requests, here.refined, here.candidates, here.merged)
    affected = AFFECTED_BY["refine"] | AFFECTED_BY["merge"]
    return Link(
        "refine",
        here,
        affected,
        tuple(files),
        writes,
        {"model": measuring},
        refiner_files(config),
        tokenizer=base,
    )


def seed_link(run: RunDir, arm: Arm, number: int, base: Path | None = None) -> Link:
    """An arm's dataset -> held-out losses after a training on it, of as many steps as the loop's last."""
    here = SeedDir(run, arm, number)
    files = tuple(dict.fromkeys((here.dataset, run.final.dataset, run.heldout)))
    writes = (here.metrics, here.heldout_losses, here.heldout_rows)
    affected = AFFECTED_BY["train"] | AFFECTED_BY["heldout"]
    return Link("control", here, affected, files, writes, {"start": base}, may_write=(here.evaluations,))


def loop_rounds(run: RunDir, config: Config) -> list[RoundDir]:
    """The rounds in which the loop rewrites."""
    return [link.folder for link in chain(run, config) if link.name == "refine"]


def arms_of(config: Config) -> tuple[Arm, ...]:
    """All arms of a run, the loop first; without `controls` none."""
    return (LOOP, *config.controls) if config.controls else ()


def control_links(run: RunDir, config: Config, base: Path | None = None) -> list[tuple[Link, Config]]:
    """The stages of all arms in order, each with the settings it runs under."""
    found = [(refine_link(run, config, arm, base), config) for arm in config.controls if arm != "none"]
    for number in range(config.seeds if config.controls else 0):
        for arm in arms_of(config):
            if shared(run, arm, number) is None:
                found.append((seed_link(run, arm, number, base), with_seed(config, number)))
    return found


def _count_lines(path: Path) -> int:
    try:
        return path.read_bytes().count(b"\n")
    except OSError:  # missing; or not a file that can be read, which stops the run elsewhere
        return -1
