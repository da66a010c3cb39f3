"""A sample of the table of faults (benchmarks/fault_table.py); `benchmarks.faults --table` runs all of it."""

from __future__ import annotations

import fnmatch
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.loop_fixture import Finished, fake_answer

from benchmarks.fault_settings import CHANGES
from benchmarks.fault_table import MAKERS, Case, cases, expected
from benchmarks.fault_wide import made_by
from benchmarks.fault_world import World, differences, files, permissions, small_disk
from middo_jax.cleaning import clean, render_clean
from middo_jax.config import leaves
from middo_jax.report.build import build
from middo_jax.report.status import status
from middo_jax.rundir import RunDir, RunError, read_jsonl, write_text
from middo_jax.rundir.files import DiskFull

pytest_plugins = ["support.loop_fixture"]


@pytest.fixture(scope="module")
def world(finished: Finished) -> Iterator[World]:
    here = World(finished.root, finished.url, [fake_answer], {"rounds": 2}, "run")
    yield here
    for name in ("broken", "changed", "fresh"):
        shutil.rmtree(here.root / "runs" / name, ignore_errors=True)


def test_the_table_has_every_setting_and_no_other() -> None:
    assert set(CHANGES) == {leaf.name for leaf in leaves()}


def test_every_file_of_a_run_has_a_maker_by_hand(world: World) -> None:
    for name in files(world.finished):
        assert isinstance(expected(name), list)
    assert expected("round_01/scores.parquet") == ["round_01 score", "round_01 select"]
    with pytest.raises(LookupError, match="no stage is known to make it"):
        expected("surprise.bin")
    assert all(
        any(fnmatch.fnmatch(name, of) for name in names(world)) for of, _ in MAKERS if "evaluations" not in of
    )


def test_files_of_arms_benchmarks_and_take_back_have_makers_by_hand() -> None:
    arm = ["random refine", "seed_0 control"]
    assert made_by("controls/random") == made_by("controls") == arm
    assert made_by("controls/random/merged.jsonl") == arm[:1]
    assert made_by("controls/random/seed_0/manifest.json") == arm[1:]
    assert made_by("round_01/taken_back.jsonl") == ["round_01 take_back"]
    assert made_by("final/benchmarks.json") == ["final benchmark"]
    assert made_by("final/checkpoint/metadata.json") == ["final train"]


def names(world: World) -> list[str]:
    return [*files(world.finished), "round_00", "final"]


SAMPLE = (
    "empty round_00/manifest.json",
    "edit round_01/manifest.json",
    "flip round_00/dataset.jsonl",
    "folder round_01/selection.json",
    "remove heldout.jsonl",
    "folder llm_cache.sqlite",
    "unreadable round_01/embeddings.parquet",
    "truncate round_01/refined.jsonl",
    "truncate final/checkpoint/metadata.json",
    "folder round_00/checkpoint/metadata.json",
    "remove final/huggingface/",
    "file round_01/checkpoint/",
    "remove round_00/checkpoint/",
    "edit final/dataset.jsonl",
    "truncate events.jsonl",
    "empty config.yaml",
)


@pytest.mark.parametrize("name", SAMPLE)
def test_a_fault_is_mended_or_refused_and_nothing_else_is_redone(world: World, name: str) -> None:
    with permissions() as apply:
        if name.startswith("unreadable") and not apply:
            pytest.skip("root reads everything here")
        assert of(world, name).check() == []


def of(world: World, name: str) -> Case:
    return next(case for case in cases(world) if case.name == name)


def test_files_of_the_base_model_that_no_training_reads_are_exported_anew(world: World) -> None:
    assert of(world, "replace model/generation_config.json").check() == []


def test_a_moved_project_needs_nothing_again(world: World) -> None:
    assert of(world, "rename the run's folder").check() == []


def test_a_base_model_that_is_gone_is_asked_for_by_name(world: World) -> None:
    run = world.copy("broken")
    (run.final / "huggingface" / "model.safetensors").unlink()
    metadata = run.final.checkpoint / "metadata.json"
    away = world.root / "somewhere_else"
    (world.root / "model").rename(away)
    (world.root / "model").mkdir()  # else the settings of this world make it anew
    try:
        again = world.run(run)
        assert again.error is not None
        assert str(world.root / "model") in str(again.error)
        again = world.run(run, model__path=away)
        assert (again.redone, again.error) == (["final export"], None)
        assert metadata.exists()
    finally:
        (world.root / "model").rmdir()
        away.rename(world.root / "model")
    assert differences(world.results(run), world.results(world.finished)) == []


def test_clean_lists_what_can_go_and_a_removed_checkpoint_is_made_again_only_when_it_is_needed(
    world: World,
) -> None:
    run = world.copy("broken")
    listed = clean(run)
    assert [each.path for each in listed] == [here.checkpoint for here in run.rounds()]
    assert "can be removed: middo clean" in render_clean(listed, run, yes=False)
    assert run.round(0).checkpoint.exists()
    freed = clean(run, yes=True)
    assert freed == listed
    assert min(each.size for each in freed) > 10_000
    assert not run.round(0).checkpoint.exists()
    assert run.final.checkpoint.exists()
    assert status(run)["complete"]
    build(run)
    assert clean(run) == []
    assert world.run(run).redone == []
    run.round(1).embeddings.unlink()  # scoring needs the model of its round, and of no other
    again = world.run(run)
    assert (again.redone, again.error) == (["round_01 train", "round_01 score", "round_01 select"], None)
    wanted = world.results(world.finished)
    del wanted["round_00/checkpoint"]
    assert differences(world.results(run), wanted) == []


def test_clean_keeps_models_that_are_needed_or_may_be_and_paid_answers(world: World) -> None:
    run = world.copy("broken")
    for name in ("damaged-1/llm_cache.sqlite", "damaged-2/selection.json"):
        write_text(run.path / name, "put aside")
    run.config.write_text("rounds: of another version", encoding="utf-8")
    assert [each.path.name for each in clean(run)] == ["damaged-2"]
    shutil.copyfile(world.finished.config, run.config)
    run.round(1).scores.unlink()  # what follows needs the models of all rounds
    assert [each.path.name for each in clean(run, yes=True)] == ["damaged-2"]
    assert all(here.checkpoint.is_dir() for here in (*run.rounds(), run.final))


def test_a_damaged_cache_is_put_aside_and_what_can_be_read_of_it_is_kept(
    world: World, finished: Finished
) -> None:
    run = world.copy("broken")
    data = bytearray(run.llm_cache.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 4096] = bytes(4096)
    run.llm_cache.write_bytes(bytes(data))
    run.round(1).refined.unlink()
    asked = len(finished.requests)
    again = world.run(run, repair=True)
    assert again.error is None
    [line] = [line for line in again.said if "answers and" in line]
    assert "put aside as" in line
    assert [p.read_bytes() for p in run.path.glob("llm_cache.sqlite.damaged-*")] == [bytes(data)]
    assert len(finished.requests) - asked < len(read_jsonl(run.round(1).requests))
    assert differences(world.results(run), world.results(world.finished)) == []


def test_a_cache_that_is_none_stops_the_run_before_anything_is_trained(world: World) -> None:
    run = world.copy("broken")
    run.llm_cache.write_bytes(b"these are my notes" * 500)
    again = world.run(run, train__learning_rate=0.02)
    assert again.redone == []
    assert isinstance(again.error, RuntimeError)
    assert "llm_cache.sqlite" in str(again.error)
    assert "--repair" in str(again.error)


@pytest.mark.parametrize("room", [0, 100])  # kB: too little for the lock; for the export
def test_on_a_full_disk_nothing_is_lost_and_the_run_goes_on_when_there_is_room(
    world: World, finished: Finished, room: int
) -> None:
    run = RunDir(world.root / "runs" / "broken")
    with small_disk(run.path, 16_000) as mounted:
        if not mounted:
            pytest.skip("file systems cannot be mounted here")
        shutil.copytree(world.finished.path, run.path, dirs_exist_ok=True)
        run.round(1).refined.unlink()
        (run.final / "huggingface" / "model.safetensors").unlink()
        disk, others = os.statvfs(run.path), run.path / "of_others"
        others.write_bytes(bytes(disk.f_bavail * disk.f_frsize - room * 1024))
        kept, asked = files(run), len(finished.requests)
        again = world.run(run)
        assert isinstance(again.error, DiskFull)
        assert str(again.error).startswith(str(run.path))
        assert "disk full: free space" in str(again.error)
        assert set(kept) <= {*files(run), *(f for f in kept if f.startswith("final/huggingface/"))}
        others.unlink()
        again = world.run(run)
        assert again.error is None
        assert again.redone[-1] == "final export"
        assert differences(world.results(run), world.results(world.finished)) == []
        assert len(finished.requests) == asked  # no answer is paid twice


def test_what_repair_puts_aside_keeps_its_name_and_content(world: World) -> None:
    run = world.copy("broken")
    run.round(0).selection.write_text("mine", encoding="utf-8")
    again = world.run(run, repair=True)
    assert (again.redone, again.error) == (["round_00 select"], None)
    [aside] = run.path.glob("damaged-*")
    assert (aside / "round_00" / "selection.json").read_text(encoding="utf-8") == "mine"
    assert [line for line in world.run(run, repair=True).said if line.endswith("nothing to repair")]


def test_a_run_that_is_none_is_not_cleaned(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="not a run"):
        clean(RunDir(tmp_path), yes=True)
