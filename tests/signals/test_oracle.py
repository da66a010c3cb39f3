"""Laws of benchmarks/oracle.py: what each arm repairs, and what its figures say of losses that are known."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.oracle import ARMS, FAULTS, Seed, badness, choose, in_turn, repaired
from benchmarks.oracle_figures import report
from middo_jax.data.example import Example, Message
from middo_jax.report.paired import Losses

N, COUNT = 40, 8


def sample(prompt: str, response: str) -> Example:
    return Example((Message("user", prompt), Message("assistant", response)))


@pytest.fixture(scope="module")
def seed() -> Seed:
    """Rows 0 to 7 have two faults of each kind."""
    clean = [sample(f"p{i}", f"r{i}") for i in range(N)]
    fault = [FAULTS[i // 2] if i < 8 else "" for i in range(N)]
    faulty = [sample(f"p{i}", "bad") if fault[i] else clean[i] for i in range(N)]
    return Seed(3, clean, faulty, fault, [])


@pytest.fixture(scope="module")
def scores() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    names = ("loss_pre", "loss_post", "ifd", "knn_mean_sim", "quality", "n_target_tokens")
    return {name: rng.normal(size=N) for name in names}


def test_repair_replaces_the_chosen_rows_and_no_others(seed: Seed) -> None:
    assert repaired(seed, []) == seed.faulty
    assert repaired(seed, choose("all", 0, seed, {})) == seed.clean
    some = repaired(seed, [0, 5, 20])
    assert [i for i in range(N) if some[i] != seed.faulty[i]] == [0, 5]
    assert some[0] == seed.clean[0]


@pytest.mark.parametrize("arm", [arm for arm in ARMS if arm not in ("none", "all") and "only" not in arm])
def test_an_arm_with_a_budget_chooses_that_many_different_rows(arm: str, seed: Seed, scores) -> None:
    assert len(set(choose(arm, COUNT, seed, scores))) == len(choose(arm, COUNT, seed, scores)) == COUNT


def test_the_worst_rows_are_chosen(seed: Seed, scores: dict[str, np.ndarray]) -> None:
    assert choose("ifd", 1, seed, scores) == [int(scores["ifd"].argmax())]
    assert choose("quality", 1, seed, scores) == [int(scores["quality"].argmin())]
    both = {"loss_pre": np.array([0.0, 9.0, 5.0]), "loss_post": np.array([9.0, 0.0, 5.0])}
    assert badness("complexity", both).argmax() == 2  # bad by both losses
    with_gap = dict(scores, ifd=np.where(np.arange(N) == 4, np.nan, 0.0))
    assert 4 not in choose("ifd", N - 1, seed, with_gap)


def test_the_axes_take_turns() -> None:
    assert in_turn([np.array([0, 1, 2]), np.array([0, 2, 1]), np.array([2, 1, 0])], 3) == [0, 2, 1]


def losses(mean: float) -> Losses:
    rng = np.random.default_rng(1)
    n_tokens = rng.integers(5, 20, size=30)
    noise = rng.normal(size=30)  # equal in all arms: paired differences have none
    return Losses(n_tokens * (mean + noise - (noise * n_tokens).sum() / n_tokens.sum()), n_tokens)


def test_figures_of_known_losses() -> None:
    """none 2.0, all 1.0, random 1.9, loss 1.7: shares 0.1 and 0.3, and loss recovers three times as much."""
    means = {"none": 2.0, "all": 1.0, "random at 10%": 1.9, "loss at 10%": 1.7}
    found = {arm: {s: losses(mean) for s in range(3)} for arm, mean in means.items()}
    hits = {arm: {s: {"": 5, "cut response": 3} for s in range(3)} for arm in means}
    text, figures = report(found, hits, draws=200)
    for arm, share in (("random at 10%", 0.1), ("loss at 10%", 0.3)):
        assert figures[arm]["share"]["value"] == pytest.approx(share)
        assert figures[arm]["share"]["low"] == pytest.approx(share)  # paired: the rows' noise cancels
    assert figures["loss at 10%"]["times_random"]["value"] == pytest.approx(3.0)
    assert "| loss at 10% | 3 | 1.7000 | 9 of 24 |" in text
    assert figures["none"]["share"] == {"value": 0.0, "low": 0.0, "high": 0.0}


def test_an_interval_is_as_wide_as_the_rows_disagree() -> None:
    n_tokens = np.full(50, 10)
    gain = np.random.default_rng(2).normal(1.0, 5.0, size=50)
    found = {
        "none": {0: Losses(np.full(50, 20.0), n_tokens)},
        "all": {0: Losses(np.full(50, 10.0), n_tokens)},
        "loss at 10%": {0: Losses(20.0 - gain, n_tokens)},
    }
    hits = {arm: {0: {"": 1}} for arm in found}
    share = report(found, hits, draws=2000)[1]["loss at 10%"]["share"]
    standard_error = gain.std() / 10 / np.sqrt(50)
    assert share["value"] == pytest.approx(gain.mean() / 10)
    assert share["high"] - share["low"] == pytest.approx(2 * 1.96 * standard_error, rel=0.1)
