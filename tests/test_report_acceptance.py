"""The page's account of candidates: every one is counted once, and a gate only tells of what reached it."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from synthetic_run import write_run

from middo_jax.config import RefineSettings
from middo_jax.refine.gates import GATE_OF
from middo_jax.report.acceptance import ALWAYS, BY_TEXT, GATES, acceptance
from middo_jax.report.build import page
from middo_jax.run_dir import RunDir, read_jsonl

COLOURS = {"complexity": "c-complexity", "diversity": "c-diversity", "quality": "c-quality"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    return write_run(tmp_path_factory.mktemp("run") / "demo")


def settings(**refine: Any) -> dict[str, Any]:
    return {"refine": RefineSettings(**refine).model_dump(mode="json")}


def cells(told: dict[str, Any], gate: str) -> list[dict[str, Any]]:
    return next(row["cells"] for row in told["gates"] if row["title"] == GATES[gate])


def test_gates_are_those_of_refining_in_the_order_in_which_they_are_met() -> None:
    assert list(GATES) == ["answered", *dict.fromkeys(GATE_OF.values())]
    assert {*ALWAYS, *BY_TEXT} < set(GATES)


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
    sane = acceptance(rows, settings(accept="sane", gates={"numbers": False, "length": None}), COLOURS)
    none = acceptance(rows, settings(accept="none"), COLOURS)
    assert sane is not None
    assert none is not None
    diversity = sane["groups"].index(("diversity",))
    complexity = sane["groups"].index(("complexity",))
    states = {gate: [cell["state"] for cell in cells(sane, gate)] for gate in GATES}
    assert (
        states["numbers"][complexity] == states["length"][complexity] == states["loss"][complexity] == "open"
    )
    assert states["code"][complexity] == states["language"][diversity] == "shut"
    assert (
        states["numbers"][diversity] == states["loss"][diversity] == states["novelty"][complexity] == "none"
    )
    shut = {gate for gate in GATES if any(cell["state"] == "shut" for cell in cells(none, gate))}
    assert shut == set(ALWAYS)


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
