"""Feeds the trainer: planned steps, packed on the host and sent to the devices while these compute."""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from typing import NamedTuple

import grain
from jax.sharding import Mesh

from middo_jax.config import TrainSettings
from middo_jax.data.packing import PackedBatch, pack
from middo_jax.data.tokenize import TokenizedExample
from middo_jax.training.plan import PlannedStep
from middo_jax.training.step import Batch, put_batch

# Packed, beyond the batch of the step under way. Tokens, not activations: a few bytes a position.
_BATCHES_AHEAD = 4


class Fed(NamedTuple):
    """A batch on the devices, and the seconds that the loop stood still until it was there."""

    batch: Batch
    wait_s: float


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
