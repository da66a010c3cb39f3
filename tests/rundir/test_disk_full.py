"""A full disk: the error says so, names the path, and leaves the old file as it was."""

from __future__ import annotations

import errno
import os
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from middo_jax.refinement import AnswerCache, Ledger
from middo_jax.refinement.endpoint.usage import Usage
from middo_jax.rundir import RunDir, write_jsonl, write_text
from middo_jax.rundir.files import DiskFull, full_disk_named, is_disk_full


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_file_that_does_not_fit_is_named_and_the_old_one_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    path = tmp_path / "dataset.jsonl"
    write_jsonl(path, [1])

    def full(handle: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskFull, match=rf"^{path}: disk full: free space there.*same command again"):
        write_jsonl(path, [2])
    assert path.read_text() == "1\n"
    assert [p.name for p in tmp_path.iterdir()] == ["dataset.jsonl"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_the_log_says_so_too(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").symlink_to("/dev/full")
    with pytest.raises(DiskFull, match=r"events\.jsonl: disk full"):
        RunDir(tmp_path).log("start")


def test_the_refiners_cache_says_so_and_never_asks_to_move_answers_away(tmp_path: Path) -> None:
    cache = AnswerCache(tmp_path / "llm_cache.sqlite")
    cache._db.execute(f"PRAGMA max_page_count = {cache._db.execute('PRAGMA page_count').fetchone()[0]}")
    ledger = Ledger(cache)

    def fill() -> None:
        for i in range(1000):
            cache.enter("run", i, "quality" * 50, Usage(requests=1))

    with pytest.raises(DiskFull, match=r"llm_cache\.sqlite: disk full") as raised:
        fill()
    assert "move" not in str(raised.value)
    cache.close()
    assert ledger.run.requests == 0
    assert AnswerCache(tmp_path / "llm_cache.sqlite").spent("run")  # what was entered before is there


def raised_from(error: BaseException) -> BaseException:
    try:
        raise RuntimeError("a stage failed") from error
    except RuntimeError as outer:
        return outer


@pytest.mark.parametrize(
    ("error", "is_full"),
    [
        (OSError(errno.ENOSPC, "x"), True),
        (raised_from(OSError(errno.EDQUOT, "x")), True),
        (ValueError("tensorstore: [Errno 28] No space left on device: open"), True),
        (OSError(errno.EACCES, "x"), False),
        (sqlite3.OperationalError("database is locked"), False),
        (RuntimeError("out of memory"), False),
    ],
)
def test_which_errors_are_those_of_a_full_disk(error: Exception, is_full: bool) -> None:
    assert is_disk_full(error) is is_full
    expected: Any = DiskFull if is_full else type(error)
    with pytest.raises(expected), full_disk_named("here"):
        raise error


def test_a_full_disk_that_is_named_keeps_its_name(tmp_path: Path) -> None:
    with (
        pytest.raises(DiskFull, match=r"^inner: disk full"),
        full_disk_named("outer"),
        full_disk_named("inner"),
    ):
        raise OSError(errno.ENOSPC, "x")
    write_text(tmp_path / "a", "b")
