"""Requests, and sampling of the next token from logits.

Axes: docs/contributing.md#axes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Numbers = jax.Array | np.ndarray  # numpy's on the host, JAX's inside a program

COLDEST = 1e-4  # lowest temperature that is not greedy
HOTTEST = 100.0  # highest temperature; long before it, all tokens are equally likely
TOP_LOGPROBS = 20  # likeliest tokens whose log-probabilities a request may ask for
INT32_MAX = 2**31 - 1
# Halvings that find a sampling threshold: 2**-32 of the logits' range is finer than float32 tells apart.
BISECTIONS = 32


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt and its sampling parameters.

    Attributes:
      prompt_tokens: token ids, at least one and fewer than the engine's max_context.
      max_tokens: at most so many tokens; fewer where the context is full. 0 only with `prompt_logprobs`.
      temperature: from 0 to HOTTEST; 0 takes the likeliest token, always.
      top_p: sample from the likeliest tokens that hold this share of the probability; 1 is off.
      top_k: sample from the k likeliest tokens, before top_p; 0 is off.
      seed: the same request with the same seed has the same answer; taken modulo 2**32.
      stop_ids: tokens that end the answer.
      logprobs: also return the log-probabilities of the answer's tokens.
      prompt_logprobs: also return those of the prompt's tokens.
    """

    prompt_tokens: Sequence[int]
    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    stop_ids: frozenset[int] = frozenset()
    logprobs: bool = False
    prompt_logprobs: bool = False


class Sampling(NamedTuple):
    """Sampling parameters of each row; `index` is the number of tokens that its answer already has."""

    temperature_b: Numbers
    top_p_b: Numbers
    top_k_b: Numbers
    seed_b: Numbers
    index_b: Numbers
    logprobs_b: Numbers

    @classmethod
    def of(cls, rows: Sequence[tuple[Request, int] | None]) -> Sampling:
        """Builds the arrays from one (request, index) per row; None is an idle row, sampled greedily."""
        filled = [(Request((), 0), 0) if row is None else row for row in rows]
        # numpy arrays: JAX arrays would be sent to the device one by one, for every token.
        return cls(
            np.array([request.temperature for request, _ in filled], np.float32),
            np.array([request.top_p for request, _ in filled], np.float32),
            np.array([min(request.top_k, INT32_MAX) for request, _ in filled], np.int32),
            np.array([request.seed % 2**32 for request, _ in filled], np.uint32),
            np.array([index for _, index in filled], np.int32),
            np.array([request.logprobs for request, _ in filled], np.bool_),
        )


def sample(logits_bv: jax.Array, sampling: Sampling) -> jax.Array:
    """Returns the next token of every row, [b]. A row's result does not depend on the other rows.

    Noise and thresholds are computed for all rows if any row needs them; they do not change the logits of
    rows that do not need them, bit for bit.
    """
    greedy_b = jnp.argmax(logits_bv, axis=-1).astype(jnp.int32)
    needs_noise_b = sampling.temperature_b > 0
    needs_threshold_b = needs_noise_b & ((sampling.top_p_b < 1) | (sampling.top_k_b > 0))

    def draw() -> jax.Array:
        # Subtracting the maximum and limiting the temperature keeps the quotients finite.
        temperature_b = jnp.maximum(sampling.temperature_b, COLDEST)
        scaled_bv = (logits_bv - logits_bv.max(axis=-1, keepdims=True)) / temperature_b[:, None]
        likely_bv = jax.lax.cond(
            jnp.any(needs_threshold_b),
            lambda: keep_likely(scaled_bv, sampling.top_k_b, sampling.top_p_b),
            lambda: scaled_bv,
        )
        # Names the generator, because the default can be configured to one that draws differently under vmap.
        keys_b = jax.vmap(lambda seed: jax.random.key(seed, impl="threefry2x32"))(sampling.seed_b)
        keys_b = jax.vmap(jax.random.fold_in)(keys_b, sampling.index_b)
        noise_bv = jax.vmap(lambda key: jax.random.gumbel(key, logits_bv.shape[1:]))(keys_b)
        drawn_b = jnp.argmax(likely_bv + noise_bv, axis=-1).astype(jnp.int32)
        return jnp.where(needs_noise_b, drawn_b, greedy_b)

    return jax.lax.cond(jnp.any(needs_noise_b), draw, lambda: greedy_b)


def keep_likely(logits_bv: jax.Array, top_k_b: Numbers, top_p_b: Numbers) -> jax.Array:
    """Sets all logits outside a row's top_k (0: all), and then outside its top_p nucleus (1: all), to -inf.

    The nucleus (arXiv 1904.09751) is the smallest set of likeliest tokens with a total probability of at
    least top_p; the likeliest token is always in it. Equal logits are kept or dropped together. Thresholds
    are found by bisection, because on a CPU a sort of 50k logits takes as long as a decode step of a small
    model.
    """
    count_b = _threshold(logits_bv, jnp.ones_like(logits_bv), top_k_b.astype(logits_bv.dtype))
    kept_bv = logits_bv >= jnp.where(top_k_b > 0, count_b, -jnp.inf)[:, None]
    mass_bv = jax.nn.softmax(jnp.where(kept_bv, logits_bv, -jnp.inf), axis=-1)
    share_b = _threshold(logits_bv, mass_bv, top_p_b * mass_bv.sum(axis=-1))
    # A tiny top_p is 0 in float32, of which even an empty nucleus has enough.
    share_b = jnp.minimum(share_b, logits_bv.max(axis=-1))
    kept_bv &= logits_bv >= jnp.where(top_p_b < 1, share_b, -jnp.inf)[:, None]
    return jnp.where(kept_bv, logits_bv, -jnp.inf)


def _threshold(logits_bv: jax.Array, mass_bv: jax.Array, wanted_b: Numbers) -> jax.Array:
    """Returns the highest threshold [b] such that the logits at or above it have at least the wanted mass."""

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        enough_b, short_b = bounds
        middle_b = (enough_b + short_b) / 2
        held_b = jnp.where(logits_bv >= middle_b[:, None], mass_bv, 0.0).sum(axis=-1)
        is_enough_b = held_b >= wanted_b
        return jnp.where(is_enough_b, middle_b, enough_b), jnp.where(is_enough_b, short_b, middle_b)

    bounds = (logits_bv.min(axis=-1), logits_bv.max(axis=-1) + 1)
    return jax.lax.fori_loop(0, BISECTIONS, halve, bounds)[0]
