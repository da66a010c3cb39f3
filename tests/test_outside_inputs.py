"""Files outside of a run: an edited one makes stale what reads it, a moved one makes nothing stale."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from support.loop_fixture import Finished, begun, contents, settings

from middo_jax.config import load
from middo_jax.data.files import inputs_of
from middo_jax.loop import run_loop
from middo_jax.progress import Silent
from middo_jax.report.status import status
from middo_jax.rundir import RunDir
from middo_jax.rundir.chain import chain
from middo_jax.rundir.link import assess, content_of

pytest_plugins = ["support.loop_fixture"]


def test_a_moved_project_is_done_for_run_and_for_those_who_only_read(
    finished: Finished, tmp_path: Path
) -> None:
    finished.copy(tmp_path / "runs")
    shutil.copytree(finished.root / "model", tmp_path / "model")
    shutil.copyfile(finished.root / "data.json", tmp_path / "data.json")
    moved = settings(tmp_path, finished.url, rounds=2)
    run = run_loop(load(None, moved), Silent())
    assert begun(run) == begun(finished.run)
    state = status(run)
    assert state["complete"]
    assert [row["stale"] for row in [*state["rounds"], state["final"]]] == [{}, {}, {}]
    assert state["effects"]["rounds"] is not None
    record = run.round(0).stages()["train"]["inputs"]["start"]
    assert record["path"] == str((tmp_path / "model").resolve())
    written = contents(run.path, "manifest.json")
    run_loop(load(None, moved), Silent())
    assert contents(run.path, "manifest.json") == written


# Files of the user's: their content counts, not their names.


def of_nothing(root: Path, **more: Any) -> tuple[RunDir, list[str]]:
    """A run whose stages wrote files without sense, with the user's files in `root`."""
    files = ("model/config.json", "refiner/x.json", "data.json", "eval.json", "t.jinja", "answers.jsonl")
    for name in (*files, "tasks/x.yaml"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("{}\n", encoding="utf-8")
    given = named(root, root, **more)
    config, run = load(None, given), RunDir(root / "runs" / "run")
    for link in chain(run, config, root / "model", inputs_of(config.data)):
        for path in link.writes:
            is_folder = path.name in ("checkpoint", "huggingface")
            file = path / "metadata.json" if is_folder else path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("{}\n", encoding="utf-8")
        link.begin().finish(config, 1.0)
    return run, given


def named(root: Path, files: Path, **more: Any) -> list[str]:
    """Settings that name the user's files in a folder."""
    values = {"runs_dir": root / "runs", "name": "run", "model.path": files / "model"}
    values |= {"data.path": files / "data.json", "data.eval_path": files / "eval.json"}
    values |= {name.replace("__", "."): str(value).format(files) for name, value in more.items()}
    return [f"{name}={value}" for name, value in values.items() if value != "None"]


def of_files(run: RunDir, root: Path, given: list[str]) -> set[tuple[str, str]]:
    """The stages that are stale and do not only follow, for the program that looks for all places."""
    config = load(None, given)
    states = assess(chain(run, config, root / "model", inputs_of(config.data)), config)
    stale = {(link.folder.path.name, link.name): s.why.text for link, s in states if s.why}
    return {key for key, why in stale.items() if not why.startswith("follows ")}


FILES = {
    "model__template": "{}/t.jinja",
    "evaluate__tasks": "[x]",
    "evaluate__include_path": "{}/tasks",
    "refine__base_url": "replay:{}/answers.jsonl",
    "refine__model": "{}/refiner",
}


@pytest.mark.parametrize(
    ("name", "stale"),
    [
        ("t.jinja", {"prepare", "train", "score", "refine", "evaluate", "benchmark"}),
        ("tasks/x.yaml", {"benchmark"}),
        ("answers.jsonl", {"refine"}),
        ("refiner/x.json", {"refine"}),
        ("eval.json", {"prepare"}),
    ],
)
def test_an_edited_file_of_the_users_makes_stale_what_reads_it(
    tmp_path: Path, name: str, stale: set[str]
) -> None:
    run, given = of_nothing(tmp_path, **FILES)
    assert of_files(run, tmp_path, given) == set()
    (tmp_path / name).write_text("other\n", encoding="utf-8")
    content_of.cache_clear()
    found = of_files(run, tmp_path, given)
    assert {stage for _, stage in found} == stale
    assert ("final", "prepare") not in found


def test_moved_files_of_the_users_make_nothing_stale(tmp_path: Path) -> None:
    run, _ = of_nothing(tmp_path, **FILES)
    names = ("model", "refiner", "data.json", "eval.json", "t.jinja", "answers.jsonl", "tasks")
    (tmp_path / "elsewhere").mkdir()
    for name in names:
        (tmp_path / name).rename(tmp_path / "elsewhere" / name)
    moved = named(tmp_path, tmp_path / "elsewhere", **FILES)
    assert of_files(run, tmp_path / "elsewhere", moved) == set()


@pytest.mark.parametrize(
    "more",
    [
        {"rounds": 2},
        {"rounds": 2, "train__start_from": "previous", "evaluate__tasks": "[x]"},
        {"rounds": 2, "stop__patience": 1},
        {"rounds": 2, "stop__patience": 1, "stop__metric": "task", "evaluate__tasks": "[x]"},
    ],
)
def test_each_stage_that_depends_on_the_base_model_compares_its_content(
    tmp_path: Path, more: dict[str, Any]
) -> None:
    (tmp_path / "model").mkdir()
    config = load(None, named(tmp_path, tmp_path, **more))
    links = chain(RunDir(tmp_path / "runs" / "run"), config, tmp_path / "model", {})
    dependent = [link for link in links if "model" in link.affected_by]
    assert len(dependent) > 5
    assert [link.where for link in dependent if not {"tokenizer", "base"} & link.inputs.keys()] == []


def test_moved_sources_make_nothing_stale_and_another_weight_does(tmp_path: Path) -> None:
    sources = "[{{path: {}/data.json, weight: 2}}]"
    run, _ = of_nothing(tmp_path, data__path=None, data__sources=sources)
    shutil.copytree(tmp_path, tmp_path / "elsewhere", ignore=shutil.ignore_patterns("runs"))
    moved = named(tmp_path, tmp_path / "elsewhere", data__path=None, data__sources=sources)
    assert of_files(run, tmp_path / "elsewhere", moved) == set()
    other = sources.replace("2", "3")
    moved = named(tmp_path, tmp_path / "elsewhere", data__path=None, data__sources=other)
    assert of_files(run, tmp_path / "elsewhere", moved) == {("round_00", "prepare")}


def test_an_edited_folder_of_a_named_dataset_is_noticed(tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    folder.mkdir()
    (folder / "state.json").write_text("{}", encoding="utf-8")
    source = {"data__path": f"hf:{folder}:train"}
    run, given = of_nothing(tmp_path, **source)
    (folder / "state.json").write_text("{ }", encoding="utf-8")
    assert of_files(run, tmp_path, given) == {("round_00", "prepare")}
    assert inputs_of(load(None, ["data.path=hf:someone/some:train", "model.path=m"]).data) == {}


def test_a_refiner_in_the_place_of_recorded_answers_makes_rewrites_stale(tmp_path: Path) -> None:
    run, given = of_nothing(tmp_path, **FILES)
    without = [setting for setting in given if not setting.startswith("refine.base_url")]
    assert {stage for _, stage in of_files(run, tmp_path, without)} == {"refine"}
