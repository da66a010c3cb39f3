"""Laws of the neighbour search: blocked, sharded and padded, it is brute force."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from sklearn.neighbors import NearestNeighbors

from middo_jax.config import MeshSettings
from middo_jax.parallel.mesh import make_mesh
from middo_jax.signals.duplicates import groups
from middo_jax.signals.neighbours.search import nearest_neighbours
from middo_jax.signals.table import Measured


def ring_of(devices: int) -> Mesh:
    return make_mesh(MeshSettings(), jax.devices()[:devices])


def brute_force(x: np.ndarray, k: int, group: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Sorts all similarities of each row, in float64; rows without a direction take no part."""
    n = len(x)
    group = np.arange(n) if group is None else group
    index, similarity = np.full((n, k), -1), np.full((n, k), np.nan)
    with np.errstate(invalid="ignore", divide="ignore"):
        unit = x.astype(np.float64) / np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True)
    usable = np.isfinite(unit).all(axis=1)
    for i in np.flatnonzero(usable):
        others = [j for j in np.flatnonzero(usable) if group[j] != group[i]]
        nearest = sorted(others, key=lambda j: (-(unit[i] @ unit[j]), j))[:k]
        index[i, : len(nearest)] = nearest
        similarity[i, : len(nearest)] = [unit[i] @ unit[j] for j in nearest]
    return index, similarity


CASES = [
    # n, k, block
    (1, 1, 4),
    (2, 1, 4),
    (2, 3, 1),
    (5, 2, 1),
    (5, 5, 3),
    (33, 2, 7),
    (64, 4, 8),
    (101, 3, 1024),
    (101, 10, 5),
]


@pytest.mark.parametrize("devices", [1, 2, 3])
@pytest.mark.parametrize(("n", "k", "block"), CASES)
def test_blocked_is_brute_force(n: int, k: int, block: int, devices: int) -> None:
    rng = np.random.default_rng(n * k)
    x = (rng.standard_normal((n, 12)) * rng.lognormal(0, 3, (n, 1))).astype(np.float32)
    seen: list[tuple[int, int]] = []
    found = nearest_neighbours(
        x,
        k,
        ring_of(devices),
        block=block,
        on_progress=lambda *p: seen.append(p),
    )
    index, similarity = brute_force(x, k)
    np.testing.assert_array_equal(found.index_nj, index)
    np.testing.assert_allclose(found.similarity_nj, similarity, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.mean_similarity(), similarity.mean(axis=1), rtol=1e-5, atol=1e-6)
    assert seen[-1] == (n, n)


def test_axes_of_the_mesh_change_nothing() -> None:
    x = np.random.default_rng(0).standard_normal((50, 6)).astype(np.float32)
    cube = make_mesh(MeshSettings(data=2, fsdp=2, tensor=2))
    for name, array in nearest_neighbours(x, 3, cube, block=4)._asdict().items():
        np.testing.assert_allclose(array, getattr(nearest_neighbours(x, 3, ring_of(1)), name), rtol=1e-6)


@pytest.mark.parametrize("devices", [1, 2, 5])
@pytest.mark.parametrize("m", [0, 1, 17])
def test_queries_that_are_no_samples(m: int, devices: int) -> None:
    """They see every sample: what brute force finds in both, if the others are left out."""
    x = np.random.default_rng(5).standard_normal((23 + m, 7)).astype(np.float32)
    dataset, queries = x[:23], x[23:]
    found = nearest_neighbours(dataset, 4, ring_of(devices), query_qd=queries, block=3)
    group = np.r_[np.arange(23), np.full(m, 99)]
    index, similarity = brute_force(x, 4, group)
    np.testing.assert_array_equal(found.index_nj, index[23:])
    np.testing.assert_allclose(found.similarity_nj, similarity[23:], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("devices", [1, 4])
def test_one_of_a_group_is_no_neighbour_of_another(devices: int) -> None:
    rng = np.random.default_rng(6)
    x = rng.standard_normal((40, 5)).astype(np.float32)
    keys = ["abcdefghijkl"[i] for i in rng.integers(0, 12, 40)]
    group = groups(keys)
    assert all((group[i] == group[j]) == (keys[i] == keys[j]) for i in range(40) for j in range(40))
    assert [keys[i] for i in group] == keys
    found = nearest_neighbours(x, 3, ring_of(devices), group_n=group, block=4)
    index, similarity = brute_force(x, 3, group)
    np.testing.assert_array_equal(found.index_nj, index)
    np.testing.assert_allclose(found.similarity_nj, similarity, rtol=1e-5, atol=1e-6)


def test_it_is_what_scikit_learn_finds() -> None:
    x = np.random.default_rng(0).standard_normal((300, 24)).astype(np.float32)
    distance, index = NearestNeighbors(n_neighbors=5, metric="cosine", algorithm="brute").fit(x).kneighbors()
    found = nearest_neighbours(x, 5, make_mesh(), block=16)
    np.testing.assert_array_equal(found.index_nj, index)
    np.testing.assert_allclose(found.similarity_nj, 1 - distance, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("devices", [1, 2, 8])
@pytest.mark.parametrize("block", [2, 5, 100])
def test_ties_go_to_the_lower_index(block: int, devices: int) -> None:
    # Signs over 2: unit vectors whose products are exact, hence equal to the bit.
    x = np.random.default_rng(1).choice([-0.5, 0.5], (40, 4)).astype(np.float32)
    found = nearest_neighbours(x, 6, ring_of(devices), block=block)
    index, similarity = brute_force(x, 6)
    np.testing.assert_array_equal(found.index_nj, index)
    np.testing.assert_array_equal(found.similarity_nj, similarity)


def test_duplicates_are_each_others_neighbours() -> None:
    x = np.random.default_rng(2).standard_normal((10, 6)).astype(np.float32)
    found = nearest_neighbours(np.concatenate([x, 3 * x]), 1, make_mesh(), block=3)
    assert found.index_nj[:, 0].tolist() == [*range(10, 20), *range(10)]
    np.testing.assert_allclose(found.similarity_nj, 1, rtol=1e-6)


@pytest.mark.parametrize("block", [2, 100])
def test_rows_without_a_direction_take_no_part(block: int) -> None:
    x = np.random.default_rng(3).standard_normal((12, 5)).astype(np.float32)
    x[[0, 4]] = 0
    x[5, 2], x[11, 0] = np.nan, np.inf
    found = nearest_neighbours(x, 2, make_mesh(), block=block)
    index, similarity = brute_force(x, 2)
    np.testing.assert_array_equal(found.index_nj, index)
    np.testing.assert_allclose(found.similarity_nj, similarity, rtol=1e-5, atol=1e-6)
    assert not np.isin([0, 4, 5, 11], found.index_nj).any()
    assert np.isnan(found.mean_similarity()[[0, 4, 5, 11]]).all()


@pytest.mark.parametrize(
    "x", [np.zeros((0, 4)), np.zeros((3, 4)), np.full((2, 4), np.nan)], ids=["none", "zero", "nan"]
)
def test_nothing_to_find(x: np.ndarray) -> None:
    found = nearest_neighbours(x.astype(np.float32), 2, make_mesh())
    assert found.index_nj.shape == found.similarity_nj.shape == (len(x), 2)
    assert (found.index_nj == -1).all()
    assert np.isnan(found.similarity_nj).all()


@pytest.mark.parametrize("n", [0, 1, 2, 4])
def test_the_table_names_neighbours_by_id(n: int) -> None:
    x = np.random.default_rng(4).standard_normal((n, 5)).astype(np.float32)
    found = nearest_neighbours(x, 2, make_mesh())
    ids = [f"row{i}" for i in range(n)]
    table = Measured(ids, np.ones(n, np.int32), np.zeros(n, bool), neighbours=found).to_table().to_pydict()
    for i in range(n):
        others = [j for j in found.index_nj[i] if j >= 0]
        assert table["knn_ids"][i] == [ids[j] for j in others]
        assert len(table["knn_sims"][i]) == len(others) == min(2, n - 1)
        # Fewer neighbours than asked for: no score, and the row says so.
        assert (table["knn_mean_sim"][i] is None) == (n <= 2)
        assert table["error"][i] == ("knn_mean_sim is not finite" if n <= 2 else None)
