"""Several datasets as one: how many rows of each are taken, and which. Pure functions."""

from __future__ import annotations

import random
from collections.abc import Sequence

from middo_jax.config.settings import Source
from middo_jax.data.formats import DataError


def shares(sizes: Sequence[int], sources: Sequence[Source]) -> list[int]:
    """How many usable rows of each source are taken.

    Sources with weights are mixed in the ratio of their weights, with as many rows as that allows. A source
    with neither weight nor count is taken whole.

    sizes [1000, 300], weights 1 and 1  ->  [300, 300];  weights 3 and 1  ->  [900, 300]

    Raises:
      DataError: a source has fewer usable rows than its count.
    """
    for n, source in zip(sizes, sources, strict=True):
        if source.count is not None and source.count > n:
            raise DataError(
                f"{source.path}: data.sources wants {source.count:,} rows of it, and {n:,} can be used; "
                "lower its count"
            )
    weighted = [(n, s.weight) for n, s in zip(sizes, sources, strict=True) if s.weight is not None]
    unit = min((n / weight for n, weight in weighted), default=0.0)  # rows per unit of weight
    return [
        s.count if s.count is not None else n if s.weight is None else min(n, max(1, round(unit * s.weight)))
        for n, s in zip(sizes, sources, strict=True)
    ]


def chosen(n: int, count: int, seed: int, name: str) -> list[int]:
    """`count` of the numbers 0..n-1 in order; which ones depends on the seed and the name only."""
    if count >= n:
        return list(range(n))
    return sorted(random.Random(f"{seed}:{name}").sample(range(n), count))
