"""Held-out loss: the loss on examples that are never trained on, computed from a scoring pass.

Axes: docs/contributing.md#axes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np


class RowLosses(NamedTuple):
    """Summed loss of each of n examples, in order.

    Attributes:
      ids: IDs of the examples.
      nll_n: float64 [n], sum of the negative log-likelihoods of the example's target tokens, in nats.
      n_targets_n: int64 [n], number of the example's target tokens.
    """

    ids: Sequence[str]
    nll_n: np.ndarray
    n_targets_n: np.ndarray


class SourceLoss(NamedTuple):
    """Held-out loss over the examples of one source; see `HeldoutLoss`."""

    loss: float
    n_target_tokens: int


class HeldoutLoss(NamedTuple):
    """Mean negative log-likelihood over all target tokens, with equal weights.

    Attributes:
      loss: nats per target token.
      n_target_tokens: number of target tokens.
      n: number of examples.
      by_source: source -> its loss; empty if there is only one source.
    """

    loss: float
    n_target_tokens: int
    n: int
    by_source: Mapping[str, SourceLoss]


def row_losses(ids: Sequence[str], loss_n: np.ndarray, n_targets_n: np.ndarray) -> RowLosses:
    """Converts the mean losses of a scoring pass to sums; the sum of an example without targets is 0.

    loss [2, nan, 5], targets [3, 0, 1]  ->  sums [6, 0, 5]

    Raises:
      ValueError: no example has a target.
    """
    if not n_targets_n.any():
        raise ValueError(f"held-out loss: none of the {len(ids)} examples has a token to predict")
    nll_n = np.where(n_targets_n > 0, loss_n.astype(np.float64) * n_targets_n, 0.0)
    return RowLosses(ids, nll_n, n_targets_n.astype(np.int64))


def total(rows: RowLosses, sources: Sequence[str] = ()) -> HeldoutLoss:
    """Returns the loss over all rows and, if `sources` (a name per row) has several, of each source."""

    def mean(chosen_n: np.ndarray) -> SourceLoss:
        n_targets = int(rows.n_targets_n[chosen_n].sum())
        return SourceLoss(math.fsum(rows.nll_n[chosen_n]) / n_targets, n_targets)

    names, source_n = sorted(set(sources)), np.asarray(sources)
    of_source = {name: source_n == name for name in names if len(names) > 1}
    by_source = {name: mean(of) for name, of in of_source.items() if rows.n_targets_n[of].any()}
    return HeldoutLoss(*mean(np.ones(len(rows.ids), bool)), len(rows.ids), by_source)
