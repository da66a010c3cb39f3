"""Control arms beside a finished loop: each stage once, more seeds without the earlier ones, and a report."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.loop_fixture import Finished, rows_by_id
from test_chain import begun, results

from middo_jax import stages
from middo_jax.cleaning import clean
from middo_jax.config import ConfigError, load
from middo_jax.loop import run_loop
from middo_jax.progress import Silent
from middo_jax.report.status import render_status, status
from middo_jax.rundir import RunDir, RunError, read_jsonl
from middo_jax.rundir.arms import control_links
from middo_jax.rundir.rows import ControlsFile
from middo_jax.rundir.schemas import faults

pytest_plugins = ["support.loop_fixture"]


def broken_off(*_: Any) -> None:
    raise InterruptedError


Given = Callable[..., list[str]]


def arms_trained_once_per_seed(run: RunDir, given: Given, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs with one seed, is broken off with two, and runs again; controls.json of one seed."""
    before = len(read_jsonl(run.events))
    assert status(run)["controls"] is None
    run_loop(load(None, given()), Silent())
    # final and round_00 have as many steps, so the first trainings of `loop` and `none` are there already.
    assert begun(run, before) == [("controls/random", "refine"), ("controls/random/seed_0", "control")]
    once = json.loads(run.controls.read_text(encoding="utf-8"))
    assert faults(once, ControlsFile) == []
    events = len(read_jsonl(run.events))
    with monkeypatch.context() as patched:
        patched.setattr(stages, "measure_heldout", broken_off)
        with pytest.raises(InterruptedError):  # between training and measurement
            run_loop(load(None, given(seeds=2)), Silent())
    assert status(run)["next"] == {"round": "controls/loop/seed_1", "stage": "control"}
    run_loop(load(None, given(seeds=2)), Silent())
    trained = [(f"controls/{arm}/seed_1", "control") for arm in ("loop", "none", "random")]
    assert begun(run, events) == [trained[0], *trained]
    steps = read_jsonl(run.path / "controls" / "loop" / "seed_1" / "metrics.jsonl")
    assert [row["step"] for row in steps] == list(range(1, len(steps) + 1))  # none was done twice
    return once


def check_figures(run: RunDir, once: Any) -> None:
    """Losses, differences and costs of controls.json, against those of the run's other files."""
    found = json.loads(run.controls.read_text(encoding="utf-8"))
    loop, none, random = found["arms"]
    assert [arm["name"] for arm in found["arms"]] == ["loop", "none", "random"]
    assert [arm["losses"][0] for arm in found["arms"]] == [arm["losses"][0] for arm in once["arms"]]
    finals = {m["name"]: m["loss"] for m in json.loads(run.heldout_losses.read_text())["models"]}
    assert loop["losses"][0] == pytest.approx(finals["final"], rel=1e-6)
    assert none["losses"][0] == pytest.approx(finals["round_00"], rel=1e-6)
    assert loop["gain"]["value"] == pytest.approx(none["mean"] - loop["mean"])
    assert random["loop_better_by"]["value"] == pytest.approx(random["mean"] - loop["mean"])
    assert (
        random["loop_better_by"]["low"]
        <= random["loop_better_by"]["value"]
        <= random["loop_better_by"]["high"]
    )
    tasks = [row for folder in run.rounds() for row in read_jsonl(folder.refined)]
    assert (loop["tasks"], loop["accepted"]) == (len(tasks), sum(row["accepted"] for row in tasks))
    assert random["tasks"] == min(len(tasks), len(rows_by_id(run.round(0).dataset)))
    assert 0 < random["accepted"] <= loop["accepted"]
    assert (none["tasks"], none["tokens"], none["choosing_flops"], none["gain"]) == (0, 0, 0, None)
    assert loop["choosing_flops"] > random["choosing_flops"] == 0
    assert random["gain_per_1000_tokens"] == pytest.approx(random["gain"]["value"] / random["tokens"] * 1000)
    steps = [len(json.loads(v)) for k, v in results(run).items() if k.endswith("seed_1/metrics.jsonl")]
    assert steps == [len(read_jsonl(run.final.metrics))] * 3
    assert not list((run.path / "controls").rglob("checkpoint"))


def test_arms_are_trained_once_per_seed_and_compared(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished.copy(tmp_path)
    run = RunDir(tmp_path / "run")

    def given(**more: Any) -> list[str]:
        return finished.settings(**{"runs_dir": tmp_path, "controls": "[none, random]", **more})

    check_figures(run, arms_trained_once_per_seed(run, given, monkeypatch))
    # The loop is as it was, and the arms are shown and done.
    assert {k: v for k, v in results(run).items() if not k.startswith("controls")} == results(finished.run)
    state = status(run)
    assert state["complete"]
    assert "control arms, 2 seeds, " in render_status(state)
    assert "Control arms</h2>" in run.report.read_text(encoding="utf-8")
    config = load(None, given(seeds=2, train__learning_rate=0.02))
    stale = [link.name for link, own in control_links(run, config) if link.why_stale(own) is not None]
    assert set(stale) == {"control"}
    (run.path / "controls" / "none" / "seed_1" / "checkpoint").mkdir()
    assert any("control arm" in each.why for each in clean(run))
    merged = run.path / "controls" / "random" / "merged.jsonl"
    merged.unlink()
    merged.mkdir()
    with pytest.raises(RunError, match=r"merged\.jsonl is a folder, not a file: .*--repair"):
        run_loop(load(None, given(seeds=2)), Silent())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["controls=[none, none]"], "names an arm twice"),
        (["controls=[random]", "train.start_from=previous"], r"need train\.start_from=base"),
        (["controls=[ifd]"], r"needs scoring\.readings"),
        (["seeds=3"], "seeds repeats the trainings of controls"),
        (["controls=[best]"], "controls"),
    ],
)
def test_arms_that_cannot_be_compared_are_refused(wrong: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(None, ["model.path=m", "data.path=d", *wrong])
