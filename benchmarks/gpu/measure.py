"""One job of the GPU table, in a process of its own: prints and writes its figures as JSON.

    python -m benchmarks.gpu.measure scoring-8b --out scoring-8b.json

Weights and tokens are random, shapes and lengths real (see `shapes`). Seconds are medians of several, after
what is timed has run once; what is compiled before stands by itself. "of peak" is FLOPs that the figures' own
definition counts, over the seconds and the dense bfloat16 rate that the maker publishes; the definitions are
those of `shapes.forward_flops` and, for training, `middo_jax.training.flops`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from benchmarks.gpu import shapes
from benchmarks.gpu.attention import blocks, kernels
from benchmarks.gpu.profiling import kernel_times
from middo_jax.config import MeshSettings, TrainSettings
from middo_jax.data.packing import pack
from middo_jax.data.tokenize import TokenizedExample
from middo_jax.models.config import DecoderConfig, Lora
from middo_jax.models.decoder import abstract
from middo_jax.models.lora import partition, with_fresh_adapters
from middo_jax.models.model import Model
from middo_jax.models.parameters import LORA_TARGETS
from middo_jax.parallel.mesh import make_mesh
from middo_jax.training.flops import peak_flops, training_flops
from middo_jax.training.plan import plan_epoch

Figures = dict[str, Any]
TINY = False  # set by --tiny: everything on a model and a load that a CPU can bear


def of_peak(flops: float, seconds: float) -> float | None:
    """Share of this device's published rate; None where none is known."""
    peak = peak_flops(jax.devices()[0].device_kind)
    return None if peak is None else flops / seconds / peak


def peak_gigabytes() -> float | None:
    """The most memory that this process's arrays and programs have held."""
    stats = jax.devices()[0].memory_stats()
    return None if stats is None else stats["peak_bytes_in_use"] / 1e9


def one_device() -> Mesh:
    """The first device alone."""
    return make_mesh(MeshSettings(), jax.devices()[:1])


def scoring(model: str) -> Figures:
    """`score_examples` of Alpaca- and Dolly-like examples; the first also with a template's head shared."""
    from middo_jax.passes.losses import score_examples

    config, mesh = shapes.MODELS[model], one_device()
    loaded = Model.of(config, shapes.random_params(config, mesh), mesh)
    tokens = {"8b": 120_000, "1b": 500_000}.get(model, 4_000)
    batch_tokens, chunk = (32_768, 4096) if model != "tiny" else (1024, 256)
    figures: Figures = {"batch_tokens": batch_tokens, "unembed_chunk": chunk}
    for name, prefix in (("alpaca", 0), ("dolly", 0), ("alpaca", shapes.HEAD)):
        tokens_n, targets_n = shapes.lengths(name, tokens)
        made = shapes.examples(tokens_n, targets_n, config.vocab_size, prefix)

        def run(made: list[Any] = made) -> Any:
            return score_examples(loaded, made, batch_tokens=batch_tokens, chunk=chunk)

        again = [run()[1] for _ in range(3)]  # each compiles before its clock starts
        first, seconds = again[0], statistics.median(facts.seconds for facts in again)
        flops = shapes.forward_flops(config, tokens_n, targets_n)
        figures[f"{name}, head of {prefix} shared" if prefix else name] = {
            "examples": len(made),
            "tokens": sum(map(len, made)),
            "seconds": [facts.seconds for facts in again],
            "tokens_per_s": sum(map(len, made)) / seconds,
            "of_peak": None if prefix else of_peak(sum(flops.values()), seconds),
            "fill": first.fill,
            "shapes": first.shapes,
            "compile_s": first.compile_seconds,
        }
        if name == "dolly":
            figures["kernels"] = kernel_times(run)
    return figures | {"peak_gb": peak_gigabytes()}


def ratings(model: str) -> Figures:
    """`judge` of the quickstart's rows, whose six questions are one tree each."""
    from middo_jax.data.sources import read
    from middo_jax.data.tokenize import load_tokenizer
    from middo_jax.stages.ratings import Asked, judge

    config, mesh = shapes.MODELS[model], one_device()
    rows, _ = read("configs/quickstart_data.jsonl", "alpaca")
    tokenizer = load_tokenizer(TOKENIZER)
    config = dataclasses.replace(config, vocab_size=max(config.vocab_size, len(tokenizer)))
    judging = Model.of(config, shapes.random_params(config, mesh), mesh)
    rows = (
        rows[:8] if TINY else [dataclasses.replace(row, id=f"{row.id}{i}") for i in range(3) for row in rows]
    )

    def run() -> Any:
        began = time.perf_counter()
        rating_n6, facts = judge(
            judging,
            Asked.of(rows, tokenizer, 2048),
            batch_tokens=32_768 if not TINY else 2048,
        )
        assert np.isfinite(rating_n6).all()
        return facts, time.perf_counter() - began

    again = [run() for _ in range(3)]  # each compiles before its clock starts
    first = again[0][0]
    seconds = statistics.median(facts.seconds for facts, _ in again)
    whole = np.array([first.real_tokens])
    flops = shapes.forward_flops(config, whole, np.zeros(1, int))["matrices"]
    return {
        "samples": len(rows),
        "tokens_read": first.real_tokens,
        "seconds": [facts.seconds for facts, _ in again],
        "seconds_with_rendering": [seconds for _, seconds in again],
        "samples_per_s": len(rows) / seconds,
        "tokens_per_s": first.real_tokens / seconds,
        "of_peak_matrices_only": of_peak(flops, seconds),
        "fill": first.fill,
        "shapes": first.shapes,
        "compile_s": first.compile_seconds,
        "kernels": kernel_times(run),
        "peak_gb": peak_gigabytes(),
    }


def training(model: str, lora: bool) -> Figures:
    """A training step of packed Alpaca-like examples, AdamW; with adapters of rank 16, or all weights."""
    from middo_jax.training.optimizer import abstract_opt_state, make_optimizer
    from middo_jax.training.step import make_train_step, put_batch

    config, mesh = shapes.MODELS[model], one_device()
    length, rows, steps = (4096, 4, 6) if not TINY else (512, 2, 2)
    params = shapes.random_params(config, mesh, "bfloat16" if lora else "float32")
    trainee = Model.of(config, params, mesh)
    if lora:
        trainee = with_fresh_adapters(trainee, Lora(16, 32.0, tuple(LORA_TARGETS)), 0)
        config = trainee.config
    made = shapes.examples(*shapes.lengths("alpaca", 2 * (steps + 3) * rows * length), config.vocab_size)
    settings = TrainSettings(batch_size=rows, remat="dots")
    plan = plan_epoch(list(map(len, made)), settings, 0, 0, length)[: steps + 2]
    trained, frozen = partition(trainee.params, config)
    with jax.set_mesh(mesh):
        optimizer = make_optimizer(settings, 100)
        target = abstract_opt_state(optimizer, trained, mesh)
        state = (
            trained,
            jax.jit(optimizer.init, out_shardings=jax.tree.map(lambda x: x.sharding, target))(trained),
        )
        step = make_train_step(
            trainee.graphdef, settings, 100, chunk=2048, state=state, longest=shapes.LONGEST
        )
        batches = [put_batch(pack(made, rows_, rows, length, length), 1, mesh) for rows_ in plan]
        began = time.perf_counter()
        compiled = step.lower(*state, frozen, batches[0]).compile()
        compiling = time.perf_counter() - began
        seconds = []
        for number, batch in enumerate(batches):
            began = time.perf_counter()
            *state, outputs = compiled(*state, frozen, batch)
            assert np.isfinite(float(outputs.loss))
            if number > 1:
                seconds.append(time.perf_counter() - began)
        held = [state]

        def again() -> Any:
            *held[0], outputs = compiled(*held[0], frozen, batches[-1])
            return outputs

        profile = kernel_times(again)
    of_steps = [[made[i] for row in rows_ for i in row] for rows_ in plan[2:]]
    return {
        "rows": rows,
        "row_tokens": length,
        "seconds": seconds,
        **_rates(config, of_steps, seconds),
        "compile_s": compiling,
        "kernels": profile,
        "peak_gb": peak_gigabytes(),
    }


def _rates(
    config: DecoderConfig, of_steps: Sequence[Sequence[TokenizedExample]], seconds: Sequence[float]
) -> Figures:
    """Medians over the steps: tokens per second, and the share of the device's peak if that is known."""
    tokens = [sum(map(len, step)) for step in of_steps]
    flops = [
        training_flops(config, [len(one) for one in step], sum(int(one.is_target_n.sum()) for one in step))
        for step in of_steps
    ]
    return {
        "tokens_per_s": statistics.median(n / s for n, s in zip(tokens, seconds, strict=True)),
        "of_peak": of_peak(1.0, 1.0)
        and statistics.median(of_peak(f, s) or 0 for f, s in zip(flops, seconds, strict=True)),
    }


def neighbours() -> Figures:
    """`nearest_neighbours` of 200,000 x 4,096, two neighbours; and its products' share of float32's peak."""
    from middo_jax.signals.neighbours.search import nearest_neighbours

    n, width = (200_000, 4096) if not TINY else (2_000, 64)
    rng = np.random.default_rng(0)
    embedding_nd = rng.standard_normal((n, width), np.float32)
    figures: Figures = {"rows": n, "width": width}
    for block in (16_384, 4096) if not TINY else (256,):
        began = time.perf_counter()
        found = nearest_neighbours(embedding_nd, 2, one_device(), block=block)
        first = time.perf_counter() - began
        began = time.perf_counter()
        nearest_neighbours(embedding_nd, 2, one_device(), block=block)
        figures[f"blocks of {block}"] = {"first_s": first, "seconds": time.perf_counter() - began}
        checked_m = rng.integers(0, n, 8)
        similarity_mn = embedding_nd[checked_m] @ embedding_nd.T / np.linalg.norm(embedding_nd, axis=1)
        similarity_mn[np.arange(8), checked_m] = -np.inf
        wrong = (similarity_mn.argmax(axis=1) != found.index_nj[checked_m, 0]).sum()
        figures[f"blocks of {block}"]["wrong_of_8"] = int(wrong)
    return figures | {"flops_of_each_pair_once": n * n * width, "peak_gb": peak_gigabytes()}


def decoding(model: str) -> Figures:
    """The embedded engine with 256 slots: prompts of 64 tokens, answers of 128, so many requests at once."""
    from middo_jax.inference.engine import Engine
    from middo_jax.inference.sampling import Request

    config, mesh = shapes.MODELS[model], one_device()
    params = shapes.random_params(config, mesh)
    rng = np.random.default_rng(0)
    figures: Figures = {}
    prompt, answer = (64, 128) if not TINY else (8, 4)
    counts = (1, 32, 256) if not TINY else (1, 2)
    prompts: list[list[int]] = []
    with jax.set_mesh(mesh), Engine(abstract(config)[0], params, counts[-1], 256) as engine:
        for count in counts:
            seconds = []
            for _ in range(3):  # the first compiles
                prompts = rng.integers(1, config.vocab_size, (count, prompt)).tolist()
                began = time.perf_counter()
                answers = engine.generate(Request(tokens, answer) for tokens in prompts)
                seconds.append(time.perf_counter() - began)
                assert all(len(a.tokens) == answer for a in answers)
            figures[f"{count} requests"] = {
                "seconds": seconds,
                "tokens_per_s": count * answer / statistics.median(seconds[1:]),
                "ms_per_token_of_a_request": 1000 * statistics.median(seconds[1:]) / answer,
            }
        requests = [Request(tokens, 4) for tokens in prompts]
        figures["kernels"] = kernel_times(lambda: len(engine.generate(requests)))
    return figures | {"peak_gb": peak_gigabytes()}


TOKENIZER = "benchmarks/gpu/tokenizer"
JOBS: dict[str, Callable[[], Figures]] = {
    "scoring-8b": lambda: scoring("8b"),
    "scoring-1b": lambda: scoring("1b"),
    "ratings-8b": lambda: ratings("8b"),
    "lora-8b": lambda: training("8b", True),
    "full-1b": lambda: training("1b", False),
    "neighbours": neighbours,
    "decoding-1b": lambda: decoding("1b"),
    "kernels": lambda: kernels(TINY),
    "blocks": blocks,
    "scoring-tiny": lambda: scoring("tiny"),
    "ratings-tiny": lambda: ratings("tiny"),
    "lora-tiny": lambda: training("tiny", True),
    "full-tiny": lambda: training("tiny", False),
    "decoding-tiny": lambda: decoding("tiny"),
}


def main() -> None:
    """Runs one job."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("job", choices=sorted(JOBS))
    parser.add_argument("--out", type=Path, required=True, help="gets the figures as JSON")
    parser.add_argument("--tiny", action="store_true", help="everything so small that a CPU bears it")
    arguments = parser.parse_args()
    global TINY
    TINY = arguments.tiny or arguments.job.endswith("-tiny")
    figures = JOBS[arguments.job]()
    device = jax.devices()[0].device_kind
    arguments.out.write_text(
        json.dumps({"device": device, "jax": jax.__version__, **figures}, indent=1) + "\n"
    )
    print(json.dumps({k: v for k, v in figures.items() if k != "kernels"}), flush=True)


if __name__ == "__main__":
    main()
