"""Laws of the neighbour search after an edit: it finds what a search from scratch finds."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from middo_jax.config import MeshSettings
from middo_jax.parallel.mesh import make_mesh
from middo_jax.signals.neighbours import incremental
from middo_jax.signals.neighbours.incremental import Earlier, rows_before, updated_neighbours
from middo_jax.signals.neighbours.nearest import Neighbours
from middo_jax.signals.neighbours.search import nearest_neighbours, neighbours_through

N, K, BLOCK = 60, 3, 7


def ring_of(devices: int) -> Mesh:
    return make_mesh(MeshSettings(), jax.devices()[:devices])


def assert_same(ours: Neighbours, theirs: Neighbours) -> None:
    np.testing.assert_array_equal(ours.index_nj, theirs.index_nj)
    np.testing.assert_allclose(ours.similarity_nj, theirs.similarity_nj, rtol=0, atol=1e-6)


def edited(rng: np.random.Generator, n: int, kind: str) -> list[int]:
    """Names of the samples after an edit; those below n were there before, in their order unless moved."""
    names = list(range(n))
    count = int(rng.integers(1, n // 10 + 2))
    if kind in ("replace", "mixed"):
        for i in rng.choice(n, count, replace=False):
            names[i] = 100 + int(i)
    if kind in ("delete", "mixed"):
        names = [name for name in names if rng.random() > 0.05]
    if kind in ("insert", "mixed"):
        for j in range(count):
            names.insert(int(rng.integers(0, len(names) + 1)), 200 + j)
    if kind == "move":
        names.append(names.pop(n // 2))
    return names


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("with_groups", [False, True])
@pytest.mark.parametrize("kind", ["none", "replace", "delete", "insert", "mixed", "move"])
@pytest.mark.parametrize("exact", [False, True])
def test_an_update_is_a_search_from_scratch(kind: str, with_groups: bool, devices: int, exact: bool) -> None:
    rng = np.random.default_rng([len(kind), with_groups, devices, exact])
    # Signs over 2: products are exact, and most samples have ties for their last neighbour.
    table = rng.choice([-0.5, 0.5], (300, 4)) if exact else rng.standard_normal((300, 12))
    table = table.astype(np.float32)
    table[[3, 205]] = 0  # no direction
    group = rng.integers(0, 40, 300).astype(np.int32)
    mesh = ring_of(devices)

    def search(names: list[int]) -> Neighbours:
        return nearest_neighbours(
            table[names], K, mesh, group_n=group[names] if with_groups else None, block=BLOCK
        )

    before, after = list(range(N)), edited(rng, N, kind)
    earlier = Earlier(search(before), rows_before(after, before))
    updated = updated_neighbours(
        table[after], K, mesh, earlier, group_n=group[after] if with_groups else None, block=BLOCK
    )
    assert_same(updated, search(after))


def test_round_after_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """Updates of updates; and never a whole search for a small edit."""
    rng = np.random.default_rng(7)
    table = rng.standard_normal((400, 10)).astype(np.float32)
    names = list(range(200))
    found = nearest_neighbours(table[names], 2, ring_of(2), block=16)
    scratch = nearest_neighbours
    monkeypatch.setattr(incremental, "nearest_neighbours", None)
    for step in range(4):
        after = [n for n in names if rng.random() > 0.02] + [200 + 10 * step + j for j in range(4)]
        earlier = Earlier(found, rows_before(after, names))
        found = updated_neighbours(table[after], 2, ring_of(2), earlier, block=16)
        assert_same(found, scratch(table[after], 2, ring_of(2), block=16))
        names = after


@pytest.mark.parametrize("n", [1, 2, 4])
def test_fewer_samples_than_neighbours(n: int) -> None:
    table = np.random.default_rng(n).standard_normal((9, 5)).astype(np.float32)
    before, after = list(range(n)), [*range(n), 8]
    earlier = Earlier(nearest_neighbours(table[before], K, ring_of(1)), rows_before(after, before))
    found = updated_neighbours(table[after], K, ring_of(1), earlier)
    assert_same(found, nearest_neighbours(table[after], K, ring_of(1)))


def test_a_small_edit_searches_little() -> None:
    """What is searched is what changed and what lost a neighbour, no more."""
    x = np.random.default_rng(0).standard_normal((100, 8)).astype(np.float32)
    found = nearest_neighbours(x, 2, ring_of(1))
    row_n = np.delete(np.arange(101), [10, 20])
    row_n[-1] = -1  # two deleted, one added
    lost = np.isin(found.index_nj, [10, 20]).any(axis=1)
    expected = np.delete(np.r_[lost, True], [10, 20])
    np.testing.assert_array_equal(Earlier(found, row_n).to_search(), expected)


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("m", [0, 1, 20])
def test_pairs_with_a_chosen_sample(m: int, devices: int) -> None:
    x = np.random.default_rng(m).standard_normal((50, 6)).astype(np.float32)
    x[5] = np.nan
    chosen = np.sort(np.random.default_rng(1).choice(50, m, replace=False))
    found, brought = neighbours_through(x, chosen, K, ring_of(devices), block=BLOCK)
    whole = nearest_neighbours(x, K, ring_of(1))
    assert_same(found, Neighbours(whole.index_nj[chosen], whole.similarity_nj[chosen]))
    # Seen from each sample the others but the chosen ones are of its own group: nobody's neighbours.
    for i in (0, 5, 17, 49):
        group = np.where(np.isin(np.arange(50), chosen), np.arange(50), 99)
        group[i] = 99
        alone = nearest_neighbours(x, K, ring_of(1), group_n=group.astype(np.int32))
        np.testing.assert_array_equal(brought.index_nj[i], alone.index_nj[i])


def test_rows_before() -> None:
    assert rows_before(["a", "x", "c", "b"], ["a", "b", "c"]).tolist() == [0, -1, 2, -1]
    assert rows_before([], ["a"]).tolist() == rows_before([], []).tolist() == []
    assert rows_before(["a"], []).tolist() == [-1]
