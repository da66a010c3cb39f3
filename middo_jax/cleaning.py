"""Finds the files of a run that can be removed to save space without losing a result."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from middo_jax.buckets import shown
from middo_jax.config import stored
from middo_jax.report.status import load_settings, require_run
from middo_jax.rundir import RoundDir, RunDir, held
from middo_jax.rundir.chain import chain
from middo_jax.rundir.damage import ASIDE, ROLLED_BACK
from middo_jax.rundir.leftovers import leftovers, remove, shown_size, size_of
from middo_jax.rundir.link import assess


class Removable(NamedTuple):
    """A file or folder that nothing needs.

    Attributes:
      path: where it is.
      size: bytes.
      why: what it is, and what its loss costs.
    """

    path: Path
    size: int
    why: str


def clean(run: RunDir, yes: bool = False) -> list[Removable]:
    """Lists what can go, and with `yes` removes it.

    Raises:
      RunError: the folder does not exist or is no run's, or a file in it cannot be read.
      RunLocked: another process writes into the folder; only with `yes`.
    """
    require_run(run)
    if not yes:
        return list(_removable(run))
    with held(run.path, lambda line: None):
        found = list(_removable(run))
        for each in found:
            remove(each.path)
    return found


def render_clean(found: list[Removable], run: RunDir, yes: bool) -> str:
    """The list as text, with its sum and what to do next."""
    lines = [f"{shown_size(each.size):>9}  {shown(each.path)}: {each.why}" for each in found]
    total = shown_size(sum(each.size for each in found))
    if not found:
        return f"{shown(run.path)}: nothing can be removed"
    end = f"{total} removed" if yes else f"{total} can be removed: middo clean {shown(run.path)} --yes"
    return "\n".join([*lines, end])


def _removable(run: RunDir) -> Iterator[Removable]:
    for path in leftovers(run.path):
        yield Removable(path, size_of(path), "left by a process that was killed")
    needed = _needed(run)
    for here in run.rounds():
        if needed is not None and here.checkpoint.is_dir() and here.checkpoint.resolve() not in needed:
            why = "this round is done; it is trained again if a later change needs its model"
            yield Removable(here.checkpoint, size_of(here.checkpoint), why)
    for here in (*run.rounds(), run.final):
        for path in sorted(here.checkpoint.glob("unreadable_step_*")):
            if needed is None or here.path == run.final.path or here.checkpoint.resolve() in needed:
                yield Removable(path, size_of(path), "a state of a training that could not be read")
    for path in sorted((run.path / "controls").glob("*/seed_*/checkpoint")):
        if "control" in RoundDir(path.parent).stages():
            yield Removable(path, size_of(path), "the model of a control arm, which was measured")
    for path in sorted(run.path.glob(f"{ROLLED_BACK}*")):
        yield Removable(path, size_of(path), "what `middo rollback` put aside")
    for path in sorted(run.path.glob(f"{ASIDE}*")):
        if not any(path.rglob("*.sqlite*")):  # answers were paid for: only the user may remove them
            yield Removable(path, size_of(path), "what `middo run --repair` put aside")


def _needed(run: RunDir) -> set[Path] | None:
    """Checkpoints that stages which are not done will read; None if that is not known: then all are."""
    config = stored(load_settings(run))
    if config is None:
        return None
    states = assess(chain(run, config), config)
    pending = [link for link, state in states if not state.is_fresh]
    done = {link.folder.path for link, state in states if link.name == "train" and state.is_fresh}
    unfinished = {RoundDir(here.path).checkpoint.resolve() for here in run.rounds() if here.path not in done}
    return unfinished | {
        path.resolve() for link in pending for path in link.models.values() if path is not None
    }
