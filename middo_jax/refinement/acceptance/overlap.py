"""Near-duplicates by their words: the share of word triples that two texts have in common, exactly.

The candidates are the index and the corpus streams past it, so that memory follows the candidates, which are
few, and time follows the corpus' text, read once.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator

N = 3  # words of a shingle: pairs are mostly grammar, and a changed word breaks too many longer ones

# A word, or one sign of a script that is written without spaces.
_TOKEN = re.compile(
    r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff]|[^\W\u3040-\u30ff\u3400-\u9fff]+"
)

Shingles = frozenset[tuple[str, ...]]


def shingles(text: str) -> Shingles:
    """The distinct triples of neighbouring words, case and punctuation aside; a shorter text is one shingle.

    "Name a bird, please." -> {(name, a, bird), (a, bird, please)}
    """
    words = _TOKEN.findall(text.casefold())
    if len(words) < N:
        return frozenset([tuple(words)] if words else [])
    return frozenset(zip(words, words[1:], words[2:], strict=False))


def jaccard(one: Shingles, other: Shingles) -> float:
    """Shingles in common over shingles in all, 0 where both are empty."""
    union = len(one | other)
    return len(one & other) / union if union else 0.0


class Overlaps:
    """Texts by number, asked which of them a further text is a near-duplicate of."""

    def __init__(self, threshold: float) -> None:
        """`threshold`: the `jaccard` from which on two texts count as near-duplicates."""
        self._threshold = threshold
        self._sizes: list[int] = []
        self._holders: defaultdict[tuple[str, ...], list[int]] = defaultdict(list)

    def add(self, text: str) -> None:
        """Takes up a text; its number is how many there were before."""
        own = shingles(text)
        for shingle in own:
            self._holders[shingle].append(len(self._sizes))
        self._sizes.append(len(own))

    def matches(self, text: str) -> Iterator[tuple[int, float]]:
        """(number, jaccard) of the texts that this one is a near-duplicate of, in the order of numbers."""
        own = shingles(text)
        common = Counter(number for shingle in own for number in self._holders.get(shingle, ()))
        for number, shared in sorted(common.items()):
            overlap = shared / (len(own) + self._sizes[number] - shared)
            if overlap >= self._threshold:
                yield number, overlap
