"""What trace and report say of the user's own ids, of turns that changed, and of repaired rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from support.synthetic_run import write_run

from middo_jax.report.build import page
from middo_jax.report.lineage import trace
from middo_jax.report.terminal import render_trace
from middo_jax.rundir import RunDir, read_jsonl, write_json, write_jsonl


def with_ids(run: RunDir) -> dict[str, Any]:
    """Gives each sample its root's number as the user's id, additions none; returns an accepted rewrite."""
    roots: dict[str, str] = {}
    accepted: dict[str, Any] = {}

    def named(row: dict[str, Any]) -> dict[str, Any]:
        root = row["lineage"]["root_id"]
        if row["lineage"]["op"] == "synthesize":
            return row
        return row | {"user_id": roots.setdefault(root, f"mine-{len(roots)}")}

    for folder in (*run.rounds(), run.final):
        write_jsonl(folder.dataset, [named(row) for row in read_jsonl(folder.dataset)])
        if not folder.refined.exists():
            continue
        tasks = read_jsonl(folder.refined)
        for task in tasks:
            for key in ("example", "original"):
                task[key] = named(task[key]) if task[key] else None
            if task["accepted"] and task["replaces"]:
                accepted = accepted or task
        write_jsonl(folder.refined, tasks)
    return accepted


def test_trace_finds_and_shows_the_users_ids_and_turns(tmp_path: Path) -> None:
    run = write_run(tmp_path / "demo", n_rows=60)
    task = with_ids(run)
    chain = trace(run, task["original"]["user_id"])
    assert task["original"]["id"] in {sample["id"] for sample in chain}
    child = next(sample for sample in chain if sample["id"] == task["example"]["id"])
    assert child["user_id"] == task["original"]["user_id"]
    assert (child["turns"], child["turns_changed"]) == (2, 2)
    text = render_trace(chain)
    assert f"(yours: {child['user_id']})" in text
    assert "2 of 2 turns changed" in text


def test_the_report_shows_ids_turns_and_repairs(tmp_path: Path) -> None:
    run = write_run(tmp_path / "demo", n_rows=60)
    task = with_ids(run)
    folder = run.rounds()[0]
    long = [{"role": "user", "content": "First?"}, {"role": "assistant", "content": "Yes."}]
    tasks = read_jsonl(folder.refined)
    for row in tasks:
        if row["task_id"] == task["task_id"]:
            for key in ("example", "original"):
                row[key]["messages"] = long + row[key]["messages"]
    write_jsonl(folder.refined, tasks)
    stages = folder.stages()
    stages.setdefault("prepare", {"files": {}, "stats": {}, "seconds": 0})["repairs"] = {"joined turns": 7}
    stages["refine"]["kept"] = {"tools are used, and a refiner has none": 3}
    write_json(folder.manifest, {"version": 1, "stages": stages})
    shown = page(run)
    assert f'your id <span class="id">{task["original"]["user_id"]}</span>' in shown
    assert "1 accepted rewrites are of conversations of several turns: 2 of their 4 turns changed" in shown
    assert "Turn 3 (user) before" in shown
    assert "3 selected samples stay as they are: tools are used, and a refiner has none" in shown
    assert "joined turns" in shown
    assert "Why rows of the input could not be used." in shown
