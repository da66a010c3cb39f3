"""Feeds the trainer: packs planned steps on the host and sends them to the devices while these compute."""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from typing import NamedTuple

import grain
from jax.sharding import Mesh

from middo_jax.config import TrainSettings
from middo_jax.data.lazy import Lazy
from middo_jax.data.packing import PackedBatch, pack
from middo_jax.data.tokenize import TokenizedExample
from middo_jax.training.plan import PlannedStep
from middo_jax.training.step import Batch, own_rows, put_batch

# Batches packed in advance. They are small: a few bytes per position.
_BATCHES_AHEAD = 4


class Fed(NamedTuple):
    """A batch on the devices, and the seconds that the loop waited for it."""

    batch: Batch
    wait_s: float


def feed(
    tokenized: Sequence[TokenizedExample],
    steps: Sequence[PlannedStep],
    settings: TrainSettings,
    pack_length: int,
    mesh: Mesh,
) -> Generator[Fed, None, None]:
    """Yields the batches of the steps in order, on the mesh.

    A Grain thread packs a few batches ahead. A batch is sent while the devices compute the previous step.
    Close the generator to end it early. Every process packs only the rows that its own devices read, and of
    `Lazy` tokens makes only these.

    Args:
      tokenized: the examples that the plan's indices refer to.
      steps: steps of `plan_training`, starting at the one to continue with.
      settings: training settings; `batch_size` and `gradient_accumulation` are used.
      pack_length: number of tokens per row.
      mesh: device mesh over which the rows are sharded.
    """

    own = own_rows(settings, mesh)

    def make(step: PlannedStep) -> PackedBatch:
        rows = [step.rows[i] if i < len(step.rows) else [] for i in own]
        if isinstance(tokenized, Lazy):
            tokenized.bring(i for row in rows for i in row)
        return pack(tokenized, rows, len(own), pack_length, max_segments=pack_length)

    # One thread: packing holds the interpreter's lock, so a second one would gain nothing.
    ahead = grain.ReadOptions(num_threads=1, prefetch_buffer_size=_BATCHES_AHEAD)
    batches = iter(grain.MapDataset.source(steps).map(make).to_iter_dataset(ahead))
    try:
        for _ in steps:
            began = time.perf_counter()
            packed = next(batches)
            wait_s = time.perf_counter() - began
            yield Fed(put_batch(packed, settings.micro_batches, mesh), wait_s)
    finally:
        batches.close()
