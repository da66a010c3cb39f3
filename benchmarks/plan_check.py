"""Are the times of `middo plan` right? Predicted against measured on this CPU, and against a published run.

    python -m benchmarks plan_check                  # three sizes, scoring and training, on this CPU
    python -m benchmarks plan_check --published      # Llama-3.1-8B on v6e-256, compiled by the `tpu` extra

On the CPU the rates of a chip are measured first: a large matmul, and a copy of a large array. Then small
random models score and train, and the time is predicted from their compiled programs by the code that plans a
pod. Measured is the shortest of several runs, since other work on the machine only adds to them.

The published run is MaxText's: Llama-3.1-8B on v6e-256, sequences of 8,192 tokens, 45.5 % MFU, 7,207 tokens
per second and chip. Its batch and recomputation are not ours exactly: here each chip has --rows sequences,
and every layer is recomputed.
"""

from __future__ import annotations

import argparse
import functools
import os
import time
from collections.abc import Callable
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"  # before jax is imported

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from benchmarks.paper_memory import SHAPES
from middo_jax.config import Config, load
from middo_jax.models.config import DecoderConfig
from middo_jax.models.model import Params, abstract_model
from middo_jax.parallel.mesh import one_device
from middo_jax.passes.loss_plan import MIN_LENGTH
from middo_jax.passes.losses import LossInputs, score_batch
from middo_jax.planning.amounts import Amounts
from middo_jax.planning.chips import Chip, Slices
from middo_jax.planning.compiling import Compiled, compile_program, mesh_of
from middo_jax.planning.programs import STEPS, BatchShape, scoring, training
from middo_jax.planning.stages import Workload, plan_stage
from middo_jax.training.optimizer import make_optimizer
from middo_jax.training.step import Batch, make_train_step

TARGETS = 0.55
# Layers, width, MLP, heads, key/value heads.
SIZES = {"10M": (4, 256, 704, 4, 2), "40M": (8, 512, 1408, 8, 4), "100M": (12, 768, 2048, 12, 4)}
BATCH, LENGTH, VOCAB = 4, 512, 16384
PUBLISHED_TOKENS, PUBLISHED_MFU = 7207.0, 0.455


def decoder_of(size: str) -> DecoderConfig:
    """A small model; XLA's attention, whose cost does not depend on the data."""
    layers, width, mlp, heads, kv_heads = SIZES[size]
    return DecoderConfig(
        VOCAB, width, mlp, layers, heads, kv_heads, width // heads, LENGTH, attention="xla", dtype="float32"
    )


def settings(**more: Any) -> Config:
    """The settings of both programs."""
    named = {"model.path": "none", "data.path": "none", "model.dtype": "float32", "model.max_length": LENGTH}
    return load(None, [named | {"train.batch_size": BATCH, "train.remat": "layer"} | more])


def shortest(run: Callable[[], Any], runs: int = 7) -> float:
    """Seconds of the shortest of several runs, after one that is not counted."""
    jax.block_until_ready(run())
    times = []
    for _ in range(runs):
        began = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - began)
    return min(times)


def this_cpu() -> Chip:
    """The measured rates of this CPU."""
    n, size, repeats = 1536, 2**22, 32
    x_nn = jnp.ones((n, n), jnp.float32)
    matmul_s = shortest(lambda: _product(x_nn, x_nn))
    y_n = jnp.ones(size, jnp.float32)
    memory_s = shortest(lambda: _plus_ones(y_n, repeats)) / repeats
    return Chip(
        "cpu",
        2.0 * n**3 / matmul_s,
        2.0 * 4 * size / memory_s,
        float("inf"),
        matmul_tile=1,
        matmul_efficiency=1.0,
        memory_efficiency=1.0,
    )


@jax.jit
def _product(x_nn: jax.Array, y_nn: jax.Array) -> jax.Array:
    return x_nn @ y_nn


@functools.partial(jax.jit, static_argnames="repeats")
def _plus_ones(x_n: jax.Array, repeats: int) -> jax.Array:
    # A loop, so that no new memory is requested from the system each time, as in a program's own arrays.
    return jax.lax.fori_loop(0, repeats, lambda _, y_n: y_n + 1, x_n)


def _arrays(shapes: Any, rng: np.random.Generator) -> Any:
    return jax.tree.map(lambda x: jnp.asarray(0.02 * rng.standard_normal(x.shape), x.dtype), shapes)


def measured_scoring(decoder: DecoderConfig, config: Config, mesh: Mesh) -> float:
    """Seconds of one batch of scoring: each row is one text."""
    rng = np.random.default_rng(0)
    model = abstract_model(decoder, mesh)
    params = _arrays(model.params, rng)
    tokens_bt, positions_bt, is_target_bt = _texts(rng)
    batch = LossInputs(
        tokens_bt, jnp.zeros_like(tokens_bt), positions_bt, tokens_bt, is_target_bt, ~is_target_bt
    )
    static: dict[str, Any] = {
        "max_segments": LENGTH // MIN_LENGTH,
        "chunk": config.scoring.unembed_chunk,
        "longest": LENGTH,
    }
    return shortest(lambda: score_batch(model.graphdef, params, batch, **static))


def _texts(rng: np.random.Generator) -> tuple[jax.Array, jax.Array, jax.Array]:
    tokens_bt = jnp.asarray(rng.integers(0, VOCAB, (BATCH, LENGTH)), jnp.int32)
    positions_bt = jnp.broadcast_to(jnp.arange(LENGTH, dtype=jnp.int32), (BATCH, LENGTH))
    return tokens_bt, positions_bt, positions_bt >= round(LENGTH * (1 - TARGETS))


def measured_training(decoder: DecoderConfig, config: Config, mesh: Mesh) -> float:
    """Seconds of one optimizer step."""
    rng = np.random.default_rng(0)
    model = abstract_model(decoder, mesh)
    state = _arrays(model.params, rng)
    opt_state = make_optimizer(config.train, STEPS).init(state)
    tokens_bt, positions_bt, is_target_bt = _texts(rng)
    batch = Batch(tokens_bt[None], jnp.zeros_like(tokens_bt)[None], positions_bt[None], is_target_bt[None])
    placed = jax.tree.map(lambda x: jax.device_put(x, jax.devices()[0]), (state, opt_state))
    step = make_train_step(
        model.graphdef,
        config.train,
        STEPS,
        state=placed,
        chunk=config.scoring.unembed_chunk,
        longest=LENGTH,
    )

    def run() -> Any:
        nonlocal placed
        trained, moments, outputs = step(*placed, Params({}), batch)
        placed = trained, moments
        return outputs.loss, jax.tree.leaves(trained)[0]

    return shortest(run, 4)


def on_this_cpu() -> None:
    """Prints predicted and measured times."""
    chip, mesh, config = this_cpu(), one_device(), settings()
    rates = f"{chip.matmul_flops / 1e9:.0f} GFLOP/s, {chip.memory_bytes / 1e9:.1f} GB/s"
    print(f"{os.cpu_count()} cores, measured: {rates}\n")
    print("| program | size | GFLOP | predicted | measured | predicted / measured | limited by |")
    print("|---" * 7 + "|")
    for size in SIZES:
        decoder = decoder_of(size)
        rows = BatchShape(BATCH, LENGTH, LENGTH, TARGETS)
        programs = {
            "scoring": (scoring(config, decoder, mesh, rows, 1.0), measured_scoring),
            "training": (training(config, decoder, mesh, TARGETS, 1.0), measured_training),
        }
        for name, (program, measure) in programs.items():
            compiled = compile_program(program, mesh, chip, None)
            _print_line(name, size, compiled, measure(decoder, config, mesh))


def _print_line(name: str, size: str, compiled: Compiled, measured: float) -> None:
    cost = compiled.cost
    assert cost is not None  # it fits: a CPU has no limit here
    print(
        f"| {name} | {size} | {cost.flops / 1e9:.1f} | {cost.seconds:.3f} s | {measured:.3f} s | "
        f"{cost.seconds / measured:.2f} | {cost.limit} |",
        flush=True,
    )
    for note in cost.notes:
        print(f"  {note}")


def published(rows: int) -> None:
    """Prints tokens per second and chip of the published run's shape and mesh."""
    slices = Slices.parse("v6e:16x16")
    length = 8192
    config = load(
        None,
        [
            {
                "model.path": "none",
                "data.path": "none",
                "model.max_length": length,
                "train.batch_size": rows * slices.chips,
                "train.remat": "layer",
                "train.param_dtype": "float32",
            }
        ],
    )
    lengths_n = np.full(rows * slices.chips, length)  # one step
    amounts = Amounts(len(lengths_n), lengths_n, 1.0, "full rows")
    workload = Workload(config, SHAPES["llama-3.1-8b"], amounts, slices.chip, slices)
    stage = plan_stage("train", workload, mesh_of(slices, (1, 256, 1)), print)
    used = f"{stage.memory.used / 2**30:.1f} of {stage.memory.usable / 2**30:.1f} GiB per chip"
    if stage.seconds is None:
        print(f"does not fit: {used}")
        return
    tokens = rows * length / stage.seconds
    print(f"{used}; {stage.seconds:.3f} s per step of {rows} x {length} tokens per chip")
    print(f"the compiler's estimate: {stage.cost.compiler_seconds(slices.chip):.3f} s")
    parts = f"matmuls {stage.cost.matmul_s:.3f}, memory {stage.cost.memory_s:.3f}"
    print(f"{parts}, network {stage.cost.network_s:.3f} s")
    print(
        f"{tokens:.0f} tokens/s per chip; published {PUBLISHED_TOKENS:.0f}: {tokens / PUBLISHED_TOKENS:.2f}"
    )


def main() -> None:
    """Runs one of the two checks."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--published", action="store_true", help="compare with the published run")
    parser.add_argument("--rows", type=int, default=2, help="sequences per chip of the published run")
    arguments = parser.parse_args()
    published(arguments.rows) if arguments.published else on_this_cpu()


if __name__ == "__main__":
    main()
