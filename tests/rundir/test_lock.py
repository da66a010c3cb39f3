"""Laws of the lock: one process writes into a folder, and only the lock of an ended owner is removed."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.loop_fixture import contents, settings

import middo_jax as middo
from middo_jax import api
from middo_jax.cleaning import clean
from middo_jax.config import load
from middo_jax.report.build import build
from middo_jax.report.status import render_status, status
from middo_jax.rollback import rollback
from middo_jax.rundir import RoundDir, RunDir, RunLocked, held, lock, write_text

HOLD = """
import sys
from pathlib import Path
from middo_jax.rundir import held
with held(Path({folder!r})):
    print("held", flush=True)
    sys.stdin.read()
"""


def started(script: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


@contextlib.contextmanager
def holder(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the lock until its stdin ends; it never outlives the block."""
    with started(HOLD.format(folder=str(folder))) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


def owned(folder: Path, **changes: Any) -> str:
    """Writes a lock of this process with other facts; returns its text."""
    folder.mkdir(exist_ok=True)
    owner = dataclasses.replace(lock.Owner.this_process(), **changes)
    write_text(folder / lock.NAME, json.dumps(dataclasses.asdict(owner)))
    return (folder / lock.NAME).read_text(encoding="utf-8")


@pytest.mark.multiprocess
def test_a_second_process_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with holder(folder) as first:
        write_text(folder / "config.yaml", "a: 1")
        before = contents(tmp_path)
        with pytest.raises(RunLocked) as refused, held(folder):
            raise AssertionError("two processes hold one lock")
        assert contents(tmp_path) == before
        message = str(refused.value)
        assert "\n" not in message
        for fact in (str(folder), f"process {first.pid}", lock.Owner.this_process().host, "minute ago"):
            assert fact in message
        first.communicate("")  # it ends, and releases
    with held(folder):
        assert (folder / lock.NAME).exists()
    assert contents(tmp_path).keys() == {"run/config.yaml"}


@pytest.mark.multiprocess
def test_the_lock_of_a_killed_process_is_removed_with_a_line(tmp_path: Path) -> None:
    with holder(tmp_path) as process:
        process.send_signal(signal.SIGKILL)
        while "Z" not in Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2][:3]:
            time.sleep(0.01)
        said: list[str] = []
        with held(tmp_path, said.append):  # not yet waited for: only its exit code is left
            pass
        (line,) = said
        assert f"process {process.pid}" in line
        assert "ended without releasing" in line
    assert contents(tmp_path) == {}


@pytest.mark.multiprocess
@pytest.mark.parametrize("how", [signal.SIGINT, None])
def test_the_lock_is_released_on_ctrl_c_and_on_exceptions(tmp_path: Path, how: signal.Signals | None) -> None:
    folder = tmp_path / "a" / "run"
    if how is None:
        with pytest.raises(KeyError), held(folder):
            raise KeyError
    else:
        with holder(folder) as process:
            process.send_signal(how)
            assert process.wait() != 0
    assert list(tmp_path.iterdir()) == []  # what was made for the lock alone is gone too


def test_many_processes_that_find_one_leftover_lock_write_one_at_a_time(tmp_path: Path) -> None:
    owned(tmp_path, started="0")
    script = (
        "import os, time\nfrom pathlib import Path\nfrom middo_jax.rundir import RunLocked, held\n"
        f"folder, done = Path({str(tmp_path)!r}), 0\n"
        "while done < 5:\n"
        "    try:\n"
        "        with held(folder, lambda line: None):\n"
        "            os.close(os.open(folder / 'inside', os.O_CREAT | os.O_EXCL))\n"
        "            time.sleep(0.002)\n"
        "            (folder / 'inside').unlink()\n"
        "            done += 1\n"
        "    except RunLocked:\n"
        "        time.sleep(0.001)\n"
    )
    processes = [started(script) for _ in range(4)]
    assert [process.wait(60) for process in processes] == [0] * 4
    assert contents(tmp_path) == {}


def test_a_process_number_that_is_another_process_by_now_is_a_leftover(tmp_path: Path) -> None:
    owned(tmp_path, started="1")  # this process, but it started at another time
    said: list[str] = []
    with held(tmp_path, said.append):
        assert len(said) == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"host": "elsewhere", "pid": 2**22 + 1},
        {"namespace": "pid:[1]", "pid": 2**22 + 1},  # a container on this host
        {"boot": "another", "machine": ""},  # a restart, or another machine of this name
        {"boot": "another", "namespace": "pid:[1]"},
    ],
)
def test_where_nothing_can_be_proven_the_lock_stays(tmp_path: Path, changes: dict[str, Any]) -> None:
    text = owned(tmp_path, since=time.time() - 7300, **changes)
    with pytest.raises(RunLocked) as refused, held(tmp_path):
        pass
    message = str(refused.value)
    assert "2 hours ago" in message
    assert f"delete {tmp_path / lock.NAME}" in message
    assert str(changes.get("host", "")) in message
    assert contents(tmp_path) == {lock.NAME: text.encode()}


def test_after_a_restart_of_the_machine_its_locks_are_leftovers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = dataclasses.replace(
        lock.Owner.this_process(), machine="f00", namespace="pid:[4026531836]", boot="second"
    )
    monkeypatch.setattr(lock.Owner, "this_process", classmethod(lambda cls: here))
    owned(tmp_path, boot="first")
    with held(tmp_path, lambda line: None):
        pass
    owned(tmp_path, boot="first", machine="ba4")
    with pytest.raises(RunLocked), held(tmp_path):
        pass


def changed(**values: Any) -> str:
    return json.dumps(dataclasses.asdict(lock.Owner.this_process()) | values)


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[]", '{"pid": 1}', "[" * 100_000),
        *(changed(since=value) for value in ("x", None, float("nan"), float("inf"))),
        *(changed(pid="x"), changed(command=None)),
    ],
)
def test_a_damaged_lock_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / lock.NAME).write_text(text, encoding="utf-8")
    with pytest.raises(RunLocked, match=r"does not say by whom.*delete"), held(tmp_path):
        pass
    assert (tmp_path / lock.NAME).read_text(encoding="utf-8") == text


def test_a_folder_in_the_place_of_a_lock_is_refused(tmp_path: Path) -> None:
    (tmp_path / lock.NAME).mkdir()
    with pytest.raises(RunLocked, match=r"does not say by whom.*delete"), held(tmp_path):
        pass


def test_one_process_may_take_it_again_and_a_round_has_its_runs_lock(tmp_path: Path) -> None:
    write_text(tmp_path / "config.yaml", "")
    for index in (0, 1):
        write_text(RoundDir(tmp_path / f"round_{index:02d}").dataset, "")
    with held(tmp_path):
        with held(tmp_path / "round_00"), held(tmp_path / "round_01"):
            assert (tmp_path / lock.NAME).exists()
        assert (tmp_path / lock.NAME).exists()
        assert not (tmp_path / "round_00" / lock.NAME).exists()
    assert not (tmp_path / lock.NAME).exists()


def test_a_lock_that_was_deleted_and_taken_by_another_is_not_released(tmp_path: Path) -> None:
    with held(tmp_path):
        text = owned(tmp_path, token="other")
    assert contents(tmp_path) == {lock.NAME: text.encode()}


WRITERS = ("run", "score", "train", "select", "refine", "batch", "review", "compare", "clean", "rollback")


@pytest.mark.parametrize("verb", WRITERS)
def test_what_writes_is_refused_and_changes_nothing(tmp_path: Path, verb: str) -> None:
    """Before the data is read: `settings` names none that is there."""
    small = settings(tmp_path, name="folder", runs_dir=tmp_path, data__path=tmp_path / "none.json")
    folder, model = tmp_path / "folder", tmp_path / "model"
    owned(folder, host="elsewhere")
    write_text(folder / "config.yaml", load(None, small).to_yaml())
    if verb == "rollback":  # it asks first whether there is such a round
        write_text(RoundDir(folder / "round_00").dataset, "")
    before = contents(tmp_path)
    calls: dict[str, Callable[[], Any]] = {
        "run": lambda: middo.run(load(None, small)),
        "score": lambda: middo.score(tmp_path / "none.json", model, out=folder),
        "train": lambda: middo.train(tmp_path / "none.json", model, folder),
        "select": lambda: middo.select(folder),
        "refine": lambda: middo.refine(folder),
        "batch": lambda: api.refine_by_batch(folder, write=tmp_path / "ask.jsonl"),
        "review": lambda: middo.read_review(folder, [tmp_path / "none.jsonl"]),
        "compare": lambda: middo.score_models(tmp_path / "none.json", {"a": model}, out=folder),
        "clean": lambda: clean(RunDir(folder), yes=True),
        "rollback": lambda: rollback(RunDir(folder), 0, yes=True),
    }
    with pytest.raises(RunLocked, match="elsewhere"):
        calls[verb]()
    assert contents(tmp_path) == before
    render_status(status(RunDir(folder)))  # what reads is not refused
    assert contents(tmp_path) == before
    build(RunDir(folder)).unlink()
    assert contents(tmp_path) == before


def test_where_there_are_no_hard_links_the_file_is_made_exclusively(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(*_: Any) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", no_links)
    owned(tmp_path, started="0")
    with held(tmp_path, lambda line: None):
        assert contents(tmp_path).keys() == {lock.NAME}
    assert contents(tmp_path) == {}
