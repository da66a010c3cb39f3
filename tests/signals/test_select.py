"""Laws of selection: the formulas of the paper, on finite scores only."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from middo_jax.config import Config, load
from middo_jax.report.terminal import render_selection
from middo_jax.signals.neighbours.nearest import Neighbours
from middo_jax.signals.select import SWEEP, Standardised, m_of_fraction, schema, select
from middo_jax.signals.table import Measured

NAN = float("nan")


def config(*overrides: str) -> Config:
    return load(None, ["model.path=m", "data.path=d", *overrides])


def table_of(
    pre: list[float] | None = None,
    post: list[float] | None = None,
    similarity: list[float] | None = None,
    quality: list[float] | None = None,
) -> Any:
    """A score table with these columns; the six ratings of a sample are all its quality."""
    n = len(next(values for values in (pre, post, similarity, quality) if values is not None))

    def array(values: list[float] | None) -> np.ndarray | None:
        return None if values is None else np.asarray(values, np.float32)

    sims = array(similarity)
    return Measured(
        [f"s{i}" for i in range(n)],
        np.ones(n, np.int32),
        np.zeros(n, bool),
        array(pre),
        array(post),
        None if sims is None else Neighbours(np.zeros((n, 1), np.int32), sims[:, None]),
        None if quality is None else np.repeat(np.asarray(quality, np.float32)[:, None], 6, axis=1),
    ).to_table()


def test_by_hand() -> None:
    # [0 0 0 0 5]: mean 1, std 2; 5 is two deviations above, 0 half a deviation below.
    table, facts = select(
        table_of([0, 0, 0, 0, 5], [5, 0, 0, 0, 5], [5, 5, 5, 5, 0], [0, 5, 5, 5, 5]), config("quality.m=1.9")
    )
    # loss_post: mean 2, std sqrt(6) = 2.449; 5 is 1.22 deviations above.
    assert table["hard"].to_pylist() == [False, False, False, False, True]
    assert table["sparse"].to_pylist() == [False, False, False, False, True]
    assert table["low_quality"].to_pylist() == [True, False, False, False, False]
    assert table["complexity_z"].to_pylist() == pytest.approx([-0.5, *[-2 / 6**0.5] * 3, 3 / 6**0.5])
    assert table["diversity_z"].to_pylist() == [-0.5, -0.5, -0.5, -0.5, 2]
    complexity = facts["axes"]["complexity"]
    assert complexity["mean"] == {"loss_pre": 1.0, "loss_post": 2.0}
    assert complexity["std"] == {"loss_pre": 2.0, "loss_post": pytest.approx(6**0.5)}
    assert complexity["threshold"] == {"loss_pre": 3.0, "loss_post": pytest.approx(2 + 6**0.5)}
    assert facts["axes"]["diversity"]["threshold"] == {"knn_mean_sim": 2.0}
    assert facts["axes"]["quality"]["threshold"] == {"quality": pytest.approx(4 - 1.9 * 2)}
    assert [facts["axes"][axis]["ids"] for axis in ("complexity", "diversity", "quality")] == [
        ["s4"],
        ["s4"],
        ["s0"],
    ]
    assert facts["overlap"] == {"hard&sparse": 1, "hard&low_quality": 0, "sparse&low_quality": 0, "all": 0}
    assert facts["n"] == 5
    assert table.schema == schema()
    assert "hard              1 of 5  m 1.000  loss_pre > 3.0000" in render_selection(facts)


def test_hard_needs_both_losses() -> None:
    table, _ = select(table_of([9, 9, 0, 0, 0, 0, 0, 0], [9, 0, 9, 0, 0, 0, 0, 0]), config())
    assert table["hard"].to_pylist() == [True] + [False] * 7


def test_missing_scores_are_neither_selected_nor_in_a_mean() -> None:
    table, facts = select(table_of(similarity=[NAN, 5, 5, NAN, 5, 5, 0, float("inf")]), config())
    assert table["sparse"].to_pylist() == [False] * 6 + [True, False]
    assert table["diversity_z"].null_count == 3
    assert facts["axes"]["diversity"]["mean"] == {"knn_mean_sim": 4.0}
    assert facts["axes"]["diversity"]["std"] == {"knn_mean_sim": 2.0}
    assert (facts["axes"]["diversity"]["n_scored"], facts["axes"]["diversity"]["n_null"]) == (5, 3)
    # One of two losses missing is enough to not know.
    table, facts = select(table_of([NAN, 0, 0, 0, 9], [9, 0, 0, 0, NAN]), config())
    assert not any(table["hard"].to_pylist())
    assert facts["axes"]["complexity"]["n_null"] == 2


def test_an_axis_that_was_not_computed_is_left_out() -> None:
    table, facts = select(table_of(quality=[5, 5, 5, 5, 0]), config())
    assert table["hard"].to_pylist() == table["sparse"].to_pylist() == [None] * 5
    assert table["complexity_z"].null_count == 5
    assert list(facts["axes"]) == list(facts["sweep"]) == ["quality"]
    assert facts["overlap"] == {}
    # Half of complexity is none of it.
    assert select(table_of(pre=[1, 2, 3]), config())[1]["axes"] == {}
    assert render_selection(select(table_of(pre=[1, 2, 3]), config())[1]) == "no axis has scores"


@pytest.mark.parametrize("value", [0.0, 0.1, 1e30, 1 / 3])
@pytest.mark.parametrize("threshold", ["quality.m=0", "quality.m=0.5", "quality.fraction=0.3"])
def test_equal_scores_select_nothing(value: float, threshold: str) -> None:
    table, _ = select(table_of(quality=[value] * 11), config(threshold))
    assert not any(table["low_quality"].to_pylist())
    assert not Standardised.of(np.full(11, value)).z.any()  # float64 too, whose mean may be off by a bit


@given(st.integers(1, 80), st.floats(0.01, 0.99), st.integers(0, 999))
def test_a_fraction_is_kept(n: int, fraction: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.permutation(n).astype(float)  # without ties
    table, facts = select(table_of(quality=[*scores, NAN]), config(f"quality.fraction={fraction!r}"))
    selected = np.asarray(table["low_quality"].to_pylist())
    assert selected.sum() == round(fraction * n) == facts["axes"]["quality"]["n_selected"]
    assert not selected[-1]
    assert set(scores[selected[:-1]]) == set(range(selected.sum()))  # the lowest


def test_a_fraction_of_hard_samples_is_kept() -> None:
    rng = np.random.default_rng(0)
    pre, post = rng.standard_normal((2, 200))
    _, facts = select(table_of(pre.tolist(), post.tolist()), config("complexity.fraction=0.05"))
    assert facts["axes"]["complexity"]["n_selected"] == 10
    m = facts["axes"]["complexity"]["m"]
    again = select(table_of(pre.tolist(), post.tolist()), config(f"complexity.m={m!r}"))[1]
    assert again["axes"]["complexity"]["ids"] == facts["axes"]["complexity"]["ids"]


def test_m_of_fraction() -> None:
    assert m_of_fraction(np.asarray([3.0, 1, 2, 0]), 0.5) == 1
    assert m_of_fraction(np.asarray([3.0, 1, 2, 0]), 0.99) == -np.inf
    assert m_of_fraction(np.asarray([2.0, 2, 2, 0]), 0.5) == 2  # ties: fewer
    assert m_of_fraction(np.asarray([]), 0.5) == -np.inf


SCORES = st.lists(
    st.tuples(*[st.integers(-40, 40).map(lambda i: i / 8) | st.just(NAN)] * 4), min_size=1, max_size=30
)


@given(SCORES, *[st.floats(-2, 3)] * 3)
def test_selection_is_the_papers_formula(
    rows: list[tuple[float, ...]], hard_m: float, sparse_m: float, low_m: float
) -> None:
    pre, post, similarity, quality = np.asarray(rows, float).T
    assume(not any(np.isnan(x).all() for x in (pre, post, similarity, quality)))

    def bound(x: np.ndarray, m: float) -> float:
        # A score that lies on the threshold up to rounding may fall to either side.
        value = np.nanmean(x) + m * np.nanstd(x)
        assume(not (np.abs(x - value) < 1e-6).any())
        return float(value)

    settings = config(f"complexity.m={hard_m!r}", f"diversity.m={sparse_m!r}", f"quality.m={low_m!r}")
    assume(all(np.nanstd(x) > 0 for x in (pre, post, similarity, quality)))
    table, facts = select(table_of(*(x.tolist() for x in (pre, post, similarity, quality))), settings)
    hard = (pre > bound(pre, hard_m)) & (post > bound(post, hard_m))
    sparse = similarity < bound(similarity, -sparse_m)
    low = quality < bound(quality, -low_m)
    for name, expected in (("hard", hard), ("sparse", sparse), ("low_quality", low)):
        assert table[name].to_pylist() == expected.tolist()
    assert facts["overlap"] == {
        "hard&sparse": (hard & sparse).sum(),
        "hard&low_quality": (hard & low).sum(),
        "sparse&low_quality": (sparse & low).sum(),
        "all": (hard & sparse & low).sum(),
    }
    for points in facts["sweep"].values():
        counts = [point["n"] for point in points]
        assert [point["m"] for point in points] == list(SWEEP)
        assert counts == sorted(counts, reverse=True)


def test_nothing_to_select() -> None:
    table = table_of(quality=[1.0]).slice(0, 0)
    selected, facts = select(table, config())
    assert len(selected) == facts["n"] == 0
