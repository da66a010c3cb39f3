"""Control arms beside the loop (`controls`, `seeds`): the same budget spent on other rows, trained as often.

Each arm rewrites rows of round_00's dataset and is trained from the base model, for as many steps as the
loop's last training, once per seed. All models are measured on the same held-out rows. `report/controls.py`
compares them; docs/design.md says where everything is.
"""

from __future__ import annotations

import functools
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from middo_jax import stages
from middo_jax.config import Config
from middo_jax.data.example import Example
from middo_jax.models.config import read_config
from middo_jax.models.parameters import parameters
from middo_jax.parallel.coordination import barrier, from_first, on_each_disk
from middo_jax.report.controls import ArmCost, summarise
from middo_jax.rundir import RoundDir, RunDir, read_jsonl, write_json
from middo_jax.rundir.arms import (
    LOOP,
    Arm,
    ArmDir,
    SeedDir,
    arms_of,
    control_links,
    loop_rounds,
)
from middo_jax.rundir.link import Link
from middo_jax.session import Session, read_dataset

# The passes over round_00's dataset that an arm's choice needs; `loop` and `reanswer` need all of all rounds.
PASSES: Mapping[str, tuple[str, ...]] = {
    "none": (),
    "random": (),
    "length": (),
    "loss": ("loss and embeddings",),
    "ifd": ("loss and embeddings", "loss of responses alone"),
}


class ControlStage(NamedTuple):
    """A stage of an arm.

    Attributes:
      name: for messages: `controls/random/seed_0 control`.
      link: its inputs and outputs.
      config: its settings, with the seed of its training.
      run: what does it, in all processes.
    """

    name: str
    link: Link
    config: Config
    run: Callable[[], None]


def control_stages(session: Session, run: RunDir, heldout: Sequence[Example]) -> Iterator[ControlStage]:
    """The stages of all arms in order; the loop must be done."""
    for link, config in control_links(run, session.config, session.base):
        function = stages.refine_arm if link.name == "refine" else _train_seed
        own = Session(config, session.progress)
        name = f"{link.folder.path.relative_to(run.path).as_posix()} {link.name}"
        yield ControlStage(name, link, config, functools.partial(function, own, run, link, heldout))


def _train_seed(session: Session, run: RunDir, link: Link, heldout: Sequence[Example]) -> None:
    """Trains a model on an arm's dataset, measures its held-out loss and removes it."""
    began, begun, here = time.monotonic(), link.begin(), link.folder
    assert isinstance(here, SeedDir)
    start = link.models["start"]
    assert start is not None
    if not from_first(f"{link.where}: checkpoint", here.checkpoint.exists):
        on_each_disk(f"{link.where}: remove", lambda: stages.remove_training(here))
    with session.stage():
        n_steps = stages.count_steps(session, read_dataset(run.final))
        stages.train_stage(session, here, start, heldout, restart=True, n_steps=n_steps)
        losses = stages.measure_heldout(session, here, {here.arm: here.checkpoint}, heldout)
    barrier(f"{link.where}: measured")  # no process reads the checkpoint any more
    on_each_disk(f"{link.where}: forget", lambda: _forget_model(here))
    begun.finish(session.config, time.monotonic() - began, losses=losses, n_steps=n_steps)


def _forget_model(here: RoundDir) -> None:
    here.forget("train")
    shutil.rmtree(here.checkpoint, ignore_errors=True)


def write_summary(session: Session, run: RunDir) -> None:
    """Writes controls.json: all arms, their differences and costs."""
    config = session.config
    costs: dict[Arm, ArmCost] = {
        arm: ArmCost(*_rewrites(run, config, arm), _flops(session, run, arm)) for arm in arms_of(config)
    }
    write_json(run.controls, summarise(run, costs, config.seeds))


def _rewrites(run: RunDir, config: Config, arm: Arm) -> tuple[int, int, int]:
    """(tasks, accepted rewrites, tokens of the refiner's answers and their requests) of an arm."""
    folders = loop_rounds(run, config) if arm == LOOP else [ArmDir(run, arm)]
    rows = [row for folder in folders if folder.refined.exists() for row in read_jsonl(folder.refined)]
    tokens = sum(row["usage"]["prompt_tokens"] + row["usage"]["completion_tokens"] for row in rows)
    return len(rows), sum(bool(row["accepted"]) for row in rows), tokens


def _flops(session: Session, run: RunDir, arm: Arm) -> float:
    """The FLOPs of the layers' matrices that an arm spends on choosing: scoring, and the trainings before it.

    2 x parameters per token of a scoring pass, 6 x per token of a training whose model measures. The training
    before round_00 counts for every arm that reads a loss of its model. The refiner's own are not counted.
    """
    if arm in PASSES and not PASSES[arm]:
        return 0.0
    shapes = read_config(session.base)
    matrices = sum(s.size(shapes) for s in parameters(shapes) if s.path[-1].endswith("_proj"))
    rounds = [run.round(0)] if arm in PASSES else loop_rounds(run, session.config)
    total = 0.0
    for folder in rounds:
        passes = folder.stages()["score"]["passes"]
        names = PASSES.get(arm, tuple(passes))
        total += 2.0 * matrices * sum(passes[name]["real_tokens"] for name in names if name in passes)
        total += 6.0 * matrices * _trained_tokens(session, folder)
    return total


def _trained_tokens(session: Session, folder: RoundDir) -> int:
    tokenized = session.tokenize(read_dataset(folder))
    return sum(map(len, tokenized)) * session.config.train.num_epochs
