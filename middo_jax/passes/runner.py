"""One pass of a model over a planned dataset: every shape is compiled before the clock starts.

Then the device works on one batch while the host makes the next.

Axes: b row, t position.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from middo_jax.data.packing import Bucket
from middo_jax.parallel.hosts import to_host, to_mesh
from middo_jax.progress import Progress

COMPILERS = 4  # at a time


@dataclasses.dataclass(frozen=True)
class PassFacts:
    """What a pass took.

    Attributes:
      real_tokens: positions that some text needs.
      computed_tokens: those and the padding.
      shapes: programs that were compiled for it, or found compiled.
      compile_seconds: until all were.
      seconds: from then on.
    """

    real_tokens: int
    computed_tokens: int
    shapes: int
    compile_seconds: float
    seconds: float

    @property
    def fill(self) -> float:
        """Share of the computed positions that is real."""
        return self.real_tokens / max(self.computed_tokens, 1)


@dataclasses.dataclass(frozen=True)
class Batch:
    """What a program reads: its arrays [b, ...], and how many of their positions are real."""

    arrays: tuple[np.ndarray | None, ...]
    real_tokens: int


def sweep(
    program: Any,
    model: tuple[nnx.GraphDef, nnx.State],
    buckets: Sequence[Bucket],
    make: Callable[[Bucket, list[list[int]]], Batch],
    keep: Callable[[list[list[int]], Any], None],
    *,
    static: Callable[[Bucket], dict[str, Any]],
    mesh: Mesh,
    progress: Progress,
    name: str,
    per_sample: int = 1,
) -> PassFacts:
    """Runs `program` on every batch of the buckets.

    Args:
      program: a jitted function of (graphdef, params, *arrays, **static); graphdef and static are static.
      model: graphdef, and params on the mesh.
      buckets: the plan.
      make: a batch of a bucket, from rows of its plan.
      keep: receives the rows and what the program made of them, as numpy arrays.
      static: the program's static arguments for a bucket.
      mesh: where.
      progress: is told how far it is, under this name.
      name: of the pass.
      per_sample: planned items that make one sample.
    """
    graphdef, params = model
    total = sum(len(row) for bucket in buckets for row in bucket.rows) // per_sample
    done = real_tokens = 0

    def on_mesh(batch: Batch) -> list[jax.Array | None]:
        # Every array is split along its rows; what there is of other axes lies whole on each device.
        return [x if x is None else to_mesh(mesh, x, "batch", *(None,) * (x.ndim - 1)) for x in batch.arrays]

    def finish(rows: list[list[int]], result: Any) -> None:
        nonlocal done
        keep(rows, to_host(result))
        done += sum(map(len, rows))
        advance(done // per_sample, total)

    with jax.set_mesh(mesh):
        began = time.monotonic()
        with progress.task(f"{name}: compiling", "shapes") as advance:
            lowered = []
            for bucket in buckets:
                first = on_mesh(make(bucket, next(bucket.batches())))
                lowered.append(program.lower(graphdef, params, *first, **static(bucket)))
            programs = _compile(lowered, advance)
        compiled = time.monotonic()
        with progress.task(name) as advance:
            running: tuple[list[list[int]], Any] | None = None
            for bucket, run in zip(buckets, programs, strict=True):
                for rows in bucket.batches():
                    batch = make(bucket, rows)
                    real_tokens += batch.real_tokens
                    result = run(params, *on_mesh(batch))
                    # The next batch is under way before the last one's numbers are waited for.
                    if running is not None:
                        finish(*running)
                    running = rows, result
            if running is not None:
                finish(*running)
    return PassFacts(
        real_tokens=real_tokens,
        computed_tokens=sum(b.length * b.batch * -(-len(b.rows) // b.batch) for b in buckets),
        shapes=len(buckets),
        compile_seconds=compiled - began,
        seconds=time.monotonic() - compiled,
    )


def _compile(lowered: Sequence[Any], advance: Callable[[int, int], None]) -> list[Any]:
    """Several at a time, since the compiler mostly works on one core."""
    workers = min(COMPILERS, os.cpu_count() or 1)
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        jobs = [pool.submit(program.compile) for program in lowered]
        for n, _ in enumerate(concurrent.futures.as_completed(jobs), start=1):
            advance(n, len(jobs))
    return [job.result() for job in jobs]
