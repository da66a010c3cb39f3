"""Reads plan.json, as far as the report shows it. No stage writes the file: `middo plan --save` does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from middo_jax.rundir.manifest import RunError
from middo_jax.rundir.plan_rows import PlanFile, PlannedStageRow
from middo_jax.rundir.schemas import faults_of, newer

# Other keys may be missing, or be those of a later program.
_SHOWN = ("topology", "chips", "rows", "hours", "chip_hours", "usd")
_SHOWN_OF_STAGE = ("stage", "seconds_per_round", "used_gib", "limited_by")


def read_plan(path: Path) -> dict[str, Any] | None:
    """The plan of a run; None if there is none.

    Raises:
      RunError: the file is not a plan, or a newer program wrote it.
    """
    if not path.exists():
        return None
    try:
        plan = _parsed(path)
    except ValueError as error:
        raise RunError(
            f"{path}: not a plan ({error}); `middo plan CONFIG --save` writes it again, and `middo run "
            "CONFIG --repair` puts it aside"
        ) from error
    if why := newer(path.name, plan.get("version", 1), path):
        raise RunError(why)
    return plan


def plan_fault(path: Path) -> str | None:
    """Why a file is not a plan; None if it is one, or a newer program's."""
    try:
        _parsed(path)
    except ValueError as error:
        return str(error)
    return None


def _parsed(path: Path) -> dict[str, Any]:
    """The plan. Raises ValueError if it is not one; what a newer program wrote is not looked at further."""
    try:
        plan = json.loads(path.read_bytes(), parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("JSON that is nested too deep") from None
    if not isinstance(plan, dict):
        raise ValueError(f"it is a {type(plan).__name__}, not an object")
    if type(version := plan.get("version", 1)) is not int:
        raise ValueError(f"version is {version!r}")
    if newer(path.name, version, path) is not None:
        return plan
    found, stages = faults_of(plan, PlanFile, _SHOWN), plan.get("stages")
    if isinstance(stages, list):
        for number, stage in enumerate(stages):
            of_stage = faults_of(stage, PlannedStageRow, _SHOWN_OF_STAGE)
            found += [f"stages[{number}]: {why}" for why in of_stage]
    else:
        found.append("stages is not a list")
    if found:
        raise ValueError(found[0])
    return plan


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")
