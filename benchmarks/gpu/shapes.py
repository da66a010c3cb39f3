"""What is measured on a GPU: models of real shapes with random weights, and examples of real lengths.

Axes: n example, token of an example.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from middo_jax.data.tokenize import TokenizedExample
from middo_jax.models.config import DecoderConfig, LayerKind, Llama3Rope
from middo_jax.models.decoder import abstract
from middo_jax.models.parameters import ParameterSpec, parameters

_LLAMA = {
    "max_position_embeddings": 131_072,
    "kinds": (LayerKind(rope_theta=500_000.0, rope_scaling=Llama3Rope(8.0, 1.0, 4.0, 8192)),),
    "vocab_size": 128_256,
    "num_heads": 32,
    "num_kv_heads": 8,
    "dtype": "bfloat16",
}
# Llama-3.1-8B, Llama-3.2-1B, and a model with which the whole script runs on a CPU.
MODELS = {
    "8b": DecoderConfig(hidden_size=4096, intermediate_size=14_336, num_layers=32, head_dim=128, **_LLAMA),
    "1b": DecoderConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_layers=16,
        head_dim=64,
        tie_word_embeddings=True,
        **_LLAMA,
    ),
    "tiny": DecoderConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        max_position_embeddings=4096,
        dtype="bfloat16",
    ),
}
# Tokens of an example, template included: median and 99th percentile. Two thirds are targets.
LENGTHS = {"alpaca": (92, 330), "dolly": (66, 1600), "tiny": (20, 60)}
LONGEST = 4096
TARGET_SHARE = 2 / 3
HEAD = 24  # tokens that a template begins with: its system turn


def random_params(config: DecoderConfig, mesh: Mesh, dtype: str = "bfloat16") -> nnx.State:
    """Parameters as a model that has learnt nothing starts with, made on the device."""
    specs = parameters(config)
    values = jax.jit(
        functools.partial(_initial, specs, config, dtype),
        out_shardings=[spec.sharding(mesh) for spec in specs],
    )(jax.random.key(0, impl="rbg"))
    of_path = {spec.path: value for spec, value in zip(specs, values, strict=True)}
    return nnx.map_state(lambda path, param: param.replace(of_path[path]), abstract(config)[1])


def _initial(
    specs: tuple[ParameterSpec, ...], config: DecoderConfig, dtype: str, key: jax.Array
) -> list[jax.Array]:
    keys = jax.random.split(key, len(specs))
    return [_value(spec, config, dtype, key) for spec, key in zip(specs, keys, strict=True)]


def _value(spec: ParameterSpec, config: DecoderConfig, dtype: str, key: jax.Array) -> jax.Array:
    if not spec.is_stacked:
        return spec.initial(key, config, dtype)
    # One layer after the other: random numbers are made in float32, and a stack would set the peak memory.
    one = dataclasses.replace(spec, axes=spec.axes[1:])
    return jax.lax.map(lambda key: one.initial(key, config, dtype), jax.random.split(key, config.num_layers))


def lengths(name: str, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """(tokens [n], targets [n]) of so many examples of a distribution as have about so many tokens together.

    A log-normal distribution through its median and 99th percentile, at most LONGEST, in random order; an
    example is at least its template's head, a token of a prompt and a target. Its end are targets.
    """
    median, p99 = LENGTHS[name]
    sigma = np.log(p99 / median) / statistics.NormalDist().inv_cdf(0.99)
    rng = np.random.default_rng(0)
    count = round(tokens / (median * np.exp(sigma**2 / 2)))
    least = (HEAD if name != "tiny" else 0) + 2
    tokens_n = np.rint(rng.lognormal(np.log(median), sigma, count)).astype(np.int64).clip(least, LONGEST)
    return tokens_n, np.minimum(np.rint(TARGET_SHARE * tokens_n).astype(np.int64), tokens_n - least + 1)


def examples(
    tokens_n: np.ndarray, targets_n: np.ndarray, vocab_size: int, prefix: int = 0
) -> list[TokenizedExample]:
    """Examples of random tokens with these lengths; `prefix`: so many at the start are the same in all."""
    rng = np.random.default_rng(1)
    shared = rng.integers(1, vocab_size, prefix).astype(np.int32)
    made = []
    for i, (count, targets) in enumerate(zip(tokens_n.tolist(), targets_n.tolist(), strict=True)):
        own = rng.integers(1, vocab_size, count - prefix).astype(np.int32)
        at = np.arange(count)
        is_target = at >= count - targets
        in_prompt = (at >= prefix) & ~is_target
        tokens = np.concatenate([shared, own])
        made.append(TokenizedExample(f"example{i}", tokens, is_target, in_prompt, False))
    return made


def forward_flops(config: DecoderConfig, tokens_n: np.ndarray, targets_n: np.ndarray) -> dict[str, Any]:
    """FLOPs of a forward pass by part: matrices, attention, head; a multiply-add counts two.

    matrices 2 x elements per token; attention 4 x heads x head_dim per layer and pair of positions of an
    example that see each other; head 2 x vocabulary x width per target.
    """
    elements = sum(spec.size(config) for spec in parameters(config) if spec.path[-1].endswith("_proj"))
    pairs = (tokens_n * (tokens_n + 1) // 2).sum()
    return {
        "matrices": 2 * elements * int(tokens_n.sum()),
        "attention": 4 * config.num_heads * config.head_dim * config.num_layers * int(pairs),
        "head": 2 * config.vocab_size * config.hidden_size * int(targets_n.sum()),
    }
