"""Hooks: called after the steps that they ask for, with the training as it is then; they change nothing."""

from __future__ import annotations

import dataclasses
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
from support.tiny_training import CHUNK, PACK_LENGTH, SETTINGS, examples, fine_tune, fresh_model, mesh_of

from middo_jax.models.model import Params
from middo_jax.rundir import read_jsonl
from middo_jax.training.hooks import AfterStep, Hook, every, on_metrics
from middo_jax.training.metrics import StepMetrics
from middo_jax.training.plan import PlannedStep, TrainingPlan
from middo_jax.training.sft import train

ONE = mesh_of(1, 1, 1)
PLAN = TrainingPlan(examples(20), SETTINGS, 3, PACK_LENGTH)
LAST = len(PLAN.steps)


def trained(out_dir: Path, *hooks: Hook) -> Params:
    return train(fresh_model(ONE), PLAN, out_dir, chunk=CHUNK, hooks=hooks).params


def test_hooks_see_the_state_of_their_step_and_change_nothing(tmp_path: Path) -> None:
    assert LAST % 3, "the last step must not be a multiple"
    found: dict[str, list[int]] = {"plain": [], "third": [], "third and last": []}
    lines: list[int] = []
    last: list[np.ndarray] = []

    class Plain(Hook):
        def after_step(self, at: AfterStep) -> None:
            found["plain"].append(at.step)

    def third(at: AfterStep) -> None:
        found["third"].append(at.step)
        at.settle()
        lines.append(len(read_jsonl(tmp_path / "hooked" / "metrics.jsonl")))

    def third_and_last(at: AfterStep) -> None:
        found["third and last"].append(at.step)
        last[:] = [np.array(x) for x in jax.tree.leaves(at.model().params)]

    metrics: list[StepMetrics] = []
    hooks = (Plain(), every(3, third), every(3, third_and_last, and_last=True), on_metrics(metrics.append))
    got = trained(tmp_path / "hooked", *hooks)
    thirds = list(range(3, LAST, 3))
    assert found == {"plain": list(range(LAST + 1)), "third": thirds, "third and last": [*thirds, LAST]}
    assert lines == thirds  # settled: the step's own line is there
    assert [m.step for m in metrics] == list(range(1, LAST + 1))
    want = fine_tune(tmp_path / "plain", examples(20), ONE)
    for ours, seen, theirs in zip(jax.tree.leaves(got), last, jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(ours, theirs)
        np.testing.assert_array_equal(seen, theirs)


def test_a_hook_that_raises_while_a_training_is_stopped_does_not_lose_the_step(tmp_path: Path) -> None:
    def stop_then_fail(metrics: StepMetrics) -> None:
        if metrics.step == 2:
            signal.raise_signal(signal.SIGINT)
        if metrics.step == 3:  # read while the training stops
            raise OSError("the disk of the plot is full")

    with pytest.raises(OSError, match="disk of the plot"):
        trained(tmp_path, on_metrics(stop_then_fail))
    assert [p.name for p in (tmp_path / "checkpoint" / "steps").iterdir()] == ["3"]


def test_every_needs_a_step() -> None:
    with pytest.raises(ValueError, match="must be at least 1"):
        every(0, lambda at: None)


def test_a_number_of_steps_takes_the_place_of_the_epochs() -> None:
    """Fewer leave out the last ones; more begin a further epoch, in its own order."""
    steps, n = PLAN.steps, len(PLAN.steps)

    def of(n_steps: int) -> list[PlannedStep]:
        return dataclasses.replace(PLAN, n_steps=n_steps).steps

    assert of(n) == steps
    assert of(n - 1) == steps[:-1]
    longer = of(n + 1)
    assert longer[:n] == steps
    assert longer[n].epoch == SETTINGS.num_epochs
    assert longer[n].rows != steps[0].rows
