"""What `middo plan` predicted, beside what the run measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from middo_jax.report.status import load_jsonl
from middo_jax.rundir import RoundDir, RunDir
from middo_jax.rundir.plans import read_plan


def planned(run: RunDir) -> dict[str, Any] | None:
    """The plan and, for each of its stages, planned and measured seconds per round; None without a plan.

    Measured is the mean over the rounds that have the stage, without compilation where the files tell it
    apart. None: no round has it, or the files do not have its time.

    Raises:
      RunError: plan.json is not a plan, or a newer program wrote it.
    """
    plan = read_plan(run.plan)
    if plan is None:
        return None
    folders = [*run.rounds(), run.final]
    return {
        "plan": plan,
        "rows": [
            {
                "stage": stage["stage"],
                "planned": stage["seconds_per_round"],
                "measured": _mean(_MEASURED.get(stage["stage"], _unknown), folders),
                "used_gib": stage["used_gib"],
                "limited_by": stage["limited_by"],
            }
            for stage in plan["stages"]
        ],
    }


def _mean(measured: Callable[[RoundDir], float | None], folders: Sequence[RoundDir]) -> float | None:
    found = [seconds for folder in folders if (seconds := measured(folder)) is not None]
    return sum(found) / len(found) if found else None


def _training(folder: RoundDir) -> float | None:
    steps = load_jsonl(folder.metrics, torn_end=True) or []
    found = [step["speed"]["seconds"] for step in steps if "speed" in step]  # older files have none
    return sum(found) if found else None


def _passes(folder: RoundDir, ratings: bool) -> float | None:
    passes = folder.stages().get("score", {}).get("passes", {})
    found = [facts["seconds"] for name, facts in passes.items() if (name == "ratings") == ratings]
    return sum(found) if found else None


def _stage(folder: RoundDir, name: str) -> float | None:
    return folder.stages().get(name, {}).get("seconds")


def _unknown(folder: RoundDir) -> None:
    """The files have no time of this stage alone."""


_MEASURED: dict[str, Callable[[RoundDir], float | None]] = {
    "train": _training,
    "score": lambda folder: _passes(folder, ratings=False),
    "rate": lambda folder: _passes(folder, ratings=True),
    "refine": lambda folder: _stage(folder, "refine"),
    "export": lambda folder: _stage(folder, "export"),
}
