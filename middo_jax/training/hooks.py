"""Hooks: functions that are called during a training.

    train(model, plan, "out", chunk=1024, hooks=[every(100, look_at), on_metrics(plot)])

Trackers, evaluation and checkpoints are hooks too; `sft.train` calls them before the caller's. Hooks do not
influence the training. A resumed training calls hooks again for the steps that it repeats and for the state
from which it resumes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from middo_jax.models.model import Model
from middo_jax.training.checkpoint import TrainState
from middo_jax.training.metrics import MetricsLog, StepMetrics
from middo_jax.training.step import StepOutputs


@dataclasses.dataclass(frozen=True)
class AfterStep:
    """A training after one of its steps. The devices may still be computing that step.

    Attributes:
      state: parameters and optimizer state. The next step reuses their memory: read them, but keep no array.
      total_steps: number of steps of the whole training.
      with_state: function that returns the model with the parameters of a state.
      settle: function that waits for the step and writes its line of metrics.jsonl to the disk.
    """

    state: TrainState
    total_steps: int
    with_state: Callable[[TrainState], Model]
    settle: Callable[[], None]

    @property
    def step(self) -> int:
        """Number of steps done; 0 before the first."""
        return self.state.step

    @property
    def is_last(self) -> bool:
        """Whether no step follows."""
        return self.step == self.total_steps

    def model(self) -> Model:
        """The model as it is after this step; valid until the hook returns."""
        return self.with_state(self.state)


class Hook:
    """Base class of hooks; override either method."""

    def after_step(self, at: AfterStep) -> None:
        """Called with the state that the training starts or resumes from, then after each step.

        The step has been dispatched but need not be computed yet. A hook that reads its arrays waits for
        them, and the devices are then idle until the host dispatches the next step.
        """

    def on_metrics(self, metrics: StepMetrics) -> None:
        """Called once per step, after its metrics were read: while the next step is computed."""


class _Every(Hook):
    def __init__(self, n: int, function: Callable[[AfterStep], None], and_last: bool) -> None:
        self._n, self._function, self._and_last = n, function, and_last

    def after_step(self, at: AfterStep) -> None:
        if at.step > 0 and (at.step % self._n == 0 or (self._and_last and at.is_last)):
            self._function(at)


class _OnMetrics(Hook):
    def __init__(self, function: Callable[[StepMetrics], None]) -> None:
        self._function = function

    def on_metrics(self, metrics: StepMetrics) -> None:
        self._function(metrics)


def every(n: int, function: Callable[[AfterStep], None], *, and_last: bool = False) -> Hook:
    """Returns a hook that calls a function after each n-th step.

    Args:
      n: interval in steps; 10 means after steps 10, 20, 30.
      function: called with the training after the step.
      and_last: whether to call it after the last step too, whatever its number.

    Raises:
      ValueError: `n` is less than 1.
    """
    if n < 1:
        raise ValueError(f"every({n}, ...): a hook is called after each n-th step, so n must be at least 1")
    return _Every(n, function, and_last)


def on_metrics(function: Callable[[StepMetrics], None]) -> Hook:
    """Returns a hook that calls a function with the metrics of each step."""
    return _OnMetrics(function)


class Hooks:
    """Calls all hooks of a training in order. A step's metrics are written to metrics.jsonl first."""

    def __init__(
        self,
        hooks: Sequence[Hook],
        log: MetricsLog,
        total_steps: int,
        with_state: Callable[[TrainState], Model],
    ) -> None:
        self._hooks = hooks
        self._log = log
        self._total_steps = total_steps
        self._with_state = with_state

    def dispatched(self, outputs: StepOutputs) -> None:
        """Reads the metrics of the previous step, after a step was dispatched."""
        self.tell(self._log.dispatched(outputs))

    def settle(self) -> None:
        """Waits for the last dispatched step and writes its metrics to the disk."""
        self.tell(self._log.catch_up())

    def after_step(self, state: TrainState) -> None:
        """Calls `after_step` of all hooks, with the state after a dispatched step."""
        at = AfterStep(state, self._total_steps, self._with_state, self.settle)
        for hook in self._hooks:
            hook.after_step(at)

    def tell(self, metrics: StepMetrics | None) -> None:
        """Calls `on_metrics` of all hooks, unless `metrics` is None."""
        if metrics is None:
            return
        for hook in self._hooks:
            hook.on_metrics(metrics)
