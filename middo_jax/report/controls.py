"""Control arms: their held-out losses, paired differences with intervals, and what their choice costs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from middo_jax.report.paired import Interval, Losses, interval, resampled
from middo_jax.rundir import RunDir, RunError
from middo_jax.rundir.arms import LOOP, Arm, SeedDir, shared
from middo_jax.rundir.rows import ArmRow, ControlsFile, IntervalRow

DRAWS = 2_000


@dataclasses.dataclass(frozen=True)
class ArmCost:
    """What an arm cost.

    Attributes:
      tasks: samples that the refiner was asked about.
      accepted: rewrites and additions in its dataset.
      tokens: of the refiner, prompts and completions, whether they were paid for or came from the cache.
      flops: of choosing.
    """

    tasks: int
    accepted: int
    tokens: int
    flops: float


def summarise(run: RunDir, costs: Mapping[Arm, ArmCost], seeds: int) -> ControlsFile:
    """The contents of controls.json.

    A gain is `none`'s loss minus the arm's; without the arm `none` there is no gain.

    Args:
      run: all its arms are measured.
      costs: by arm, the loop first.
      seeds: the number of trainings per arm.
    """
    found = {arm: {k: _losses(run, arm, k) for k in range(seeds)} for arm in costs}
    means = resampled(found, range(seeds), DRAWS)
    arms: list[ArmRow] = []
    for arm, cost in costs.items():
        gain = None if "none" not in found or arm == "none" else interval(means["none"] - means[arm])
        behind = None if arm == LOOP else interval(means[arm] - means[LOOP])
        per_1000 = None if gain is None or not cost.tokens else gain.value / cost.tokens * 1000
        arms.append(
            {
                "name": arm,
                "losses": [found[arm][k].mean for k in range(seeds)],
                "mean": float(means[arm][0]),
                "gain": _row(gain),
                "loop_better_by": _row(behind),
                "tasks": cost.tasks,
                "accepted": cost.accepted,
                "tokens": cost.tokens,
                "gain_per_1000_tokens": per_1000,
                "choosing_flops": cost.flops,
            }
        )
    n_rows = len(next(iter(found.values()))[0].nll)
    return {"seeds": seeds, "heldout_rows": n_rows, "resamples": DRAWS, "arms": arms}


def _losses(run: RunDir, arm: Arm, number: int) -> Losses:
    """The held-out losses of a training, in the order of ids; rows without a target are left out."""
    of_run = shared(run, arm, number)
    path = run.heldout_rows if of_run else SeedDir(run, arm, number).heldout_rows
    rows = [row for row in pq.read_table(path).to_pylist() if row["model"] == (of_run or arm)]
    rows = sorted((row for row in rows if row["n_target_tokens"]), key=lambda row: row["id"])
    if not rows:
        raise RunError(
            f"{path}: no held-out row of {of_run or arm} has a target; the arms cannot be compared"
        )
    return Losses(*(np.array([row[name] for row in rows], float) for name in ("nll", "n_target_tokens")))


def _row(found: Interval | None) -> IntervalRow | None:
    return None if found is None else {"value": found.value, "low": found.low, "high": found.high}


def verdict(found: Mapping[str, float] | None) -> str:
    """Whether the loop is better than an arm, by the interval of the difference."""
    if found is None:
        return ""
    return (
        "the loop is better"
        if found["low"] > 0
        else "the arm is better"
        if found["high"] < 0
        else "not shown"
    )


def control_lines(found: Mapping[str, Any] | None) -> list[str]:
    """The arms as lines for a terminal; none where there are no arms."""
    if found is None:
        return []
    head = ["arm", "loss", "gain over none", "loop better by", "", "accepted", "tokens", "FLOPs"]
    rows = [
        [
            arm["name"],
            f"{arm['mean']:.4f}",
            _text(arm["gain"]),
            _text(arm["loop_better_by"]),
            verdict(arm["loop_better_by"]).removeprefix("the "),
            f"{arm['accepted']:,} of {arm['tasks']:,}",
            f"{arm['tokens']:,}",
            f"{arm['choosing_flops']:.2g}",
        ]
        for arm in found["arms"]
    ]
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in (head, *rows)
    ]
    seeds = "1 seed" if found["seeds"] == 1 else f"{found['seeds']} seeds"
    return [
        f"control arms, {seeds}, loss of {found['heldout_rows']:,} held-out rows, FLOPs of choosing:",
        *(f"  {line}" for line in lines),
    ]


def _text(found: Mapping[str, float] | None) -> str:
    return "" if found is None else f"{found['value']:+.4f} [{found['low']:+.4f}, {found['high']:+.4f}]"
