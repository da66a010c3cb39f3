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
from middo_jax.rundir.damage import damages, put_aside


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


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "{}",
        '{"half": ',
        "[" * 100_000,
        "NaN",
        '{"version": "1"}',
        '{"topology": "v5e:8x8", "chips": 64, "rows": 240, "hours": 1, "chip_hours": NaN, "usd": null}',
        '{"topology": "v5e:8x8", "chips": 64, "rows": 240, "hours": 1, "chip_hours": 1.0, "usd": null, '
        '"stages": [{"stage": "train"}]}',
    ],
)
def test_what_is_no_plan_is_refused_and_repair_puts_it_aside(tmp_path: Path, content: str) -> None:
    run = write_run(tmp_path / "demo", n_rows=40)
    run.plan.write_text(content, encoding="utf-8")
    with pytest.raises(RunError, match=r"plan\.json: not a plan \(.*--repair"):
        page(run)
    [found] = damages(run, [])
    assert found.path == run.plan
    put_aside(run, [found.path])
    assert "Planned and measured" not in page(run)


def test_a_plan_may_lack_what_the_report_does_not_show_and_a_newer_one_is_no_damage(tmp_path: Path) -> None:
    run = with_plan(RunDir(tmp_path), [stage("train", None)])
    assert planned(run) is not None
    assert list(damages(run, [])) == []
    with_plan(run, [], version=99)
    assert list(damages(run, [])) == []
