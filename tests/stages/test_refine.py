"""The refinement stage as a command runs it."""

from __future__ import annotations

import json
from pathlib import Path

from support.command import Middo
from support.loop_fixture import Finished, selected

from middo_jax.rundir import read_jsonl

pytest_plugins = ["support.command", "support.loop_fixture"]


def test_an_addition_lacks_the_columns_that_name_a_row(
    finished: Finished, middo: Middo, tmp_path: Path
) -> None:
    assert finished.run.round(0).stages()["prepare"]["id_columns"] == []
    here = selected(finished, tmp_path / "run")
    manifest = json.loads((here / "manifest.json").read_text(encoding="utf-8"))
    manifest["stages"]["prepare"]["id_columns"] = ["source"]
    (here / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    middo("refine", here)
    tasks = [task for task in read_jsonl(here / "refined.jsonl") if task["accepted"]]
    found = {(task["op"] == "synthesize", task["example"]["extra"]["source"] is None) for task in tasks}
    assert found == {(True, True), (False, False)}
