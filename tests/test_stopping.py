"""Rounds that end early, rewrites that are taken back, and runs that go back to a round."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from support.loop_fixture import Finished, contents, rows_by_id, settings
from support.said import Said
from test_chain import begun, own, reasons, results

from middo_jax.cleaning import clean
from middo_jax.config import load
from middo_jax.loop import run_loop
from middo_jax.preferences import preference_pairs
from middo_jax.progress import Silent
from middo_jax.report.lineage import trace
from middo_jax.report.status import render_status, status
from middo_jax.report.terminal import render_trace
from middo_jax.rollback import render_rollback, rollback
from middo_jax.rundir import RoundDir, RunDir, RunError, read_jsonl
from middo_jax.rundir.rows import TakenBackRow
from middo_jax.rundir.schemas import faults

pytest_plugins = ["support.loop_fixture"]


class Broken(Exception):
    """Stands for a process that ends."""


def of(finished: Finished, runs_dir: Path, **more: Any) -> list[str]:
    # A gain of 9 nats is out of reach: the rounds end with round_01.
    given = {"rounds": 3, "runs_dir": runs_dir, "stop__patience": 1, "stop__min_gain": 9}
    return settings(finished.root, finished.url, **{**given, **more})


def trained_once(finished: Finished, runs_dir: Path) -> RunDir:
    """A run whose first round is done, and nothing else."""
    finished.copy(runs_dir)
    run = RunDir(runs_dir / "run")
    for folder in (run.round(1), run.final):
        shutil.rmtree(folder.path)
    for path in (run.heldout_losses, run.heldout_rows):
        path.unlink()
    return run


def test_the_rounds_end_and_final_is_the_best_also_if_it_is_broken_off(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, said = trained_once(finished, tmp_path / "whole"), Said()
    run_loop(load(None, of(finished, tmp_path / "whole")), said)
    values = [run.round(t).stages()["heldout"]["losses"][f"round_0{t}"] for t in range(2)]
    best = run.round(values.index(min(values)))
    assert [r.path.name for r in run.rounds()] == ["round_00", "round_01"]
    assert run.round(1).stages().keys() == {"prepare", "train", "heldout"}
    assert run.final.dataset.read_bytes() == best.dataset.read_bytes()
    assert contents(run.final.checkpoint) == contents(best.checkpoint)
    assert run.final.own_format.exists()
    assert (run.final / "huggingface" / "model.safetensors").exists()
    why = (
        "the rounds end with round_01: no gain of more than 9 in the last training (stop.patience); the best"
    )
    assert [line for line in said.lines if line.startswith(f"{why} is {best.path.name}")]
    state = status(run)
    assert state["complete"]
    assert (state["stop"]["last"], state["stop"]["best"]) == ("round_01", best.path.name)
    assert why in render_status(state)
    assert why in run.report.read_text(encoding="utf-8")

    # The same in pieces: after each of these stages the process ends before anything follows from it.
    broken, finish = trained_once(finished, tmp_path / "pieces"), RoundDir.finish

    def broken_off(self: RoundDir, stage: str, *rest: Any, **facts: Any) -> None:
        finish(self, stage, *rest, **facts)
        if stage in ("heldout", "best"):
            raise Broken

    config = load(None, of(finished, tmp_path / "pieces"))
    with monkeypatch.context() as patched:
        patched.setattr(RoundDir, "finish", broken_off)
        for _ in ("heldout", "heldout", "best"):
            with pytest.raises(Broken):
                run_loop(config, Silent())
    run_loop(config, Silent())
    assert results(broken) == results(run)
    assert status(broken)["complete"]

    # What depends on the settings is done again, and nothing else.
    assert reasons(run, of(finished, tmp_path / "whole", stop__min_gain=8)) == {}
    longer = of(finished, tmp_path / "whole", stop__min_gain=0, stop__patience=9, rounds=2)
    assert own(reasons(run, longer)) == {("final", "best"), ("final", "evaluate")}
    events = len(read_jsonl(run.events))
    run_loop(load(None, longer), Silent())
    more = [key for key in begun(run, events) if key[0] != "final"]
    round_1 = [("round_01", s) for s in ("score", "select", "refine", "merge")]
    assert more == [*round_1, ("round_02", "train"), ("round_02", "heldout")]
    assert status(run)["stop"]["last"] == "round_02"
    assert status(run)["complete"]


@pytest.mark.slow
def test_a_run_without_patience_becomes_one_with_it_and_back(finished: Finished, tmp_path: Path) -> None:
    def given(**more: Any) -> list[str]:
        return finished.settings(runs_dir=tmp_path, **more)

    finished.copy(tmp_path)
    run, events = RunDir(tmp_path / "run"), len(read_jsonl(finished.run.events))
    run_loop(load(None, given(stop__patience=9)), Silent())
    tried = [("round_00", "heldout"), ("round_01", "heldout"), ("round_02", "train"), ("round_02", "heldout")]
    assert [key for key in begun(run, events) if key[0] != "final"] == tried
    assert {"best", "evaluate"} <= run.final.stages().keys()
    assert not {"prepare", "train"} & run.final.stages().keys()
    run_loop(load(None, given()), Silent())
    kept = {name: data for name, data in results(run).items() if name in results(finished.run)}
    assert kept == results(finished.run)
    assert "best" not in run.final.stages()
    assert status(run)["complete"]


def test_worse_rewrites_are_taken_back_and_traced(finished: Finished, tmp_path: Path) -> None:
    def given(**more: Any) -> list[str]:
        return finished.settings(runs_dir=tmp_path, **more)

    finished.copy(tmp_path)
    run, events = RunDir(tmp_path / "run"), len(read_jsonl(finished.run.events))
    on = given(refine__take_back=True)
    assert own(reasons(run, on)) == {("round_01", "refine"), ("round_01", "merge"), ("final", "prepare")}
    run_loop(load(None, on), Silent())
    assert [s for f, s in begun(run, events) if f != "final"] == ["take_back", "refine", "merge"]
    assert own(reasons(run, given())) == {("round_01", "refine"), ("round_01", "merge"), ("final", "prepare")}
    rows = read_jsonl(run.round(1).taken_back)
    assert rows
    assert [fault for row in rows for fault in faults(row, TakenBackRow)] == []
    final = rows_by_id(run.final.dataset)
    replaced = [row for row in rows if row["original"] is not None]
    assert {row["source_id"] for row in replaced} <= final.keys()
    assert not {row["id"] for row in rows} & final.keys()
    record = run.round(1).stages()["take_back"]
    assert record["n"] == len(rows)
    assert f"{len(rows)} of the {record['accepted']} rewrites" in run.report.read_text(encoding="utf-8")
    found = {sample["id"]: sample for sample in trace(run, replaced[0]["id"])}
    assert found[replaced[0]["id"]]["taken_back"]["round"] == 1
    assert found[replaced[0]["source_id"]]["rounds"] == ["round_00", "final"]
    assert "taken back in round 1: " in render_trace(list(found.values()))
    worse = {row["id"] for row in rows}
    assert worse & {pair["middo_id"] for pair in preference_pairs(finished.run)}
    assert not worse & {pair["middo_id"] for pair in preference_pairs(run)}
    assert status(run)["complete"]


def test_a_run_goes_back_to_a_round_and_on_from_there_to_the_same_end(
    finished: Finished, tmp_path: Path
) -> None:
    finished.copy(tmp_path)
    run, before = RunDir(tmp_path / "run"), contents(tmp_path)
    with pytest.raises(RunError, match="no round_05 with a dataset; there are round_00, round_01"):
        rollback(run, 5)
    would = rollback(run, 0)
    assert [path.name for path in would.later][:2] == ["round_01", "final"]
    assert "would put aside round_01, final" in render_rollback(would, run)
    assert contents(tmp_path) == before
    done = rollback(run, 1, yes=True)
    assert done.aside is not None
    assert {name: data for name, data in contents(done.aside).items() if name.startswith("final/")} == {
        name.removeprefix("run/"): data for name, data in before.items() if name.startswith("run/final/")
    }
    assert "nothing was deleted" in render_rollback(done, run)
    assert status(run)["next"] == {"round": "final", "stage": "train"}
    assert [each.path for each in clean(run) if each.path == done.aside]
    asked = len(finished.requests)
    run_loop(load(None, finished.settings(runs_dir=tmp_path)), Silent())
    assert len(finished.requests) == asked
    made = {name: data for name, data in results(run).items() if not name.startswith("rolled-back-")}
    assert made == results(finished.run)
    assert render_rollback(rollback(finished.run, 1)._replace(later=[]), run).endswith(
        "nothing came after round_01"
    )
