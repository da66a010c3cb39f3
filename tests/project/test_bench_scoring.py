"""What benchmarks/scoring.py measures on has the sizes asked for, and its FLOPs are counted right."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest
from support.tiny_model import FAMILIES, write_tiny_model

from benchmarks.scoring_rows import JOINT, SEPARATOR, forward_flops, join_to, log_normal
from middo_jax.data.example import Example, Message
from middo_jax.models.hf import load


def test_joined_rows_have_the_wanted_sizes_and_no_text_twice() -> None:
    """Words for tokens: every row is filled to within the smallest text that was left."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(4, 60, size=400).tolist()
    pool = [
        Example((Message("user", f"q{i}"), Message("assistant", " ".join([f"a{i}"] * (size - 1)))))
        for i, size in enumerate(sizes)
    ]
    targets = [500, 40, 12, 700, 1, 90]
    rows = join_to(pool, sizes, targets)
    used = [int(text[1:]) for row in rows for text in row.prompt.split(SEPARATOR)]
    assert len(used) == len(set(used))
    for row, target in zip(rows, targets, strict=True):
        parts = [int(text[1:]) for text in row.prompt.split(SEPARATOR)]
        assert row.response.split(SEPARATOR) == [pool[i].response for i in parts]
        size = sum(sizes[i] for i in parts) + JOINT * (len(parts) - 1)
        assert target - 4 - JOINT < size <= target or (target < 4 and len(parts) == 1)


def test_too_small_a_pool_is_an_error() -> None:
    pool = [Example((Message("user", "q"), Message("assistant", "a")))]
    with pytest.raises(ValueError, match="too few"):
        join_to(pool, [2], [2, 2])


@pytest.mark.parametrize("count", [100, 200, 1000])
def test_sizes_have_the_median_and_the_percentile(count: int) -> None:
    sizes = log_normal(count, median=33, p99=1567)
    assert np.median(sizes) == pytest.approx(33, rel=0.05)
    assert np.quantile(sizes, 0.99) == pytest.approx(1567, rel=0.1)


@pytest.mark.parametrize("family", ["llama3", "smollm2", "qwen3", "gemma3"])
def test_flops_are_those_of_the_matrices_and_of_every_pair_that_attends(family: str, tmp_path: Path) -> None:
    """Counted off the loaded parameters and off each layer's mask, drawn whole."""
    loaded = load(write_tiny_model(tmp_path / "model", **FAMILIES[family]))
    params, config = loaded.params, loaded.config
    t, targets = 48, 5
    a_token = 2 * sum(x.size for x in jax.tree.leaves(params) if x.ndim == 3)
    distance_tt = np.arange(t)[:, None] - np.arange(t)
    windows = [config.kinds[kind].window or t for kind in config.kind_of_layer or [0] * config.num_layers]
    pairs = sum(int(((distance_tt >= 0) & (distance_tt < window)).sum()) for window in windows)
    # Scores, and what they weigh: a product and a sum each, over every head's width.
    attention = 2 * 2 * config.num_heads * config.head_dim * pairs
    head = 2 * config.vocab_size * config.hidden_size
    assert forward_flops(config, t, targets) == t * a_token + attention + targets * head
