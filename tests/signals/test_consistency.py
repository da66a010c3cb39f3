"""Laws of the axis `consistency`: ranks, deciles, and which fault a sample's worst reading sees."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from middo_jax.config import load
from middo_jax.config.axis_table import BUILT_IN, axis_names, scored_axes
from middo_jax.signals.consistency import FAULTS, NEEDED, consistency, deciles, percentile_rank
from middo_jax.signals.select import select
from middo_jax.signals.table import Measured

N = 200


def columns(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.gamma(2.0, size=N) for name in sorted(NEEDED)}


def test_a_rank_is_the_share_below_and_half_of_the_equal() -> None:
    ranks = percentile_rank(np.array([1, 5, 5, np.nan, 0.5]))
    np.testing.assert_allclose(ranks, [3 / 8, 6 / 8, 6 / 8, np.nan, 1 / 8])
    assert np.isnan(percentile_rank(np.array([np.nan]))).all()
    assert percentile_rank(np.array([7.0])) == [0.5]


def test_deciles_are_of_one_size_and_in_order_and_leave_out_what_is_missing() -> None:
    values = np.random.default_rng(1).permutation(N).astype(float)
    values[:3] = np.nan
    groups = deciles(values)
    assert sorted(np.concatenate(groups).tolist()) == list(range(3, N))
    sizes = [len(group) for group in groups]
    assert max(sizes) - min(sizes) <= 1
    edges = [(values[group].min(), values[group].max()) for group in groups]
    assert edges == sorted(edges)
    assert len(deciles(values[:30])) == 1  # too few for more


@pytest.mark.parametrize("fault", FAULTS)
def test_the_worst_reading_names_the_fault(fault: Any) -> None:
    """A sample that is extreme in one reading is at the top, and of that fault."""
    given = columns()
    given[fault.reading] = given[fault.reading].copy()
    given[fault.reading][7] = 1e6
    found = consistency(given)
    assert found.fault_n[7] == fault.name
    assert found.rank_n[7] >= np.quantile(found.rank_n, 0.85)
    assert ((found.rank_n > 0) & (found.rank_n < 1)).all()


def test_a_missing_reading_is_left_out_and_a_sample_without_any_has_no_rank() -> None:
    given = columns()
    whole = consistency(given)
    for fault in FAULTS:
        given[fault.reading][3] = np.nan
    found = consistency(given)
    assert np.isnan(found.rank_n[3])
    assert found.fault_n[3] is None
    given[FAULTS[0].reading][3] = 1e6
    assert consistency(given).fault_n[3] == FAULTS[0].name
    assert np.isfinite(np.delete(found.rank_n, 3)).all()
    np.testing.assert_allclose(np.delete(found.rank_n, 3), np.delete(whole.rank_n, 3), atol=0.1)


def test_no_order_of_the_samples_changes_a_rank() -> None:
    given, order = columns(), np.random.default_rng(2).permutation(N)
    moved = consistency({name: values[order] for name, values in given.items()})
    np.testing.assert_allclose(moved.rank_n, consistency(given).rank_n[order])


def test_it_is_off_unless_the_settings_say_so() -> None:
    given = ["model.path=m", "data.path=d"]
    assert scored_axes(load(None, given)) == ("complexity", "diversity", "quality")
    assert scored_axes(load(None, [*given, "scoring.readings=[consistency]"])) == axis_names() == BUILT_IN


def test_the_column_the_set_and_the_overlap() -> None:
    given = columns()
    table = Measured(
        [str(i) for i in range(N)],
        np.ones(N, np.int32),
        np.zeros(N, bool),
        loss_post=given["loss_post"],
        loss_unconditional=given["loss_post"] / given["ifd"],
        end_nll=given["end_nll"],
        worst_decile_nll=given["worst_decile_nll"],
        ranked=True,
    ).to_table()
    wanted = consistency(given)
    np.testing.assert_allclose(table["consistency"].to_pylist(), wanted.rank_n, atol=0.02)
    assert set(table["fault"].to_pylist()) == {fault.name for fault in FAULTS}
    config = load(None, ["model.path=m", "data.path=d", "consistency.fraction=0.1"])
    chosen, facts = select(table, config)
    assert set(facts["axes"]) == {"consistency"}
    flagged = np.array(chosen["inconsistent"].to_pylist())
    assert 0 < flagged.sum() <= N / 10
    assert wanted.rank_n[flagged].min() >= np.quantile(wanted.rank_n, 0.85)
