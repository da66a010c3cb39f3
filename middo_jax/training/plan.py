"""Plans a training before its first step: the examples of each step, packed into rows.

A batch depends only on (examples, settings, seed, step), not on the state of an iterator or the number of
processes. The step alone is therefore enough to resume, even on another slice.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from middo_jax.config import TrainSettings
from middo_jax.data.packing import first_fit
from middo_jax.data.tokenize import TokenizedExample
from middo_jax.training.facts import ExampleFacts

_log = logging.getLogger(__name__)

_LONGEST_MULTIPLE = 128


class PlannedStep(NamedTuple):
    """One optimizer step: at most train.batch_size rows, each a list of indices of examples."""

    epoch: int
    rows: list[list[int]]


@dataclasses.dataclass(frozen=True, eq=False)
class TrainingPlan:
    """All inputs of a training except the model.

    Attributes:
      tokenized: the examples. Of `Lazy` ones, a process reads its share and the rows of its devices.
      settings: training settings.
      seed: seed of the order of the examples and of stochastic rounding.
      pack_length: number of tokens per row.
      metadata: small JSON values to save with the final parameters, such as {"base": path of the model};
        a checkpoint with other values belongs to another training.
      n_steps: number of steps in the place of `train.num_epochs`: the last ones are left out, or further
        epochs follow; None: all epochs.
    """

    tokenized: Sequence[TokenizedExample]
    settings: TrainSettings
    seed: int
    pack_length: int
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    n_steps: int | None = None

    @functools.cached_property
    def facts(self) -> ExampleFacts:
        """Facts of the examples. All processes must read it at the same point first."""
        return ExampleFacts.of(self.tokenized)

    @functools.cached_property
    def steps(self) -> list[PlannedStep]:
        """All steps of all epochs; see `plan_training`."""
        lengths = self.facts.length_n.tolist()
        steps = plan_training(lengths, self.settings, self.seed, self.pack_length)
        epoch = self.settings.num_epochs
        while self.n_steps is not None and len(steps) < self.n_steps:
            rows = plan_epoch(lengths, self.settings, epoch, self.seed, self.pack_length)
            steps += [PlannedStep(epoch, step) for step in rows]
            epoch += 1
        return steps[: self.n_steps]

    @property
    def rows_of_epoch(self) -> int:
        """Number of packed rows that the first epoch fills."""
        return sum(len(step.rows) for step in self.steps if step.epoch == 0)


def plan_epoch(
    lengths: Sequence[int], settings: TrainSettings, epoch: int, seed: int, pack_length: int
) -> list[list[list[int]]]:
    """Returns the steps of an epoch, each a list of rows of indices of examples, from the examples' lengths.

    Every example occurs once, in an order determined by (seed, epoch). A step has `train.batch_size` rows or,
    with `train.examples_per_step`, that many examples as far as they fit the rows. The last step may have
    fewer; it is padded, never dropped.
    """
    order = np.random.default_rng((seed, epoch)).permutation(len(lengths)).tolist()
    if settings.examples_per_step is None:
        rows = _rows(lengths, order, pack_length)
        return [rows[i : i + settings.batch_size] for i in range(0, len(rows), settings.batch_size)]
    steps, left, start = [], [], 0
    while left or start < len(order):
        stop = start + settings.examples_per_step - len(left)
        rows = _rows(lengths, left + order[start:stop], pack_length)
        steps.append(rows[: settings.batch_size])
        left = [i for row in rows[settings.batch_size :] for i in row]  # the next step starts with these
        start = stop
    return steps


def _rows(lengths: Sequence[int], order: list[int], pack_length: int) -> list[list[int]]:
    packed = first_fit([lengths[i] for i in order], pack_length, max_segments=pack_length)
    return [[order[i] for i in row] for row in packed]


def plan_training(
    lengths: Sequence[int], settings: TrainSettings, seed: int, pack_length: int
) -> list[PlannedStep]:
    """Returns all steps of all epochs. Warns if `train.examples_per_step` do not fit the rows of a step."""
    epochs = [plan_epoch(lengths, settings, epoch, seed, pack_length) for epoch in range(settings.num_epochs)]
    if settings.examples_per_step is not None:
        taken = [sum(map(len, rows)) for steps in epochs for rows in steps[:-1]]
        short = sum(n < settings.examples_per_step for n in taken)
        if short:
            _log.warning(
                "%d of %d steps take fewer than train.examples_per_step=%d examples: train.batch_size=%d "
                "sequences hold no more; raise it",
                short,
                len(taken) + len(epochs),
                settings.examples_per_step,
                settings.batch_size,
            )
    return [PlannedStep(epoch, rows) for epoch, steps in enumerate(epochs) for rows in steps]


def longest_example(lengths: Sequence[int], pack_length: int) -> int:
    """Returns the longest example's length, rounded up so that other data can reuse the compiled step."""
    longest = max(lengths)
    return min(pack_length, -(-longest // _LONGEST_MULTIPLE) * _LONGEST_MULTIPLE)
