"""Token sequences with a common beginning as trees, so that a model reads the beginning once.

A row begins with the prefix that all its texts share. Trees follow one after the other, each in depth-first
order: the descendants of a token follow it, and `until` is the index after the last one, see
`packed_attention`.

Axes: docs/contributing.md#axes; here n is a token of a tree.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from middo_jax.data.packing import fill_rows


class Tree(NamedTuple):
    """One or more texts in depth-first order; all arrays int32.

    Attributes:
      tokens_n: texts that are equal up to a token share that token.
      positions_n: the token's position within its texts.
      until_n: index after the token's last descendant.
    """

    tokens_n: np.ndarray
    positions_n: np.ndarray
    until_n: np.ndarray

    @property
    def stem(self) -> int:
        """The number of tokens that all its texts share at the beginning."""
        return int(np.append(self.until_n == len(self.until_n), False).argmin())

    @classmethod
    def line(cls, tokens_n: np.ndarray) -> Tree:
        """The tree of a single text."""
        n = len(tokens_n)
        return cls(tokens_n, np.arange(n, dtype=np.int32), np.full(n, n, np.int32))


def trie(texts: Sequence[np.ndarray]) -> tuple[Tree, list[int]]:
    """The tree of several texts, and the index of the last token of each.

    [1 2 3], [1 2 4], [1 5]  ->  tokens [1 2 3 4 5], positions [0 1 2 2 1], until [5 4 3 4 5], ends [2 3 4]

    Raises:
      ValueError: a text is empty, or is the beginning of another one.
    """
    tokens: list[int] = []
    positions: list[int] = []
    until: list[int] = []
    ends = [0] * len(texts)

    def grow(members: list[int], at: int) -> None:
        """Appends the continuations of the members, which are equal up to `at`."""
        children: dict[int, list[int]] = {}
        for i in members:
            if at == len(texts[i]):
                raise ValueError("a text of the tree is empty, or is the beginning of another one")
            children.setdefault(int(texts[i][at]), []).append(i)
        for child in children.values():
            alike = [texts[i] for i in child]
            stop = common_prefix(alike)
            first = len(tokens)
            tokens.extend(alike[0][at:stop].tolist())
            positions.extend(range(at, stop))
            until.extend([0] * (stop - at))
            if len(child) > 1:
                grow(child, stop)
            else:
                ends[child[0]] = len(tokens) - 1
            until[first : first + stop - at] = [len(tokens)] * (stop - at)

    grow(list(range(len(texts))), 0)
    return Tree(*(np.asarray(column, np.int32) for column in (tokens, positions, until))), ends


def forest(texts: Sequence[np.ndarray]) -> tuple[Tree, list[np.ndarray]]:
    """One tree, or several side by side, of any texts; and the places of each text's tokens in it.

    Neighbours share their common beginning, so sorted texts share most. Unlike in `trie`, a text may equal
    another one or be its beginning, and the texts need not begin alike.

    [1 2], [1 2 3], [1 4], [5]  ->  tokens [1 2 3 4 5], positions [0 1 2 1 0], until [4 3 3 4 5],
                                    places [0 1], [0 1 2], [0 3], [4]
    """
    tokens: list[int] = []
    positions: list[int] = []
    until: list[int] = []
    places: list[np.ndarray] = []
    path: list[int] = []  # the places of the last text
    last = np.zeros(0, np.int32)
    for text in texts:
        shared = common_prefix([last, text])
        for place in path[shared:]:
            until[place] = len(tokens)
        new = len(text) - shared
        path = [*path[:shared], *range(len(tokens), len(tokens) + new)]
        tokens.extend(text[shared:].tolist())
        positions.extend(range(shared, len(text)))
        until.extend([0] * new)
        places.append(np.asarray(path, np.int32))
        last = text
    for place in path:
        until[place] = len(tokens)
    return Tree(*(np.asarray(column, np.int32) for column in (tokens, positions, until))), places


def common_prefix(texts: Sequence[np.ndarray]) -> int:
    """The number of tokens that all texts share at the beginning."""
    shortest = min(map(len, texts), default=0)
    for text in texts[1:]:
        differs_n = text[:shortest] != texts[0][:shortest]
        shortest = int(differs_n.argmax()) if differs_n.any() else shortest
    return shortest


class PackedTrees(NamedTuple):
    """A batch: rows of trees, given as indices into `trees`.

    The first `prefix` tokens of all trees are equal.
    """

    trees: Sequence[Tree]
    rows: Sequence[Sequence[int]]
    batch: int
    length: int
    prefix: int

    def fill(self, values: Callable[[int], np.ndarray], padding: int = 0) -> np.ndarray:
        """[b, t] of `values`, which returns an array with one number per token of a tree."""
        p = self.prefix
        rows = [[values(row[0])[:p], *(values(i)[p:] for i in row)] for row in self.rows]
        dtype = None if rows else values(0).dtype  # a part of a batch may be padding only
        return fill_rows(rows, self.batch, self.length, padding, dtype)

    def tree_bt(self) -> np.ndarray:
        """int32: the number of each position's tree within its row; -1 in the prefix and in the padding."""
        prefix = np.full(self.prefix, -1, np.int32)
        rows = [
            [prefix, *(np.full(size, s, np.int32) for s, size in enumerate(self.sizes(row)))]
            for row in self.rows
        ]
        return fill_rows(rows, self.batch, self.length, -1)

    def starts(self, row: Sequence[int]) -> np.ndarray:
        """The index in the row at which each tree would start if it had the prefix to itself."""
        return np.cumsum([0, *self.sizes(row)])[:-1]

    def until_bt(self) -> np.ndarray:
        """int32: index after the last position that attends to this one; padding attends to itself."""
        rows = []
        for row in self.rows:
            starts, end = self.starts(row), self.prefix + sum(self.sizes(row))
            shifted = [
                (self.trees[i].until_n[self.prefix :] + start).astype(np.int32)
                for i, start in zip(row, starts, strict=True)
            ]
            rows.append([np.full(self.prefix, end, np.int32), *shifted])
        itself_t = np.arange(1, self.length + 1, dtype=np.int32)
        return np.maximum(fill_rows(rows, self.batch, self.length, 0), itself_t)

    def sizes(self, row: Sequence[int]) -> list[int]:
        """The number of tokens of each tree after the prefix."""
        return [len(self.trees[i].tokens_n) - self.prefix for i in row]
