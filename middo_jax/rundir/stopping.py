"""When the rounds of a run end, and which training is the best: what `stop.*` makes of the measurements.

decide([2.30, 2.21, 2.22, 2.25], StopSettings(patience=2), rounds=9)  ->  last 3, best 1
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from typing import Any

from middo_jax.config import Config, ConfigError, StopSettings
from middo_jax.rundir.layout import RunDir
from middo_jax.rundir.manifest import RunError

NAMES = {"heldout_loss": "held-out loss", "task": "mean score"}


@dataclasses.dataclass(frozen=True)
class Course:
    """The trainings of a run that were measured, and what follows from their measurements.

    Attributes:
      metric: `stop.metric`.
      values: the measurement after each training, up to the last one that counts.
      last: the training after which the rounds end, counted from 0; None while that is not known.
      best: the best training so far; of equal ones the earlier. None before the first measurement.
      why: why the rounds end; None while they do not.
    """

    metric: str
    values: tuple[float, ...]
    last: int | None
    best: int | None
    why: str | None

    def line(self) -> str:
        """One line for people: the end of the rounds, if it is known, and the best training."""
        if self.best is None:
            return "no training is measured yet"
        best = f"the best is {named(self.best)} ({NAMES[self.metric]} {self.values[self.best]:.4f})"
        if self.last is None:
            return f"so far {best}"
        return f"the rounds end with {named(self.last)}: {self.why}; {best}"

    def to_json(self) -> dict[str, Any]:
        """The attributes as JSON values, trainings by the names of their folders."""
        return {
            "metric": self.metric,
            "values": {named(t): value for t, value in enumerate(self.values)},
            "last": None if self.last is None else named(self.last),
            "best": None if self.best is None else named(self.best),
            "why": self.why,
            "line": self.line(),
        }


def named(index: int) -> str:
    """The name of a round's folder."""
    return f"round_{index:02d}"


def decide(values: Sequence[float], settings: StopSettings, rounds: int) -> Course:
    """What follows from the measurements after trainings 0, 1, ...; those after the end do not count.

    A gain is measured from the last training that brought one, so that many small gains add up.

    Args:
      values: the measurements so far. A lower held-out loss and a higher score are better.
      settings: with `patience`.
      rounds: the greatest number of rounds; training `rounds` is the last in any case.
    """
    sign = 1.0 if settings.metric == "heldout_loss" else -1.0
    best = reference = None
    without_gain = 0
    for t, value in enumerate(values[: rounds + 1]):
        if best is None or sign * value < sign * values[best]:
            best = t
        if reference is None or sign * (reference - value) > settings.min_gain:
            reference, without_gain = value, 0
        else:
            without_gain += 1
        if without_gain == settings.patience:
            trainings = "training" if without_gain == 1 else f"{without_gain} trainings"
            why = f"no gain of more than {settings.min_gain:g} in the last {trainings} (stop.patience)"
            return Course(settings.metric, tuple(values[: t + 1]), t, best, why)
    if len(values) > rounds:
        why = f"all {rounds} rounds were run"
        return Course(settings.metric, tuple(values[: rounds + 1]), rounds, best, why)
    return Course(settings.metric, tuple(values), None, best, None)


def course(run: RunDir, config: Config) -> Course:
    """`decide` from the records of the run's measurements, up to the first training without one.

    A manifest that cannot be read has none: who reads the stages of its folder says what is wrong with it.
    """
    values: list[float] = []
    with contextlib.suppress(RunError):
        for t in range(config.rounds + 1):
            value = _measured(run, t, config.stop.metric)
            if value is None:
                break
            values.append(value)
    return decide(values, config.stop, config.rounds)


def _measured(run: RunDir, t: int, metric: str) -> float | None:
    here = run.round(t)
    name = here.path.name
    if metric == "heldout_loss":
        return here.stages().get("heldout", {}).get("losses", {}).get(name)
    record = here.stages().get("benchmark", {})
    scores = record.get("scores", {}).get(name)
    return sum(scores.values()) / len(scores) if scores else None


def check_heldout(config: Config, n_heldout: int) -> None:
    """Raises ConfigError if the metric of `stop`, or the control arms, cannot be measured."""
    if config.controls and not n_heldout:
        raise ConfigError("config: controls need held-out examples; set data.eval_fraction, such as 0.05")
    if config.stop.patience is not None and config.stop.metric == "heldout_loss" and not n_heldout:
        raise ConfigError(
            "config: stop.metric=heldout_loss needs held-out examples; set data.eval_fraction, such as 0.05"
        )
