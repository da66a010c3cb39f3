"""evaluations.jsonl: the loss on held-out examples during training, one line per evaluation.

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
    """A model's loss on held-out examples.

    Attributes:
      loss: mean over all target tokens, in nats per target token.
      n_target_tokens: number of target tokens.
      by_source: source -> {"loss", "n_target_tokens"}; empty if all examples have the same source.
    """

    loss: float
    n_target_tokens: int
    by_source: Mapping[str, SourceLossRow]


Evaluate = Callable[[Model], Evaluation]


class Evaluations:
    """evaluations.jsonl and its best step."""

    def __init__(self, path: Path, done: int, track: Track) -> None:
        """Keeps the lines of the first `done` steps. Later steps are repeated, so their lines are dropped."""
        known = read_jsonl(path) if path.exists() else []
        self._rows: list[EvaluationRow] = [row for row in known if row["step"] <= done]
        self._path = path
        self._track = track

    def evaluate(self, evaluate: Evaluate, at: AfterStep) -> None:
        """Evaluates the model after this step, unless the file already has a line for the step."""
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
        """The step with the lowest held-out loss; ties go to the earlier step. None before any evaluation."""
        return min(self._rows, key=lambda row: row["loss"])["step"] if self._rows else None
