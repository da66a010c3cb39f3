"""A full disk: the error says so, names the path, and leaves the old file as it was."""

from __future__ import annotations

import errno
import os
import sqlite3
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import pytest
from support.tiny_training import CONFIG, PACK_LENGTH, SETTINGS, examples, mesh_of

from middo_jax.models.checkpoint import save_params
from middo_jax.models.model import abstract_model
from middo_jax.refinement import AnswerCache, Ledger
from middo_jax.refinement.endpoint.usage import Usage
from middo_jax.rundir import RunDir, write_jsonl, write_text
from middo_jax.rundir.files import DiskFull, full_disk_named, is_disk_full
from middo_jax.training.metrics import MetricsLog
from middo_jax.training.plan import TrainingPlan
from middo_jax.training.step import StepOutputs


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


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_metrics_of_a_training_say_so_also_when_they_are_closed(tmp_path: Path) -> None:
    """What a file could not write is tried again when it is closed, and that error would hide the first."""
    plan = TrainingPlan(examples(20), SETTINGS, 3, PACK_LENGTH)
    outputs: Any = [np.asarray(number) for number in (1.0, 7, 1.0, 0.1, False, np.nan)]
    told: list[str] = []

    def train() -> None:
        with MetricsLog(tmp_path / "metrics.jsonl", 0, plan, CONFIG, mesh_of(1, 1, 1)) as log:
            log._file.close()
            log._file = Path("/dev/full").open("w", encoding="utf-8")  # noqa: SIM115 - the log closes it
            log.dispatched(StepOutputs(*outputs))
            try:
                log.catch_up()
            except OSError as error:
                told.append(str(error))
                raise

    with pytest.raises(DiskFull) as closed:
        train()
    said = f"{tmp_path / 'metrics.jsonl'}: disk full: "
    assert [each[: len(said)] for each in (*told, str(closed.value))] == [said, said]


def test_a_checkpoint_that_does_not_fit_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise ValueError("tensorstore: [Errno 28] No space left on device: open")

    monkeypatch.setattr(ocp.Checkpointer, "save", full)
    with pytest.raises(DiskFull, match=rf"^{tmp_path}: disk full"):
        save_params(tmp_path, abstract_model(CONFIG, mesh_of(1, 1, 1)).params, {})
    assert not (tmp_path / "metadata.json").exists()
