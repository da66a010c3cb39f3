"""Is what a GPU computes right? Prints each law with its error; exits 1 if one is broken.

    python -m benchmarks.gpu.check --out check.json

Kernels, forward and backward, against XLA's attention in float32; packed rows against examples of their own;
trees against separate texts; then on a tiny model the scoring pass, a training step and generated tokens on
this device against the same on the CPU. Without a GPU the kernels run in JAX's interpreter, on less.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import functools
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from benchmarks.gpu import shapes
from middo_jax.config import MeshSettings, TrainSettings
from middo_jax.data.packing import pack
from middo_jax.inference.engine import Engine
from middo_jax.inference.sampling import Request
from middo_jax.models.attention import AttentionSpec, CachedLayer, Packing, cached_attention
from middo_jax.models.attention.triton import triton_attention
from middo_jax.models.attention.triton_cached import triton_cached_attention
from middo_jax.models.attention.xla import xla_attention
from middo_jax.models.config import DecoderConfig
from middo_jax.models.decoder import abstract
from middo_jax.models.model import Model
from middo_jax.parallel.mesh import make_mesh
from middo_jax.passes.losses import score_examples
from middo_jax.training.optimizer import abstract_opt_state, make_optimizer
from middo_jax.training.plan import plan_epoch
from middo_jax.training.step import make_train_step, put_batch

# ||ours - reference|| / ||reference||, the reference in float32.
TOLERANCES = {"float32": 2e-5, "bfloat16": 1e-2}


class Law(NamedTuple):
    """What should be equal, how far it is from that, and how far it may be."""

    name: str
    error: float
    tolerance: float

    @property
    def holds(self) -> bool:
        """Whether it is; NaN is not."""
        return self.error <= self.tolerance


def distance(ours: Any, reference: Any) -> float:
    """The largest relative distance ||x - y|| / ||y|| of two trees' leaves."""
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(reference), strict=True)
    arrays = [(np.asarray(x, np.float64), np.asarray(y, np.float64)) for x, y in pairs]
    return max(float(np.linalg.norm(x - y) / max(np.linalg.norm(y), 1e-30)) for x, y in arrays)


class Rows(NamedTuple):
    """The places of positions: segments of random lengths with a tail of padding, or trees with a prefix."""

    segment_ids: np.ndarray
    positions: np.ndarray
    until: np.ndarray | None
    prefix: int


def segments(batch: int, length: int) -> Rows:
    """Segments of 1 to 300 positions."""
    rng = np.random.default_rng(0)
    ids, positions = np.full((batch, length), -1, np.int32), np.zeros((batch, length), np.int32)
    for b in range(batch):
        start = 0
        for segment in itertools.count():
            size = int(rng.integers(1, 300))
            if start + size > length - 7:
                break
            ids[b, start : start + size], positions[b, start : start + size] = segment, np.arange(size)
            start += size
    return Rows(ids, positions, None, 0)


def trees(batch: int, length: int, prefix: int) -> Rows:
    """Trees of a stem and some branches behind a prefix that all of a row share."""
    rng = np.random.default_rng(0)
    positions = np.zeros((batch, length), np.int32)
    until = np.tile(np.arange(1, length + 1, dtype=np.int32), (batch, 1))
    for b in range(batch):
        positions[b, :prefix], until[b, :prefix] = np.arange(prefix), length
        start, most = prefix, length // 8
        while start + 4 * most < length:
            stem, branches = int(rng.integers(1, most)), rng.integers(1, most, 3).tolist()
            end = start + stem + sum(branches)
            positions[b, start : start + stem] = prefix + np.arange(stem)
            until[b, start : start + stem] = end
            start += stem
            for branch in branches:
                positions[b, start : start + branch] = prefix + stem + np.arange(branch)
                until[b, start : start + branch] = start + branch
                start += branch
    return Rows(np.zeros((batch, length), np.int32), positions, until, prefix)


def kernel_laws(on_gpu: bool) -> Iterator[Callable[[], Law]]:
    """The kernel of packed attention == XLA's in float32, values and gradients."""
    length = 1024 if on_gpu else 300
    cases = {
        "segments": (segments(2, length), None, None),
        "trees, prefix, window, soft cap": (trees(2, length, 90), 120, 20.0),
        "segments, window": (segments(2, length), 100, None),
        "segments, soft cap": (segments(2, length), None, 20.0),
        "trees": (trees(2, length, 0), None, None),
        "trees, prefix": (trees(2, length, 90), None, None),
    }
    dims = (128, 64, 256) if on_gpu else (16,)
    for dtype, (at, dim), name in itertools.product(TOLERANCES, enumerate(dims), cases):
        # All cases in one width, the plainest and the one that has everything in the others.
        if at == 0 or name in list(cases)[:2]:
            yield functools.partial(kernel_law, name, *cases[name], dtype, dim, not on_gpu)


def kernel_law(
    name: str, rows: Rows, window: int | None, soft_cap: float | None, dtype: str, dim: int, interpret: bool
) -> Law:
    """One case of `kernel_laws`."""
    rng = np.random.default_rng(1)
    shape = rows.positions.shape
    arrays = [jnp.asarray(rng.standard_normal((*shape, n, dim)), dtype) for n in (8, 2, 2, 8)]
    until = None if rows.until is None else jnp.asarray(rows.until)
    packing = Packing(jnp.asarray(rows.segment_ids), jnp.asarray(rows.positions), until, rows.prefix)
    spec = AttentionSpec(dim**-0.5, window, soft_cap)
    real_bt11 = jnp.asarray(rows.segment_ids >= 0)[..., None, None]

    def both(attend: Any, *arrays: jax.Array) -> Any:
        q, k, v, by_out = arrays
        out, pull = jax.vjp(lambda *x: attend(*x, packing, spec), q, k, v)
        return out * real_bt11, pull((by_out * real_bt11).astype(out.dtype))

    kernel = functools.partial(triton_attention, interpret=interpret)
    ours = jax.jit(functools.partial(both, kernel))(*arrays)
    with jax.default_matmul_precision("highest"):
        wide = [x.astype(jnp.float32) for x in arrays]
        theirs = jax.jit(functools.partial(both, xla_attention))(*wide)
    return Law(f"kernel == XLA: {name}, {dtype}, {dim}", distance(ours, theirs), TOLERANCES[dtype])


def cached_laws(on_gpu: bool) -> Iterator[Callable[[], Law]]:
    """The kernel of decoding == the attention of the CPU's loop."""
    for dtype, dim in itertools.product(TOLERANCES, (64, 128) if on_gpu else (16,)):
        yield functools.partial(cached_law, dtype, dim, not on_gpu)


def cached_law(dtype: str, dim: int, interpret: bool) -> Law:
    """One case of `cached_laws`."""
    rng = np.random.default_rng(2)
    keys, values = (jnp.asarray(rng.standard_normal((2, 4, 600, 2, dim)), dtype) for _ in range(2))
    positions = jnp.asarray([[0], [599], [300], [77]])
    q = jnp.asarray(rng.standard_normal((4, 1, 8, dim)), dtype)
    cached, spec = CachedLayer(keys, values, jnp.int32(1)), AttentionSpec(dim**-0.5)
    ours = triton_cached_attention(q, cached, positions, spec, interpret=interpret)
    wide_q, wide_keys, wide_values = (np.asarray(x, np.float32) for x in (q, keys, values))
    with jax.default_device(jax.devices("cpu")[0]), jax.set_mesh(cpu_mesh()):
        wide = CachedLayer(jnp.asarray(wide_keys), jnp.asarray(wide_values), jnp.int32(1))
        theirs = jax.jit(functools.partial(cached_attention, spec=spec))(wide_q, wide, np.asarray(positions))
    return Law(f"decoding == CPU: {dtype}, {dim}", distance(ours, theirs), TOLERANCES[dtype])


def cpu_mesh() -> Mesh:
    """One CPU."""
    return make_mesh(MeshSettings(), jax.devices("cpu")[:1])


def scores(config: DecoderConfig, mesh: Mesh, examples: list[Any], batch_tokens: int) -> list[np.ndarray]:
    """The columns of `ExampleScores` for a model of the config; its weights are the same on every mesh."""
    with jax.default_device(jax.devices("cpu")[0]):
        params = shapes.random_params(config, cpu_mesh(), "float32")
    specs = {spec.path: spec for spec in shapes.parameters(config)}
    params = jax.tree.map_with_path(
        lambda path, x: jax.device_put(np.asarray(x), specs[_keys(path)].sharding(mesh)), params
    )
    model = Model.of(config, params, mesh)
    found, _ = score_examples(model, examples, batch_tokens=batch_tokens, chunk=256)
    return [column for column in found if column is not None]


def _keys(path: tuple[Any, ...]) -> tuple[str, ...]:
    return tuple(str(getattr(key, "key", "")) for key in path if isinstance(getattr(key, "key", None), str))


def model_laws(mesh: Mesh) -> Iterator[Law]:
    """A tiny model's scores, training step and tokens: here == on the CPU; packed == alone; shared == not."""
    config = dataclasses.replace(shapes.MODELS["tiny"], dtype="float32")
    made = shapes.examples(*shapes.lengths("tiny", 1500), config.vocab_size)
    there = scores(config, cpu_mesh(), made, 1024)
    yield Law("scoring pass == CPU, float32", distance(scores(config, mesh, made, 1024), there), 1e-5)
    half = scores(dataclasses.replace(config, dtype="bfloat16"), mesh, made, 1024)
    yield Law("scoring pass, bfloat16 == float32", distance(half, there), 2e-2)
    alone = [scores(config, mesh, [example], 64) for example in made[:3]]
    alone_n = [np.concatenate(column) for column in zip(*alone, strict=True)]
    yield Law("packed == alone", distance(list(scores(config, mesh, made[:3], 1024)), alone_n), 1e-5)
    headed = shapes.examples(*shapes.lengths("alpaca", 1500), config.vocab_size, prefix=shapes.HEAD)
    shared, apart = (scores(config, mesh, headed[:n], 1024) for n in (len(headed), 1))
    yield Law("a head read once per row == alone", distance([x[:1] for x in shared], list(apart)), 1e-5)
    steps = [train_step(config, on, made) for on in (mesh, cpu_mesh())]
    yield Law("training step == CPU, float32", distance(*steps), 1e-4)
    rng = np.random.default_rng(0)
    asked = [rng.integers(1, config.vocab_size, n).tolist() for n in (3, 40, 150)], 20
    tokens = generated(config, *asked), by_whole_texts(config, *asked)
    differ = sum(x != y for x, y in zip(*tokens, strict=True))
    yield Law("engine's greedy tokens == CPU without a cache, answers that differ", differ, 0)


def train_step(config: DecoderConfig, mesh: Mesh, examples: list[Any]) -> Any:
    """(loss, gradient norm, parameters) after a step from random weights."""
    with jax.default_device(jax.devices("cpu")[0]):
        start = jax.tree.map(np.asarray, shapes.random_params(config, cpu_mesh(), "float32"))
    settings = TrainSettings(batch_size=2, remat="dots", warmup_ratio=0.0, learning_rate=1e-3)
    graphdef = abstract(config)[0]
    specs = {spec.path: spec for spec in shapes.parameters(config)}
    with jax.set_mesh(mesh):
        params = jax.tree.map_with_path(
            lambda path, x: jax.device_put(x, specs[_keys(path)].sharding(mesh)), start
        )
        optimizer = make_optimizer(settings, 10)
        target = abstract_opt_state(optimizer, params, mesh)
        opt_state = jax.jit(optimizer.init, out_shardings=jax.tree.map(lambda x: x.sharding, target))(params)
        frozen = jax.tree.map(lambda x: x, type(params)({}))
        step = make_train_step(graphdef, settings, 10, chunk=128, state=(params, opt_state))
        rows = plan_epoch(list(map(len, examples)), settings, 0, 0, 512)[0]
        batch = put_batch(pack(examples, rows, 2, 512, 512), 1, mesh)
        with jax.default_matmul_precision("highest"):
            trained, _, outputs = step(params, opt_state, frozen, batch)
    return outputs.loss, outputs.grad_norm, jax.tree.map(np.asarray, trained)


def generated(config: DecoderConfig, prompts: list[list[int]], count: int) -> list[list[int]]:
    """The embedded engine's greedy answers, on the first device."""
    with jax.default_device(jax.devices("cpu")[0]):
        start = jax.tree.map(np.asarray, shapes.random_params(config, cpu_mesh(), "float32"))
    params = jax.device_put(start, jax.devices()[0])
    with Engine(abstract(config)[0], params, max_batch=len(prompts), max_context=256) as engine:
        return [answer.tokens for answer in engine.generate(Request(p, count) for p in prompts)]


def by_whole_texts(config: DecoderConfig, prompts: list[list[int]], count: int) -> list[list[int]]:
    """Greedy answers without any cache, on the CPU: the whole text is read for every token."""
    length = max(map(len, prompts)) + count
    with jax.default_device(jax.devices("cpu")[0]), jax.set_mesh(cpu_mesh()):
        params = shapes.random_params(config, cpu_mesh(), "float32")
        graphdef = abstract(config)[0]

        @jax.jit
        def next_token(tokens_1t: jax.Array, n: jax.Array) -> jax.Array:
            model = nnx.merge(graphdef, params)
            t = jnp.arange(length)[None]
            hidden_1td = model.hidden(tokens_1t, jnp.where(t < n, 0, -1), jnp.where(t < n, t, 0))
            return model.unembed(hidden_1td[0, n - 1][None]).argmax()

        answers = []
        for prompt in prompts:
            text = list(prompt)
            for _ in range(count):
                tokens_1t = np.zeros((1, length), np.int32)
                tokens_1t[0, : len(text)] = text
                text.append(int(next_token(tokens_1t, np.int32(len(text)))))
            answers.append(text[len(prompt) :])
    return answers


def shown(law: Law) -> Law:
    """The law, which it prints."""
    mark = "ok    " if law.holds else "BROKEN"
    print(f"{mark} {law.name}: {law.error:.2e} (at most {law.tolerance:.0e})", flush=True)
    return law


def main() -> None:
    """Prints the laws; the exit status says whether all hold."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="gets all laws as JSON")
    arguments = parser.parse_args()
    device = jax.devices()[0]
    mesh = make_mesh(MeshSettings(), [device])
    print(f"{device.device_kind}, jax {jax.__version__}", flush=True)
    on_gpu = device.platform == "gpu"
    with jax.default_matmul_precision("highest"):
        found = [shown(law) for law in model_laws(mesh)]
    # Compiling takes most of the time, and one core each.
    with concurrent.futures.ThreadPoolExecutor(min(12, os.cpu_count() or 1)) as pool:
        jobs = [pool.submit(law) for law in (*cached_laws(on_gpu), *kernel_laws(on_gpu))]
        found += [shown(job.result()) for job in jobs]
    if arguments.out is not None:
        laws = [law._asdict() | {"holds": law.holds} for law in found]
        arguments.out.write_text(json.dumps({"device": device.device_kind, "laws": laws}, indent=1) + "\n")
    broken = sum(not law.holds for law in found)
    print(f"{len(found) - broken} laws hold, {broken} are broken")
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    main()
