"""Laws of the options beside the published formulas: how a rating is read, whether length counts as loss."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import logsumexp, softmax
from support.tiny_model import write_tiny_model

from middo_jax.config import ComplexitySettings, Config, DataSettings, Deviations, MeshSettings, ModelSettings
from middo_jax.data.example import Example, Message
from middo_jax.data.tokenize import load_tokenizer
from middo_jax.models import hf
from middo_jax.parallel.mesh import make_mesh
from middo_jax.signals.judge.readout import Readout
from middo_jax.signals.select import at_mean_length, select
from middo_jax.signals.table import Measured
from middo_jax.stages.ratings import Asked, judge


def log_sum(x: np.ndarray) -> np.ndarray:
    return np.asarray(logsumexp(x, axis=-1))


def test_readout_is_its_formula() -> None:
    log_p = np.random.default_rng(0).normal(size=(4, 3, 11)) * 3
    for temperature in (0.5, 1.0, 2.0):
        expected = softmax(log_p / temperature, axis=-1) @ np.arange(11)
        got = Readout(temperature=temperature)(jnp.asarray(log_p))
        np.testing.assert_allclose(got, expected, rtol=1e-5)
        high, low = log_p[..., 6:] / temperature, log_p[..., :5] / temperature
        got = Readout("log_odds", temperature)(jnp.asarray(log_p))
        np.testing.assert_allclose(got, log_sum(high) - log_sum(low), rtol=1e-4, atol=1e-5)
    # A constant, such as what all else is worth, does not count; turned round, the answer is the opposite.
    shifted = Readout("log_odds")(jnp.asarray(log_p) - 7)
    np.testing.assert_allclose(shifted, Readout("log_odds")(jnp.asarray(log_p)), atol=1e-5)
    np.testing.assert_allclose(Readout("log_odds")(jnp.asarray(log_p[..., ::-1])), -shifted, atol=1e-5)


def test_the_judge_reads_as_it_is_told(tmp_path: Path) -> None:
    """Hot, all ratings are alike: 5 is their mean, high and low ones balance. Cold, the likeliest is all."""
    directory, mesh = write_tiny_model(tmp_path / "model"), make_mesh(MeshSettings())
    model = hf.load(directory, mesh=mesh)
    tokenizer = load_tokenizer(directory)
    examples = [Example((Message("user", "Count to two."), Message("assistant", "One, two.")))]

    def rated(readout: Readout) -> np.ndarray:
        return judge(model, Asked.of(examples, tokenizer, 1024), batch_tokens=1024, readout=readout)[0]

    np.testing.assert_allclose(rated(Readout(temperature=1e6)), 5, atol=1e-4)
    np.testing.assert_allclose(rated(Readout("log_odds", 1e6)), 0, atol=1e-4)
    cold = rated(Readout(temperature=1e-4))
    np.testing.assert_allclose(cold, cold.round(), atol=1e-4)


def test_length_is_taken_out() -> None:
    loss, n_tokens = np.array([4.0, 3.0, 2.0, 2.0]), np.array([1.0, 2.0, 4.0, 4.0])
    np.testing.assert_allclose(at_mean_length(loss, n_tokens), 2.75)
    rng = np.random.default_rng(0)
    loss, n_tokens = rng.normal(size=100), rng.integers(1, 500, 100).astype(float)
    adjusted = at_mean_length(loss, n_tokens)
    assert abs(np.corrcoef(adjusted, np.log(n_tokens))[0, 1]) < 1e-10
    assert adjusted.mean() == pytest.approx(loss.mean())
    # Missing ones stay missing and change nothing for the rest; equal lengths change nothing at all.
    more = at_mean_length(np.r_[loss, np.nan], np.r_[n_tokens, 3.0])
    np.testing.assert_allclose(more, np.r_[adjusted, np.nan])
    np.testing.assert_array_equal(at_mean_length(loss, np.full(100, 7.0)), loss)


def test_the_setting_decides_whether_length_counts() -> None:
    """The published formula calls the shortest answer hard; its length explains all of its loss."""
    n_tokens = np.array([1, 8, 16, 32, 32], np.int32)
    loss = 5 - np.log(n_tokens).astype(np.float32) + np.array([0, 0, 0, 0, 0.5], np.float32)
    table = Measured(["a", "b", "c", "d", "e"], n_tokens, np.zeros(5, bool), loss, loss).to_table()
    cases: tuple[tuple[Literal["none", "length"], list[bool]], ...] = (
        ("none", [True, False, False, False, False]),
        ("length", [False, False, False, False, True]),
    )
    for normalise, hard in cases:
        complexity = ComplexitySettings(threshold=Deviations(m=1.0), normalise=normalise)
        config = Config(model=ModelSettings(path="m"), data=DataSettings(path="d"), complexity=complexity)
        assert select(table, config)[0]["hard"].to_pylist() == hard
