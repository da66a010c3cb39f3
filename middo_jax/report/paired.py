"""Held-out losses of several arms and seeds: paired differences with bootstrap intervals. Pure functions.

Axes: s seed, n held-out row, r resample of the bootstrap.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

RESAMPLES = 10_000
LEVEL = 0.95


class Losses(NamedTuple):
    """The held-out losses of one training.

    Attributes:
      nll: [n] sum over the target tokens of each row, in nats.
      n_tokens: [n] target tokens.
    """

    nll: np.ndarray
    n_tokens: np.ndarray

    @property
    def mean(self) -> float:
        """Nats per target token."""
        return float(self.nll.sum() / self.n_tokens.sum())


class Interval(NamedTuple):
    """A figure with its bootstrap interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


def resampled(
    arms: Mapping[str, Mapping[int, Losses]], seeds: Sequence[int], draws: int = RESAMPLES
) -> dict[str, np.ndarray]:
    """The mean loss of each arm over resampled seeds and rows, [r + 1] each; the first one is not resampled.

    Seeds are drawn with replacement, then for each of them held-out rows. All arms share the draws, so
    differences between arms are paired. All seeds have the same weight.

    Args:
      arms: held-out losses by arm and seed; every arm has all seeds.
      seeds: the seeds.
      draws: the number r of resamples.
    """
    rng = np.random.default_rng(0)
    n = {s: len(next(iter(arms.values()))[s].nll) for s in seeds}
    means = {arm: np.empty(draws + 1) for arm in arms}
    for r in range(draws + 1):
        if r == 0:
            drawn = [(s, np.arange(n[s])) for s in seeds]
        else:
            drawn = [(s, rng.integers(n[s], size=n[s])) for s in rng.choice(seeds, len(seeds)).tolist()]
        for arm, losses in arms.items():
            means[arm][r] = np.mean(
                [losses[s].nll[rows].sum() / losses[s].n_tokens[rows].sum() for s, rows in drawn]
            )
    return means


def interval(values_r: np.ndarray) -> Interval:
    """The first value, with the percentiles of the others that enclose LEVEL of them."""
    low, high = np.nanquantile(values_r[1:], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(values_r[0]), float(low), float(high))
