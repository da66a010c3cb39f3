"""Scores -> the hard, sparse and low-quality samples; thresholds from m or from a wanted fraction.

  hard         loss_pre > mean + m std  and  loss_post > mean + m std      (complexity)
  sparse       s < mean - m std, s the mean similarity to the neighbours   (diversity)
  low_quality  q < mean - m std                                           (quality)

Every axis is brought to one number a sample: by how many standard deviations it is worse than the mean. Then
all three select alike, badness > m, and a wanted fraction is a matter of the right m.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import numpy as np
import pyarrow as pa

from middo_jax.config import Config, Deviations, Threshold
from middo_jax.signals.duplicates import count_duplicates
from middo_jax.signals.table import as_floats

SWEEP = tuple(round(0.25 * i, 2) for i in range(13))  # m from 0 to 3
SETS = {"complexity": "hard", "diversity": "sparse", "quality": "low_quality"}
# selection.parquet, one row per sample: which sets it is in, and by how many standard deviations it is worse
# than the mean on each axis. Null where an axis has no scores.
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        *((name, pa.bool_()) for name in SETS.values()),
        *((f"{axis}_z", pa.float32()) for axis in SETS),
    ]
)


@dataclasses.dataclass(frozen=True)
class Standardised:
    """One column of scores, in standard deviations from its mean.

    Attributes:
      z: [n] (score - mean) / std, NaN where the score is missing, 0 where all are equal.
      mean, std: population statistics over the finite scores only; NaN if there is none.
    """

    z: np.ndarray
    mean: float
    std: float

    @classmethod
    def of(cls, scores: np.ndarray) -> Standardised:
        """Standardises [n] scores; missing ones are NaN and never enter the mean."""
        finite = scores[np.isfinite(scores)]
        if not len(finite):
            return cls(np.full(len(scores), np.nan), math.nan, math.nan)
        # Equal scores: their mean may be off by a bit, and all would lie many such "deviations" away.
        mean, std = float(finite.mean()), float(finite.std()) if np.ptp(finite) > 0 else 0.0
        z = np.where(np.isfinite(scores), (scores - mean) / std if std > 0 else 0.0, np.nan)
        return cls(z, mean, std)


@dataclasses.dataclass(frozen=True)
class AxisSelection:
    """What one axis selects.

    Attributes:
      selected: [n] bool.
      badness: [n] standard deviations by which a sample is worse than the mean, NaN where a score is missing.
      facts: the axis's part of selection.json.
    """

    selected: np.ndarray
    badness: np.ndarray
    facts: dict[str, Any]


def select_axis(columns: dict[str, np.ndarray], sign: int, threshold: Threshold) -> AxisSelection:
    """Selects where every column is worse than its mean by more than m standard deviations.

    Args:
      columns: the scores that must all be bad, [n] each, NaN where missing.
      sign: +1 if a high score is bad, -1 if a low one is.
      threshold: m, or the wanted fraction of the samples that have a score.
    """
    scores = {name: Standardised.of(values) for name, values in columns.items()}
    # All of x > mean + m std  <=>  the least of (x - mean) / std > m; NaN wins, as it must.
    badness = np.minimum.reduce([sign * s.z for s in scores.values()])
    known = np.isfinite(badness)
    fraction = None if isinstance(threshold, Deviations) else threshold.fraction
    m = (
        threshold.m
        if isinstance(threshold, Deviations)
        else m_of_fraction(badness[known], threshold.fraction)
    )
    selected = known & (badness > m)
    return AxisSelection(
        selected,
        badness,
        {
            "n_scored": int(known.sum()),
            "n_null": int((~known).sum()),
            "m": _finite(m),
            "fraction": fraction,
            "mean": {name: _finite(s.mean) for name, s in scores.items()},
            "std": {name: _finite(s.std) for name, s in scores.items()},
            "threshold": {name: _finite(s.mean + sign * m * s.std) for name, s in scores.items()},
            "n_selected": int(selected.sum()),
        },
    )


def at_mean_length(loss: np.ndarray, n_tokens: np.ndarray) -> np.ndarray:
    """[n] losses as they would be if all answers had the geometric mean of their lengths.

    The mean loss of a short answer is higher and scatters more: its first tokens are the hardest to foresee.
    What the least-squares line of loss over log length says of a sample's length is taken off its loss.

    loss [4, 3, 2, 2], n_tokens [1, 2, 4, 4]  ->  the line falls by 1 for every doubling; all are 2.75

    Args:
      loss: [n] nats per token, NaN where missing; these stay so.
      n_tokens: [n] targets.
    """
    known = np.isfinite(loss) & (n_tokens > 0)
    length = np.log(np.where(known, n_tokens, 1))
    length -= length[known].mean()
    spread = float(np.sum(length[known] ** 2))
    slope = float(length[known] @ loss[known]) / spread if spread > 0 else 0.0
    return loss - slope * length


def m_of_fraction(badness: np.ndarray, fraction: float) -> float:
    """The m with which `badness > m` selects round(fraction * n) samples, fewer if there are ties.

    badness [3, 1, 2, 0], fraction 0.5  ->  m = 1, which selects 3 and 2
    """
    count = round(fraction * len(badness))
    if count >= len(badness):
        return -math.inf
    return float(np.sort(badness)[::-1][count])


def select(table: pa.Table, config: Config) -> tuple[pa.Table, dict[str, Any]]:
    """The three sets.

    Returns:
      selection.parquet, see SCHEMA, and selection.json: thresholds, counts, ids, overlap, how many samples
      each m would select, and how many have the same prompt as another (None where that was not looked at).
    """
    axes = {
        "complexity": (("loss_pre", "loss_post"), 1, config.complexity.threshold),
        "diversity": (("knn_mean_sim",), -1, config.diversity.threshold),
        "quality": (("quality",), -1, config.quality.threshold),
    }
    ids = np.asarray(table["id"].to_pylist(), object)
    facts: dict[str, Any] = {}
    sweep: dict[str, Any] = {}
    flags: dict[str, np.ndarray] = {}
    columns_of: dict[str, pa.Array] = {"id": pa.array(ids, pa.string())}
    for axis, (names, sign, threshold) in axes.items():
        columns = {name: as_floats(table, name) for name in names}
        if any(np.isnan(values).all() for values in columns.values()):
            continue  # not computed
        if axis == "complexity" and config.complexity.normalise == "length":
            n_tokens = as_floats(table, "n_target_tokens")
            columns = {name: at_mean_length(values, n_tokens) for name, values in columns.items()}
        chosen = select_axis(columns, sign, threshold)
        flags[SETS[axis]] = chosen.selected
        missing = ~np.isfinite(chosen.badness)
        columns_of[SETS[axis]] = pa.array(chosen.selected, pa.bool_())
        columns_of[f"{axis}_z"] = pa.array(chosen.badness, pa.float32(), mask=missing)
        facts[axis] = chosen.facts | {"ids": ids[chosen.selected].tolist()}
        sweep[axis] = [
            {"m": m, "n": int(select_axis(columns, sign, Deviations(m=m)).selected.sum())} for m in SWEEP
        ]
    overlap = {
        f"{a}&{b}": int((flags[a] & flags[b]).sum())
        for a, b in itertools.combinations(SETS.values(), 2)
        if {a, b} <= set(flags)
    }
    if len(flags) == len(SETS):
        overlap["all"] = int(np.logical_and.reduce(list(flags.values())).sum())
    hashes = table["prompt_hash"].drop_null().to_pylist()
    duplicates = count_duplicates(hashes) if hashes else None
    selection = {
        "n": len(table),
        "axes": facts,
        "overlap": overlap,
        "sweep": sweep,
        "duplicates": duplicates,
    }
    none = {f.name: pa.nulls(len(table), f.type) for f in SCHEMA}
    return pa.table([(none | columns_of)[f.name] for f in SCHEMA], schema=SCHEMA), selection


def _finite(x: float) -> float | None:
    return x if math.isfinite(x) else None
