"""evaluations.jsonl: the loss on held-out examples as the training goes on, one line an evaluation.

{"step": 50, "loss": 1.31, "n_target_tokens": 5210, "by_source": {"code": {"loss": 0.9, ...}, ...}}
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import jax

from middo_jax.models.model import Model
from middo_jax.rundir import read_jsonl, write_jsonl
from middo_jax.rundir.rows import EvaluationRow, SourceLossRow
from middo_jax.training.hooks import AfterStep
from middo_jax.training.trackers import Track


class Evaluation(NamedTuple):
    """What a model makes of examples that it is not trained on.

    Attributes:
      loss: nats a target token, each weighing the same.
      n_target_tokens: over how many.
      by_source: {"loss", "n_target_tokens"} of each source's examples; empty if they are of one.
    """

    loss: float
    n_target_tokens: int
    by_source: Mapping[str, SourceLossRow]


Evaluate = Callable[[Model], Evaluation]


class Evaluations:
    """evaluations.jsonl, and which of its steps was the best."""

    def __init__(self, path: Path, done: int, track: Track) -> None:
        """`done` steps are done: their lines stay, those of later steps are written again."""
        known = read_jsonl(path) if path.exists() else []
        self._rows: list[EvaluationRow] = [row for row in known if row["step"] <= done]
        self._path = path
        self._track = track

    def evaluate(self, evaluate: Evaluate, at: AfterStep) -> None:
        """Evaluates the model after this step, unless that was done before the training was stopped."""
        if any(row["step"] == at.step for row in self._rows):
            return
        at.settle()
        found = evaluate(at.model())
        self._rows.append(
            {
                "step": at.step,
                "loss": found.loss,
                "n_target_tokens": found.n_target_tokens,
                "by_source": dict(found.by_source),
            }
        )
        if jax.process_index() == 0:
            write_jsonl(self._path, self._rows)
        by_source = {f"heldout/loss/{source}": of["loss"] for source, of in found.by_source.items()}
        self._track(at.step, {"heldout/loss": found.loss, **by_source})

    @property
    def best_step(self) -> int | None:
        """The step after which the held-out loss was the lowest, the first of several; None before any."""
        return min(self._rows, key=lambda row: row["loss"])["step"] if self._rows else None
