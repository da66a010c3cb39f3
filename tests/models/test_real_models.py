"""Law: real models say here what they say in transformers, token for token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from support.forward import forward
from support.golden.make_continuations import GOLDEN, NUM_TOKENS, demo_directory, prompts

from middo_jax.inference.engine import Engine
from middo_jax.inference.sampling import Request
from middo_jax.models.gguf import DEMOS
from middo_jax.models.hf import CheckpointError, load
from middo_jax.models.model import bound

pytestmark = pytest.mark.real_model
NUM_COMPARED = 64  # positions whose logits are compared: all of 700 would be 734 MB with Gemma's vocabulary


@pytest.fixture(
    scope="module",
    params=[name if name == "smollm2" else pytest.param(name, marks=pytest.mark.slow) for name in DEMOS],
)
def demo(request: pytest.FixtureRequest) -> tuple[str, Path]:
    try:
        return request.param, demo_directory(request.param)
    except CheckpointError as error:
        pytest.skip(str(error))


def test_greedy_continuations_are_those_of_transformers(demo: tuple[str, Path]) -> None:
    """Ten prompts, answered together: read in chunks, decoded in one batch, from one cache."""
    name, directory = demo
    golden: list[dict[str, Any]] = [
        row for row in json.loads(GOLDEN.read_text(encoding="utf-8")) if row["model"] == name
    ]
    assert [row["prompt"] for row in golden] == prompts(directory)
    loaded = load(directory)
    graphdef, params, config = loaded.graphdef, loaded.params, loaded.config
    longest = max(len(row["prompt"]) for row in golden)
    assert all(longest > kind.window for kind in config.kinds if kind.window is not None)
    with Engine(graphdef, params, max_batch=len(golden), max_context=longest + NUM_TOKENS) as engine:
        answers = engine.generate(Request(row["prompt"], max_tokens=NUM_TOKENS) for row in golden)
    for row, answer in zip(golden, answers, strict=True):
        same = np.equal(answer.tokens, row["continuation"])
        assert same.all(), f"from token {same.argmin()} on; the closest logits are {row['closest']} apart"


@pytest.mark.parity
def test_logits_behind_the_window(demo: tuple[str, Path]) -> None:
    """The last logits of a text longer than Gemma's window, within 1e-5 of the largest."""
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    directory = demo[1]
    tokens = np.array(prompts(directory)[-1:], np.int32)
    loaded = load(directory)
    graphdef, params = loaded.graphdef, loaded.params
    positions = np.arange(tokens.shape[1])[None]
    hidden_btd = jax.jit(forward, static_argnums=0)(
        graphdef, params, tokens, np.zeros_like(tokens), positions
    )
    ours = np.asarray(bound(graphdef, params).unembed(hidden_btd[0, -NUM_COMPARED:]))
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        output = model(torch.from_numpy(tokens.astype(np.int64)), logits_to_keep=NUM_COMPARED)
    theirs = output.logits[0].numpy()
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())
