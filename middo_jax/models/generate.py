"""Answers from a Decoder: prefill, decode and sampling on the device, continuous batching on the host.

    with Engine(graphdef, params, max_batch=8, max_context=2048) as engine:
        future = engine.submit(Request(prompt_tokens, max_tokens=256))
        future.result().tokens

One cache holds `max_batch` slots. A request is prefilled alone into a free slot, then all slots are decoded
together, one token a step; a slot that ends is refilled before the next step. Prompts are padded to a few
lengths, so that the number of compiled programs is bounded. A request's answer depends on the request alone:
not on its slot, not on what its neighbours ask, not on when it came.
Axes: b slot, t position, d model width, v vocabulary.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import threading
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from middo_jax.models.decoder import Decoder, KVCache, empty_cache

SHORTEST_BUCKET = 32
COLDEST = 1e-4  # lowest temperature that is not greedy
# Halvings that find a sampling threshold: 2**-32 of the logits' range is finer than float32 tells apart.
BISECTIONS = 32


@dataclasses.dataclass(frozen=True)
class Request:
    """What is to be answered, and how.

    Attributes:
      prompt_tokens: token ids, at least one and fewer than the engine's max_context.
      max_tokens: at most so many tokens; fewer where the context is full.
      temperature: 0 takes the likeliest token, always.
      top_p: sample from the likeliest tokens that hold this share of the probability; 1 is off.
      top_k: sample from so many likeliest tokens, before top_p; 0 is off.
      seed: the same request with the same seed has the same answer; taken modulo 2**32.
      stop_ids: tokens that end the answer.
    """

    prompt_tokens: Sequence[int]
    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    stop_ids: frozenset[int] = frozenset()


@dataclasses.dataclass(frozen=True)
class Completion:
    """An answer. `tokens` is without the stop token; "length": it was cut by max_tokens or the context."""

    tokens: list[int]
    finish_reason: Literal["stop", "length"]


class Sampling(NamedTuple):
    """How each row is sampled; `index` counts the tokens that its answer already has."""

    temperature_b: jax.Array
    top_p_b: jax.Array
    top_k_b: jax.Array
    seed_b: jax.Array
    index_b: jax.Array

    @classmethod
    def of(cls, rows: Sequence[tuple[Request, int] | None]) -> Sampling:
        """Arrays from (request, index) a row; None is an idle row, which is greedy since that costs least."""
        filled = [(Request((), 0), 0) if row is None else row for row in rows]
        return cls(
            jnp.array([request.temperature for request, _ in filled], jnp.float32),
            jnp.array([request.top_p for request, _ in filled], jnp.float32),
            jnp.array([request.top_k for request, _ in filled], jnp.int32),
            jnp.array([request.seed % 2**32 for request, _ in filled], jnp.uint32),
            jnp.array([index for _, index in filled], jnp.int32),
        )


def sample(logits_bv: jax.Array, sampling: Sampling) -> jax.Array:
    """The next token [b] of every row; each row is drawn as if it were alone.

    What only some rows need (random numbers, thresholds) is computed for all rows or for none, and leaves
    the other rows' logits as they are, to the bit.
    """
    greedy_b = jnp.argmax(logits_bv, axis=-1).astype(jnp.int32)
    needs_noise_b = sampling.temperature_b > 0
    needs_threshold_b = needs_noise_b & ((sampling.top_p_b < 1) | (sampling.top_k_b > 0))

    def draw() -> jax.Array:
        # Relative to the highest and not colder than that: the quotients stay finite.
        temperature_b = jnp.maximum(sampling.temperature_b, COLDEST)
        scaled_bv = (logits_bv - logits_bv.max(axis=-1, keepdims=True)) / temperature_b[:, None]
        likely_bv = jax.lax.cond(
            jnp.any(needs_threshold_b),
            lambda: keep_likely(scaled_bv, sampling.top_k_b, sampling.top_p_b),
            lambda: scaled_bv,
        )
        # A named generator: the default one may be configured to draw differently under vmap.
        keys_b = jax.vmap(lambda seed: jax.random.key(seed, impl="threefry2x32"))(sampling.seed_b)
        keys_b = jax.vmap(jax.random.fold_in)(keys_b, sampling.index_b)
        noise_bv = jax.vmap(lambda key: jax.random.gumbel(key, logits_bv.shape[1:]))(keys_b)
        drawn_b = jnp.argmax(likely_bv + noise_bv, axis=-1).astype(jnp.int32)
        return jnp.where(needs_noise_b, drawn_b, greedy_b)

    return jax.lax.cond(jnp.any(needs_noise_b), draw, lambda: greedy_b)


def keep_likely(logits_bv: jax.Array, top_k_b: jax.Array, top_p_b: jax.Array) -> jax.Array:
    """Sets to -inf what is not among a row's top_k logits (0: all), then not in its top_p nucleus (1: all).

    The nucleus (arXiv 1904.09751) is the smallest set of likeliest tokens whose share of the probability is
    at least top_p. Equal logits are kept or dropped together. Thresholds are found by bisection: on a CPU a
    sort of 50k logits takes as long as a decode step of a small model.
    """
    count_b = _threshold(logits_bv, jnp.ones_like(logits_bv), top_k_b.astype(logits_bv.dtype))
    kept_bv = logits_bv >= jnp.where(top_k_b > 0, count_b, -jnp.inf)[:, None]
    mass_bv = jax.nn.softmax(jnp.where(kept_bv, logits_bv, -jnp.inf), axis=-1)
    share_b = _threshold(logits_bv, mass_bv, top_p_b * mass_bv.sum(axis=-1))
    kept_bv &= logits_bv >= jnp.where(top_p_b < 1, share_b, -jnp.inf)[:, None]
    return jnp.where(kept_bv, logits_bv, -jnp.inf)


def _threshold(logits_bv: jax.Array, mass_bv: jax.Array, wanted_b: jax.Array) -> jax.Array:
    """The highest threshold [b] at or above which the logits hold at least the wanted mass."""

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        enough_b, short_b = bounds
        middle_b = (enough_b + short_b) / 2
        held_b = jnp.where(logits_bv >= middle_b[:, None], mass_bv, 0.0).sum(axis=-1)
        is_enough_b = held_b >= wanted_b
        return jnp.where(is_enough_b, middle_b, enough_b), jnp.where(is_enough_b, short_b, middle_b)

    bounds = (logits_bv.min(axis=-1), logits_bv.max(axis=-1) + 1)
    return jax.lax.fori_loop(0, BISECTIONS, halve, bounds)[0]


@functools.partial(jax.jit, static_argnames="graphdef", donate_argnames="cache")
def prefill(
    graphdef: nnx.GraphDef[Decoder],
    params: nnx.State,
    cache: KVCache,
    tokens_1t: jax.Array,
    length: jax.Array,
    slot: jax.Array,
    sampling: Sampling,
) -> tuple[jax.Array, KVCache]:
    """Reads one prompt, padded on the right from `length` on, into a slot.

    Returns:
      (the answer's first token [1], the cache).
    """
    model = nnx.merge(graphdef, params)
    bucket = tokens_1t.shape[1]
    positions_1t = jnp.arange(bucket)[None]
    hidden_1td, prompt = model.hidden_cached(tokens_1t, positions_1t, empty_cache(model.config, 1, bucket))
    corner = (0, slot, 0, 0, 0)
    keys = jax.lax.dynamic_update_slice(cache.keys, prompt.keys, corner)
    values = jax.lax.dynamic_update_slice(cache.values, prompt.values, corner)
    last_1d = jax.lax.dynamic_index_in_dim(hidden_1td, length - 1, axis=1, keepdims=False)
    return sample(model.unembed(last_1d), sampling), KVCache(keys, values)


@functools.partial(jax.jit, static_argnames="graphdef", donate_argnames="cache")
def decode(
    graphdef: nnx.GraphDef[Decoder],
    params: nnx.State,
    cache: KVCache,
    tokens_b: jax.Array,
    positions_b: jax.Array,
    sampling: Sampling,
) -> tuple[jax.Array, KVCache]:
    """Reads one token a slot; an idle slot's position is the cache's length.

    Returns:
      (the next token [b], the cache).
    """
    model = nnx.merge(graphdef, params)
    hidden_b1d, cache = model.hidden_cached(tokens_b[:, None], positions_b[:, None], cache)
    return sample(model.unembed(hidden_b1d[:, 0]), sampling), cache


@dataclasses.dataclass
class _Answer:
    """A request that is queued or being answered, and its answer so far."""

    request: Request
    future: concurrent.futures.Future[Completion]
    tokens: list[int] = dataclasses.field(default_factory=list)


class Engine:
    """Answers requests from any number of threads, up to `max_batch` at a time, on a thread of its own.

    Args:
      graphdef: the decoder's structure, from `split`.
      params: its parameters.
      max_batch: slots, hence requests decoded together.
      max_context: tokens of prompt and answer together.

    Raises:
      ValueError: max_context is more than the model has positions.
    """

    def __init__(
        self, graphdef: nnx.GraphDef[Decoder], params: nnx.State, max_batch: int, max_context: int
    ) -> None:
        self.config = nnx.merge(graphdef, params).config
        if max_context > self.config.max_position_embeddings:
            raise ValueError(
                f"max_context={max_context} is more than the model's "
                f"max_position_embeddings={self.config.max_position_embeddings}"
            )
        self.max_context = max_context
        self._graphdef = graphdef
        self._params = params
        self._cache = empty_cache(self.config, max_batch, max_context)
        self._slots: list[_Answer | None] = [None] * max_batch
        self._queue: deque[_Answer] = deque()
        self._changed = threading.Condition()
        self._ended: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="middo-engine", daemon=True)
        self._thread.start()

    @property
    def is_running(self) -> bool:
        """Whether requests are taken: not closed, and no failure on the device."""
        return self._ended is None

    def submit(self, request: Request) -> concurrent.futures.Future[Completion]:
        """Queues a request. Cancelling the future frees its place in the queue or its slot.

        Raises:
          ValueError: the prompt is empty, too long or not of this vocabulary, or a setting is out of range.
          RuntimeError: the engine is closed or has failed.
        """
        self._check(request)
        answer = _Answer(request, concurrent.futures.Future())
        with self._changed:
            if self._ended is not None:
                raise RuntimeError(f"the engine takes no more requests: {self._ended}") from self._ended
            self._queue.append(answer)
            self._changed.notify()
        return answer.future

    def generate(self, requests: Iterable[Request]) -> list[Completion]:
        """Answers of all requests, in their order; raises what `submit` raises."""
        futures: list[concurrent.futures.Future[Completion]] = []
        try:
            futures.extend(self.submit(request) for request in requests)
            return [future.result() for future in futures]
        finally:
            for future in futures:  # a no-op unless one of them has failed
                future.cancel()

    def close(self) -> None:
        """Stops after the step in progress; what is not answered fails with RuntimeError."""
        self._end(RuntimeError("the engine was closed"))
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check(self, request: Request) -> None:
        length, vocab_size = len(request.prompt_tokens), self.config.vocab_size
        if not 0 < length < self.max_context:
            raise ValueError(
                f"the prompt has {length} tokens; it must have from 1 to {self.max_context - 1}, "
                f"since prompt and answer share a context of {self.max_context}"
            )
        if not (min(request.prompt_tokens) >= 0 and max(request.prompt_tokens) < vocab_size):
            raise ValueError(f"the prompt holds token ids outside the vocabulary of {vocab_size}")
        if request.max_tokens < 1:
            raise ValueError(f"max_tokens={request.max_tokens} must be at least 1")
        if not (request.temperature >= 0 and 0 < request.top_p <= 1 and request.top_k >= 0):
            raise ValueError(
                f"temperature={request.temperature} must be >= 0, top_p={request.top_p} in (0, 1], "
                f"top_k={request.top_k} >= 0"
            )

    def _run(self) -> None:
        try:
            while self._wait():
                self._refill()
                self._step()
        except BaseException as error:  # whatever it is, nobody may wait for ever
            self._end(error)
        for answer in (*self._queue, *self._slots):
            if answer is not None and answer.future.set_running_or_notify_cancel():
                answer.future.set_exception(self._ended or RuntimeError("the engine has ended"))
        del self._params, self._cache  # who closes an engine wants its memory

    def _end(self, reason: BaseException) -> None:
        with self._changed:
            self._ended = self._ended or reason
            self._changed.notify()

    def _wait(self) -> bool:
        """Sleeps until there is work; False if the engine has ended."""
        with self._changed:
            self._changed.wait_for(lambda: self._ended or self._queue or any(self._slots))
            return self._ended is None

    def _refill(self) -> None:
        """Prefills queued requests into free slots."""
        for slot, answer in enumerate(self._slots):
            if answer is not None and answer.future.cancelled():
                self._slots[slot] = None
            while self._slots[slot] is None and self._queue:
                self._prefill(slot, self._queue.popleft())

    def _prefill(self, slot: int, answer: _Answer) -> None:
        if answer.future.cancelled():
            return
        self._slots[slot] = answer
        prompt = answer.request.prompt_tokens
        tokens_1t = np.zeros((1, _bucket(len(prompt), self.max_context)), np.int32)
        tokens_1t[0, : len(prompt)] = prompt
        first_1, self._cache = prefill(
            self._graphdef,
            self._params,
            self._cache,
            tokens_1t,
            np.int32(len(prompt)),
            np.int32(slot),
            Sampling.of([(answer.request, 0)]),
        )
        self._append(slot, answer, int(first_1[0]))

    def _step(self) -> None:
        """Decodes one token of every slot in use."""
        if not any(self._slots):
            return
        tokens_b = np.zeros(len(self._slots), np.int32)
        positions_b = np.full(len(self._slots), self.max_context, np.int32)
        for slot, answer in enumerate(self._slots):
            if answer is not None:
                tokens_b[slot] = answer.tokens[-1]
                positions_b[slot] = len(answer.request.prompt_tokens) + len(answer.tokens) - 1
        rows = [None if answer is None else (answer.request, len(answer.tokens)) for answer in self._slots]
        next_b, self._cache = decode(
            self._graphdef, self._params, self._cache, tokens_b, positions_b, Sampling.of(rows)
        )
        for slot, (answer, token) in enumerate(zip(self._slots, np.asarray(next_b), strict=True)):
            if answer is not None:
                self._append(slot, answer, int(token))

    def _append(self, slot: int, answer: _Answer, token: int) -> None:
        """Adds a token to an answer and, if that ends it, hands it over and frees its slot."""
        request = answer.request
        if token in request.stop_ids:
            completion = Completion(answer.tokens, "stop")
        else:
            answer.tokens.append(token)
            room = self.max_context - len(request.prompt_tokens)
            if len(answer.tokens) < min(request.max_tokens, room):
                return
            completion = Completion(answer.tokens, "length")
        self._slots[slot] = None
        if answer.future.set_running_or_notify_cancel():
            answer.future.set_result(completion)


def _bucket(length: int, max_context: int) -> int:
    """The padded length of a prompt: a power of two from SHORTEST_BUCKET on, at most max_context."""
    return min(max(SHORTEST_BUCKET, 1 << (length - 1).bit_length()), max_context)
