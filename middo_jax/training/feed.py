"""What the trainer is fed: steps planned on the host, packed and sent to the devices while these compute.

A batch is a function of (examples, settings, seed, number of its step) alone: no iterator's state and no
number of processes enters it, so that to resume, here or on another slice, is to know that number.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Generator, Sequence
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from middo_jax.config import TrainSettings
from middo_jax.data.packing import PackedBatch, first_fit, pack
from middo_jax.data.tokenize import TokenizedExample
from middo_jax.training.step import Batch, put_batch

_log = logging.getLogger(__name__)

# Packed, beyond the batch of the step under way. Tokens, not activations: a few bytes a position.
_BATCHES_AHEAD = 4
_LONGEST_MULTIPLE = 128


class PlannedStep(NamedTuple):
    """One optimizer step: rows of indices into the examples, at most train.batch_size of them."""

    epoch: int
    rows: list[list[int]]


class Fed(NamedTuple):
    """A batch on the devices, and the seconds that the loop stood still until it was there."""

    batch: Batch
    wait_s: float


def plan_epoch(
    tokenized: Sequence[TokenizedExample], settings: TrainSettings, epoch: int, seed: int, pack_length: int
) -> list[list[list[int]]]:
    """Steps of rows of indices: every example once, in an order that (seed, epoch) gives.

    Steps are full of rows, or, with `train.examples_per_step`, take that many examples as far as the rows
    hold them. The last step may hold fewer than the others; it is padded, never dropped.
    """
    order = np.random.default_rng((seed, epoch)).permutation(len(tokenized)).tolist()
    if settings.examples_per_step is None:
        rows = _rows(tokenized, order, pack_length)
        return [rows[i : i + settings.batch_size] for i in range(0, len(rows), settings.batch_size)]
    steps, left, start = [], [], 0
    while left or start < len(order):
        stop = start + settings.examples_per_step - len(left)
        rows = _rows(tokenized, left + order[start:stop], pack_length)
        steps.append(rows[: settings.batch_size])
        left = [i for row in rows[settings.batch_size :] for i in row]  # the next step begins with them
        start = stop
    return steps


def _rows(tokenized: Sequence[TokenizedExample], order: list[int], pack_length: int) -> list[list[int]]:
    packed = first_fit([len(tokenized[i]) for i in order], pack_length, max_segments=pack_length)
    return [[order[i] for i in row] for row in packed]


def plan_training(
    tokenized: Sequence[TokenizedExample], settings: TrainSettings, seed: int, pack_length: int
) -> list[PlannedStep]:
    """All steps of all epochs. Warns if `train.examples_per_step` are too many for the rows of a step."""
    epochs = [
        plan_epoch(tokenized, settings, epoch, seed, pack_length) for epoch in range(settings.num_epochs)
    ]
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


def longest_example(tokenized: Sequence[TokenizedExample], pack_length: int) -> int:
    """Tokens that no example exceeds; rounded up, since other data need not compile another step."""
    longest = max(map(len, tokenized))
    return min(pack_length, -(-longest // _LONGEST_MULTIPLE) * _LONGEST_MULTIPLE)


def feed(
    tokenized: Sequence[TokenizedExample],
    steps: Sequence[PlannedStep],
    settings: TrainSettings,
    pack_length: int,
    mesh: Mesh,
) -> Generator[Fed, None, None]:
    """The batches of the steps in their order, on the mesh.

    Grain's thread packs a few ahead; what it packed is sent while the devices compute the step before. Close
    the generator to end it early. Every process packs the whole batch and sends its own devices their part.

    Args:
      tokenized: what the plan's indices point to.
      steps: of `plan_training`, from the step to go on with.
      settings: for the number of rows and micro-batches.
      pack_length: tokens of a row.
      mesh: over which the rows are spread.
    """
    import grain

    def make(step: PlannedStep) -> PackedBatch:
        return pack(tokenized, step.rows, settings.batch_size, pack_length, max_segments=pack_length)

    # One thread: packing holds the interpreter's lock, a second one would gain nothing.
    ahead = grain.ReadOptions(num_threads=1, prefetch_buffer_size=_BATCHES_AHEAD)
    batches = iter(grain.MapDataset.source(steps).map(make).to_iter_dataset(ahead))
    try:
        for _ in steps:
            began = time.perf_counter()
            packed = next(batches)
            wait_s = time.perf_counter() - began
            yield Fed(put_batch(packed, settings.gradient_accumulation, mesh), wait_s)
    finally:
        batches.close()
