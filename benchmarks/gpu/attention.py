"""Attention alone: 4 rows of 4,096 positions, 32 query heads, 8 key/value heads, bfloat16.

Axes: b batch row, t position, h query heads, k key/value heads, d head dimension.
"""

from __future__ import annotations

import concurrent.futures
import os
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu import shapes
from middo_jax.models.attention import AttentionSpec, Kernel, Packing, packed_attention, triton

Arrays = tuple[jax.Array, jax.Array, jax.Array]
REPEATS = 10


class Rows(NamedTuple):
    """Packed rows: which example each position is of, its place there, and pairs that see each other."""

    segment_ids: jax.Array
    positions: jax.Array
    pairs: int


def packed_rows(batch: int, length: int, distribution: str | None) -> Rows:
    """Rows filled with examples in their order, the last of a row cut; None: one text per row."""
    ids = np.zeros((batch, length), np.int32)
    positions = np.tile(np.arange(length, dtype=np.int32), (batch, 1))
    if distribution is not None:
        sizes = iter(shapes.lengths(distribution, 8 * batch * length)[0].tolist())
        for b in range(batch):
            start = segment = 0
            while start < length:
                size = min(next(sizes), length - start)
                ids[b, start : start + size], positions[b, start : start + size] = segment, np.arange(size)
                segment, start = segment + 1, start + size
    return Rows(jnp.asarray(ids), jnp.asarray(positions), int((positions.astype(np.int64) + 1).sum()))


def cases(tiny: bool) -> Iterator[tuple[int, str, Rows, Arrays]]:
    """(head_dim, name, rows, queries, keys and values)."""
    batch, length, dims = (1, 256, (16,)) if tiny else (4, 4096, (128, 64))
    for dim in dims:
        q, k, v = (
            jax.random.normal(jax.random.key(i), (batch, length, heads, dim), jnp.bfloat16)
            for i, heads in enumerate((32, 8, 8))
        )
        for name, distribution in (("alpaca", "alpaca"), ("one text", None)):
            yield dim, name, packed_rows(batch, length, distribution), (q, k, v)


def attention(rows: Rows, dim: int, kernel: Kernel) -> Callable[..., jax.Array]:
    """(queries, keys, values) -> attention; a new function at every call, which JAX traces anew."""
    packing, spec = Packing(rows.segment_ids, rows.positions), AttentionSpec(dim**-0.5)
    return lambda q, k, v: packed_attention(q, k, v, packing, spec, kernel)


def gradient(attend: Callable[..., jax.Array], of: tuple[int, ...]) -> Callable[..., Any]:
    """The gradient of its sum by some of its arguments."""
    return jax.grad(lambda *arrays: attend(*arrays).astype(jnp.float32).sum(), of)


def milliseconds(calls: dict[str, tuple[Callable[..., Any], Arrays]]) -> dict[str, float | str]:
    """The median of several runs of each call; the error, where the device cannot run it.

    All are compiled first, several at a time: that takes most of the time, and one core each.
    """
    with concurrent.futures.ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        programs = {name: pool.submit(call, *arrays) for name, (call, arrays) in calls.items()}
    found: dict[str, float | str] = {}
    for name, (_, arrays) in calls.items():
        try:
            run = programs[name].result()
            jax.block_until_ready(run(*arrays))
        except Exception as error:  # a kernel that needs more shared memory than there is, say: a figure too
            found[name] = str(error)[:120]
            continue
        seconds = []
        for _ in range(REPEATS):
            began = time.perf_counter()
            jax.block_until_ready(run(*arrays))
            seconds.append(time.perf_counter() - began)
        found[name] = 1000 * statistics.median(seconds)
    return found


def traced(call: Callable[..., Any], arrays: Arrays) -> tuple[Callable[..., Any], Arrays]:
    """What `milliseconds` is given: traced now, compiled there."""
    lowered = jax.jit(call).lower(*arrays)
    return lambda *_: lowered.compile(), arrays


def kernels(tiny: bool) -> dict[str, Any]:
    """Milliseconds of every kernel, forward and with its backward pass, and TFLOP/s of visible pairs."""
    names: tuple[Kernel, ...] = ("xla",) if tiny else ("triton", "xla")
    calls, flops = {}, {}
    for dim, name, rows, arrays in cases(tiny):
        for kernel in names:
            attend = attention(rows, dim, kernel)
            # The backward pass has five products where the forward pass has two.
            for what, call, times in (
                ("forward", attend, 1.0),
                ("both passes", gradient(attend, (0, 1, 2)), 3.5),
            ):
                figure = f"{name}, {dim}, {kernel}, {what}"
                calls[figure] = traced(call, arrays)
                flops[figure] = times * 4 * 32 * dim * rows.pairs
    return {
        figure: {"ms": took, "tflops": None if isinstance(took, str) else flops[figure] / took / 1e9}
        for figure, took in milliseconds(calls).items()
    }


# (queries and keys per block, warps, stages)
SIZES = (
    *((128, 64, 8, 3), (128, 64, 4, 3), (64, 64, 4, 3), (128, 128, 8, 2), (64, 128, 4, 2), (64, 64, 4, 2)),
    *((64, 32, 4, 3), (32, 64, 4, 3), (64, 64, 8, 2), (128, 32, 4, 3), (32, 128, 4, 3), (128, 64, 8, 2)),
)


def blocks() -> dict[str, Any]:
    """Milliseconds of the forward pass, of dq with it, and of dk and dv with it, by the kernels' sizes."""
    calls = {}
    kept = {part: dict(sizes) for part, sizes in triton.BLOCKS.items()}
    for dim, name, rows, arrays in cases(tiny=False):
        for sizes in map(triton.Blocks._make, SIZES):
            for part, of in (("forward", None), ("dq", (0,)), ("dkv", (1, 2))):
                for other in kept:
                    triton.BLOCKS[other] = kept[other] | {dim: sizes if other == part else kept[other][dim]}
                attend = attention(rows, dim, "triton")
                call = attend if of is None else gradient(attend, of)
                calls[f"{dim}, {name}, {part}, {tuple(sizes)}"] = traced(call, arrays)
    triton.BLOCKS.update(kept)
    return milliseconds(calls)
