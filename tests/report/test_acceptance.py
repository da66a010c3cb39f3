"""The page's account of candidates: every one is counted once, and a gate only tells of what reached it."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from support.synthetic_run import write_run

from middo_jax.config import RefineSettings
from middo_jax.config.gates import gates
from middo_jax.report.acceptance import ANSWERED, acceptance
from middo_jax.report.build import page
from middo_jax.report.lineage import trace
from middo_jax.rundir import RunDir, read_jsonl, write_jsonl

TITLES = {"answered": ANSWERED} | {row.name: row.title for row in gates()}
COLOURS = {"complexity": "c-complexity", "diversity": "c-diversity", "quality": "c-quality"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    return write_run(tmp_path_factory.mktemp("run") / "demo")


def settings(**refine: Any) -> dict[str, Any]:
    return {"refine": RefineSettings(**refine).model_dump(mode="json")}


def cells(told: dict[str, Any], gate: str) -> list[dict[str, Any]]:
    return next(row["cells"] for row in told["gates"] if row["title"] == TITLES[gate])


def candidate(gate: str | None, accepted: bool = False) -> dict[str, Any]:
    return {
        "task_id": f"simplify:{gate}",
        "attempt": 0,
        "axes": ["complexity"],
        "accepted": accepted,
        "gate": gate,
        "detail": None if accepted else "so it was",
        "before": {},
        "measured": None,
    }


def test_gates_are_counted_in_the_order_in_which_they_are_met() -> None:
    """One candidate per gate: each gate lets pass all that a later one stopped, and no more."""
    names = [row.name for row in gates() if row.concerns(["complexity"])]
    rows = [candidate(name) for name in (*reversed(names), None)] + [candidate(None, accepted=True)]
    told = acceptance(rows, settings(gates={"agreement": 0.5}), COLOURS)
    assert told is not None
    assert [row["title"] for row in told["gates"]] == [ANSWERED, *(row.title for row in gates())]
    left = len(rows)
    for name in ("answered", *names):
        [cell] = cells(told, name)
        assert cell == {"state": "shut", "asked": left, "passed": left - 1}
        left -= 1
    assert told["accepted"] == [left] == [1]


def test_gates_that_depend_on_who_refines_are_counted_where_they_were_asked() -> None:
    rows = [candidate(None, accepted=True), candidate(None, accepted=True) | {"axes": ["quality"]}]

    def states(gate: str, limits: dict[str, Any]) -> list[str]:
        told = acceptance(rows, settings(), COLOURS, limits=limits)
        assert told is not None
        assert told["groups"] == [("complexity",), ("quality",)]
        return [cell["state"] for cell in cells(told, gate)]

    assert states("floor", {}) == states("loss", {}) == ["shut", "none"]
    own = {"refines_itself": True}
    assert states("floor", own) == ["shut", "shut"]
    assert states("loss", own) == ["none", "none"]


def test_a_gate_that_is_not_in_the_table_any_more_is_counted_all_the_same() -> None:
    told = acceptance([candidate("polite"), candidate(None, accepted=True)], settings(), COLOURS)
    assert told is not None
    assert told["gates"][-1] == {"title": "polite", "cells": [{"state": "shut", "asked": 2, "passed": 1}]}


def test_candidates_and_verdicts_of_version_0_1_are_read(tmp_path: Path) -> None:
    """There `reason` was one text, and a round's rejected.jsonl had the answers."""
    old = write_run(tmp_path / "old", n_rows=60)
    for folder in old.rounds():
        for path, name in ((folder.candidates, "reason"), (folder.refined, "reject_reason")):
            rows = read_jsonl(path)
            for row in rows:
                detail = row.pop("detail")
                row[name] = None if row["accepted"] else f"loss: {detail}"
            if path == folder.refined:
                rows = [{k: v for k, v in row.items() if k != "gate"} for row in rows]
            write_jsonl(path, rows)
    told = page(old)
    assert "loss: so it was" not in told  # candidates are counted, not listed
    assert "loss: unchanged" in told
    refused = next(row for row in read_jsonl(old.round(0).refined) if not row["accepted"])
    family = trace(old, refused["source_id"])
    assert refused["reject_reason"] in {sample["verdict"] for sample in family}


def test_every_candidate_is_counted_once(run: RunDir) -> None:
    rows = read_jsonl(run.round(0).candidates)
    told = acceptance(rows, settings(), COLOURS)
    assert told is not None
    assert sum(t["tries"] for t in told["tries"]) == len(rows)
    assert sum(told["accepted"]) == sum(row["accepted"] for row in rows)
    assert sum(t["tried"] for t in told["attempts"]) == len(rows)
    assert sum(t["accepted"] for t in told["attempts"]) == sum(told["accepted"])
    for i, group in enumerate(told["groups"]):
        of = [row for row in rows if tuple(row["axes"]) == group]
        column = [row["cells"][i] for row in told["gates"] if row["cells"][i]["state"] == "shut"]
        assert column[0]["asked"] == len(of)
        for before, after in itertools.pairwise(column):
            assert after["asked"] == before["passed"]
        assert column[-1]["passed"] == told["accepted"][i]


def test_open_gates_and_gates_of_other_axes_say_so(run: RunDir) -> None:
    rows = read_jsonl(run.round(0).candidates)
    sane = acceptance(rows, settings(accept="sane", gates={"open": ["numbers"], "length": None}), COLOURS)
    none = acceptance(rows, settings(accept="none"), COLOURS)
    assert sane is not None
    assert none is not None
    diversity = sane["groups"].index(("diversity",))
    complexity = sane["groups"].index(("complexity",))
    states = {name: [cell["state"] for cell in cells(sane, name)] for name in TITLES}
    assert (
        states["numbers"][complexity] == states["length"][complexity] == states["loss"][complexity] == "open"
    )
    assert states["code"][complexity] == states["language"][diversity] == "shut"
    assert (
        states["numbers"][diversity] == states["loss"][diversity] == states["novelty"][complexity] == "none"
    )
    shut = {name for name in TITLES if any(cell["state"] == "shut" for cell in cells(none, name))}
    assert shut == {"answered", "readable", "answer_readable", "duplicate"}


def test_what_changed_is_the_median_of_what_was_measured(run: RunDir) -> None:
    rows = read_jsonl(run.round(0).candidates)
    told = acceptance(rows, {}, COLOURS)
    assert told is not None
    changes = {change["axis"]: change for change in told["changes"]}
    assert changes.keys() == {"complexity", "diversity", "quality"}
    for axis, change in changes.items():
        measured = [row for row in rows if axis in row["axes"] and row["measured"]]
        assert change["accepted"]["n"] == sum(row["accepted"] for row in measured)
        rises = change["accepted"]["after"] > change["accepted"]["before"]
        assert rises == (axis != "complexity")


def test_nothing_refined_and_nothing_selected_are_told_apart(run: RunDir, tmp_path: Path) -> None:
    assert acceptance(None, settings(), COLOURS) is None
    empty = acceptance([], settings(), COLOURS)
    assert empty is not None
    assert (empty["groups"], empty["changes"], empty["attempts"]) == ([], [], [])
    told = page(run)
    assert told.count("How rewrites were judged") == 2
    without = write_run(tmp_path / "old", n_rows=60)
    for directory in without.rounds():
        directory.candidates.unlink()
        directory.dropped.unlink()
    assert "How rewrites were judged" not in page(without)
