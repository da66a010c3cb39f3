"""Figures of oracle.py: held-out losses of arms and seeds -> recovered shares with intervals. Pure functions.

Axes: s seed, n held-out row, r resample of the bootstrap.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

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
    arms: Mapping[str, Mapping[int, Losses]], seeds: list[int], draws: int
) -> dict[str, np.ndarray]:
    """The mean loss of each arm over resampled seeds and rows, [r + 1] each; the first one is not resampled.

    All arms share the draws, so differences between arms are paired. All seeds have the same weight.

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


def report(
    found: Mapping[str, Mapping[int, Losses]],
    hits: Mapping[str, Mapping[int, Mapping[str, int]]],
    draws: int = RESAMPLES,
) -> tuple[str, dict[str, Any]]:
    """A Markdown table and the same figures for JSON.

    An arm is compared with random at its own budget. Figures use the seeds that the arm, none, all and random
    have in common.

    Args:
      found: held-out losses by arm and seed.
      hits: by arm and seed, the number of chosen rows per fault; "" counts rows without one.
      draws: resamples of the bootstrap.
    """
    head = ("arm", "seeds", "held-out loss", "faulty of chosen", "share of the gap", "times random's")
    lines, figures = [head, ("---",) + ("---:",) * (len(head) - 1)], dict[str, Any]()
    for arm, by_seed in found.items():
        name, at, budget = arm.partition(" at ")
        control = f"random at {budget}" if at and name != "random" else None
        wanted: list[str] = ["none", "all", arm, *([control] if control else [])]
        used = {a: found[a] for a in wanted if a in found}
        seeds = sorted(set.intersection(*(set(losses) for losses in used.values())))
        total = sum(sum(hits[arm][s].values()) for s in seeds)
        faulty = total - sum(hits[arm][s][""] for s in seeds)
        mean = float(np.mean([by_seed[s].mean for s in seeds])) if seeds else float("nan")
        share, times = None, None
        if seeds and {"none", "all"} <= set(used):
            means = resampled(used, seeds, draws)
            gap = means["none"] - means["all"]
            with np.errstate(divide="ignore", invalid="ignore"):
                share = interval((means["none"] - means[arm]) / gap)
                if control is not None and control in used:
                    times = interval((means["none"] - means[arm]) / (means["none"] - means[control]))
        cells = (share if arm not in ("none", "all") else None, times)
        lines.append(
            (
                arm,
                str(len(seeds)),
                f"{mean:.4f}",
                f"{faulty} of {total}",
                *("" if c is None else str(c) for c in cells),
            )
        )
        figures[arm] = {
            "seeds": {str(s): losses.mean for s, losses in by_seed.items()},
            "hits": {str(s): dict(counts) for s, counts in hits[arm].items()},
            "share": share and share._asdict(),
            "times_random": times and times._asdict(),
        }
    return "\n".join("| " + " | ".join(line) + " |" for line in lines), figures
