"""The values that the functions of `api` return."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from middo_jax.config.axis_table import axis_names
from middo_jax.data.sources import Rejection
from middo_jax.rundir.records import PassRow, UsageRow
from middo_jax.rundir.rows import MetricsRow, RefinedRow, SelectionFile

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

    from middo_jax.evaluation.heldout import HeldoutLoss


@dataclasses.dataclass(frozen=True)
class Scores:
    """The result of `score`.

    Attributes:
      table: one row per sample: the columns of scores.parquet, `id` first (docs/scoring.md), then the user's
        own columns. The user's columns get the suffix `_user` if their name is taken.
      embeddings: float32 [n, d], the mean hidden state over each prompt; rows as in the table.
      rejected: rows that could not be used, each with its position and the reason.
      passes: seconds, tokens and shapes of each model pass, by name.
      n_reused: how many samples the folder had the scores of, so that they were not measured.
    """

    table: pa.Table
    embeddings: np.ndarray
    rejected: list[Rejection]
    passes: dict[str, PassRow]
    n_reused: int = 0

    @property
    def reused(self) -> bool:
        """Whether the folder had all of these scores, so that nothing was measured."""
        return 0 < len(self.table) == self.n_reused


@dataclasses.dataclass(frozen=True)
class Selection:
    """The result of `select`.

    Attributes:
      table: the table of scores with one more boolean column per axis (`hard`, `sparse`, `low_quality`, and
        those of registered axes): whether a sample is in that set; null if the axis has no scores.
      facts: the contents of selection.json: thresholds, counts, IDs, overlap, the number of samples for each
        m.
    """

    table: pa.Table
    facts: SelectionFile

    def ids(self, axis: str) -> list[str]:
        """Returns the IDs that an axis, such as `complexity`, selects, in the table's order."""
        if axis not in axis_names():
            raise ValueError(f"{axis!r} is none of {', '.join(axis_names())}")
        return self.facts["axes"].get(axis, {"ids": []})["ids"]


@dataclasses.dataclass(frozen=True)
class Refined:
    """The result of `refine`.

    Attributes:
      merged: the file with the next dataset: the folder's rows with the accepted rewrites.
      rows: the rows of refined.jsonl, one per task of the refiner.
      usage: requests, tokens and cost by axis.
    """

    merged: Path
    rows: list[RefinedRow]
    usage: dict[str, UsageRow]

    @property
    def n_accepted(self) -> int:
        """The number of accepted rewrites."""
        return sum(row["accepted"] for row in self.rows)


@dataclasses.dataclass(frozen=True)
class Trained:
    """The result of `train`.

    Attributes:
      checkpoint: a model for `score`, `evaluate`, `export` and `train`.
      metrics: the rows of metrics.jsonl, one per step.
      heldout: the loss on the rows that `data.eval_fraction` holds out; None without such rows.
    """

    checkpoint: Path
    metrics: list[MetricsRow]
    heldout: HeldoutLoss | None


@dataclasses.dataclass(frozen=True)
class Exported:
    """The result of `export`.

    Attributes:
      path: the directory.
      verification: whether transformers computes the same logits, and their difference, or why they were not
        compared. None for an adapter, which is not compared.
    """

    path: Path
    verification: dict[str, Any] | None


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
      path: its folder; README.md describes the contents.
      report: the page for people.
      facts: the output of `middo status --json`: rounds, losses, and the `effects` on the held-out loss.
    """

    path: Path
    report: Path
    facts: dict[str, Any]
