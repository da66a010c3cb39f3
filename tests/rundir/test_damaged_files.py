"""Damaged files that commands read without the chain: one sentence with the file and the way on."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from middo_jax.config import load
from middo_jax.rundir import RunDir, RunError, read_jsonl
from middo_jax.rundir.arms import FOLDER, control_links
from middo_jax.rundir.chain import select
from middo_jax.rundir.damage import damages, refuse_damaged
from middo_jax.rundir.files import DamagedFile, read_json
from middo_jax.signals.table import read_scores


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", bytes(64), b"[" * 100_000])
@pytest.mark.parametrize(
    ("name", "read"),
    [("scores.parquet", read_scores), ("selection.json", read_json), ("refined.jsonl", read_jsonl)],
)
def test_the_file_and_the_way_on_are_in_one_line(
    tmp_path: Path, name: str, read: Callable[[Path], Any], content: bytes
) -> None:
    path = tmp_path / name
    path.write_bytes(b"{}\n" + content if content and name == "refined.jsonl" else content)
    if read is read_jsonl and not content:
        assert read(path) == []
        return
    with pytest.raises(DamagedFile, match=rf"{re.escape(str(path))}.*--repair") as raised:
        read(path)
    assert "\n" not in str(raised.value)
    if read is read_jsonl:
        assert f"{name}:2" in str(raised.value)


def verdict(**other: Any) -> str:
    row: dict[str, Any] = {"id": "t@c", "verdict": "reject", "example": None, "comment": None, "by": []}
    return json.dumps(row | other) + "\n"


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (verdict(), ""),
        (verdict(later="a key of a later program"), ""),
        (verdict() + '{"id": "t@', "Unterminated string"),
        (verdict() + "[]\n", "row 2: it is a list, not an object"),
        (verdict(verdict="perhaps"), "row 1: verdict is 'perhaps'"),
        ("{}\n", "row 1: id is missing"),
    ],
)
def test_damaged_verdicts_of_people_are_found_and_say_how_to_have_them_again(
    tmp_path: Path, content: str, why: str
) -> None:
    run = RunDir(tmp_path)
    here = run.round(0)
    here.path.mkdir()
    here.verdicts.write_text(content, encoding="utf-8")
    found = list(damages(run, [select(here)]))
    assert [damage.path for damage in found] == ([here.verdicts] if why else [])
    if why:
        with pytest.raises(RunError, match=rf"verdicts\.jsonl has people.*{why}.*--read-review.*--repair"):
            refuse_damaged(found)


def test_files_and_folders_of_control_arms_are_looked_at(tmp_path: Path) -> None:
    given = ["model.path=m", "data.path=d", "controls=[none, random]", "seeds=2", f"runs_dir={tmp_path}"]
    run, config = RunDir(tmp_path / "run"), load(None, given)
    run.round(0).metrics.mkdir(parents=True)  # which says whether a training of an arm is the run's own
    run.controls.mkdir()
    arm = run.path / FOLDER / "random"
    (arm / "merged.jsonl").mkdir(parents=True)
    (arm / "seed_1").touch()
    links = [link for link, _ in control_links(run, config)]
    found = {damage.path: damage.why for damage in damages(run, links)}
    assert found == {
        run.controls: "is a folder, not a file",
        arm / "merged.jsonl": "is a folder, not a file",
        arm / "seed_1": "is not a folder",
    }
    shutil.rmtree(run.path / FOLDER)
    (run.path / FOLDER).touch()
    assert run.path / FOLDER in {damage.path for damage in damages(run, links)}
