"""Runs passes: plans the batches, compiles every shape, then runs them and returns results per example.

While the device computes a batch, the host packs the next one and collects the results of the previous one.

Axes: docs/contributing.md#axes; s index of an example in its row, m example of a batch.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import os
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from middo_jax.data.packing import Bucket, plan_buckets
from middo_jax.data.trees import PackedTrees, Tree
from middo_jax.models.model import Model
from middo_jax.parallel.coordination import stop_point
from middo_jax.parallel.hosts import to_host, to_mesh
from middo_jax.progress import Progress

COMPILERS = 4  # maximum number of threads that compile


@dataclasses.dataclass(frozen=True)
class PassFacts:
    """Size and duration of a pass.

    Attributes:
      real_tokens: number of computed positions without padding.
      computed_tokens: number of computed positions, padding included.
      shapes: number of programs, newly compiled or reused.
      compile_seconds: time until all programs were compiled.
      seconds: time of the pass after compilation.
    """

    real_tokens: int
    computed_tokens: int
    shapes: int
    compile_seconds: float
    seconds: float

    @property
    def fill(self) -> float:
        """Share of the computed positions that is not padding."""
        return self.real_tokens / max(self.computed_tokens, 1)


@dataclasses.dataclass(frozen=True)
class Plan:
    """The rows and batches of a pass, and the shared prefix of its rows.

    Attributes:
      trees: token tree of each example.
      prefix: length in tokens of the prefix common to all trees, which each row contains once.
      buckets: rows of indices of trees, by shape.
    """

    trees: Sequence[Tree]
    prefix: int
    buckets: list[Bucket]

    @classmethod
    def of(cls, trees: Sequence[Tree], prefix: int, batch_tokens: int, ways: int, min_length: int) -> Plan:
        """Plans the batches.

        Args:
          trees: token tree of each example.
          prefix: length in tokens of the common prefix.
          batch_tokens: tokens per batch, all devices together.
          ways: number of parts into which the mesh splits a batch, see `batch_divisor`.
          min_length: minimum number of tokens that an example counts in a row.
        """
        lengths = [len(tree.tokens_n) - prefix for tree in trees]
        buckets = plan_buckets(lengths, batch_tokens, ways, prefix=prefix, min_length=min_length)
        return cls(trees, prefix, buckets)

    def packed(self, bucket: Bucket, rows: list[list[int]]) -> PackedTrees:
        """Returns the packed batch of some rows."""
        return PackedTrees(self.trees, rows, bucket.batch, bucket.length, self.prefix)

    @property
    def real_tokens(self) -> int:
        """Number of computed positions without padding; a row's prefix counts once."""
        packed = (self.packed(bucket, bucket.rows) for bucket in self.buckets)
        return sum(self.prefix + sum(batch.sizes(row)) for batch in packed for row in batch.rows if row)

    @property
    def computed_tokens(self) -> int:
        """Number of computed positions, padding included."""
        return sum(b.length * b.batch * -(-len(b.rows) // b.batch) for b in self.buckets)

    def facts(self) -> dict[str, Any]:
        """Returns `fill`, `shapes` and `prefix` of the pass, which are known before it runs."""
        fill = self.real_tokens / max(self.computed_tokens, 1)
        return {"fill": fill, "shapes": self.shapes, "prefix": self.prefix}

    @property
    def shapes(self) -> list[list[int]]:
        """[rows per batch, tokens per row, tokens of the longest example] of each compiled program."""
        return [[bucket.batch, bucket.length, bucket.longest] for bucket in self.buckets]


@dataclasses.dataclass
class Pass:
    """A program over a plan, for one or several models. Models with the same shapes share the compiled code.

    Attributes:
      program: a jitted function of (graphdef, params, batch, **static); graphdef and static are static. It
        returns a pytree of arrays [b, s, ...], the results of the examples in each row.
      plan: the batches, planned for a mesh with the same `batch_divisor` as the models' mesh.
      inputs: function from a packed batch to the program's inputs, a pytree of arrays [b, ...].
      static: function from a bucket to the program's static arguments.
    """

    program: Any
    plan: Plan
    inputs: Callable[[PackedTrees], Any]
    static: Callable[[Bucket], dict[str, Any]]
    _compiled: tuple[Hashable, list[Any]] | None = dataclasses.field(default=None, init=False, repr=False)

    def run(
        self, model: Model, keep: Callable[[np.ndarray, Any], None], progress: Progress, name: str
    ) -> PassFacts:
        """Computes every batch on the model's mesh.

        Args:
          model: the model to run.
          keep: called with [m] indices of examples, in any order, and the pytree of their results [m, ...].
          progress: progress display.
          name: name of the pass in the progress display.
        """
        began = time.monotonic()
        with jax.set_mesh(model.mesh):
            programs = self._programs(model, progress, name)
            compiled = time.monotonic()
            with progress.task(name) as advance:
                total = sum(len(row) for bucket in self.plan.buckets for row in bucket.rows)
                done, running = 0, None

                def finish(rows: list[list[int]], result: Any) -> None:
                    nonlocal done
                    index_m = np.concatenate([np.asarray(row, np.int64) for row in rows])
                    b_m = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
                    s_m = np.concatenate([np.arange(len(row)) for row in rows])
                    keep(index_m, jax.tree.map(lambda x_bs: x_bs[b_m, s_m], to_host(result)))
                    done += len(index_m)
                    advance(done, total)

                for run, rows, inputs in self._batches(programs):
                    stop_point()
                    result = run(model.params, _on_mesh(model, inputs))
                    # Waits for the previous batch's results only after this batch was dispatched.
                    if running is not None:
                        finish(*running)
                    running = rows, result
                if running is not None:
                    finish(*running)
            seconds = time.monotonic() - compiled
        return PassFacts(
            real_tokens=self.plan.real_tokens,
            computed_tokens=self.plan.computed_tokens,
            shapes=len(programs),
            compile_seconds=compiled - began,
            seconds=seconds,
        )

    def _batches(self, programs: list[Any]) -> Iterator[tuple[Any, list[list[int]], Any]]:
        for bucket, run in zip(self.plan.buckets, programs, strict=True):
            for rows in bucket.batches():
                yield run, rows, self.inputs(self.plan.packed(bucket, rows))

    def _programs(self, model: Model, progress: Progress, name: str) -> list[Any]:
        """Returns the compiled program of each bucket."""
        kind = (model.graphdef, model.mesh, *((x.aval, x.sharding) for x in jax.tree.leaves(model.params)))
        if self._compiled is not None and self._compiled[0] == kind:
            return self._compiled[1]
        with progress.task(f"{name}: compiling", "shapes") as advance:
            lowered = []
            for bucket in self.plan.buckets:
                first = self.inputs(self.plan.packed(bucket, next(bucket.batches())))
                batch, static = _on_mesh(model, first), self.static(bucket)
                lowered.append(self.program.lower(model.graphdef, model.params, batch, **static))
            programs = _compile(lowered, advance)
        self._compiled = kind, programs
        return programs


def _on_mesh(model: Model, inputs: Any) -> Any:
    """Shards every array along its rows; the other axes are not split."""
    return jax.tree.map(lambda x: to_mesh(model.mesh, x, "batch", *(None,) * (x.ndim - 1)), inputs)


def _compile(lowered: Sequence[Any], advance: Callable[[int, int], None]) -> list[Any]:
    """Compiles several programs at a time, because the compiler mostly uses one core."""
    workers = min(COMPILERS, os.cpu_count() or 1)
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        jobs = [pool.submit(program.compile) for program in lowered]
        for n, _ in enumerate(concurrent.futures.as_completed(jobs), start=1):
            advance(n, len(jobs))
    return [job.result() for job in jobs]
