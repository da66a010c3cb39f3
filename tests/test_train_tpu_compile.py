"""The real TPU compiler takes a published training step, and it fits the chips that its config is for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "paper_memory.py"


@pytest.mark.tpu_compile
def test_a_published_training_fits_its_slice() -> None:
    """One of the slices; `benchmarks/paper_memory.py` prints all of them."""
    pytest.importorskip("libtpu")
    # A process of its own: the suite's one is on simulated CPU devices.
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "mistral-7b-v0.3", "alpaca", "v5p-32"],
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
