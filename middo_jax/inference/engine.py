"""Text generation: prefill, decode and sampling on the device, continuous batching on the host.

    with Engine(graphdef, params, max_batch=8, max_context=2048) as engine:
        future = engine.submit(Request(prompt_tokens, max_tokens=256))
        future.result().tokens

The KV cache has `max_batch` slots. A prompt is prefilled into a free slot in chunks. Between the chunks, all
slots with a complete prompt are decoded together, one token per step, so no answer waits for a long prompt. A
finished slot is refilled before the next step. If another slot already contains whole chunks of a prompt,
they are copied instead of computed: requests with a common prefix, such as a refiner's, share that work.

A request's answer depends only on the request, bit for bit: not on its slot, the other requests or the time
of its arrival. A chunk starts at a multiple of its length and attends only to earlier positions, so a copied
chunk equals the computed one.
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

# Tokens of a prompt that are prefilled at a time, and the minimum padded length of the last chunk.
CHUNK, SHORTEST_CHUNK = 128, 32
# Chunks between two decode steps: more chunks fill free slots sooner, fewer delay running answers less.
CHUNKS_PER_STEP = 4


@dataclasses.dataclass(frozen=True)
class Completion:
    """An answer. `tokens` excludes the stop token; "length": max_tokens or the context was reached."""

    tokens: list[int]
    finish_reason: Literal["stop", "length"]


Array = TypeVar("Array")  # numpy's on the host, JAX's inside the program


class PromptChunk(NamedTuple, Generic[Array]):
    """A part of a prompt and its place in the cache.

    Attributes:
      tokens_1t: int32 token IDs, padded on the right.
      start: position of the first token in its slot.
      n_tokens: number of tokens without padding.
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
    """Prefills one chunk of a prompt into its slot.

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
        # Gather and scatter: XLA would all-gather the sharded slot axis for a dynamic slice.
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
    """Decodes one token per slot; the position of an idle slot is the cache's length.

    Returns:
      (the next token [b], the cache).
    """
    model = bound(graphdef, params)
    hidden_b1d, cache = model.hidden_cached(tokens_b[:, None], positions_b[:, None], cache)
    return sample(model.unembed(hidden_b1d[:, 0]), sampling), _in_place(cache)


_CACHE_AXES = (None, "batch", None, "kv_heads", None)  # layers, slots, positions, heads, head dimension


def _in_place(cache: KVCache) -> KVCache:
    """Constrains the cache to its usual sharding, so that donation can reuse its memory."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return cache
    spec = fitting_spec(mesh, cache.keys.shape, *_CACHE_AXES)
    return KVCache(*(jax.lax.with_sharding_constraint(x_lbpke, spec) for x_lbpke in cache))


def _mesh_of(params: Params) -> Mesh | None:
    """Returns the mesh of the parameters; None if they are on a single device without a mesh."""
    sharding = jax.tree.leaves(params)[0].sharding
    mesh = sharding.mesh if isinstance(sharding, NamedSharding) else None
    return mesh if isinstance(mesh, Mesh) else None


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _made_cache(config: DecoderConfig, max_batch: int, max_context: int) -> KVCache:
    return _in_place(empty_cache(config, max_batch, max_context))


@dataclasses.dataclass
class _Answer:
    """A queued or running request, and its answer so far."""

    request: Request
    future: concurrent.futures.Future[Completion]
    tokens: list[int] = dataclasses.field(default_factory=list)

    @property
    def chunks(self) -> list[tuple[int, ...]]:
        """The prompt's whole chunks, without the last token, which must always be computed."""
        prompt = tuple(self.request.prompt_tokens)
        return [prompt[start : start + CHUNK] for start in range(0, len(prompt) - CHUNK, CHUNK)]


@dataclasses.dataclass(eq=False)  # two slots are never the same one
class _Slot:
    """A row of the cache.

    Attributes:
      answer: the answer that uses the row; None if the row is free.
      n_read: number of tokens of the prompt that are in the cache.
      chunks: the whole chunks at the row's start, of this prompt or of the previous one.
      used: sequence number of the last request that got the row.
    """

    answer: _Answer | None = None
    n_read: int = 0
    chunks: list[tuple[int, ...]] = dataclasses.field(default_factory=list)
    used: int = 0

    @property
    def decoding(self) -> _Answer | None:
        """Its answer, if the prompt is complete, else None."""
        return self.answer if self.answer is not None and self.answer.tokens else None

    def shared(self, chunks: list[tuple[int, ...]]) -> int:
        """Returns the number of leading chunks that it has in common with a prompt."""
        pairs = zip(self.chunks, chunks, strict=False)
        return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


class Engine:
    """Answers up to `max_batch` requests at a time, on a thread of its own. Thread-safe.

    Runs on the mesh of the parameters. The cache is sharded over the same devices, slots over `data` and
    `fsdp`, heads over `tensor`, if the sizes are divisible. The answers are the same on any mesh.

    Args:
      graphdef: the decoder's structure, from `split`.
      params: the decoder's parameters.
      max_batch: number of slots: requests decoded together.
      max_context: maximum number of tokens of prompt and answer together.

    Raises:
      ValueError: max_context is over the model's max_position_embeddings.
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
        self._reading: deque[_Slot] = deque()  # slots with an incomplete prompt, the oldest first
        self._begun = itertools.count(1)
        self._queue: deque[_Answer] = deque()
        self._changed = threading.Condition()
        self._ended: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="middo-engine", daemon=True)
        self._thread.start()

    @property
    def is_running(self) -> bool:
        """Whether the engine accepts requests: it is not closed and has not failed."""
        return self._ended is None

    def submit(self, request: Request) -> concurrent.futures.Future[Completion]:
        """Queues a request. Cancelling the future frees its place in the queue or its slot.

        Raises:
          ValueError: the prompt is empty, too long or outside the vocabulary, or a setting is out of range.
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
        """Returns the answers of all requests, in order. Raises the errors of `submit`."""
        futures: list[concurrent.futures.Future[Completion]] = []
        try:
            futures.extend(self.submit(request) for request in requests)
            return [future.result() for future in futures]
        finally:
            for future in futures:  # a no-op unless one of them has failed
                future.cancel()

    def close(self) -> None:
        """Stops after the current step; unanswered requests fail with RuntimeError."""
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
            with self._on_mesh():  # JAX's mesh context is per thread
                while self._wait():
                    self._admit()
                    self._read()
                    self._step()
        except BaseException as error:  # after any error, waiting requests must fail instead of blocking
            self._end(error)
        for answer in (*self._queue, *(slot.answer for slot in self._slots)):
            if answer is not None and answer.future.set_running_or_notify_cancel():
                answer.future.set_exception(self._ended or RuntimeError("the engine has ended"))
        del self._params, self._cache  # frees their memory even if the engine object lives on

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
        """Assigns free slots to queued requests; each gets the slot that contains most of its prompt."""
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
        """Prefills a few chunks of incomplete prompts, the oldest request first."""
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
        """Decodes one token for every slot with a complete prompt."""
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
        """Adds a token to an answer. If that ends it, sets its result and frees its slot."""
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
    """Returns the padded length of a chunk: a power of two, so that few programs are compiled."""
    return max(SHORTEST_CHUNK, 1 << (n_tokens - 1).bit_length())
