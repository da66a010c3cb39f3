"""The runner of every pass: plan, compile every shape, then run, with results by example as they come.

While the device works on one batch, the host makes the next and takes in the results of the one before.

Axes: docs/contributing.md#axes; s an example's place in its row, m example of a batch.
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
class Plan:
    """Which texts lie in which row of which batch, and what each row begins with.

    Attributes:
      trees: the texts of each example.
      prefix: tokens that all of them begin with, which stand once per row.
      buckets: rows of indices into the trees, by shape.
    """

    trees: Sequence[Tree]
    prefix: int
    buckets: list[Bucket]

    @classmethod
    def of(cls, trees: Sequence[Tree], prefix: int, batch_tokens: int, ways: int, min_length: int) -> Plan:
        """Plans the batches.

        Args:
          trees: the texts of each example.
          prefix: tokens that all of them begin with.
          batch_tokens: tokens of a batch, all devices together.
          ways: into how many parts the mesh splits a batch, see `batch_divisor`.
          min_length: tokens that an example takes at least in a row.
        """
        lengths = [len(tree.tokens_n) - prefix for tree in trees]
        buckets = plan_buckets(lengths, batch_tokens, ways, prefix=prefix, min_length=min_length)
        return cls(trees, prefix, buckets)

    def packed(self, bucket: Bucket, rows: list[list[int]]) -> PackedTrees:
        """A batch of the plan."""
        return PackedTrees(self.trees, rows, bucket.batch, bucket.length, self.prefix)

    @property
    def real_tokens(self) -> int:
        """Positions that some text needs; a row's prefix counts once."""
        packed = (self.packed(bucket, bucket.rows) for bucket in self.buckets)
        return sum(self.prefix + sum(batch.sizes(row)) for batch in packed for row in batch.rows if row)

    @property
    def computed_tokens(self) -> int:
        """Those and the padding."""
        return sum(b.length * b.batch * -(-len(b.rows) // b.batch) for b in self.buckets)

    def facts(self) -> dict[str, Any]:
        """The `fill`, the `shapes` and the shared `prefix` of the pass, known before it runs."""
        fill = self.real_tokens / max(self.computed_tokens, 1)
        return {"fill": fill, "shapes": self.shapes, "prefix": self.prefix}

    @property
    def shapes(self) -> list[list[int]]:
        """[rows of a batch, tokens of a row, tokens of the longest example], as each is compiled."""
        return [[bucket.batch, bucket.length, bucket.longest] for bucket in self.buckets]


@dataclasses.dataclass
class Pass:
    """A program over a plan, to run for one model or several; it is compiled once for models that are alike.

    Attributes:
      program: a jitted function of (graphdef, params, batch, **static); graphdef and static are static. It
        returns a tree of arrays [b, s, ...]: of each row's examples.
      plan: the batches; for a mesh that splits a batch as the models' do.
      inputs: what the program reads of a batch: a tree of arrays [b, ...].
      static: the program's static arguments of a shape.
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
          model: whose parameters are used.
          keep: receives [m] indices of examples, in any order, and the tree of their results [m, ...].
          progress: is told how far it is, under this name.
          name: of the pass.
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
                    # The next batch is under way before the last one's numbers are waited for.
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
        """The compiled program of each bucket."""
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
    """Every array is split along its rows; each device has the whole of the other axes."""
    return jax.tree.map(lambda x: to_mesh(model.mesh, x, "batch", *(None,) * (x.ndim - 1)), inputs)


def _compile(lowered: Sequence[Any], advance: Callable[[int, int], None]) -> list[Any]:
    """Several at a time, since the compiler mostly works on one core."""
    workers = min(COMPILERS, os.cpu_count() or 1)
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        jobs = [pool.submit(program.compile) for program in lowered]
        for n, _ in enumerate(concurrent.futures.as_completed(jobs), start=1):
            advance(n, len(jobs))
    return [job.result() for job in jobs]
