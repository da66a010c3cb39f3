"""Hooks: what happens beside the steps of a training.

    train(model, plan, "out", chunk=1024, hooks=[every(100, look_at), on_metrics(plot)])

Trackers, evaluation and checkpoints are hooks too (`sft.train` puts them before the caller's). A hook changes
nothing of what is learnt. A stopped and resumed training calls hooks again for the steps that it repeats, and
for the state that it resumes from.
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
    """A training after one of its steps, which the devices may still compute.

    Attributes:
      state: parameters and optimizer state. The next step reuses their memory: read them, but keep no array.
      total_steps: of the whole training.
      with_state: the model with the parameters of a state.
      settle: waits for the step, and writes its line of metrics.jsonl to the disk.
    """

    state: TrainState
    total_steps: int
    with_state: Callable[[TrainState], Model]
    settle: Callable[[], None]

    @property
    def step(self) -> int:
        """Steps that are done; 0 is the state before the first."""
        return self.state.step

    @property
    def is_last(self) -> bool:
        """Whether no step follows."""
        return self.step == self.total_steps

    def model(self) -> Model:
        """The model as it is after this step; valid until the hook returns."""
        return self.with_state(self.state)


class Hook:
    """Two moments of a training; override either."""

    def after_step(self, at: AfterStep) -> None:
        """Called with the state that the training starts or resumes from, then after each step.

        A step has only been dispatched by then. A hook that reads its arrays waits for them, and the devices
        then wait for the host.
        """

    def on_metrics(self, metrics: StepMetrics) -> None:
        """Called once for each step, when its numbers were read: while the next step is computed."""


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
    """A hook that calls a function after each n-th step.

    Args:
      n: 10 is after steps 10, 20, 30.
      function: is called with the training as it is then.
      and_last: also after the last step, whatever its number.

    Raises:
      ValueError: `n` is less than 1.
    """
    if n < 1:
        raise ValueError(f"every({n}, ...): a hook is called after each n-th step, so n must be at least 1")
    return _Every(n, function, and_last)


def on_metrics(function: Callable[[StepMetrics], None]) -> Hook:
    """A hook that calls a function with the metrics of each step."""
    return _OnMetrics(function)


class Hooks:
    """All hooks of a training, called in their order, and metrics.jsonl, which has a step's numbers first."""

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
        """A step was dispatched: its predecessor's metrics are read now."""
        self.tell(self._log.dispatched(outputs))

    def settle(self) -> None:
        """Waits for the last step that was dispatched; its metrics are on the disk then."""
        self.tell(self._log.catch_up())

    def after_step(self, state: TrainState) -> None:
        """The state after a step that was dispatched."""
        at = AfterStep(state, self._total_steps, self._with_state, self.settle)
        for hook in self._hooks:
            hook.after_step(at)

    def tell(self, metrics: StepMetrics | None) -> None:
        """A step's metrics, if there are any."""
        if metrics is None:
            return
        for hook in self._hooks:
            hook.on_metrics(metrics)
