"""The whole loop on a tiny model: what it leaves behind, and that a second start changes none of it."""

from __future__ import annotations

import functools
import importlib.util
import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from support.loop_fixture import KEY, Finished, contents, rows_by_id, settings
from support.tiny_model import CHAT_TEMPLATE

from middo_jax import api
from middo_jax.config import load
from middo_jax.loop import run_loop
from middo_jax.models.checkpoint import read_metadata
from middo_jax.planning.automatic import changed_settings, with_changes
from middo_jax.progress import Silent
from middo_jax.rundir import RoundDir, RunDir, RunError, file_hash, read_jsonl
from middo_jax.signals.embeddings import read_embeddings
from middo_jax.signals.table import SCHEMA
from middo_jax.training.metrics import TrainingDiverged, TrainingWrecked

pytest_plugins = ["support.loop_fixture"]

SCORES = {"loss_pre", "loss_post", "knn_mean_sim", "quality"}


class Said(Silent):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


def rounds_and_final(run: RunDir) -> list[RoundDir]:
    return [*run.rounds(), run.final]


def small_run(root: Path, url: str | None, **more: Any) -> tuple[RunDir, list[str]]:
    """A run of its own in `root`, and what it said."""
    said = Said()
    return run_loop(load(None, settings(root, url, **more)), said), said.lines


def test_every_artefact_is_where_the_contract_says(finished: Finished) -> None:
    run = finished.run
    whole = {"config.yaml", "events.jsonl", "llm_cache.sqlite", "rejected.jsonl", "heldout.jsonl"}
    whole |= {"heldout_losses.json", "heldout_rows.parquet", "report.html", "round_00", "round_01", "final"}
    assert {p.name for p in run.path.iterdir()} == whole
    a_round = {"dataset.jsonl", "scores.parquet", "embeddings.parquet", "selection.json", "requests.jsonl"}
    a_round |= {"selection.parquet", "refined.jsonl", "candidates.jsonl", "dropped.jsonl"}
    a_round |= {"checkpoint", "metrics.jsonl", "manifest.json"}
    for directory in run.rounds():
        assert {p.name for p in directory.path.iterdir()} == a_round
    last = {"dataset.jsonl", "checkpoint", "metrics.jsonl", "manifest.json", "huggingface", "train.jsonl"}
    assert {p.name for p in run.final.path.iterdir()} == last
    given, kept = load(None, finished.settings()), load(run.config)
    assert changed_settings(given, kept) == ["scoring.batch_tokens=2048"]  # auto
    assert with_changes(given, ["scoring.batch_tokens=2048"]) == kept


def test_manifests_name_every_stage_and_the_files_as_they_are(finished: Finished) -> None:
    stages = ["prepare", "train", "score", "select", "refine", "merge"]
    for directory in finished.run.rounds():
        assert list(directory.stages()) == stages
    assert list(finished.run.final.stages()) == ["prepare", "train", "evaluate", "export"]
    exported = finished.run.final.stages()["export"]
    assert exported["verified"] is (importlib.util.find_spec("torch") is not None)
    for directory in rounds_and_final(finished.run):
        for stage, record in directory.stages().items():
            named = record["files"] | {n: h for n, h in record["reads"].items() if "metadata.json" not in n}
            assert {name: file_hash(directory / name) for name in named} == named, stage


def test_every_stage_is_logged_once_and_in_order(finished: Finished) -> None:
    events = read_jsonl(finished.run.events)
    steps = [(d.path.name, s) for d in rounds_and_final(finished.run) for s in d.stages() if s != "prepare"]
    for kind in ("start", "done"):
        assert [(e["round"], e["stage"]) for e in events if e["event"] == kind] == steps
    assert events[-1]["event"] == "report"


def test_final_has_the_dataset_in_the_format_that_came_in(finished: Finished) -> None:
    rows = read_jsonl(finished.run.final.own_format)
    assert all(row.keys() == {"id", "instruction", "input", "output", "source"} for row in rows)
    wanted = {id_: [m["content"] for m in row["messages"]] for id_, row in
              rows_by_id(finished.run.final.dataset).items()}  # fmt: skip
    found = {row["id"]: ["\n".join(filter(None, [row["instruction"], row["input"]])), row["output"]]
             for row in rows}  # fmt: skip
    assert found == wanted
    came_in = json.loads((finished.root / "data.json").read_text(encoding="utf-8"))
    kept = [{k: v for k, v in row.items() if k != "id"} for row in rows]
    assert any(row["input"] and row in kept for row in came_in)
    assert finished.run.final.stages()["prepare"]["format"] == "alpaca"


def test_scores_have_every_column_and_a_row_a_sample(finished: Finished) -> None:
    for directory in finished.run.rounds():
        table, ids = pq.read_table(directory.scores), list(rows_by_id(directory.dataset))
        selected = pq.read_table(directory.selected)
        assert selected["id"].to_pylist() == ids
        assert table.column_names == SCHEMA.names
        assert table["id"].to_pylist() == ids
        asked_for = {"loss_unconditional", "ifd", "pmi", "prompt_nll", "reverse_ifd", "consistency", "fault"}
        empty = {"error", *asked_for}
        for name in table.column_names:
            assert table[name].null_count == (len(ids) if name in empty else 0), name
        embedding_nd = read_embeddings(directory.embeddings, ids)
        assert embedding_nd.shape == (len(ids), 32)
        assert embedding_nd.dtype == np.float32
        axes = json.loads(directory.selection.read_text(encoding="utf-8"))["axes"]
        for axis, flag in (("complexity", "hard"), ("diversity", "sparse"), ("quality", "low_quality")):
            flagged = [i for i, yes in zip(ids, selected[flag].to_pylist(), strict=True) if yes]
            assert flagged == axes[axis]["ids"]
            assert flagged


def test_every_rewritten_sample_tells_where_it_comes_from(finished: Finished) -> None:
    seeds = set(rows_by_id(finished.run.round(0).dataset))
    parents: dict[str, Any] = {}
    for t, directory in enumerate(rounds_and_final(finished.run)):
        for id_, row in rows_by_id(directory.dataset).items():
            lineage = row["lineage"]
            assert lineage["root_id"] in seeds
            if lineage["op"] == "seed":
                assert lineage["root_id"] == id_
                assert id_ in seeds
                continue
            (parent_id,) = lineage["parent_ids"]
            assert parents[parent_id]["lineage"]["root_id"] == lineage["root_id"]
            assert lineage["refiner"] == "fake"
            assert lineage["prompt_version"]
            assert 1 <= lineage["round"] <= t
            axes = {"simplify": ["complexity"], "synthesize": ["diversity"]}
            assert lineage["axis"] in axes.get(lineage["op"], ["quality", "complexity+quality"])
            assert bool(lineage["hint_ids"]) == (lineage["op"] == "synthesize")
            assert set(lineage["hint_ids"]) <= parents.keys()
            assert lineage["scores_before"].keys() == SCORES
            # What it was good for is known once a later round has scored it.
            assert (lineage["scores_after"] is None) == (lineage["round"] == t)
            assert row["extra"] == parents[parent_id]["extra"]
        parents |= rows_by_id(directory.dataset)
    ops = Counter(row["lineage"]["op"] for row in parents.values())
    assert ops.keys() == {"seed", "simplify", "rewrite", "synthesize"}


def test_scores_before_and_after_are_those_of_the_tables(finished: Finished) -> None:
    tables = [
        {row["id"]: {name: row[name] for name in SCORES} for row in pq.read_table(d.scores).to_pylist()}
        for d in finished.run.rounds()
    ]
    checked = 0
    for id_, row in rows_by_id(finished.run.final.dataset).items():
        lineage = row["lineage"]
        if lineage["op"] != "seed":
            assert lineage["scores_before"] == tables[lineage["round"] - 1][lineage["parent_ids"][0]]
        if lineage["scores_after"] is not None:
            assert lineage["scores_after"] == tables[lineage["round"]][id_]
            checked += 1
    assert checked


def test_no_sample_is_lost(finished: Finished) -> None:
    folders = rounds_and_final(finished.run)
    for here, following in itertools.pairwise(folders):
        before, after = rows_by_id(here.dataset), rows_by_id(following.dataset)
        accepted = [row for row in read_jsonl(here.refined) if row["accepted"]]
        replaced = Counter(row["replaces"] for row in accepted if row["replaces"] is not None)
        for id_ in before:
            assert (id_ in after) + replaced[id_] == 1
        children = {row["example"]["id"] for row in accepted}
        assert after.keys() == (before.keys() - replaced.keys()) | children
        assert len(after) == len(before) + sum(row["replaces"] is None for row in accepted)


def test_heldout_examples_are_in_no_dataset_and_no_request(finished: Finished) -> None:
    heldout = rows_by_id(finished.run.heldout)
    assert len(heldout) == 4
    prompts = {row["messages"][0]["content"] for row in heldout.values()}
    for directory in rounds_and_final(finished.run):
        rows = rows_by_id(directory.dataset)
        assert not heldout.keys() & rows.keys()
        assert not prompts & {row["messages"][0]["content"] for row in rows.values()}
    asked = json.dumps(finished.own_requests)
    assert finished.own_requests
    assert not any(json.dumps(prompt)[1:-1] in asked for prompt in prompts)
    losses = json.loads(finished.run.heldout_losses.read_text(encoding="utf-8"))
    assert [m["name"] for m in losses["models"]] == ["base", "round_00", "round_01", "final"]
    assert losses["n"] == 4
    assert losses["models"][-1]["loss"] < losses["models"][0]["loss"]  # it has learnt something


def test_every_heldout_row_has_its_loss_under_every_model(finished: Finished) -> None:
    table = pq.read_table(finished.run.heldout_rows)
    assert table.column_names == ["model", "id", "nll", "n_target_tokens"]
    models = json.loads(finished.run.heldout_losses.read_text(encoding="utf-8"))["models"]
    heldout = list(rows_by_id(finished.run.heldout))
    assert table["model"].to_pylist() == [m["name"] for m in models for _ in heldout]
    assert table["id"].to_pylist() == heldout * len(models)
    for i, model in enumerate(models):
        of = table.slice(i * len(heldout), len(heldout))
        n_targets = sum(of["n_target_tokens"].to_pylist())
        assert n_targets == model["n_target_tokens"]
        assert sum(of["nll"].to_pylist()) / n_targets == pytest.approx(model["loss"], rel=1e-12)


def test_a_second_start_finds_everything_done(finished: Finished, tmp_path: Path) -> None:
    config = load(None, finished.settings(runs_dir=finished.copy(tmp_path)))
    before = contents(tmp_path)
    said = Said()
    run_loop(config, said)
    header = said.lines[0]
    assert header.startswith("middo-jax ")
    assert header.endswith(f"data {finished.root / 'data.json'} (24 rows)")
    assert [line.endswith("done before") for line in said.lines[1:-1]] == [True] * 13
    after = contents(tmp_path)
    changing = {"run/events.jsonl", "run/report.html", "run/config.yaml"}  # the last: runs_dir is another
    assert after.keys() == before.keys()
    assert {name for name in before if before[name] != after[name]} <= changing
    assert after["run/events.jsonl"].startswith(before["run/events.jsonl"])


@pytest.mark.parametrize("missing", ["scores.parquet", "selection.json"])
def test_a_missing_file_is_made_again_with_the_same_bytes(
    finished: Finished, tmp_path: Path, missing: str
) -> None:
    config = load(None, finished.settings(runs_dir=finished.copy(tmp_path)))
    directory = RunDir(tmp_path / "run").round(1)
    before = contents(directory.path, "selection.json", "scores.parquet", "refined.jsonl", "requests.jsonl")
    asked = len(finished.requests)
    (directory / missing).unlink()
    directory.refined.unlink()
    run_loop(config, Silent())
    assert contents(directory.path, *before) == before
    assert len(finished.requests) == asked  # every answer was in the cache


def test_previous_models_are_started_from_and_measured(finished: Finished, tmp_path: Path) -> None:
    previous = {"train__start_from": "previous"}
    run, _ = small_run(
        tmp_path, finished.url, rounds=2, model__path=finished.root / "model", data__limit=12, **previous
    )
    first, second = (pq.read_table(d.scores) for d in run.rounds())
    # A sample that both rounds hold: what was after round 0 is before round 1.
    after = dict(zip(first["id"].to_pylist(), first["loss_post"].to_pylist(), strict=True))
    before = dict(zip(second["id"].to_pylist(), second["loss_pre"].to_pylist(), strict=True))
    both = sorted(after.keys() & before.keys())
    assert both
    np.testing.assert_allclose([after[i] for i in both], [before[i] for i in both], rtol=1e-5)
    assert read_jsonl(run.round(1).metrics)[0]["loss"] < read_jsonl(run.round(0).metrics)[0]["loss"]
    base = str((finished.root / "model").resolve())
    for directory in rounds_and_final(run):
        metadata = read_metadata(directory.checkpoint)
        assert metadata is not None
        assert metadata["base"] == base  # whose config and tokenizer an export needs
        assert metadata["chat_template"] == CHAT_TEMPLATE


def test_gibberish_is_rejected_and_everything_stays(finished: Finished, tmp_path: Path) -> None:
    """The tiny model itself behind the embedded endpoint; raw prompts, sampled ratings, nothing held out."""
    unusual = {"diversity__text": "raw", "quality__method": "sample", "quality__max_new_tokens": 4}
    run, said = small_run(
        tmp_path, None, model__path=finished.root / "model", data__limit=12, data__eval_fraction=0, **unusual
    )
    before, after = run.round(0).dataset.read_bytes(), run.final.dataset.read_bytes()
    assert before == after
    refined = read_jsonl(run.round(0).refined)
    assert refined
    assert not any(row["accepted"] for row in refined)
    assert all(row["detail"] for row in refined)
    asked = read_jsonl(run.round(0).requests)
    assert {row["task_id"] for row in asked} == {row["task_id"] for row in refined}
    assert read_jsonl(run.rejected) == []  # of input rows alone
    assert not run.round(0).rejected.exists()
    assert read_jsonl(run.heldout) == []
    assert json.loads(run.heldout_losses.read_text(encoding="utf-8")) == {"n": 0, "models": []}
    assert pq.read_table(run.heldout_rows).num_rows == 0
    assert run.report.exists()
    assert len(read_jsonl(run.final.dataset)) == 12
    assert "12 samples, 0 held out, 0 rows refused" in said[1]
    # Random weights seldom write a number: what cannot be read is null, and the row says so.
    table = pq.read_table(run.round(0).scores)
    for quality, error in zip(table["quality"].to_pylist(), table["error"].to_pylist(), strict=True):
        assert (quality is None) == (error is not None)


def test_the_key_is_sent_and_stands_in_no_file(finished: Finished) -> None:
    assert {request["authorization"] for request in finished.own_requests} == {f"Bearer {KEY}"}
    files = contents(finished.run.path)
    assert files
    assert not [
        name for name, data in files.items() if KEY.encode() in data or KEY.encode("utf-16-le") in data
    ]


def test_a_wrecked_training_stops_the_loop_before_anything_is_scored_or_paid_for(
    finished: Finished, tmp_path: Path
) -> None:
    asked = len(finished.requests)
    absurd = {"runs_dir": tmp_path, "train__learning_rate": 100, "train__warmup_ratio": 0}
    with pytest.raises((TrainingWrecked, TrainingDiverged), match=r"train\.learning_rate"):
        run_loop(load(None, finished.settings(**absurd, train__num_epochs=6)), Silent())
    here = RunDir(tmp_path / "run").round(0)
    assert list(here.stages()) == ["prepare"]
    assert not here.scores.exists()
    # One step ends before its own loss could show anything; the scores do.
    with pytest.raises(RunError, match=r"training made the model worse .* train\.learning_rate"):
        run_loop(load(None, finished.settings(**absurd)), Silent())
    assert list(here.stages()) == ["prepare", "train", "score", "select"]
    for by_hand in (api.refine, functools.partial(api.refine_by_batch, write=tmp_path / "ask.jsonl")):
        with pytest.raises(RunError, match="training made the model worse"):
            by_hand(here.path)
    assert len(finished.requests) == asked
