"""The axis `consistency`: one reading per kind of fault, as percentile ranks; the score is the largest rank.

  cut        the answer breaks off              end_nll
  strange    prompt and answer are strangers    ifd
  odd        single tokens are out of place     worst_decile_nll, among samples of about the same loss

A rank among samples of about the same loss or length (`within`) leaves out what follows from those alone.
Axes: docs/contributing.md#axes; c kind of fault.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

GROUPS = 10  # deciles
GROUP_SIZE = 20  # samples that a group has at least; with fewer samples there are fewer groups


class FaultKind(NamedTuple):
    """A kind of fault: the reading that sees it, and the column whose deciles it is ranked within, if any."""

    name: str
    reading: str
    within: str | None = None


FAULTS = (
    FaultKind("cut", "end_nll"),
    FaultKind("strange", "ifd"),
    FaultKind("odd", "worst_decile_nll", within="loss_post"),
)
# The columns that the axis needs; they come with the loss or with the reading `ifd`.
NEEDED = frozenset(column for fault in FAULTS for column in (fault.reading, fault.within) if column)


class Consistency(NamedTuple):
    """What the axis says of n samples.

    Attributes:
      rank_n: float64 in (0, 1): the largest percentile rank; NaN where a sample has no reading.
      fault_n: the name of that fault; None likewise.
    """

    rank_n: np.ndarray
    fault_n: list[str | None]


def consistency(columns: dict[str, np.ndarray]) -> Consistency:
    """Ranks the readings; a missing one (NaN) is left out of its sample's maximum.

    Args:
      columns: those of NEEDED, [n] float64 each.
    """
    rank_cn = np.stack([_rank(columns, fault) for fault in FAULTS])
    known_n = np.asarray(np.isfinite(rank_cn).any(axis=0))
    filled_cn = np.where(np.isfinite(rank_cn), rank_cn, -1.0)
    worst_n = filled_cn.argmax(axis=0)
    pairs = zip(worst_n.tolist(), known_n.tolist(), strict=True)
    fault_n = [FAULTS[f].name if known else None for f, known in pairs]
    return Consistency(np.where(known_n, filled_cn.max(axis=0), np.nan), fault_n)


def _rank(columns: dict[str, np.ndarray], fault: FaultKind) -> np.ndarray:
    reading_n = columns[fault.reading]
    if fault.within is None:
        return percentile_rank(reading_n)
    ranks = np.full(len(reading_n), np.nan)
    for group in deciles(columns[fault.within]):
        ranks[group] = percentile_rank(reading_n[group])
    return ranks


def percentile_rank(values_n: np.ndarray) -> np.ndarray:
    """[n] share of the finite values that are smaller, equal ones and the value itself counting half.

    [1, 5, 5, nan]  ->  [1/6, 4/6, 4/6, nan]
    """
    finite = np.sort(values_n[np.isfinite(values_n)])
    below, upto = (np.searchsorted(finite, values_n, side) for side in ("left", "right"))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(np.isfinite(values_n), (below + upto) / (2 * len(finite)), np.nan)


def deciles(values_n: np.ndarray) -> list[np.ndarray]:
    """Places of the finite values in GROUPS groups of one size, by rising value; fewer if they are few."""
    order = np.argsort(values_n, kind="stable")  # NaN last
    order = order[: int(np.isfinite(values_n).sum())]
    return np.array_split(order, max(1, min(GROUPS, len(order) // GROUP_SIZE)))
