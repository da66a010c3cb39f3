"""Hooks that save checkpoints."""

from __future__ import annotations

from middo_jax.training.checkpoint import TrainingCheckpoints
from middo_jax.training.evaluations import Evaluations
from middo_jax.training.hooks import AfterStep, Hook, every


def save_every(n: int, checkpoints: TrainingCheckpoints) -> Hook:
    """Saves after each n-th step except the last, whose state `TrainingCheckpoints.finish` saves."""

    def save(at: AfterStep) -> None:
        if not at.is_last:
            _save(checkpoints, at)

    return every(n, save)


class KeepBest(Hook):
    """Saves and keeps the state with the lowest held-out loss. Must be called after the evaluation's hook."""

    def __init__(self, checkpoints: TrainingCheckpoints, evaluations: Evaluations) -> None:
        self._checkpoints = checkpoints
        self._evaluations = evaluations

    def after_step(self, at: AfterStep) -> None:
        """Saves this state if it is the best so far."""
        best = self._evaluations.best_step
        self._checkpoints.keep_best(best)
        if best == at.step:
            _save(self._checkpoints, at)


def _save(checkpoints: TrainingCheckpoints, at: AfterStep) -> None:
    at.settle()  # so that metrics.jsonl has the lines of all steps up to the checkpoint
    checkpoints.save(at.state)
