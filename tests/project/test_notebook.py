"""docs/scores.ipynb runs, and shows as much as its cells print and draw."""

from __future__ import annotations

import base64
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.tiny_model import write_tiny_model

NOTEBOOK = Path(__file__).parents[2] / "docs" / "scores.ipynb"
END = "-- end of a cell --"


@pytest.fixture(scope="module")
def cells() -> list[dict[str, Any]]:
    """Its code cells."""
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def shown(cell: dict[str, Any]) -> str:
    """What it printed when the notebook was made."""
    assert {o["output_type"] for o in cell["outputs"]} <= {"stream", "display_data"}
    assert all(o["name"] == "stdout" for o in cell["outputs"] if o["output_type"] == "stream")
    return "".join("".join(o["text"]) for o in cell["outputs"] if o["output_type"] == "stream")


def pictures(cell: dict[str, Any]) -> list[bytes]:
    data = [o["data"] for o in cell["outputs"] if o["output_type"] == "display_data"]
    assert all(list(of) == ["image/png"] for of in data)
    return [base64.b64decode("".join(of["image/png"])) for of in data]


def without_numbers(text: str) -> list[str]:
    return [re.sub(r"[-+]?\d[\d.e+-]*", "#", line) for line in text.splitlines()]


def test_it_was_run_in_order_and_has_its_pictures(cells: list[dict[str, Any]]) -> None:
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    drawing = [cell for cell in cells if "plt.show()" in "".join(cell["source"])]
    assert len(drawing) == 3
    for cell in cells:
        drawn = pictures(cell)
        assert len(drawn) == (cell in drawing)
        assert all(of.startswith(b"\x89PNG") and len(of) > 5_000 for of in drawn)
    # What a page of documentation may weigh, and nothing of the machine that it was made on.
    assert NOTEBOOK.stat().st_size < 300_000
    assert not re.search(r"/(home|root|tmp|work|Users)/", NOTEBOOK.read_text(encoding="utf-8"))


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="needs matplotlib (the dev extra)")
def test_its_cells_run_outside_of_a_clone_and_print_what_it_shows(
    cells: list[dict[str, Any]], tmp_path: Path
) -> None:
    """In order, as a program in an empty folder, on a tiny model: numbers differ, words and lines do not."""
    write_tiny_model(tmp_path / "model")
    script = "".join(f"{''.join(cell['source'])}\nprint({END!r})\n" for cell in cells)
    root = str(NOTEBOOK.parents[1])
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")])),
        "MIDDO_MODEL": str(tmp_path / "model"),
        "MPLBACKEND": "Agg",
        "JAX_NUM_CPU_DEVICES": "1",
    }
    ran = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    printed = ran.stdout.split(f"{END}\n")[:-1]
    assert len(printed) == len(cells)
    for cell, text in zip(cells, printed, strict=True):
        if "varies" in cell["metadata"].get("tags", ()):  # other models select other rows
            assert len(text.splitlines()) == len(shown(cell).splitlines()) > 2
        else:
            assert without_numbers(text) == without_numbers(shown(cell))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
