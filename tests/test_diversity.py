"""Laws of the neighbour search: blocked, sharded and padded, it is brute force."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from sklearn.neighbors import NearestNeighbors

from middo_jax.config import MeshSettings
from middo_jax.diagnose.diversity import nearest_neighbours
from middo_jax.diagnose.table import Measured
from middo_jax.parallel.mesh import make_mesh


def one_device() -> Mesh:
    return make_mesh(MeshSettings(data=1, fsdp=1, tensor=1), jax.devices()[:1])


def brute_force(x: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Sorts all similarities of each row, in float64; rows without a direction take no part."""
    n = len(x)
    index, similarity = np.full((n, k), -1), np.full((n, k), np.nan)
    with np.errstate(invalid="ignore", divide="ignore"):
        unit = x.astype(np.float64) / np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True)
    usable = np.isfinite(unit).all(axis=1)
    for i in np.flatnonzero(usable):
        others = [j for j in np.flatnonzero(usable) if j != i]
        nearest = sorted(others, key=lambda j: (-(unit[i] @ unit[j]), j))[:k]
        index[i, : len(nearest)] = nearest
        similarity[i, : len(nearest)] = [unit[i] @ unit[j] for j in nearest]
    return index, similarity


CASES = [
    # n, k, query block, candidate block
    (1, 1, 4, 4),
    (2, 1, 4, 4),
    (2, 3, 1, 1),
    (5, 2, 1, 2),
    (5, 5, 3, 2),
    (33, 2, 8, 7),
    (64, 4, 8, 16),
    (101, 3, 1024, 8192),
    (101, 10, 5, 30),
]


@pytest.mark.parametrize("sharded", [False, True], ids=["one device", "eight devices"])
@pytest.mark.parametrize(("n", "k", "query_block", "candidate_block"), CASES)
def test_blocked_is_brute_force(
    n: int, k: int, query_block: int, candidate_block: int, sharded: bool
) -> None:
    rng = np.random.default_rng(n * k)
    x = (rng.standard_normal((n, 12)) * rng.lognormal(0, 3, (n, 1))).astype(np.float32)
    mesh = make_mesh(MeshSettings(data=2, fsdp=2, tensor=2)) if sharded else one_device()
    seen: list[tuple[int, int]] = []
    found = nearest_neighbours(
        x,
        k,
        mesh,
        query_block=query_block,
        candidate_block=candidate_block,
        on_progress=lambda *p: seen.append(p),
    )
    index, similarity = brute_force(x, k)
    np.testing.assert_array_equal(found.index_nk, index)
    np.testing.assert_allclose(found.similarity_nk, similarity, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.mean_similarity(), similarity.mean(axis=1), rtol=1e-5, atol=1e-6)
    assert seen[-1] == (n, n)


def test_it_is_what_scikit_learn_finds() -> None:
    x = np.random.default_rng(0).standard_normal((300, 24)).astype(np.float32)
    distance, index = NearestNeighbors(n_neighbors=5, metric="cosine", algorithm="brute").fit(x).kneighbors()
    found = nearest_neighbours(x, 5, make_mesh(), query_block=16, candidate_block=70)
    np.testing.assert_array_equal(found.index_nk, index)
    np.testing.assert_allclose(found.similarity_nk, 1 - distance, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("candidate_block", [2, 5, 100])
def test_ties_go_to_the_lower_index(candidate_block: int) -> None:
    # Signs over 2: unit vectors whose products are exact, hence equal to the bit.
    x = np.random.default_rng(1).choice([-0.5, 0.5], (40, 4)).astype(np.float32)
    found = nearest_neighbours(x, 6, make_mesh(), query_block=3, candidate_block=candidate_block)
    index, similarity = brute_force(x, 6)
    np.testing.assert_array_equal(found.index_nk, index)
    np.testing.assert_array_equal(found.similarity_nk, similarity)


def test_duplicates_are_each_others_neighbours() -> None:
    x = np.random.default_rng(2).standard_normal((10, 6)).astype(np.float32)
    found = nearest_neighbours(np.concatenate([x, 3 * x]), 1, make_mesh(), candidate_block=6)
    assert found.index_nk[:, 0].tolist() == [*range(10, 20), *range(10)]
    np.testing.assert_allclose(found.similarity_nk, 1, rtol=1e-6)


@pytest.mark.parametrize("block", [2, 100])
def test_rows_without_a_direction_take_no_part(block: int) -> None:
    x = np.random.default_rng(3).standard_normal((12, 5)).astype(np.float32)
    x[[0, 4]] = 0
    x[5, 2], x[11, 0] = np.nan, np.inf
    found = nearest_neighbours(x, 2, make_mesh(), query_block=block, candidate_block=block)
    index, similarity = brute_force(x, 2)
    np.testing.assert_array_equal(found.index_nk, index)
    np.testing.assert_allclose(found.similarity_nk, similarity, rtol=1e-5, atol=1e-6)
    assert not np.isin([0, 4, 5, 11], found.index_nk).any()
    assert np.isnan(found.mean_similarity()[[0, 4, 5, 11]]).all()


@pytest.mark.parametrize(
    "x", [np.zeros((0, 4)), np.zeros((3, 4)), np.full((2, 4), np.nan)], ids=["none", "zero", "nan"]
)
def test_nothing_to_find(x: np.ndarray) -> None:
    found = nearest_neighbours(x.astype(np.float32), 2, make_mesh())
    assert found.index_nk.shape == found.similarity_nk.shape == (len(x), 2)
    assert (found.index_nk == -1).all()
    assert np.isnan(found.similarity_nk).all()


@pytest.mark.parametrize("n", [0, 1, 2, 4])
def test_the_table_names_neighbours_by_id(n: int) -> None:
    x = np.random.default_rng(4).standard_normal((n, 5)).astype(np.float32)
    found = nearest_neighbours(x, 2, make_mesh())
    ids = [f"row{i}" for i in range(n)]
    table = Measured(ids, np.ones(n, np.int32), np.zeros(n, bool), neighbours=found).to_table().to_pydict()
    for i in range(n):
        others = [j for j in found.index_nk[i] if j >= 0]
        assert table["knn_ids"][i] == [ids[j] for j in others]
        assert len(table["knn_sims"][i]) == len(others) == min(2, n - 1)
        # Fewer neighbours than asked for: no score, and the row says so.
        assert (table["knn_mean_sim"][i] is None) == (n <= 2)
        assert table["error"][i] == ("knn_mean_sim is not finite" if n <= 2 else None)
