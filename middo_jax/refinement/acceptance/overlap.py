"""Near-duplicates by words: the exact share of word triples that two texts have in common.

The index contains the candidates, which are few, and the corpus is read once. So memory is proportional to
the candidates, and time to the corpus.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator

N = 3  # words per shingle: pairs are mostly grammar, and one changed word affects too many longer shingles

# A word, or one character of a script without spaces.
_TOKEN = re.compile(
    r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff]|[^\W\u3040-\u30ff\u3400-\u9fff]+"
)

Shingles = frozenset[tuple[str, ...]]


def words_of(text: str) -> list[str]:
    """The words of a text without case and punctuation; characters, in a script without spaces."""
    return _TOKEN.findall(text.casefold())


def shingles(text: str) -> Shingles:
    """The distinct triples of consecutive words, without case and punctuation; a shorter text is one shingle.

    "Name a bird, please." -> {(name, a, bird), (a, bird, please)}
    """
    words = words_of(text)
    if len(words) < N:
        return frozenset([tuple(words)] if words else [])
    return frozenset(zip(words, words[1:], words[2:], strict=False))


def jaccard(one: Shingles, other: Shingles) -> float:
    """The Jaccard index: common shingles / all shingles; 0 if both sets are empty."""
    union = len(one | other)
    return len(one & other) / union if union else 0.0


class Overlaps:
    """An index of texts, which finds those of which another text is a near-duplicate."""

    def __init__(self, threshold: float) -> None:
        """`threshold`: the minimum `jaccard` of near-duplicates."""
        self._threshold = threshold
        self._sizes: list[int] = []
        self._holders: defaultdict[tuple[str, ...], list[int]] = defaultdict(list)

    def add(self, text: str) -> None:
        """Adds a text. Its number is the count of the texts before it."""
        own = shingles(text)
        for shingle in own:
            self._holders[shingle].append(len(self._sizes))
        self._sizes.append(len(own))

    def matches(self, text: str) -> Iterator[tuple[int, float]]:
        """(number, jaccard) of the texts of which this one is a near-duplicate, by ascending number."""
        own = shingles(text)
        common = Counter(number for shingle in own for number in self._holders.get(shingle, ()))
        for number, shared in sorted(common.items()):
            overlap = shared / (len(own) + self._sizes[number] - shared)
            if overlap >= self._threshold:
                yield number, overlap
