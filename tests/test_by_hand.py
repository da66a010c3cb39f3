"""A stage by a command of its own is the stage of the loop, and folders that are no run are refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.command import Middo
from support.loop_fixture import Finished, begun, contents, fake_refiner

from middo_jax.config import load
from middo_jax.loop import run_loop
from middo_jax.progress import Silent
from middo_jax.rundir import (
    RunDir,
    read_jsonl,
    write_jsonl,
)

pytest_plugins = ["support.command", "support.loop_fixture"]


REFINED = ("requests.jsonl", "refined.jsonl", "candidates.jsonl", "dropped.jsonl")


def test_refining_a_round_by_hand_is_the_loops_stage(
    finished: Finished, middo: Middo, tmp_path: Path
) -> None:
    """Same rows, same round in their lineage, out of the run's own cache; and the run finds it done."""
    runs_dir = finished.copy(tmp_path)
    run, asked = RunDir(tmp_path / "run"), len(finished.requests)
    here = run.round(1)
    before, record = contents(here.path, *REFINED), here.stages()["refine"]
    here.forget("refine")
    for name in REFINED[:3]:
        (here / name).unlink()
    code, _, err = middo("refine", here.path)
    assert code == 0, err
    assert contents(here.path, *REFINED) == before
    assert len(finished.requests) == asked
    assert not (here / "llm_cache.sqlite").exists()
    again = here.stages()["refine"]
    assert {r["example"]["lineage"]["round"] for r in read_jsonl(here.refined) if r["accepted"]} == {2}
    for name in ("reads", "settings", "files", "limits"):
        assert again[name] == record[name]
    counts = ("requests", "answers", "prompt_tokens", "completion_tokens")  # of all starts together
    for axis, usage in record["usage"].items():
        assert {n: again["usage"][axis][n] for n in counts} == {n: usage[n] for n in counts}
    assert "../heldout.jsonl" in again["reads"]
    events = len(read_jsonl(run.events))
    run_loop(load(None, finished.settings(runs_dir=runs_dir)), Silent())
    assert begun(run, events) == []


def test_a_held_out_prompt_is_not_repeated_by_hand_either(
    finished: Finished, middo: Middo, tmp_path: Path
) -> None:
    """Also by batch files: a rewrite that equals a held-out prompt is rejected."""
    finished.copy(tmp_path)
    run = RunDir(tmp_path / "run")
    here = run.round(0)
    prompt = read_jsonl(run.heldout)[0]["messages"][0]["content"]

    def answer(text: str) -> str:
        return f"<prompt>{prompt}</prompt>" if "<prompt>" in text else "It is for all of them, as is known."

    with fake_refiner(answer=answer) as (url, _):
        code, _, err = middo("refine", here.path, f"refine.base_url={url}", "refine.model_revision=other")
    assert code == 0, err
    rows = read_jsonl(here.refined)
    assert rows
    assert not [row for row in rows if row["accepted"]]

    ask, got = tmp_path / "ask.jsonl", tmp_path / "got.jsonl"
    set_ = ("refine.model_revision=batch", "refine.response_format=text")
    middo("refine", here.path, "--write-batch", ask, *set_)
    for _ in range(9):
        rows = [{"custom_id": row["custom_id"], "error": None, "response": answered(row, answer)}
                for row in read_jsonl(ask)]  # fmt: skip
        write_jsonl(got, rows)
        code, out, err = middo("refine", here.path, "--read-batch", got, "--write-batch", ask, *set_)
        assert code == 0, err
        if "rewrites accepted" in out:
            break
    rows = read_jsonl(here.refined)
    assert rows
    assert not [row for row in rows if row["accepted"]]
    assert not (here / "llm_cache.sqlite").exists()


def answered(row: dict[str, Any], answer: Callable[[str], str]) -> dict[str, Any]:
    message = {"role": "assistant", "content": answer(row["body"]["messages"][-1]["content"])}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    return {"status_code": 200, "body": {"choices": [choice], "usage": {}}}


def test_select_takes_a_fraction_after_m(finished: Finished, middo: Middo, tmp_path: Path) -> None:
    shutil.copytree(finished.run.round(0).path, tmp_path / "scored")
    stored = load(None, finished.settings(complexity__fraction="null", complexity__m=1.5))
    (tmp_path / "scored" / "config.yaml").write_text(stored.to_yaml(), encoding="utf-8")
    scores = (tmp_path / "scored" / "scores.parquet").read_bytes()
    code, out, err = middo("select", tmp_path / "scored", "complexity.fraction=0.2", "--json")
    assert code == 0, err
    assert json.loads(out)["axes"]["complexity"]["fraction"] == 0.2
    assert (tmp_path / "scored" / "scores.parquet").read_bytes() == scores  # scoring alone writes it


def test_folders_that_are_no_run_are_refused(
    finished: Finished, middo: Middo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "notes.txt").write_text("not a run")
    shutil.copytree(finished.run.round(0).path, tmp_path / "scored")
    shutil.copyfile(finished.run.config, tmp_path / "scored" / "config.yaml")
    before = contents(tmp_path)
    monkeypatch.chdir(tmp_path)
    for folder in (".", "scored"):
        for command in (("status", folder), ("report", folder), ("trace", folder, "a")):
            code, out, err = middo(*command)
            assert (code, out) == (1, "")
            assert "not a run" in err
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    "command",
    [
        ("run", "c.yaml", "runs_dir=file:///runs"),
        ("status", "file:///runs/run"),
        ("select", "gs://bucket/runs/run/round_00"),
        ("refine", "s3://bucket/runs/run/round_00"),
        ("score", "--data", "{data}", "--model", "{model}", "--out", "file:///scored"),
        ("train", "--data", "{data}", "--model", "{model}", "--out", "http://host/tuned"),
        ("export", "checkpoint", "file:///hf"),
        ("export-data", "{run}", "gs://bucket/better"),
    ],
)
def test_urls_that_a_command_does_not_take_are_refused_and_make_no_folder(
    finished: Finished,
    middo: Middo,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: tuple[str, ...],
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copyfile(finished.run.config, "c.yaml")
    places = {"data": finished.root / "data.json", "model": finished.root / "model", "run": finished.run.path}
    code, out, err = middo(*(part.format(**places) for part in command))
    assert (code, out) == (1, "")
    assert "give a folder on this machine" in err
    assert [p.name for p in tmp_path.iterdir()] == ["c.yaml"]
