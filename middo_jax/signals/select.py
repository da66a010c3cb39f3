"""Selects the hard, sparse and low-quality samples from scores, by m or by a fraction.

  hard         loss_pre > mean + m std  and  loss_post > mean + m std      (complexity)
  sparse       s < mean - m std, s the mean similarity to the neighbours   (diversity)
  low_quality  q < mean - m std                                           (quality)
  inconsistent r > mean + m std, r the rank of the worst reading          (consistency, if it was scored)

Each axis of `config.axis_table` is reduced to one number per sample, its badness: by how many standard
deviations the sample is worse than the mean. All axes then select badness > m, and a fraction determines m.
"""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pyarrow as pa

from middo_jax.config import Config, Deviations, Threshold
from middo_jax.config.axis_table import BUILT_IN, axes, threshold_of
from middo_jax.rundir.rows import AxisFacts, AxisStatistics, SelectionFile, SweepRow
from middo_jax.rundir.schemas import SELECTED
from middo_jax.rundir.tables import arrow_schema
from middo_jax.signals.axes import scores_of
from middo_jax.signals.duplicates import count_duplicates
from middo_jax.signals.table import as_floats

SWEEP = tuple(round(0.25 * i, 2) for i in range(13))  # m from 0 to 3


def schema() -> pa.Schema:
    """The columns of selection.parquet, one row per sample.

    They are: its sets, and its badness on each axis; null if the axis has no scores. The columns of
    registered axes are the last.
    """
    fields = arrow_schema(SELECTED)
    for row in axes():
        if row.name not in BUILT_IN:
            fields = fields.append(pa.field(row.set_name, pa.bool_()))
            fields = fields.append(pa.field(f"{row.name}_z", pa.float32()))
    return fields


@dataclasses.dataclass(frozen=True)
class Standardised:
    """One column of scores, in standard deviations from its mean.

    Attributes:
      z: [n] (score - mean) / std; NaN if the score is missing, 0 if all scores are equal.
      mean, std: population statistics of the finite scores; NaN if there are none.
    """

    z: np.ndarray
    mean: float
    std: float

    @classmethod
    def of(cls, scores: np.ndarray) -> Standardised:
        """Standardises [n] scores. Missing scores are NaN and do not enter the mean."""
        finite = scores[np.isfinite(scores)]
        if not len(finite):
            return cls(np.full(len(scores), np.nan), math.nan, math.nan)
        # The mean of equal scores may be off by rounding, which would give them a tiny std and large z.
        mean, std = float(finite.mean()), float(finite.std()) if np.ptp(finite) > 0 else 0.0
        z = np.where(np.isfinite(scores), (scores - mean) / std if std > 0 else 0.0, np.nan)
        return cls(z, mean, std)


@dataclasses.dataclass(frozen=True)
class AxisSelection:
    """What one axis selects.

    Attributes:
      selected: [n] bool.
      badness: [n] standard deviations by which a sample is worse than the mean; NaN if a score is missing.
      facts: the axis's part of selection.json, without ids.
    """

    selected: np.ndarray
    badness: np.ndarray
    facts: AxisStatistics


def select_axis(columns: dict[str, np.ndarray], sign: int, threshold: Threshold) -> AxisSelection:
    """Selects samples whose every column is worse than its mean by more than m standard deviations.

    Args:
      columns: the scores that must all be bad, [n] each; NaN if missing.
      sign: +1 if a high score is bad, -1 if a low one is.
      threshold: m, or the fraction of the samples with a score.
    """
    scores = {name: Standardised.of(values) for name, values in columns.items()}
    # All x > mean + m std  <=>  the minimum of (x - mean) / std > m. A NaN makes the minimum NaN, as it must.
    badness = np.minimum.reduce([sign * s.z for s in scores.values()])
    known = np.isfinite(badness)
    fraction = None if isinstance(threshold, Deviations) else threshold.fraction
    m = (
        threshold.m
        if isinstance(threshold, Deviations)
        else m_of_fraction(badness[known], threshold.fraction)
    )
    selected = known & (badness > m)
    facts: AxisStatistics = {
        "n_scored": int(known.sum()),
        "n_null": int((~known).sum()),
        "m": _finite(m),
        "fraction": fraction,
        "mean": {name: _finite(s.mean) for name, s in scores.items()},
        "std": {name: _finite(s.std) for name, s in scores.items()},
        "threshold": {name: _finite(s.mean + sign * m * s.std) for name, s in scores.items()},
        "n_selected": int(selected.sum()),
    }
    return AxisSelection(selected, badness, facts)


def at_mean_length(loss: np.ndarray, n_tokens: np.ndarray) -> np.ndarray:
    """[n] losses, corrected to the geometric mean of all lengths.

    The mean loss of a short answer is higher and varies more, since its first tokens are the hardest to
    predict. The least-squares line of loss over log length gives the part of each loss that is due to length,
    which is subtracted.

    loss [4, 3, 2, 2], n_tokens [1, 2, 4, 4]  ->  the line falls by 1 per doubling; all results are 2.75

    Args:
      loss: [n] nats per token; NaN if missing, which stays NaN.
      n_tokens: [n] number of targets.
    """
    known = np.isfinite(loss) & (n_tokens > 0)
    length = np.log(np.where(known, n_tokens, 1))
    length -= length[known].mean()
    spread = float(np.sum(length[known] ** 2))
    slope = float(length[known] @ loss[known]) / spread if spread > 0 else 0.0
    return loss - slope * length


def m_of_fraction(badness: np.ndarray, fraction: float) -> float:
    """The m for which `badness > m` selects round(fraction * n) samples; fewer with ties.

    badness [3, 1, 2, 0], fraction 0.5  ->  m = 1, which selects 3 and 2
    """
    count = round(fraction * len(badness))
    if count >= len(badness):
        return -math.inf
    return float(np.sort(badness)[::-1][count])


def select(table: pa.Table, config: Config) -> tuple[pa.Table, SelectionFile]:
    """Selects the sets of all axes that have scores.

    Returns:
      The contents of selection.parquet, see `schema`, and of selection.json: thresholds, counts, ids,
      overlap, the number of samples that each m would select, and the number of samples with equal prompts
      (None without prompt hashes).
    """
    ids = np.asarray(table["id"].to_pylist(), object)
    facts: dict[str, AxisFacts] = {}
    sweep: dict[str, list[SweepRow]] = {}
    flags: dict[str, np.ndarray] = {}
    columns_of: dict[str, pa.Array] = {"id": pa.array(ids, pa.string())}
    for row in axes():
        columns = scores_of(table, row)
        if columns is None:
            continue  # not computed
        if row.name == "complexity" and config.complexity.normalise == "length":
            n_tokens = as_floats(table, "n_target_tokens")
            columns = {name: at_mean_length(values, n_tokens) for name, values in columns.items()}
        chosen = select_axis(columns, row.sign, threshold_of(config, row.name))
        flags[row.set_name] = chosen.selected
        missing = ~np.isfinite(chosen.badness)
        columns_of[row.set_name] = pa.array(chosen.selected, pa.bool_())
        columns_of[f"{row.name}_z"] = pa.array(chosen.badness, pa.float32(), mask=missing)
        facts[row.name] = {**chosen.facts, "ids": ids[chosen.selected].tolist()}
        sweep[row.name] = [
            {"m": m, "n": int(select_axis(columns, row.sign, Deviations(m=m)).selected.sum())} for m in SWEEP
        ]
    overlap = {f"{a}&{b}": int((flags[a] & flags[b]).sum()) for a, b in itertools.combinations(flags, 2)}
    if flags.keys() >= {row.set_name for row in axes() if not row.optional}:
        overlap["all"] = int(np.logical_and.reduce(list(flags.values())).sum())
    hashes = table["prompt_hash"].drop_null().to_pylist()
    duplicates = count_duplicates(hashes) if hashes else None
    selection: SelectionFile = {
        "n": len(table),
        "axes": facts,
        "overlap": overlap,
        "sweep": sweep,
        "duplicates": duplicates,
    }
    fields = schema()
    none = {f.name: pa.nulls(len(table), f.type) for f in fields}
    return pa.table([(none | columns_of)[f.name] for f in fields], schema=fields), selection


def _finite(x: float) -> float | None:
    return x if math.isfinite(x) else None
