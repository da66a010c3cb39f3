"""Text generation: prefill, decode and sampling on the device, continuous batching on the host.

    with Engine(graphdef, params, max_batch=8, max_context=2048) as engine:
        future = engine.submit(Request(prompt_tokens, max_tokens=256))
        future.result().tokens

One cache has `max_batch` slots. A prompt is read into a free slot in chunks; between the chunks all slots
that are being answered are decoded together, one token per step, so that no answer waits for a long
prompt. A slot that ends is refilled before the next step. Whole chunks of a prompt that are still in some
slot are copied instead of read: requests that begin alike, such as a refiner's, share that work.

A request's answer depends on the request alone, to the bit: not on its slot, not on other requests,
not on when it came. A chunk starts at a multiple of its length and sees only what is before it, so that a
copied one is equal to a computed one.

An error fails the request that caused it and no other. If several requests were being answered, nothing
shows which one caused it: each is answered again from its beginning, alone, and the one that fails alone has
failed. Since an answer depends on its request alone, the others get the tokens that they would have got.
Axes: docs/contributing.md#axes.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import itertools
import logging
import threading
import traceback
from collections import deque
from collections.abc import Hashable, Iterable
from typing import Any, Self

import jax
import numpy as np

from middo_jax.inference.fair_queue import FairQueue
from middo_jax.inference.logprobs import rows
from middo_jax.inference.programs import (
    CHUNK,
    SHORTEST_CHUNK,
    PromptChunk,
    copy_chunks,
    decode,
    made_cache,
    mesh_of,
    prefill,
)
from middo_jax.inference.sampling import HOTTEST, Request, Sampling
from middo_jax.inference.slots import Completion, OnStep, RequestState, Slot, Step
from middo_jax.models.model import Params, Structure, bound

# Chunks between two decode steps: more fill free slots sooner, fewer keep the answers in progress flowing.
CHUNKS_PER_STEP = 4

_LOG = logging.getLogger(__name__)


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
        self._mesh = mesh_of(params)
        with self._on_mesh():
            self._cache = made_cache(self.config, max_batch, max_context)
        self._slots = [Slot() for _ in range(max_batch)]
        self._reading: deque[Slot] = deque()  # slots whose prompt is not read yet, the oldest first
        self._begun = itertools.count(1)
        self._queue: FairQueue[RequestState] = FairQueue()
        self._alone: deque[RequestState] = deque()  # to be answered again, one by one, before the queue
        self._changed = threading.Condition()
        self._ended: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="middo-engine", daemon=True)
        self._thread.start()

    @property
    def is_running(self) -> bool:
        """Whether requests are taken: not closed, and the device is not lost."""
        return self._ended is None

    def submit(
        self, request: Request, on_step: OnStep | None = None, group: Hashable = None
    ) -> concurrent.futures.Future[Completion]:
        """Queues a request. Cancelling the future frees its place in the queue or its slot.

        Args:
          request: what is asked.
          on_step: is called with each token, on the engine's thread: it must return at once. An exception
            fails the request.
          group: requests of one group take turns with those of others; None is a group of its own.

        Raises:
          ValueError: the prompt is empty, too long or outside the vocabulary, or a setting is out of range.
          RuntimeError: the engine is closed or has failed.
        """
        self.check(request)
        answer = RequestState(request, concurrent.futures.Future(), on_step)
        with self._changed:
            if self._ended is not None:
                raise RuntimeError(f"the engine takes no more requests: {self._ended}") from self._ended
            self._queue.push(answer, answer if group is None else group)
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

    def check(self, request: Request) -> None:
        """Raises ValueError, with the numbers, for a request that cannot be answered."""
        length, vocab_size = len(request.prompt_tokens), self.config.vocab_size
        longest = self.max_context - (request.max_tokens > 0)
        if not 0 < length <= longest:
            raise ValueError(
                f"the prompt has {length} tokens; it must have from 1 to {longest}, "
                f"since prompt and answer share a context of {self.max_context}"
            )
        if not (min(request.prompt_tokens) >= 0 and max(request.prompt_tokens) < vocab_size):
            raise ValueError(f"the prompt has token ids outside the vocabulary of {vocab_size}")
        if request.max_tokens < (0 if request.prompt_logprobs else 1):
            raise ValueError(f"max_tokens={request.max_tokens} must be at least 1, or 0 with prompt_logprobs")
        if not (0 <= request.temperature <= HOTTEST and 0 < request.top_p <= 1 and request.top_k >= 0):
            raise ValueError(
                f"temperature={request.temperature} must be from 0 to {HOTTEST}, "
                f"top_p={request.top_p} in (0, 1], top_k={request.top_k} >= 0"
            )

    def _on_mesh(self) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext() if self._mesh is None else jax.set_mesh(self._mesh)

    def _run(self) -> None:
        try:
            with self._on_mesh():  # a thread has its own mesh
                while self._wait():
                    try:
                        self._admit()
                        self._read()
                        self._step()
                    except Exception as error:
                        self._recover(error)
        except BaseException as error:  # whatever it is, nobody may wait for ever
            self._end(error)
        with self._changed:
            left = (*self._alone, *self._queue, *(slot.answer for slot in self._slots))
        for answer in left:
            if answer is not None:
                answer.fail(self._ended or RuntimeError("the engine has ended"))
        # The memory is free once the engine is closed; the cache is absent if it could not be made again.
        self.__dict__.pop("_cache", None)
        del self._params

    def _end(self, reason: BaseException) -> None:
        with self._changed:
            self._ended = self._ended or reason
            self._changed.notify()

    def _wait(self) -> bool:
        """Sleeps until there is work; False if the engine has ended."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._ended or self._queue or self._alone or any(slot.answer for slot in self._slots)
            )
            return self._ended is None

    def _recover(self, error: Exception) -> None:
        """Fails the only request in progress, or has several answered again; makes an empty cache.

        Raises:
          Exception: no request was in progress, or no cache can be made: the engine ends.
        """
        active = [slot.answer for slot in self._slots if slot.answer is not None]
        if not active:
            raise error
        _LOG.error("the engine failed with %d requests in progress", len(active), exc_info=error)
        if error.__traceback__ is not None:
            traceback.clear_frames(error.__traceback__)  # they keep the old cache
        self._slots = [Slot() for _ in self._slots]
        self._reading.clear()
        if len(active) == 1:
            active[0].fail(error)
        for answer in active if len(active) > 1 else ():
            answer.restart()
            self._alone.append(answer)
        del self._cache  # donated to the program that failed, or its result
        self._cache = made_cache(self.config, len(self._slots), self.max_context)
        jax.block_until_ready(self._cache)

    def _admit(self) -> None:
        """Gives free slots to waiting requests, each the one that has most of its prompt already."""
        for slot in self._slots:
            if slot.answer is not None and slot.answer.future.cancelled():
                slot.answer = None
        self._reading = deque(slot for slot in self._reading if slot.answer is not None)
        free = [slot for slot in self._slots if slot.answer is None]
        while free and (answer := self._next_answer()) is not None:
            chunks = answer.chunks
            slot = max(free, key=lambda slot: (slot.shared(chunks), -slot.used))
            # A copied chunk has no hidden states, and so no log-probabilities.
            shareable = [] if answer.request.prompt_logprobs else chunks
            source = max(self._slots, key=lambda slot: slot.shared(shareable))
            n_shared = source.shared(shareable)
            must_copy = slot.shared(shareable) < n_shared
            slot.answer, slot.n_read, slot.chunks = answer, n_shared * CHUNK, chunks[:n_shared]
            slot.used = next(self._begun)
            free.remove(slot)
            self._reading.append(slot)
            if must_copy:
                pair = (np.int32(self._slots.index(each)) for each in (source, slot))
                self._cache = copy_chunks(self._cache, *pair, np.int32(n_shared))

    def _next_answer(self) -> RequestState | None:
        """The next request to be answered; one that is to be alone waits for the others, and they for it."""
        busy = [slot.answer for slot in self._slots if slot.answer is not None]
        while self._alone and self._alone[0].future.cancelled():
            self._alone.popleft()
        if self._alone:
            return None if busy else self._alone.popleft()
        if any(answer.alone for answer in busy):
            return None
        with self._changed:
            while self._queue:
                answer = self._queue.pop()
                if not answer.future.cancelled():
                    return answer
        return None

    def _read(self) -> None:
        """Prefills a few chunks of incomplete prompts, the oldest request first."""
        for _ in range(CHUNKS_PER_STEP):
            if not self._reading:
                return
            slot = self._reading[0]
            assert slot.answer is not None
            request = slot.answer.request
            chunk, n_tokens = self._chunk(slot, request), min(CHUNK, len(request.prompt_tokens) - slot.n_read)
            following, of_prompt, self._cache = prefill(
                self._graphdef, self._params, self._cache, chunk, Sampling.of([(request, 0)])
            )
            slot.n_read += n_tokens
            slot.chunks = slot.answer.chunks[: slot.n_read // CHUNK]
            is_read = slot.n_read == len(request.prompt_tokens)
            if request.prompt_logprobs:
                slot.answer.of_prompt += rows(of_prompt, n_tokens - is_read)
            if not is_read:
                continue
            self._reading.popleft()
            if request.max_tokens == 0:
                slot.answer.finish("length")
                slot.answer = None
                continue
            logprob = rows(following.logprobs, 1)[0] if request.logprobs else None
            self._add(slot, slot.answer, Step(int(following.token_b[0]), logprob))

    def _chunk(self, slot: Slot, request: Request) -> PromptChunk[Any]:
        """The next part of a prompt."""
        start = slot.n_read
        part = request.prompt_tokens[start : start + CHUNK]
        after = request.prompt_tokens[start + 1 : start + 1 + CHUNK]
        tokens_1t, next_1t = np.zeros((2, 1, _padded(len(part))), np.int32)
        tokens_1t[0, : len(part)], next_1t[0, : len(after)] = part, after
        return PromptChunk(
            tokens_1t,
            next_1t,
            start=np.int32(start),
            n_tokens=np.int32(len(part)),
            slot=np.int32(self._slots.index(slot)),
            logprobs=np.bool_(request.prompt_logprobs),
        )

    def _step(self) -> None:
        """Decodes one token for every slot with a complete prompt."""
        answers = [slot.decoding for slot in self._slots]
        if not any(answers):
            return
        tokens_b = np.zeros(len(answers), np.int32)
        positions_b = np.full(len(answers), self.max_context, np.int32)
        for row, answer in enumerate(answers):
            if answer is not None:
                tokens_b[row] = answer.steps[-1].token
                positions_b[row] = len(answer.request.prompt_tokens) + len(answer.steps) - 1
        settings = [None if answer is None else (answer.request, len(answer.steps)) for answer in answers]
        following, self._cache = decode(
            self._graphdef, self._params, self._cache, tokens_b, positions_b, Sampling.of(settings)
        )
        token_b = np.asarray(following.token_b).tolist()
        wanted = any(answer is not None and answer.request.logprobs for answer in answers)
        logprobs = rows(following.logprobs, len(answers)) if wanted else []
        for row, (slot, answer) in enumerate(zip(self._slots, answers, strict=True)):
            if answer is not None:
                logprob = logprobs[row] if answer.request.logprobs else None
                self._add(slot, answer, Step(token_b[row], logprob))

    def _add(self, slot: Slot, answer: RequestState, step: Step) -> None:
        """Adds a token to an answer; frees its slot if that ends it."""
        try:
            ends = answer.add(step, self.max_context)
        except Exception as error:  # of `on_step`: the caller's own
            answer.fail(error)
            ends = True
        if ends:
            slot.answer = None


def _padded(n_tokens: int) -> int:
    """Returns the padded length of a chunk: a power of two, so that few programs are compiled."""
    return max(SHORTEST_CHUNK, 1 << (n_tokens - 1).bit_length())
