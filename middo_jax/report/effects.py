"""Two separate effects on the held-out loss: that of fine-tuning, and that of the rounds.

The effect of fine-tuning is the loss of round_00's model (trained on the seed data) minus that of the
base model. The effect of the rounds is the loss of the final model minus that of round_00's model. A negative
effect is an improvement.
Axes: docs/contributing.md#axes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow.lib
import pyarrow.parquet as pq

from middo_jax.rundir import RunDir, RunError
from middo_jax.rundir.schemas import HELDOUT_ROWS
from middo_jax.rundir.tables import refuse_newer

EFFECTS = {"rounds": ("round_00", "final"), "fine_tuning": ("base", "round_00")}  # name: (before, after)
RESAMPLES = 10_000
LEVEL = 0.95
SEED = 0
_MAX_DRAWS = 100_000_000  # takes about a second; with more than 10,000 rows there are fewer resamples
_MIN_RESAMPLES = 1_000


@dataclasses.dataclass(frozen=True)
class Effect:
    """A difference between the held-out losses of two models, in nats per target token.

    Attributes:
      before, after: the models' names.
      loss_before, loss_after: their losses.
      change: loss_after - loss_before.
      interval: 95 % interval of `change`; None if it cannot be computed.
      reason: why there is no interval; None if there is one.
      n_rows: number of held-out rows with a target; None without an interval.
    """

    before: str
    after: str
    loss_before: float
    loss_after: float
    change: float
    interval: tuple[float, float] | None
    reason: str | None
    n_rows: int | None

    @property
    def verdict(self) -> str | None:
        """Whether the change is better, worse or not shown, by its interval; None without an interval."""
        if self.interval is None:
            return None
        low, high = self.interval
        return "better" if high < 0 else "worse" if low > 0 else "no effect shown"

    def to_json(self) -> dict[str, Any]:
        """All attributes and the verdict as JSON values."""
        interval = list(self.interval) if self.interval else None
        return dataclasses.asdict(self) | {"interval": interval, "verdict": self.verdict}


def effects(run: RunDir, models: Sequence[Mapping[str, Any]]) -> dict[str, Effect | None]:
    """Both effects by name, see EFFECTS; None if one of the two losses is unknown.

    Args:
      run: the run's folder; the intervals are computed from its heldout_rows.parquet.
      models: {"name", "loss"} of each model, as in heldout_losses.json.

    Raises:
      RunError: heldout_rows.parquet cannot be read.
    """
    losses = {m["name"]: m["loss"] for m in models if m["loss"] is not None}
    rows = _read_row_losses(run) if losses else None
    return {
        name: _effect(before, after, losses, rows) if before in losses and after in losses else None
        for name, (before, after) in EFFECTS.items()
    }


def _effect(before: str, after: str, losses: Mapping[str, float], rows: _RowLosses | None) -> Effect:
    reason, interval, n_rows = _obstacle(before, after, losses, rows), None, None
    if rows is not None and reason is None:
        pairs = [(*rows[before][id_], rows[after][id_][0]) for id_ in rows[before]]
        nll_before_n, targets_n, nll_after_n = (np.array(c, np.float64) for c in zip(*pairs, strict=True))
        interval = bootstrap(nll_before_n, nll_after_n, targets_n)
        n_rows = int((targets_n > 0).sum()) if interval else None
        reason = None if interval else "fewer than two held-out rows"
    change = losses[after] - losses[before]
    return Effect(before, after, losses[before], losses[after], change, interval, reason, n_rows)


def _obstacle(before: str, after: str, losses: Mapping[str, float], rows: _RowLosses | None) -> str | None:
    """Why no interval can be computed from the rows; None if it can."""
    if rows is None:
        return "the run has no losses per row (heldout_rows.parquet)"
    if before not in rows or after not in rows or rows[before].keys() != rows[after].keys():
        return f"heldout_rows.parquet does not have the same rows for {before} and {after}"
    for name in (before, after):
        nll, n_targets = (math.fsum(column) for column in zip(*rows[name].values(), strict=True))
        if not math.isclose(nll, losses[name] * n_targets, rel_tol=1e-6):
            return f"heldout_rows.parquet and heldout_losses.json disagree on {name}"
    return None


def bootstrap(
    nll_before_n: np.ndarray, nll_after_n: np.ndarray, n_targets_n: np.ndarray, seed: int = SEED
) -> tuple[float, float] | None:
    """The 95 % percentile interval of sum(nll_after - nll_before) / sum(n_targets) over resampled rows.

    Each resample draws n rows with replacement. A row has both of its losses (the bootstrap is paired) and
    its number of targets, so long rows have more weight, as in the held-out loss. The interval covers the
    choice of held-out rows. It does not cover the randomness of training.

    Args:
      nll_before_n: float [n], sum of each row's losses under the first model.
      nll_after_n: float [n], sum of each row's losses under the second model.
      n_targets_n: [n], number of target tokens of each row; rows without targets are left out.
      seed: of the resampling.

    Returns:
      (low, high); None for fewer than two rows with a target.
    """
    has_targets = n_targets_n > 0
    change_n = (nll_after_n - nll_before_n)[has_targets]
    weight_n = n_targets_n[has_targets].astype(np.float64)
    n = change_n.size
    if n < 2:
        return None
    rng = np.random.default_rng(seed)
    count = min(RESAMPLES, max(_MIN_RESAMPLES, _MAX_DRAWS // n))
    at_once = max(1, 2**20 // n)  # 8 MB of indices
    found = []
    for start in range(0, count, at_once):
        drawn = rng.integers(n, size=(min(at_once, count - start), n))
        found.append(change_n[drawn].sum(axis=1) / weight_n[drawn].sum(axis=1))
    low, high = np.quantile(np.concatenate(found), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


_RowLosses = Mapping[str, Mapping[str, tuple[float, int]]]  # model: id: (sum of losses, target tokens)


def _read_row_losses(run: RunDir) -> _RowLosses | None:
    """heldout_rows.parquet; None for an older run, which does not have the file."""
    path = run.heldout_rows
    if not path.exists():
        return None
    found: dict[str, dict[str, tuple[float, int]]] = {}
    try:
        table = pq.read_table(path, columns=["model", "id", "nll", "n_target_tokens"])
    except (pyarrow.lib.ArrowException, OSError) as e:
        raise RunError(f"{path}: not a table of held-out losses ({e}); delete it") from e
    refuse_newer(table.schema, HELDOUT_ROWS, path)
    for row in table.to_pylist():
        found.setdefault(row["model"], {})[row["id"]] = (row["nll"], row["n_target_tokens"])
    return found


def effect_lines(found: Mapping[str, Mapping[str, Any] | None]) -> list[str]:
    """One line per known effect, for a terminal; fine-tuning comes first.

    Args:
      found: the JSON values of both effects by name, as `status` returns them.
    """
    titles = {"fine_tuning": "effect of fine-tuning", "rounds": "effect of the rounds"}
    lines = []
    for name, title in titles.items():
        if (effect := found[name]) is None:
            continue
        line = f"{title} ({effect['before']} to {effect['after']}): {effect['change']:+.4f} nats per token"
        if effect["interval"] is None:
            lines.append(f"{line}, no interval: {effect['reason']}")
        else:
            low, high = effect["interval"]
            lines.append(f"{line}, 95 % interval {low:+.4f} to {high:+.4f}: {effect['verdict']}")
    return lines
