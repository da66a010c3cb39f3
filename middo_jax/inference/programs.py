"""The engine's device programs: read a part of a prompt, copy parts between slots, decode one token per slot.

Each program computes log-probabilities in a branch that runs only if a request asks for them. The logits are
computed outside of that branch, so that the tokens do not depend on it, to the bit.
Axes: docs/contributing.md#axes.
"""

from __future__ import annotations

import functools
from typing import Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from middo_jax.inference.logprobs import ROWS_AT_A_TIME, Logprobs, logprobs_of, no_logprobs
from middo_jax.inference.sampling import Sampling, sample
from middo_jax.models.config import DecoderConfig
from middo_jax.models.decoder import Decoder, KVCache, empty_cache
from middo_jax.models.model import Params, Structure, bound
from middo_jax.parallel.mesh import fitting_spec

# Tokens of a prompt that are read at a time, and the fewest that the last chunk is padded to.
CHUNK, SHORTEST_CHUNK = 128, 32

Array = TypeVar("Array")  # numpy's on the host, JAX's inside the program


class PromptChunk(NamedTuple, Generic[Array]):
    """A part of a prompt and its place.

    Attributes:
      tokens_1t: int32, padded on the right.
      next_1t: int32, the tokens that follow in the prompt, padded on the right.
      start: position of the first token in its slot.
      n_tokens: tokens without the padding.
      slot: row of the cache.
      logprobs: whether the log-probabilities of `next_1t` are wanted.
    """

    tokens_1t: Array
    next_1t: Array
    start: Array
    n_tokens: Array
    slot: Array
    logprobs: Array


class Next(NamedTuple):
    """The next token of each row, [b], and its log-probability; zeros where no row asks for it."""

    token_b: jax.Array
    logprobs: Logprobs[jax.Array]


@functools.partial(jax.jit, static_argnames="graphdef", donate_argnames="cache")
def prefill(
    graphdef: Structure, params: Params, cache: KVCache, chunk: PromptChunk[jax.Array], sampling: Sampling
) -> tuple[Next, Logprobs[jax.Array], KVCache]:
    """Reads one chunk of a prompt into its slot.

    Returns:
      (the token that follows the chunk, log-probabilities [t] of `next_1t`, the cache).
    """
    model = bound(graphdef, params)
    positions_1t = chunk.start + jnp.arange(chunk.tokens_1t.shape[1])[None]
    hidden_1td, cache = model.hidden_cached(chunk.tokens_1t, positions_1t, cache, chunk.slot)
    last_1d = jax.lax.dynamic_index_in_dim(hidden_1td, chunk.n_tokens - 1, axis=1, keepdims=False)
    of_prompt = jax.lax.cond(
        chunk.logprobs,
        lambda: _of_prompt(model, hidden_1td[0], chunk.next_1t[0]),
        lambda: no_logprobs(chunk.tokens_1t.shape[1], model.config.vocab_size),
    )
    return _next(model, last_1d, sampling), of_prompt, _in_place(cache)


def _of_prompt(model: Decoder, hidden_td: jax.Array, next_t: jax.Array) -> Logprobs[jax.Array]:
    """A few rows at a time: logits of all would take chunk length x vocabulary."""

    def some(hidden_and_next: tuple[jax.Array, jax.Array]) -> Logprobs[jax.Array]:
        hidden_nd, next_n = hidden_and_next
        return logprobs_of(model.unembed(hidden_nd), next_n)

    n_rows = min(ROWS_AT_A_TIME, len(hidden_td))
    parts = jax.lax.map(
        some, (hidden_td.reshape(-1, n_rows, hidden_td.shape[-1]), next_t.reshape(-1, n_rows))
    )
    return Logprobs(*(x.reshape(-1, *x.shape[2:]) for x in parts))


def _next(model: Decoder, hidden_bd: jax.Array, sampling: Sampling) -> Next:
    logits_bv = model.unembed(hidden_bd)
    token_b = sample(logits_bv, sampling)
    logprobs = jax.lax.cond(
        jnp.any(sampling.logprobs_b),
        lambda: logprobs_of(logits_bv, token_b),
        lambda: no_logprobs(*logits_bv.shape),
    )
    return Next(token_b, logprobs)


@functools.partial(jax.jit, donate_argnames="cache")
def copy_chunks(cache: KVCache, source: jax.Array, target: jax.Array, n_chunks: jax.Array) -> KVCache:
    """Copies the first chunks of one slot to another."""

    def copy(index: jax.Array, cache: KVCache) -> KVCache:
        at = index * CHUNK + jnp.arange(CHUNK)
        # Gathered and scattered: a slice of an axis that devices split would collect all of it first.
        return KVCache(*(x_lbpke.at[:, target, at].set(x_lbpke[:, source, at]) for x_lbpke in cache))

    return _in_place(jax.lax.fori_loop(0, n_chunks, copy, cache))


@functools.partial(jax.jit, static_argnames="graphdef", donate_argnames="cache")
def decode(
    graphdef: Structure,
    params: Params,
    cache: KVCache,
    tokens_b: jax.Array,
    positions_b: jax.Array,
    sampling: Sampling,
) -> tuple[Next, KVCache]:
    """Reads one token per slot; an idle slot's position is the cache's length.

    Returns:
      (the next tokens, the cache).
    """
    model = bound(graphdef, params)
    hidden_b1d, cache = model.hidden_cached(tokens_b[:, None], positions_b[:, None], cache)
    return _next(model, hidden_b1d[:, 0], sampling), _in_place(cache)


_CACHE_AXES = (None, "batch", None, "kv_heads", None)  # of a cache: layers, slots, positions, heads, width


def _in_place(cache: KVCache) -> KVCache:
    """The cache, split over the mesh in use as it always is, so that its memory is used again."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return cache
    spec = fitting_spec(mesh, cache.keys.shape, *_CACHE_AXES)
    return KVCache(*(jax.lax.with_sharding_constraint(x_lbpke, spec) for x_lbpke in cache))


def mesh_of(params: Params) -> Mesh | None:
    """The mesh of the parameters; None if they are on a single device without one."""
    sharding = jax.tree.leaves(params)[0].sharding
    mesh = sharding.mesh if isinstance(sharding, NamedSharding) else None
    return mesh if isinstance(mesh, Mesh) else None


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def made_cache(config: DecoderConfig, max_batch: int, max_context: int) -> KVCache:
    """An empty cache, split over the mesh in use."""
    return _in_place(empty_cache(config, max_batch, max_context))
