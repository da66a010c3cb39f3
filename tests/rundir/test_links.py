"""Laws of single links of the chain: what a stage's record misses, and what it does not."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from support.loop_fixture import Finished, settings
from test_chain import flip, of_every, own, reasons, scored

from middo_jax.config import load
from middo_jax.rundir import RoundDir, RunDir, write_json, write_jsonl
from middo_jax.rundir.chain import chain
from middo_jax.rundir.link import Link
from middo_jax.rundir.manifest import Reason

pytest_plugins = ["support.loop_fixture"]


def test_other_weights_at_the_place_of_the_base_model_make_stale_what_computes_with_them(
    finished: Finished,
) -> None:
    """Its tokenizer and config are the same, and so is the size of the file."""
    path = finished.root / "model" / "model.safetensors"
    before = path.read_bytes()
    flip(path)
    try:
        found = reasons(finished.run, finished.settings())
    finally:
        path.write_bytes(before)
    assert own(found) == of_every("train", "score", "evaluate")
    assert found["round_00", "train"] == f"start has changed: {path.parent.resolve()}"
    assert found["final", "export"] == "follows round_00 train"
    assert reasons(finished.run, finished.settings()) == {}


def test_losses_while_training_are_missed_where_they_were_measured(tmp_path: Path) -> None:
    config = load(None, settings(tmp_path))
    link = chain(RunDir(tmp_path / "run"), config)[1]
    assert link.where == "round_00 train"
    write_json(link.folder.checkpoint / "metadata.json", {"identity": "a"})
    for path in (link.folder.dataset, link.folder.metrics, link.folder.evaluations):
        write_jsonl(path, [1])
    link.begin().finish(config, 1.0)
    assert link.why_stale(config) is None
    link.folder.evaluations.unlink()
    assert link.why_stale(config) == Reason("evaluations.jsonl is missing")


def test_a_checkpoint_that_was_trained_again_at_another_place_is_the_same(tmp_path: Path) -> None:
    folder, config = scored(tmp_path / "run", settings(tmp_path)), load(None, settings(tmp_path))
    link = chain(RunDir(tmp_path / "run"), config)[2]
    metadata = folder.checkpoint / "metadata.json"
    write_json(metadata, {"identity": "a", "base": "/here/model", "base_from_here": "../model"})
    link.begin().finish(config, 1.0)
    write_json(metadata, {"identity": "a", "base": "/moved/here/model", "base_from_here": "../../model"})
    assert link.why_stale(config) is None
    write_json(metadata, {"identity": "b", "base": "/here/model", "base_from_here": "../model"})
    assert link.why_stale(config) == Reason("checkpoint/metadata.json has changed")


def test_a_refiner_that_is_a_checkpoint_of_another_run_is_an_input(tmp_path: Path) -> None:
    folder, config = scored(tmp_path / "run", settings(tmp_path)), load(None, settings(tmp_path))
    other = tmp_path / "other" / "final" / "checkpoint"
    write_json(other / "metadata.json", {"identity": "a"})
    write_jsonl(folder.path / "written.jsonl", [1])
    link = Link("refine", folder, frozenset(), (), (folder.path / "written.jsonl",), data={"refiner": other})
    link.begin().finish(config, 1.0)
    assert link.why_stale(config) is None
    write_json(other / "metadata.json", {"identity": "another"})
    assert link.why_stale(config) == Reason(f"refiner has changed: {other}", input="refiner")


def test_the_last_checkpoint_is_missed_and_those_of_the_rounds_are_not(
    finished: Finished, tmp_path: Path
) -> None:
    given, run = finished.settings(runs_dir=finished.copy(tmp_path)), RunDir(tmp_path / "run")
    for here in run.rounds():
        shutil.rmtree(here.checkpoint)
    assert reasons(run, given) == {}
    for here in run.rounds():  # emptied by `rm -r checkpoint/*`
        here.checkpoint.mkdir()
    assert reasons(run, given) == {}
    run.config.unlink()  # `run` writes it again, and a round is still one of a run
    assert reasons(run, given) == {}
    shutil.rmtree(run.final.checkpoint)
    found = reasons(run, given)
    assert own(found) == {("final", "train")}
    assert found["final", "train"].endswith(" is missing")


def test_a_file_that_another_process_is_writing_anew_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`status` reads beside a run: what was there a moment ago may be gone."""
    folder = RoundDir(tmp_path / "round_00")
    write_jsonl(folder.scores, [1])
    folder.finish("score", [folder.scores], 1.0)
    folder.scores.touch()

    def gone(path: Path, *_: object) -> str:
        raise FileNotFoundError(path)

    monkeypatch.setattr("middo_jax.rundir.manifest.fingerprint", gone)
    assert not folder.is_done("score")


def test_data_is_compared_where_it_is_now(finished: Finished, tmp_path: Path) -> None:
    moved = tmp_path / "data.json"
    shutil.copyfile(finished.root / "data.json", moved)
    config = load(None, finished.settings())

    def why() -> Reason | None:
        return chain(finished.run, config, data={"data": moved})[0].why_stale(config)

    assert why() is None
    flip(moved)
    assert why() == Reason(f"data has changed: {moved.resolve()}", input="data")
