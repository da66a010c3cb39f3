"""A folder and its original: equal after a push, resumable after a kill at any moment of one."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Callable, MutableMapping
from pathlib import Path
from typing import Any, cast

import pytest
from support.bucket_servers import MemoryStore
from support.loop_fixture import contents

from middo_jax.buckets.mirror import Mirror
from middo_jax.buckets.names import is_copied, is_light
from middo_jax.buckets.places import Place
from middo_jax.buckets.store import Store
from middo_jax.rundir import RoundDir, RunError, write_json, write_text
from middo_jax.rundir.elsewhere import bring, copy_of, is_elsewhere

pytest_plugins = ["support.bucket_servers"]
pytestmark = pytest.mark.usefixtures("own_copies")

Objects = MutableMapping[str, tuple[bytes, str]]


class Killed(BaseException):
    """Stands for SIGKILL: nothing of the program handles it."""


class KilledStore(MemoryStore):
    """Is killed at the n-th change of the bucket, before it or after it."""

    def __init__(self, objects: Objects, n: int, after: bool) -> None:
        super().__init__(objects)
        self.left, self.after = n, after

    def put(self, file: Path, name: str) -> str:
        return self._change(lambda: super(KilledStore, self).put(file, name))

    def remove(self, name: str) -> None:
        self._change(lambda: super(KilledStore, self).remove(name))

    def _change(self, change: Callable[[], Any]) -> Any:
        self.left -= 1
        if self.left == 0:
            if self.after:
                change()
            raise Killed
        return change()


def mirror_of(objects: Objects, folder: Path, store: MemoryStore | None = None) -> Mirror:
    found = store or MemoryStore(objects)
    return Mirror(found.place, folder, cast(Store, found))


def files(objects: Objects) -> dict[str, bytes]:
    return {name: content for name, (content, _) in objects.items()}


def record(run: Path, stage: str, *names: str) -> None:
    RoundDir(run / "round_00").finish(stage, [run / "round_00" / name for name in names], 0.0)


def save_step(run: Path, step: int) -> None:
    folder = run / "round_00" / "checkpoint" / "steps" / str(step)
    for name in ("arrays/0.0", "arrays/.zarray", "_CHECKPOINT_METADATA"):
        write_text(folder / name, f"{step} {name}")


# What a run does to its folder, one push after each.
def prepared(run: Path) -> None:
    write_text(run / "config.yaml", "name: run\n")
    write_text(run / "round_00" / "dataset.jsonl", "{}\n")
    record(run, "prepare", "dataset.jsonl")


def trains(run: Path) -> None:
    save_step(run, 10)
    write_text(run / "round_00" / "metrics.jsonl", "1\n" * 10)


def trains_on(run: Path) -> None:
    save_step(run, 20)
    shutil.rmtree(run / "round_00" / "checkpoint" / "steps" / "10")
    write_text(run / "round_00" / "metrics.jsonl", "1\n" * 20)


def trained(run: Path) -> None:
    checkpoint = run / "round_00" / "checkpoint"
    for name in ("_CHECKPOINT_METADATA", "d/0"):
        write_text(checkpoint / "params" / name, f"first {name}")
    write_json(checkpoint / "metadata.json", {"identity": "first"})
    shutil.rmtree(checkpoint / "steps")
    record(run, "train", "checkpoint", "metrics.jsonl")


def scored(run: Path) -> None:
    write_text(run / "round_00" / "scores.parquet", "scores")
    record(run, "score", "scores.parquet")


def trains_again(run: Path) -> None:
    RoundDir(run / "round_00").forget("train")
    shutil.rmtree(run / "round_00" / "checkpoint")
    (run / "round_00" / "metrics.jsonl").unlink()


def trained_again(run: Path) -> None:
    checkpoint = run / "round_00" / "checkpoint"
    for name in ("_CHECKPOINT_METADATA", "d/0", "d/1"):
        write_text(checkpoint / "params" / name, f"second {name}")
    write_json(checkpoint / "metadata.json", {"identity": "second"})
    write_text(run / "round_00" / "metrics.jsonl", "2\n" * 20)
    record(run, "train", "checkpoint", "metrics.jsonl")


HISTORY = [prepared, trains, trains_on, trained, scored, trains_again, trained_again]


def assert_resumable(run: Path) -> None:
    """What the folder declares finished is whole."""
    folder = RoundDir(run / "round_00")
    for stage in folder.stages():
        assert folder.is_done(stage), stage
    checkpoint = folder.checkpoint
    for step in checkpoint.glob("steps/*"):
        assert {path.name for path in step.rglob("*") if path.is_file()} == {
            "0.0",
            ".zarray",
            "_CHECKPOINT_METADATA",
        }
        assert all(path.read_text().startswith(f"{step.name} ") for path in step.rglob("*") if path.is_file())
    if (checkpoint / "metadata.json").exists():
        of = "first" if "first" in (checkpoint / "metadata.json").read_text() else "second"
        params = {
            path.name: path.read_text() for path in (checkpoint / "params").rglob("*") if path.is_file()
        }
        assert params.keys() >= {"_CHECKPOINT_METADATA", "0"}
        assert all(text.startswith(of) for text in params.values())


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("number", range(len(HISTORY)), ids=[change.__name__ for change in HISTORY])
def test_a_push_that_is_killed_at_any_object_leaves_a_run_that_resumes(
    number: int, after: bool, tmp_path: Path
) -> None:
    before: dict[str, tuple[bytes, str]] = {}
    mirror = mirror_of(before, tmp_path / "before")
    for change in HISTORY[:number]:
        change(mirror.folder)
        mirror.push()
    n, is_killed = 0, True
    while is_killed:
        n += 1
        objects = dict(before)
        here = mirror_of(objects, tmp_path / f"{n}-here", KilledStore(objects, n, after))
        here.pull()
        HISTORY[number](here.folder)
        newest = contents(here.folder)
        try:
            here.push()
            is_killed = False
        except Killed:
            other = mirror_of(dict(objects), tmp_path / f"{n}-other-host")
            other.pull()
            assert_resumable(other.folder)
            if HISTORY[number] in (trains_on, trained):  # no progress is lost
                checkpoint = other.folder / "round_00" / "checkpoint"
                assert [*checkpoint.glob("steps/*")] or (checkpoint / "metadata.json").exists()
        # The same machine goes on with what it has, and the bucket is as the folder.
        again = mirror_of(objects, here.folder)
        again.pull()
        assert contents(here.folder).items() >= newest.items()
        assert_resumable(here.folder)
        again.push()
        assert contents(here.folder) == files(objects)
    assert n > 2


def test_a_bucket_has_the_same_files_under_the_same_names(bucket: str, tmp_path: Path) -> None:
    place = Place.of(bucket)
    assert place is not None
    mirror = Mirror(place, tmp_path / "here")
    mirror.pull()
    prepared(mirror.folder)
    trains(mirror.folder)
    for name in (".scores.tmp-1-00000000-00000000-a", "middo.lock", "x.sqlite-wal"):
        write_text(mirror.folder / name, "not copied")
    assert mirror.push() == 7
    assert mirror.push() == 0
    trained(mirror.folder)
    mirror.push()
    other = Mirror(place, tmp_path / "other")
    assert other.pull() == len(other.store.list())
    assert other.pull() == 0
    for name in (".scores.tmp-1-00000000-00000000-a", "middo.lock", "x.sqlite-wal"):
        (mirror.folder / name).unlink()
    assert contents(other.folder) == contents(mirror.folder)


def test_the_bucket_wins_where_another_host_went_on(tmp_path: Path) -> None:
    objects: dict[str, tuple[bytes, str]] = {}
    one, two = mirror_of(objects, tmp_path / "one"), mirror_of(objects, tmp_path / "two")
    prepared(one.folder)
    one.push()
    trains(one.folder)  # killed before it pushed
    two.pull()
    scored(two.folder)
    two.push()
    mirror_of(objects, one.folder).pull()
    assert contents(one.folder) == contents(two.folder) == files(objects)


def test_what_was_not_pushed_is_kept_where_nobody_else_wrote(tmp_path: Path) -> None:
    objects: dict[str, tuple[bytes, str]] = {}
    here = mirror_of(objects, tmp_path / "here")
    prepared(here.folder)
    here.push()
    write_text(here.folder / "round_00" / "requests.jsonl", "paid for")
    again = mirror_of(objects, here.folder)
    again.pull()
    assert (here.folder / "round_00" / "requests.jsonl").read_text() == "paid for"


def test_files_that_are_lost_here_are_copied_again_and_never_removed_there(tmp_path: Path) -> None:
    objects: dict[str, tuple[bytes, str]] = {}
    here = mirror_of(objects, tmp_path / "here")
    prepared(here.folder)
    here.push()
    shutil.rmtree(here.folder)
    again = mirror_of(objects, here.folder)
    again.pull()
    again.push()
    assert len(objects) == 3
    assert contents(here.folder) == files(objects)


def test_weights_stay_in_the_bucket_until_they_are_read(tmp_path: Path) -> None:
    objects: dict[str, tuple[bytes, str]] = {}
    one, two = mirror_of(objects, tmp_path / "one"), mirror_of(objects, tmp_path / "two")
    for change in (prepared, trains, trained, scored):
        change(one.folder)
    one.push()
    two.pull(is_light)
    weights = two.folder / "round_00" / "checkpoint" / "params"
    assert not weights.exists()
    with copy_of(two.folder, two):
        assert RoundDir(two.folder / "round_00").is_done("train")
        assert is_elsewhere(weights / "d" / "0")
        left = contents(one.folder / "round_00" / "checkpoint" / "params")
        assert two.size(weights.parent) == sum(map(len, left.values()))
        two.push()  # not here is not removed
        assert files(objects) == contents(one.folder)
        bring(weights)
        assert contents(two.folder) == contents(one.folder)
        assert not is_elsewhere(weights / "d" / "0")


def test_a_checkpoint_that_is_removed_here_is_removed_there_with_its_weights(tmp_path: Path) -> None:
    objects: dict[str, tuple[bytes, str]] = {}
    one, two = mirror_of(objects, tmp_path / "one"), mirror_of(objects, tmp_path / "two")
    trains(one.folder)
    trained(one.folder)
    one.push()
    two.pull(is_light)
    shutil.rmtree(two.folder / "round_00" / "checkpoint")
    two.push()
    assert [name for name in objects if "checkpoint" in name] == []


def test_what_is_removed_here_before_weights_are_brought_is_removed_there(tmp_path: Path) -> None:
    objects: dict[str, tuple[bytes, str]] = {}
    one, two = mirror_of(objects, tmp_path / "one"), mirror_of(objects, tmp_path / "two")
    for change in (prepared, trains, trained, scored):
        change(one.folder)
    one.push()
    two.pull(is_light)
    with copy_of(two.folder, two):
        (two.folder / "round_00" / "scores.parquet").unlink()
        bring(two.folder / "round_00" / "checkpoint" / "params")
        two.push()
    assert "round_00/scores.parquet" not in objects
    assert contents(two.folder) == files(objects)


def test_weights_that_are_not_as_they_were_written_are_refused(tmp_path: Path) -> None:
    objects: dict[str, tuple[bytes, str]] = {}
    one, two = mirror_of(objects, tmp_path / "one"), mirror_of(objects, tmp_path / "two")
    trains(one.folder)
    trained(one.folder)
    one.push()
    two.pull(is_light)
    name = "round_00/checkpoint/params/d/0"
    objects[name] = b"damaged", objects[name][1]
    with copy_of(two.folder, two), pytest.raises(RunError, match=f"{name} is not as it was written"):
        bring(two.folder / "round_00" / "checkpoint")
    assert not (two.folder / name).exists()


def test_a_database_in_use_is_copied_whole(tmp_path: Path) -> None:
    objects: dict[str, tuple[bytes, str]] = {}
    one, two = mirror_of(objects, tmp_path / "one"), mirror_of(objects, tmp_path / "two")
    one.folder.mkdir()
    database = sqlite3.connect(one.folder / "llm_cache.sqlite")
    database.execute("PRAGMA journal_mode=WAL")
    database.execute("CREATE TABLE answers (text)")
    database.execute("INSERT INTO answers VALUES ('paid for')")
    database.commit()  # into the log
    one.push()
    assert [*objects] == ["llm_cache.sqlite"]
    assert one.push() == 0
    database.execute("INSERT INTO answers VALUES ('and this')")
    database.commit()
    assert one.push() == 1
    two.pull()
    with sqlite3.connect(two.folder / "llm_cache.sqlite") as copy:
        assert copy.execute("SELECT text FROM answers").fetchall() == [("paid for",), ("and this",)]
    database.close()


def test_a_file_that_grows_while_it_is_sent_is_sent_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    objects: dict[str, tuple[bytes, str]] = {}
    here = mirror_of(objects, tmp_path / "here")
    log = here.folder / "events.jsonl"
    write_text(log, "1\n")
    put = MemoryStore.put

    def slow(self: MemoryStore, file: Path, name: str) -> str:
        with log.open("a") as opened:
            opened.write("2\n")
        return put(self, file, name)

    monkeypatch.setattr(MemoryStore, "put", slow)
    here.push()
    assert objects["events.jsonl"][0] == b"1\n"
    monkeypatch.undo()
    assert here.push() == 1
    assert objects["events.jsonl"][0] == b"1\n2\n"


def test_a_pull_that_is_killed_does_not_pass_for_newer_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    objects: dict[str, tuple[bytes, str]] = {}
    one, two = mirror_of(objects, tmp_path / "one"), mirror_of(objects, tmp_path / "two")
    prepared(one.folder)
    one.push()
    two.pull()
    write_text(two.folder / "config.yaml", "name: two\n")  # never pushed
    trains(one.folder)
    one.push()

    def killed(self: MemoryStore, name: str, to: Path) -> None:
        raise Killed

    with monkeypatch.context() as kill:
        kill.setattr(MemoryStore, "get", killed)
        with pytest.raises(Killed):
            mirror_of(objects, two.folder).pull()
    mirror_of(objects, two.folder).pull()
    assert contents(two.folder) == contents(one.folder)


def test_the_patterns_of_what_is_not_copied_spare_what_runs_have() -> None:
    assert is_copied("round_00/checkpoint/steps/3/arrays/.zarray")
    assert not is_copied("round_00/checkpoint/.params.orbax.tmp-1-a-b/x")
