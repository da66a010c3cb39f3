"""Ours equals transformers, on the real model and from the command line down."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from middo_jax.models.gguf import demo_model_path
from middo_jax.models.hf import CheckpointError
from middo_jax.models.resolve import resolve

ROOT = Path(__file__).parent.parent


@pytest.mark.real_model
@pytest.mark.parity
def test_score_agrees_with_transformers_on_the_real_model(tmp_path: Path) -> None:
    """Losses to 1e-3, embeddings to cosine 0.9999, the same neighbours, the same three sets."""
    pytest.importorskip("torch")
    try:
        model = resolve(str(demo_model_path()))
    except CheckpointError as error:
        pytest.skip(str(error))

    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=900
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done

    data, out = str(ROOT / "configs" / "quickstart_data.jsonl"), str(tmp_path / "scored")
    both = ["--model", str(model), "--pre-model", str(model)]
    call(
        "-m",
        "middo_jax",
        "score",
        "--data",
        data,
        *both,
        "--out",
        out,
        "data.limit=12",
        "model.max_length=512",
    )
    call("-m", "middo_jax", "select", out)
    table = call("benchmarks/agreement.py", out, *both).stdout
    assert table.count("ok") == 7, table
