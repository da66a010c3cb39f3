"""Runs passes: plans the batches, compiles every shape, then runs them and returns results per example.

While the device computes a batch, the host packs the next one and collects the results of the previous one.
In a job each process packs only the rows that its own devices read; all get all results.

Axes: docs/contributing.md#axes.
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
from jax.sharding import Mesh

from middo_jax.data.packing import Bucket, plan_buckets
from middo_jax.data.trees import PackedTrees, Tree
from middo_jax.models.model import Model
from middo_jax.parallel.coordination import stop_point
from middo_jax.parallel.hosts import Span, own_spans, rows_to_mesh, to_host
from middo_jax.parallel.preemption import Preempted
from middo_jax.passes.parts import Saved
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

    What an earlier start of the pass has computed does not count.
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
class PassPlan:
    """The rows and batches of a pass, and the shared prefix of its rows.

    Attributes:
      trees: token tree of each example.
      lengths: number of tokens of each tree.
      prefix: length in tokens of the prefix common to all trees, which each row contains once.
      buckets: rows of indices of trees, by shape.
    """

    trees: Sequence[Tree]
    lengths: Sequence[int]
    prefix: int
    buckets: list[Bucket]

    @classmethod
    def of(
        cls,
        trees: Sequence[Tree],
        prefix: int,
        batch_tokens: int,
        ways: int,
        min_length: int,
        lengths: Sequence[int] | None = None,
    ) -> PassPlan:
        """Plans the batches.

        Args:
          trees: token tree of each example.
          prefix: length in tokens of the common prefix.
          batch_tokens: tokens per batch, all devices together.
          ways: number of parts into which the mesh splits a batch, see `batch_divisor`.
          min_length: minimum number of tokens that an example counts in a row.
          lengths: number of tokens of each tree, if the plan must not read the trees.
        """
        if lengths is None:
            lengths = [len(tree.tokens_n) for tree in trees]
        own = [length - prefix for length in lengths]
        buckets = plan_buckets(own, batch_tokens, ways, prefix=prefix, min_length=min_length)
        return cls(trees, lengths, prefix, buckets)

    def packed(self, bucket: Bucket, rows: list[list[int]], span: Span) -> PackedTrees:
        """Returns a span of the packed batch of some rows."""
        start, stop = span
        return PackedTrees(self.trees, rows[start:stop], stop - start, bucket.length, self.prefix)

    def real_tokens_of(self, rows: list[list[int]]) -> int:
        """Number of positions of some rows without padding; a row's prefix counts once."""
        return sum(self.prefix + sum(self.lengths[i] - self.prefix for i in row) for row in rows)

    @property
    def real_tokens(self) -> int:
        """Number of computed positions without padding."""
        return sum(self.real_tokens_of(bucket.rows) for bucket in self.buckets)

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
      inputs: function from packed rows to the program's inputs, a pytree of arrays [b, ...] in which a row
        depends on no other row.
      static: function from a bucket to the program's static arguments.
    """

    program: Any
    plan: PassPlan
    inputs: Callable[[PackedTrees], Any]
    static: Callable[[Bucket], dict[str, Any]]
    _compiled: tuple[Hashable, list[Any]] | None = dataclasses.field(default=None, init=False, repr=False)

    def run(
        self,
        model: Model,
        keep: Callable[[np.ndarray, Any], None],
        progress: Progress,
        name: str,
        saved: Saved | None = None,
    ) -> PassFacts:
        """Computes every batch on the model's mesh.

        Args:
          model: the model to run.
          keep: called with [m] indices of examples, in any order, and the pytree of their results [m, ...].
          progress: progress display.
          name: name of the pass in the progress display.
          saved: results of an earlier start with this model, which are taken; new ones are added.
        """
        began = time.monotonic()
        with jax.set_mesh(model.mesh):
            programs = self._programs(model, progress, name)
            compiled = time.monotonic()
            with progress.task(name) as advance:
                total = sum(len(row) for bucket in self.plan.buckets for row in bucket.rows)
                results = _Results(keep, advance, total, saved)
                try:
                    self._run_batches(programs, model, results)
                finally:
                    if saved is not None:
                        saved.parts.save()
            seconds = time.monotonic() - compiled
        return PassFacts(
            real_tokens=results.real_tokens,
            computed_tokens=results.computed_tokens,
            shapes=len(programs),
            compile_seconds=compiled - began,
            seconds=seconds,
        )

    def _run_batches(self, programs: list[Any], model: Model, results: _Results) -> None:
        running = None
        try:
            for bucket, program, rows in self._batches(programs):
                stop_point()
                static = {**self.static(bucket), "shape": (bucket.batch, bucket.length)}
                key = results.key_if_missing(rows, static, program.out_tree)
                if key is None:
                    continue
                inputs = self._packed(model.mesh, bucket, rows)
                result = program(model.params, rows_to_mesh(model.mesh, bucket.batch, inputs))
                # Waits for the previous batch's results only after this batch was dispatched.
                if running is not None:
                    results.finish(*running)
                running = rows, result, key
                results.real_tokens += self.plan.real_tokens_of(rows)
                results.computed_tokens += bucket.batch * bucket.length
        except Preempted:
            if running is not None:
                results.finish(*running)  # the devices have computed it, or are about to
            raise
        if running is not None:
            results.finish(*running)

    def _batches(self, programs: list[Any]) -> Iterator[tuple[Bucket, Any, list[list[int]]]]:
        """The bucket, the program and the rows of each batch."""
        for bucket, program in zip(self.plan.buckets, programs, strict=True):
            for rows in bucket.batches():
                yield bucket, program, rows

    def _packed(self, mesh: Mesh, bucket: Bucket, rows: list[list[int]]) -> dict[Span, Any]:
        """The program's inputs in the spans of a batch that this process's devices read."""
        spans = own_spans(mesh, bucket.batch)
        return {span: self.inputs(self.plan.packed(bucket, rows, span)) for span in spans}

    def _programs(self, model: Model, progress: Progress, name: str) -> list[Any]:
        """Returns the compiled program of each bucket."""
        kind = (model.graphdef, model.mesh, *((x.aval, x.sharding) for x in jax.tree.leaves(model.params)))
        if self._compiled is not None and self._compiled[0] == kind:
            return self._compiled[1]
        with progress.task(f"{name}: compiling", "shapes") as advance:
            lowered = []
            for bucket in self.plan.buckets:
                first = self._packed(model.mesh, bucket, next(bucket.batches()))
                batch, static = rows_to_mesh(model.mesh, bucket.batch, first), self.static(bucket)
                lowered.append(self.program.lower(model.graphdef, model.params, batch, **static))
            programs = _compile(lowered, advance)
        self._compiled = kind, programs
        return programs


@dataclasses.dataclass
class _Results:
    """What a running pass does with its results.

    Attributes:
      keep: see `Pass.run`.
      advance: is called with the number of finished examples, and of all.
      total: number of all examples.
      saved: see `Pass.run`.
      done: number of finished examples.
      real_tokens, computed_tokens: see `PassFacts`.
    """

    keep: Callable[[np.ndarray, Any], None]
    advance: Callable[[int, int], None]
    total: int
    saved: Saved | None
    done: int = 0
    real_tokens: int = 0
    computed_tokens: int = 0

    def key_if_missing(self, rows: list[list[int]], static: dict[str, Any], out_tree: Any) -> bytes | None:
        """Returns the batch's key in the parts, which is empty without parts.

        None if an earlier start has computed the batch; its results are kept then.
        """
        if self.saved is None:
            return b""
        parts, digests = self.saved
        key = parts.key(([digests[i] for i in row] for row in rows), static)
        if (leaves := parts.find(key)) is None:
            return key
        self._finish(rows, jax.tree.unflatten(out_tree, leaves))
        return None

    def finish(self, rows: list[list[int]], result: Any, key: bytes) -> None:
        """Keeps the results of a batch, a pytree of arrays [b, s, ...] on the devices."""
        b_m = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
        s_m = np.concatenate([np.arange(len(row)) for row in rows])
        found = jax.tree.map(lambda x_bs: x_bs[b_m, s_m], to_host(result))
        if self.saved is not None:
            self.saved.parts.add(key, jax.tree.leaves(found))
        self._finish(rows, found)

    def _finish(self, rows: list[list[int]], found: Any) -> None:
        index_m = np.concatenate([np.asarray(row, np.int64) for row in rows])
        self.keep(index_m, found)
        self.done += len(index_m)
        self.advance(self.done, self.total)


def _compile(lowered: Sequence[Any], advance: Callable[[int, int], None]) -> list[Any]:
    """Compiles several programs at a time, because the compiler mostly uses one core."""
    workers = min(COMPILERS, os.cpu_count() or 1)
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        jobs = [pool.submit(program.compile) for program in lowered]
        for n, _ in enumerate(concurrent.futures.as_completed(jobs), start=1):
            advance(n, len(jobs))
    return [job.result() for job in jobs]
