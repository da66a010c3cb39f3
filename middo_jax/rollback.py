"""`middo rollback RUN ROUND`: a run is again as it was after that round; what came later is put aside."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from middo_jax.buckets import shown
from middo_jax.report.build import build
from middo_jax.report.status import require_run
from middo_jax.rundir import RunDir, RunError, held
from middo_jax.rundir.damage import ROLLED_BACK, put_aside


class Rollback(NamedTuple):
    """What a rollback moves.

    Attributes:
      round: the name of the last round that stays.
      later: what came after it.
      aside: where it is now; None if nothing was moved.
    """

    round: str
    later: list[Path]
    aside: Path | None


def rollback(run: RunDir, index: int, yes: bool = False) -> Rollback:
    """Lists what came after a round, and with `yes` puts it aside in a new folder of the run.

    Nothing is deleted, and the cache of the refiner's answers stays where it is. The report is made again.

    Args:
      run: the run.
      index: of the round, counted from 0.
      yes: whether to do it.

    Raises:
      RunError: the folder is no run's, or it has no such round.
      RunLocked: another process writes into the folder; only with `yes`.
    """
    require_run(run)
    rounds = [folder.path.name for folder in run.rounds()]
    here = run.round(index)
    if not here.dataset.exists():
        raise RunError(
            f"{run.path}: no {here.path.name} with a dataset; there are {', '.join(rounds) or 'none'}"
        )
    if not yes:
        return Rollback(here.path.name, _later(run, index), None)
    with held(run.path, lambda line: None):
        later = _later(run, index)
        moved = put_aside(run, later, ROLLED_BACK)
        if moved:
            run.log("rollback", round=here.path.name)
            build(run)
    aside = next(iter(moved.values())).parent if moved else None
    return Rollback(here.path.name, later, aside)


def _later(run: RunDir, index: int) -> list[Path]:
    """The later rounds, `final`, and the figures of all models, `final` among them."""
    rounds = [folder.path for folder in run.rounds() if folder.index > index]
    found = [*rounds, run.final.path, run.heldout_losses, run.heldout_rows, run.contrast_rows, run.controls]
    return [path for path in found if os.path.lexists(path)]


def render_rollback(done: Rollback, run: RunDir) -> str:
    """What is or would be put aside, and how to go on."""
    where = shown(run.path)
    if not done.later:
        return f"{where}: nothing came after {done.round}"
    names = ", ".join(path.name for path in done.later)
    number = int(done.round.removeprefix("round_"))
    if done.aside is None:
        return (
            f"{where}: would put aside {names}, and keep everything up to {done.round}: "
            f"middo rollback {where} {number} --yes"
        )
    return (
        f"{where}: as it was after {done.round}. {names}: moved to {shown(done.aside)}, nothing was deleted. "
        f"The refiner's answers are kept, so equal requests cost nothing. `middo run CONFIG` goes on after "
        f"{done.round}; with rounds={number + 1} it ends there"
    )
