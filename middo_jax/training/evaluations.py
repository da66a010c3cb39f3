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
    """Evaluates every so many steps and after the last; remembers which step was the best."""

    def __init__(
        self, path: Path, evaluate: Evaluate | None, every: int | None, total_steps: int, track: Track
    ) -> None:
        """Without `evaluate` or `every` nothing is ever due."""
        self._path = path
        self._evaluate = evaluate
        self._every = every
        self._total_steps = total_steps
        self._track = track
        self._rows: list[EvaluationRow] = []

    def resume(self, step: int) -> None:
        """Takes up what is known of the steps up to this one; later ones come again."""
        known = read_jsonl(self._path) if self._path.exists() else []
        self._rows = [row for row in known if row["step"] <= step]

    def is_due(self, step: int) -> bool:
        """Whether the state after this step is to be evaluated and was not yet."""
        if self._evaluate is None or self._every is None or step == 0:
            return False
        is_known = any(row["step"] == step for row in self._rows)
        return not is_known and (step % self._every == 0 or step == self._total_steps)

    def run(self, step: int, model: Model) -> None:
        """Evaluates the model after `step`."""
        assert self._evaluate is not None
        found = self._evaluate(model)
        self._rows.append(
            {
                "step": step,
                "loss": found.loss,
                "n_target_tokens": found.n_target_tokens,
                "by_source": dict(found.by_source),
            }
        )
        if jax.process_index() == 0:
            write_jsonl(self._path, self._rows)
        by_source = {f"heldout/loss/{source}": of["loss"] for source, of in found.by_source.items()}
        self._track(step, {"heldout/loss": found.loss, **by_source})

    @property
    def best_step(self) -> int | None:
        """The step after which the held-out loss was the lowest, the first of several; None before any."""
        return min(self._rows, key=lambda row: row["loss"])["step"] if self._rows else None
