"""The page shows a plan beside what the run measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.report_page import Page
from support.synthetic_run import write_run

from middo_jax.report.build import page
from middo_jax.report.planned import planned
from middo_jax.rundir import RunDir, RunError, read_jsonl, write_json, write_jsonl


def stage(name: str, seconds: float | None) -> dict[str, Any]:
    return {"stage": name, "seconds_per_round": seconds, "used_gib": 3.25, "limited_by": "network"}


def with_plan(run: RunDir, stages: list[dict[str, Any]], version: int = 1) -> RunDir:
    plan = {"version": version, "topology": "v5e:8x8", "chips": 64, "rows": 240, "hours": 0.5}
    write_json(run.plan, {**plan, "chip_hours": 32.0, "usd": 38.4, "stages": stages})
    return run


def test_planned_times_are_beside_the_measured_ones(tmp_path: Path) -> None:
    run = write_run(tmp_path / "demo")
    for folder, seconds in zip((*run.rounds(), run.final), (3.0, 4.0, 5.0), strict=True):
        write_jsonl(
            folder.metrics, [row | {"speed": {"seconds": seconds}} for row in read_jsonl(folder.metrics)]
        )
    with_plan(run, [stage("train", 10.0), stage("neighbours", 2.0), stage("refine", None)])
    found = planned(run)
    assert found is not None
    rows = {row["stage"]: row for row in found["rows"]}
    assert rows["train"]["measured"] == pytest.approx(60 * 4.0)  # steps, seconds per step
    assert rows["neighbours"]["measured"] is None
    refine = [f.stages()["refine"]["seconds"] for f in run.rounds()]
    assert rows["refine"]["measured"] == pytest.approx(sum(refine) / len(refine))
    words = Page(page(run)).words
    assert "Planned and measured" in words
    assert "v5e:8x8 (64 chips), 240 rows" in words
    assert "does not fit" in words
    assert "24.00" in words


def test_without_a_plan_there_is_no_table(tmp_path: Path) -> None:
    run = write_run(tmp_path / "demo")
    assert planned(run) is None
    assert "Planned and measured" not in page(run)


def test_a_newer_plan_is_refused(tmp_path: Path) -> None:
    run = with_plan(write_run(tmp_path / "demo"), [], version=99)
    with pytest.raises(RunError, match=r"plan\.json has format version 99"):
        planned(run)
