"""Figures of oracle.py: held-out losses of arms and seeds -> recovered shares with intervals. Pure functions.

Axes: s seed, n held-out row, r resample of the bootstrap.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from middo_jax.report.paired import RESAMPLES, Losses, interval, resampled


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
