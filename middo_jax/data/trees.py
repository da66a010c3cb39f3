"""Texts that begin alike, read once: token sequences as tries, and rows of such trees behind a prefix.

A row holds the tokens that all its texts begin with, then one tree after the other, each laid out depth
first: what grows from a position follows it, up to a place that `until` tells (see `packed_attention`).

Axes: b row, t position, n token of a tree.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from middo_jax.data.packing import fill_rows


class Tree(NamedTuple):
    """One or more texts, laid out depth first; all int32.

    Attributes:
      tokens_n: a token stands once for all texts that are equal up to it.
      positions_n: within its texts.
      until_n: place behind the last token that grows from this one.
    """

    tokens_n: np.ndarray
    positions_n: np.ndarray
    until_n: np.ndarray

    @property
    def stem(self) -> int:
        """Tokens that all its texts begin with."""
        return int(np.append(self.until_n == len(self.until_n), False).argmin())

    @classmethod
    def line(cls, tokens_n: np.ndarray) -> Tree:
        """The tree of a single text."""
        n = len(tokens_n)
        return cls(tokens_n, np.arange(n, dtype=np.int32), np.full(n, n, np.int32))


def trie(texts: Sequence[np.ndarray]) -> tuple[Tree, list[int]]:
    """The tree of several texts, and the place of each one's last token.

    [1 2 3], [1 2 4], [1 5]  ->  tokens [1 2 3 4 5], positions [0 1 2 2 1], until [5 4 3 4 5], ends [2 3 4]

    Raises:
      ValueError: a text is empty, or another begins with all of it.
    """
    tokens: list[int] = []
    positions: list[int] = []
    until: list[int] = []
    ends = [0] * len(texts)

    def grow(members: list[int], at: int) -> None:
        """Lays out what the members, equal up to `at`, go on with."""
        children: dict[int, list[int]] = {}
        for i in members:
            if at == len(texts[i]):
                raise ValueError("a text of the tree is empty, or another begins with all of it")
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


def common_prefix(texts: Sequence[np.ndarray]) -> int:
    """How many tokens all texts begin with."""
    shortest = min(map(len, texts), default=0)
    for text in texts[1:]:
        differs_n = text[:shortest] != texts[0][:shortest]
        shortest = int(differs_n.argmax()) if differs_n.any() else shortest
    return shortest


class PackedTrees(NamedTuple):
    """A batch: rows of trees, by their numbers, whose first `prefix` tokens all are the same."""

    trees: Sequence[Tree]
    rows: Sequence[Sequence[int]]
    batch: int
    length: int
    prefix: int

    def fill(self, values: Callable[[int], np.ndarray], padding: int = 0) -> np.ndarray:
        """[b, t] of `values`, an array a tree with a number a token; the prefix is the first tree's."""
        p = self.prefix
        rows = [[values(row[0])[:p], *(values(i)[p:] for i in row)] for row in self.rows]
        return fill_rows(rows, self.batch, self.length, padding)

    def tree_bt(self) -> np.ndarray:
        """int32: which of its row's trees a position is of; -1 in the prefix and in the padding."""
        prefix = np.full(self.prefix, -1, np.int32)
        rows = [
            [prefix, *(np.full(size, s, np.int32) for s, size in enumerate(self.sizes(row)))]
            for row in self.rows
        ]
        return fill_rows(rows, self.batch, self.length, -1)

    def starts(self, row: Sequence[int]) -> np.ndarray:
        """Where each tree's first token would stand in its row, were the prefix its own."""
        return np.cumsum([0, *self.sizes(row)])[:-1]

    def until_bt(self) -> np.ndarray:
        """int32: place in the row behind the last position that sees this one; padding sees itself."""
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
        """Tokens of each tree behind the prefix."""
        return [len(self.trees[i].tokens_n) - self.prefix for i in row]
