"""The values that the functions of `api` return."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from middo_jax.data.sources import Rejection
from middo_jax.rundir.rows import SelectionFile
from middo_jax.signals.select import SETS

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

    from middo_jax.evaluation.heldout import HeldoutLoss


@dataclasses.dataclass(frozen=True)
class Scores:
    """What `score` measured.

    Attributes:
      table: one row per sample: the columns of scores.parquet, `id` first (docs/scoring.md), then the
        user's own. A column of the user's whose name is taken has the suffix `_user`.
      embeddings: float32 [n, d], the mean hidden state over each prompt; the table's rows.
      rejected: rows that could not be used, each with its place and the reason.
      passes: what each pass over a model took: seconds, tokens, shapes.
    """

    table: pa.Table
    embeddings: np.ndarray
    rejected: list[Rejection]
    passes: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Selection:
    """What `select` chose.

    Attributes:
      table: that of the scores, and the columns `hard`, `sparse` and `low_quality`: whether a sample is in
        that set; null where the axis has no scores.
      facts: the content of selection.json: thresholds, counts, ids, overlap, how many samples each m selects.
    """

    table: pa.Table
    facts: SelectionFile

    def ids(self, axis: str) -> list[str]:
        """The ids that `complexity`, `diversity` or `quality` selects, in the table's order."""
        if axis not in SETS:
            raise ValueError(f"{axis!r} is none of {', '.join(SETS)}")
        return self.facts["axes"].get(axis, {"ids": []})["ids"]


@dataclasses.dataclass(frozen=True)
class Refined:
    """What `refine` made.

    Attributes:
      merged: the next dataset as a file: the folder's rows with the accepted rewrites.
      rows: one per task of the refiner, those of refined.jsonl.
      usage: requests, tokens and cost by axis.
    """

    merged: Path
    rows: list[dict[str, Any]]
    usage: dict[str, Any]

    @property
    def n_accepted(self) -> int:
        """Rewrites that were accepted."""
        return sum(row["accepted"] for row in self.rows)


@dataclasses.dataclass(frozen=True)
class Trained:
    """What `train` made.

    Attributes:
      checkpoint: a model that `score`, `evaluate`, `export` and `train` take.
      metrics: one row per step, those of metrics.jsonl.
      heldout: the loss on the rows that `data.eval_fraction` held out; None if it held out none.
    """

    checkpoint: Path
    metrics: list[dict[str, Any]]
    heldout: HeldoutLoss | None


@dataclasses.dataclass(frozen=True)
class Exported:
    """What `export` wrote.

    Attributes:
      path: the directory.
      verification: whether transformers computes the same logits, and how near they are, or why that is not
        known. None for an adapter, which is not compared.
    """

    path: Path
    verification: dict[str, Any] | None


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
      path: its folder; README.md says what is in it.
      report: the page for people.
      facts: what `middo status --json` prints: rounds, losses, and the `effects` on the held-out loss.
    """

    path: Path
    report: Path
    facts: dict[str, Any]
