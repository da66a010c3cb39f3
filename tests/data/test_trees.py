"""Laws of trees: every text can be read off, each shared token stands once, rows keep trees apart."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from middo_jax.data.trees import PackedTrees, Tree, common_prefix, forest, trie

# A token of its own at the end: no text begins with all of another.
TEXTS = st.lists(st.lists(st.integers(0, 2), max_size=6), min_size=1, max_size=6).map(
    lambda texts: [np.asarray([*text, 100 + i], np.int32) for i, text in enumerate(texts)]
)


def seen_from(place: int, until_n: np.ndarray) -> np.ndarray:
    """The places that a place sees, itself included."""
    return np.flatnonzero((np.arange(len(until_n)) <= place) & (place < until_n))


def test_trie_by_hand() -> None:
    tree, ends = trie([np.asarray(text, np.int32) for text in ([1, 2, 3], [1, 2, 4], [1, 5])])
    assert [column.tolist() for column in tree] == [[1, 2, 3, 4, 5], [0, 1, 2, 2, 1], [5, 4, 3, 4, 5]]
    assert ends == [2, 3, 4]
    assert tree.stem == 1


@given(TEXTS)
def test_what_the_end_of_a_text_sees_is_the_text(texts: list[np.ndarray]) -> None:
    tree, ends = trie(texts)
    for text, end in zip(texts, ends, strict=True):
        seen = seen_from(end, tree.until_n)
        assert np.array_equal(tree.tokens_n[seen], text)
        assert np.array_equal(tree.positions_n[seen], np.arange(len(text)))
    assert len(tree.tokens_n) == len({tuple(t[: n + 1]) for t in texts for n in range(len(t))})
    assert tree.stem == common_prefix(texts)


@pytest.mark.parametrize("texts", [[[]], [[1, 2], [1]], [[3], [3]]])
def test_a_text_within_another_is_refused(texts: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="empty, or is the beginning of another one"):
        trie([np.asarray(text, np.int32) for text in texts])


@given(st.lists(TEXTS, min_size=1, max_size=5), st.integers(0, 3))
def test_rows_keep_trees_apart_and_share_the_prefix(forest: list[list[np.ndarray]], prefix: int) -> None:
    head = np.arange(50, 50 + prefix, dtype=np.int32)
    texts = [[np.r_[head, text] for text in tree] for tree in forest]
    grown = [trie(tree) for tree in texts]
    trees = [tree for tree, _ in grown]
    length = prefix + sum(len(tree.tokens_n) - prefix for tree in trees) + 3
    rows = PackedTrees(trees, [list(range(len(trees))), [0]], 3, length, prefix)
    tokens, positions = rows.fill(lambda i: trees[i].tokens_n), rows.fill(lambda i: trees[i].positions_n)
    until, number = rows.until_bt(), rows.tree_bt()
    for b, row in enumerate(rows.rows):
        for s, (i, start) in enumerate(zip(row, rows.starts(row), strict=True)):
            for text, end in zip(texts[i], grown[i][1], strict=True):
                seen = seen_from(int(start) + end, until[b])
                assert np.array_equal(tokens[b, seen], text)
                assert np.array_equal(positions[b, seen], np.arange(len(text)))
                assert number[b, seen[prefix:]].tolist() == [s] * (len(text) - prefix)
        used = prefix + sum(rows.sizes(row))
        assert (number[b, :prefix] == -1).all()
        assert (number[b, used:] == -1).all()
        assert not any((until[b, :used] > place).any() for place in range(used, length))
    assert {a.dtype for a in (tokens, positions, until, number)} == {np.dtype(np.int32)}


def test_a_line_is_a_text_alone() -> None:
    tree, ends = trie([np.asarray([4, 5, 6], np.int32)])
    assert ends == [2]
    assert all(np.array_equal(a, b) for a, b in zip(tree, Tree.line(tree.tokens_n), strict=True))


def test_a_forest_holds_each_text_once() -> None:
    texts = [np.array(t, np.int32) for t in ([1, 2], [1, 2, 3], [1, 2, 3], [1, 4], [5])]
    tree, places = forest(texts)
    assert tree.tokens_n.tolist() == [1, 2, 3, 4, 5]
    assert tree.positions_n.tolist() == [0, 1, 2, 1, 0]
    assert tree.until_n.tolist() == [4, 3, 3, 4, 5]
    assert [p.tolist() for p in places] == [[0, 1], [0, 1, 2], [0, 1, 2], [0, 3], [4]]


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=1, max_size=12))
def test_in_a_forest_a_token_sees_what_is_before_it_in_its_text(tokens: list[list[int]]) -> None:
    texts = [np.array(t, np.int32) for t in sorted(tokens)]
    tree, places = forest(texts)
    assert len(tree.tokens_n) == len({tuple(t[: n + 1]) for t in tokens for n in range(len(t))})
    for text, place_n in zip(texts, places, strict=True):
        assert tree.tokens_n[place_n].tolist() == text.tolist()
        for i in place_n:
            seen = [j for j in range(i + 1) if tree.until_n[j] > i]
            assert seen == [j for j in place_n if j <= i]
