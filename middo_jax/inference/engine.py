"""Answers from a Decoder: prefill, decode and sampling on the device, continuous batching on the host.

    with Engine(graphdef, params, max_batch=8, max_context=2048) as engine:
        future = engine.submit(Request(prompt_tokens, max_tokens=256))
        future.result().tokens

One cache holds `max_batch` slots. A prompt is read into a free slot in chunks; between the chunks all slots
that are being answered are decoded together, one token per step, so that nobody's answer waits for a long
prompt. A slot that ends is refilled before the next step. Whole chunks of a prompt that still lie in some
slot are copied instead of read: requests that begin alike, as a refiner's do, share that work.

A request's answer depends on the request alone, to the bit: not on its slot, not on what its neighbours ask,
not on when it came. A chunk starts at a multiple of its length and sees only what is before it, so that a
copied one is the one that would have been computed.
Axes: docs/contributing.md#axes; b is a slot, p a position in it, e head dimension.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
import itertools
import threading
from collections import deque
from collections.abc import Iterable
from typing import Generic, Literal, NamedTuple, Self, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from middo_jax.inference.sampling import Request, Sampling, sample
from middo_jax.models.config import DecoderConfig
from middo_jax.models.decoder import KVCache, empty_cache
from middo_jax.models.model import Params, Structure, bound
from middo_jax.parallel.mesh import fitting_spec

# Tokens of a prompt that are read at a time, and the fewest that the last chunk is padded to.
CHUNK, SHORTEST_CHUNK = 128, 32
# Chunks between two decode steps: more fill free slots sooner, fewer keep the answers in progress flowing.
CHUNKS_PER_STEP = 4


@dataclasses.dataclass(frozen=True)
class Completion:
    """An answer. `tokens` is without the stop token; "length": it was cut by max_tokens or the context."""

    tokens: list[int]
    finish_reason: Literal["stop", "length"]


Array = TypeVar("Array")  # numpy's on the host, JAX's inside the program


class PromptChunk(NamedTuple, Generic[Array]):
    """A part of a prompt, and where it belongs.

    Attributes:
      tokens_1t: int32, padded on the right.
      start: position of the first token in its slot.
      n_tokens: tokens without the padding.
      slot: row of the cache.
    """

    tokens_1t: Array
    start: Array
    n_tokens: Array
    slot: Array


@functools.partial(jax.jit, static_argnames="graphdef", donate_argnames="cache")
def prefill(
    graphdef: Structure, params: Params, cache: KVCache, chunk: PromptChunk[jax.Array], sampling: Sampling
) -> tuple[jax.Array, KVCache]:
    """Reads one chunk of a prompt into its slot.

    Returns:
      (the token [1] that follows the chunk, the cache).
    """
    model = bound(graphdef, params)
    positions_1t = chunk.start + jnp.arange(chunk.tokens_1t.shape[1])[None]
    hidden_1td, cache = model.hidden_cached(chunk.tokens_1t, positions_1t, cache, chunk.slot)
    last_1d = jax.lax.dynamic_index_in_dim(hidden_1td, chunk.n_tokens - 1, axis=1, keepdims=False)
    return sample(model.unembed(last_1d), sampling), _in_place(cache)


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
) -> tuple[jax.Array, KVCache]:
    """Reads one token a slot; an idle slot's position is the cache's length.

    Returns:
      (the next token [b], the cache).
    """
    model = bound(graphdef, params)
    hidden_b1d, cache = model.hidden_cached(tokens_b[:, None], positions_b[:, None], cache)
    return sample(model.unembed(hidden_b1d[:, 0]), sampling), _in_place(cache)


_CACHE_AXES = (None, "batch", None, "kv_heads", None)  # of a cache: layers, slots, positions, heads, width


def _in_place(cache: KVCache) -> KVCache:
    """The cache, split over the mesh in use as it always is: so its memory is used again."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return cache
    spec = fitting_spec(mesh, cache.keys.shape, *_CACHE_AXES)
    return KVCache(*(jax.lax.with_sharding_constraint(x_lbpke, spec) for x_lbpke in cache))


def _mesh_of(params: Params) -> Mesh | None:
    """The mesh on which parameters lie; None where they lie on a single device without one."""
    sharding = jax.tree.leaves(params)[0].sharding
    mesh = sharding.mesh if isinstance(sharding, NamedSharding) else None
    return mesh if isinstance(mesh, Mesh) else None


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _made_cache(config: DecoderConfig, max_batch: int, max_context: int) -> KVCache:
    return _in_place(empty_cache(config, max_batch, max_context))


@dataclasses.dataclass
class _Answer:
    """A request that is queued or being answered, and its answer so far."""

    request: Request
    future: concurrent.futures.Future[Completion]
    tokens: list[int] = dataclasses.field(default_factory=list)

    @property
    def chunks(self) -> list[tuple[int, ...]]:
        """The prompt's whole chunks, less what has to be read in any case: its last token."""
        prompt = tuple(self.request.prompt_tokens)
        return [prompt[start : start + CHUNK] for start in range(0, len(prompt) - CHUNK, CHUNK)]


@dataclasses.dataclass(eq=False)  # two slots are never the same one
class _Slot:
    """A row of the cache.

    Attributes:
      answer: what it is used for, None if free.
      n_read: tokens of its prompt that are in the cache.
      chunks: the whole chunks at the row's start, of this prompt or of the one before.
      used: when it was last given to a request.
    """

    answer: _Answer | None = None
    n_read: int = 0
    chunks: list[tuple[int, ...]] = dataclasses.field(default_factory=list)
    used: int = 0

    @property
    def decoding(self) -> _Answer | None:
        """Its answer, if its prompt is read."""
        return self.answer if self.answer is not None and self.answer.tokens else None

    def shared(self, chunks: list[tuple[int, ...]]) -> int:
        """How many chunks it has in common with a prompt, from the start."""
        pairs = zip(self.chunks, chunks, strict=False)
        return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


class Engine:
    """Answers requests from any number of threads, up to `max_batch` at a time, on a thread of its own.

    It runs on the mesh of its parameters. The cache is split over the same devices: its slots over `data` and
    `fsdp`, its heads over `tensor`, as far as they divide. The answers are the same on any mesh.

    Args:
      graphdef: the decoder's structure, from `split`.
      params: its parameters.
      max_batch: slots, hence requests decoded together.
      max_context: tokens of prompt and answer together.

    Raises:
      ValueError: max_context is more than the model has positions.
    """

    def __init__(self, graphdef: Structure, params: Params, max_batch: int, max_context: int) -> None:
        self.config = bound(graphdef, params).config
        if max_context > self.config.max_position_embeddings:
            raise ValueError(
                f"max_context={max_context} is more than the model's "
                f"max_position_embeddings={self.config.max_position_embeddings}"
            )
        self.max_context = max_context
        self._graphdef = graphdef
        self._params = params
        self._mesh = _mesh_of(params)
        with self._on_mesh():
            self._cache = _made_cache(self.config, max_batch, max_context)
        self._slots = [_Slot() for _ in range(max_batch)]
        self._reading: deque[_Slot] = deque()  # slots whose prompt is not read yet, the oldest first
        self._begun = itertools.count(1)
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

    def _on_mesh(self) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext() if self._mesh is None else jax.set_mesh(self._mesh)

    def _run(self) -> None:
        try:
            with self._on_mesh():  # which is a thread's own
                while self._wait():
                    self._admit()
                    self._read()
                    self._step()
        except BaseException as error:  # whatever it is, nobody may wait for ever
            self._end(error)
        for answer in (*self._queue, *(slot.answer for slot in self._slots)):
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
            self._changed.wait_for(lambda: self._ended or self._queue or any(s.answer for s in self._slots))
            return self._ended is None

    def _admit(self) -> None:
        """Gives free slots to queued requests, each the one that holds most of its prompt already."""
        for slot in self._slots:
            if slot.answer is not None and slot.answer.future.cancelled():
                slot.answer = None
        self._reading = deque(slot for slot in self._reading if slot.answer is not None)
        free = [slot for slot in self._slots if slot.answer is None]
        while free and self._queue:
            answer = self._queue.popleft()
            if answer.future.cancelled():
                continue
            chunks = answer.chunks
            slot = max(free, key=lambda slot: (slot.shared(chunks), -slot.used))
            source = max(self._slots, key=lambda slot: slot.shared(chunks))
            n_shared = source.shared(chunks)
            if slot.shared(chunks) < n_shared:
                rows = (np.int32(self._slots.index(each)) for each in (source, slot))
                self._cache = copy_chunks(self._cache, *rows, np.int32(n_shared))
            slot.answer, slot.n_read, slot.chunks = answer, n_shared * CHUNK, chunks[:n_shared]
            slot.used = next(self._begun)
            free.remove(slot)
            self._reading.append(slot)

    def _read(self) -> None:
        """Reads a few chunks of the prompts that are not read yet, the oldest request's first."""
        for _ in range(CHUNKS_PER_STEP):
            if not self._reading:
                return
            slot = self._reading[0]
            assert slot.answer is not None
            answer, start = slot.answer, slot.n_read
            prompt = answer.request.prompt_tokens
            part = prompt[start : start + CHUNK]
            tokens_1t = np.zeros((1, _padded(len(part))), np.int32)
            tokens_1t[0, : len(part)] = part
            row = self._slots.index(slot)
            chunk = PromptChunk(tokens_1t, np.int32(start), np.int32(len(part)), np.int32(row))
            sampling = Sampling.of([(answer.request, 0)])
            next_1, self._cache = prefill(self._graphdef, self._params, self._cache, chunk, sampling)
            slot.n_read += len(part)
            slot.chunks = answer.chunks[: slot.n_read // CHUNK]
            if slot.n_read == len(prompt):
                self._reading.popleft()
                self._append(slot, answer, int(next_1[0]))

    def _step(self) -> None:
        """Decodes one token of every slot whose prompt is read."""
        answers = [slot.decoding for slot in self._slots]
        if not any(answers):
            return
        tokens_b = np.zeros(len(answers), np.int32)
        positions_b = np.full(len(answers), self.max_context, np.int32)
        for row, answer in enumerate(answers):
            if answer is not None:
                tokens_b[row] = answer.tokens[-1]
                positions_b[row] = len(answer.request.prompt_tokens) + len(answer.tokens) - 1
        rows = [None if answer is None else (answer.request, len(answer.tokens)) for answer in answers]
        next_b, self._cache = decode(
            self._graphdef, self._params, self._cache, tokens_b, positions_b, Sampling.of(rows)
        )
        for slot, answer, token in zip(self._slots, answers, np.asarray(next_b), strict=True):
            if answer is not None:
                self._append(slot, answer, int(token))

    def _append(self, slot: _Slot, answer: _Answer, token: int) -> None:
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
        slot.answer = None
        if answer.future.set_running_or_notify_cancel():
            answer.future.set_result(completion)


def _padded(n_tokens: int) -> int:
    """The length that a chunk of a prompt is padded to: a power of two, so that few programs are compiled."""
    return max(SHORTEST_CHUNK, 1 << (n_tokens - 1).bit_length())
