"""What killed processes leave is removed by the next start; what belongs to a living one is not."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from middo_jax.models.hf import new_directory
from middo_jax.rundir import atomic, held, process, write_text
from middo_jax.rundir.leftovers import leftovers

KILLED = """
import os, signal
from pathlib import Path
from middo_jax.models.hf import new_directory
from middo_jax.rundir import atomic
with new_directory(Path({folder!r}) / "final" / "huggingface") as directory:
    (directory / "model.safetensors").write_bytes(bytes(2_000_000))
    with atomic(Path({folder!r}) / "round_00" / "scores.parquet", "wb"):
        os.kill(os.getpid(), signal.SIGKILL)
"""


def killed_in(folder: Path) -> None:
    subprocess.run([sys.executable, "-c", KILLED.format(folder=str(folder))], check=False)


@pytest.mark.multiprocess
def test_what_a_killed_process_left_goes_when_the_folder_is_locked(tmp_path: Path) -> None:
    killed_in(tmp_path)
    (tmp_path / "round_00" / "checkpoint" / "params.orbax-checkpoint-tmp-7").mkdir(parents=True)
    found = [path.relative_to(tmp_path).as_posix().split(".tmp-")[0] for path in leftovers(tmp_path)]
    assert found[0] == "final/.huggingface"
    assert set(found[1:]) == {"round_00/.scores.parquet", "round_00/checkpoint/params.orbax-checkpoint-tmp-7"}
    said: list[str] = []
    with (tmp_path / "final" / ".mine").open("w"), held(tmp_path, said.append):
        assert not list(leftovers(tmp_path))
    assert any("2.0 MB that a killed process left there" in line for line in said)
    assert (tmp_path / "final" / ".mine").exists()


def test_a_folder_of_another_machine_or_of_an_earlier_start_of_this_one_is_swept(tmp_path: Path) -> None:
    """Only the holder of the lock makes such folders. A file may be a report, written beside the run."""
    elsewhere = f"{os.getpid()}-00000000-{'0' * 8}"
    (tmp_path / "final" / f".huggingface.tmp-{elsewhere}-x").mkdir(parents=True)
    (tmp_path / f".report.html.tmp-{elsewhere}-x").touch()
    (tmp_path / "final" / f".huggingface.tmp-{process.mark()}-x").mkdir()
    assert [path.name for path in leftovers(tmp_path)] == [f".huggingface.tmp-{elsewhere}-x"]


@pytest.mark.multiprocess
def test_the_next_export_to_the_same_place_removes_the_last_ones_copy(tmp_path: Path) -> None:
    killed_in(tmp_path)
    with new_directory(tmp_path / "final" / "huggingface") as directory:
        assert list((tmp_path / "final").iterdir()) == [directory]


def test_an_export_removes_what_killed_ones_left_beside_it_under_any_name(tmp_path: Path) -> None:
    place = process.mark().split("-")[2]
    ended, ours = f"{2**22 + 1}-00000000-{place}", process.mark()
    for mark in (ended, ours):
        (tmp_path / f".other.tmp-{mark}-x").mkdir()
        (tmp_path / f".other.tmp-{mark}-x" / "model.safetensors").touch()
    (tmp_path / ".mine").mkdir()
    with new_directory(tmp_path / "out"):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == [".mine", f".other.tmp-{ours}-x", "out"]


def test_what_belongs_to_others_stays(tmp_path: Path) -> None:
    """A living process's, and one of another machine until it is a day old."""
    ours = tmp_path / f".a.tmp-{process.mark()}-x"
    elsewhere = tmp_path / f".b.tmp-{os.getpid()}-0123abcd-deadbeef-x"
    for path in (ours, elsewhere):
        path.touch()
    with held(tmp_path, lambda line: None):
        assert ours.exists()
        assert elsewhere.exists()
    old = time.time() - 25 * 3600
    os.utime(elsewhere, (old, old))
    os.utime(ours, (old, old))
    with held(tmp_path, lambda line: None):
        assert ours.exists()
        assert not elsewhere.exists()


def test_a_number_that_is_another_process_by_now_is_an_ended_one(tmp_path: Path) -> None:
    _, _, place = process.mark().split("-")
    assert process.has_ended(process.mark()) is False
    assert process.has_ended(f"{os.getpid()}-00000000-{place}") is True
    assert process.has_ended(f"{2**22 + 1}-00000000-{place}") is True
    assert process.has_ended(f"{os.getpid()}-00000000-00000000") is None


def test_a_file_that_is_being_written_names_its_process(tmp_path: Path) -> None:
    with atomic(tmp_path / "scores.parquet"):
        [temporary] = tmp_path.iterdir()
        assert temporary.name.startswith(f".scores.parquet.tmp-{process.mark()}-")
    write_text(tmp_path / "a", "b")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "scores.parquet"]
