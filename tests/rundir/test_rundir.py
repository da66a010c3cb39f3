"""Laws of a run's folder: a file is whole or the old one, a stage is done or done again."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from middo_jax.progress import HeldBack, Lines, Silent, duration
from middo_jax.rundir import (
    RoundDir,
    RunDir,
    atomic,
    file_hash,
    read_jsonl,
    write_json,
    write_jsonl,
    write_text,
)
from middo_jax.rundir.manifest import fingerprint


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "f.txt"
    write_text(path, "old")

    def rows() -> Iterator[str]:
        yield "half of the new one"
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        write_jsonl(path, rows())
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["f.txt"]  # no temporary file is left


def test_a_failed_first_write_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "sub" / "f.json", {"loss": float("nan")})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_jsonl(tmp_path / "sub" / "f.jsonl", [{"ok": 1}, {"loss": float("inf")}])
    assert list((tmp_path / "sub").iterdir()) == []


def test_the_old_file_is_seen_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "f.bin"
    path.write_bytes(b"old")
    with atomic(path, "wb") as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert path.stat().st_mode & 0o777 == 0o644


def test_jsonl_round_trip(tmp_path: Path) -> None:
    rows = [{"text": "line\nbreak \u2028 漢字 🦙"}, [], "x", 1.5, None]
    write_jsonl(tmp_path / "f.jsonl", rows)
    assert read_jsonl(tmp_path / "f.jsonl") == rows
    assert (tmp_path / "f.jsonl").read_bytes().count(b"\n") == len(rows)
    with pytest.raises(FileNotFoundError):
        read_jsonl(tmp_path / "missing.jsonl")


@pytest.mark.parametrize(
    "separator", ["\u2028", "\u2029", "\u0085", "\x0b", "\x0c", "\x1c", "\x1e", "\r", "\r\n"]
)
def test_a_line_of_jsonl_is_one_line_to_every_reader(tmp_path: Path, separator: str) -> None:
    row = {"a": f"one{separator}two", f"b{separator}c": [separator, "é漢🦙"]}
    write_jsonl(tmp_path / "rows.jsonl", [row, row])
    text = (tmp_path / "rows.jsonl").read_text(encoding="utf-8")
    assert len(text.splitlines()) == 2
    assert "é漢🦙" in text
    assert read_jsonl(tmp_path / "rows.jsonl") == [row, row]
    run = RunDir(tmp_path)
    run.log("start", **row)
    assert len(run.events.read_text(encoding="utf-8").splitlines()) == 1


def test_a_stage_is_done_while_its_files_are_there(tmp_path: Path) -> None:
    round_dir = RoundDir(tmp_path / "round_00")
    assert not round_dir.is_done("score")
    write_text(round_dir.scores, "scores")
    (round_dir.checkpoint / "deep").mkdir(parents=True)
    (round_dir.checkpoint / "deep" / "weights").write_bytes(b"w")
    assert not round_dir.is_done("score")  # files alone are not enough
    round_dir.finish("score", [round_dir.scores], 1.23456, n=3)
    round_dir.finish("train", [round_dir.checkpoint], 9.0)
    assert round_dir.is_done("score")
    assert round_dir.is_done("train")
    record = round_dir.stages()["score"]
    assert (record["seconds"], record["n"]) == (1.235, 3)
    assert record["files"] == {"scores.parquet": file_hash(round_dir.scores)}
    round_dir.scores.unlink()
    assert not round_dir.is_done("score")
    assert round_dir.is_done("train")
    assert RoundDir(tmp_path / "round_00").is_done("train")  # another process sees it too


def test_a_stage_cannot_finish_without_its_files(tmp_path: Path) -> None:
    round_dir = RoundDir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"scores\.parquet"):
        round_dir.finish("score", [round_dir.scores], 1.0)
    assert not round_dir.manifest.exists()


def test_hash_of_a_folder(tmp_path: Path) -> None:
    def folder(name: str, files: dict[str, str]) -> str:
        for file, text in files.items():
            write_text(tmp_path / name / file, text)
        return fingerprint(tmp_path / name)

    same = folder("a", {"x": "1", "sub/y": "2"})
    assert folder("b", {"sub/y": "2", "x": "1"}) == same
    others = [
        {"x": "1"},
        {"x": "2", "sub/y": "2"},
        {"x": "1", "sub/z": "2"},
        {"x": "1", "y": "2"},
        {"x": "12", "sub/y": ""},
    ]
    assert len({same, *(folder(f"other{i}", files) for i, files in enumerate(others))}) == 1 + len(others)
    sha256_of_1 = "6b86b273ff34fce19d6b804eff5a3f5747ada4eaa22f1d49c01e52ddb7875b4b"
    assert fingerprint(tmp_path / "a" / "x") == file_hash(tmp_path / "a" / "x") == sha256_of_1


def test_run_folder(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    assert run.rounds() == []
    for index in (10, 0, 2):
        run.round(index).path.mkdir(parents=True)
    run.final.path.mkdir()
    (run.path / "round_03").write_text("not a folder")
    assert [r.path.name for r in run.rounds()] == ["round_00", "round_02", "round_10"]
    run.log("started", n=1)
    run.log("ended", text="é")
    events = [json.loads(line) for line in run.events.read_text(encoding="utf-8").splitlines()]
    assert [(e["event"], e.get("n"), e.get("text")) for e in events] == [
        ("started", 1, None),
        ("ended", None, "é"),
    ]


def test_progress_goes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    for progress in (Lines(), Silent()):
        with progress.task("score") as advance:
            advance(0, 10)
            advance(5, 10, "half")
            advance(10, 10, "loss 1.5")
        with progress.task("nothing"):
            pass
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "  score: 10/10 samples in 0.0 s loss 1.5\n"


def test_the_first_line_comes_before_what_was_said_and_logged_earlier(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    log, before = logging.getLogger("middo_jax.test"), list(logging.getLogger().handlers)
    with HeldBack(Lines()) as opening:
        opening.say("a lock was removed")
        log.warning("odd rows")
        assert (capsys.readouterr().err, caplog.text) == ("", "")
        opening.first("middo-jax")
        assert capsys.readouterr().err == "middo-jax\na lock was removed\n"
        assert caplog.messages == ["odd rows"]
        opening.say("later")
        log.warning("at once")
        assert (capsys.readouterr().err, caplog.messages) == ("later\n", ["odd rows", "at once"])
    with contextlib.suppress(ValueError), HeldBack(Lines()) as opening:
        opening.say("a lock was removed")
        log.warning("odd rows")
        raise ValueError
    assert (capsys.readouterr().err, len(caplog.messages)) == ("a lock was removed\n", 3)
    assert [each.filters for each in logging.getLogger().handlers] == [each.filters for each in before]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"),
        (0.04, "0.0 s"),
        (0.42, "0.4 s"),
        (9.96, "10 s"),
        (59.4, "59 s"),
        (59.7, "1 min 00 s"),
        (95, "1 min 35 s"),
        (3599.6, "1 h 00 min"),
        (5400, "1 h 30 min"),
        (7260, "2 h 01 min"),
    ],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text
    assert duration(np.float64(seconds)) == text
