"""The answers to one HTTP request: one or several of the engine's, whole or piece by piece."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from starlette.requests import ClientDisconnect
from starlette.types import Receive

from middo_jax.inference.engine import Engine
from middo_jax.inference.errors import ApiError
from middo_jax.inference.logprobs import TokenLogprob
from middo_jax.inference.sampling import Request
from middo_jax.inference.slots import Completion, Step
from middo_jax.inference.text import TextStream, text_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")


class Piece(NamedTuple):
    """A part of an answer, or all of it.

    Attributes:
      choice: number of the answer among those of the request, from 0.
      text: final; it may lag behind the tokens.
      steps: tokens.
      finish_reason: in the last piece.
      end: in the last piece of a finished answer; it has the prompt's log-probabilities and the stop token.
    """

    choice: int
    text: str
    steps: list[Step]
    finish_reason: str | None = None
    end: Completion | None = None


class Generation:
    """Requests in the engine, all in one group. Close it in any case, which frees what is not answered.

    Args:
      engine: answers.
      requests: one per answer.
      tokenizer: makes text of tokens.
      stops: texts that end an answer.

    Raises:
      ApiError: the engine refuses a request, or has ended.
    """

    def __init__(
        self,
        engine: Engine,
        requests: Sequence[Request],
        tokenizer: PreTrainedTokenizerBase,
        stops: Sequence[str],
        *,
        in_pieces: bool,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, Step | None]] = asyncio.Queue()
        self._tokenizer, self._stops, self._in_pieces = tokenizer, stops, in_pieces or bool(stops)
        self.requests = requests
        self.futures: list[concurrent.futures.Future[Completion]] = []
        try:
            for index, request in enumerate(requests):
                self.futures.append(
                    engine.submit(request, self._reporter(index) if self._in_pieces else None, group=self)
                )
        except (ValueError, RuntimeError) as error:
            self.close()
            status = 400 if isinstance(error, ValueError) else 503  # it was closed, or the device is lost
            raise ApiError(status, str(error)) from error
        for index, future in enumerate(self.futures if self._in_pieces else ()):
            future.add_done_callback(self._reporter(index, is_end=True))

    def close(self) -> None:
        """Frees the slots of what is not answered."""
        for future in self.futures:
            future.cancel()

    async def whole(self) -> list[Piece]:
        """All answers, complete. Raises what the engine raised."""
        if not self._in_pieces:
            completions = await asyncio.gather(*map(asyncio.wrap_future, self.futures))
            # Decoding thousands of tokens takes a while.
            texts = await asyncio.to_thread(
                lambda: [text_of(completion.tokens, self._tokenizer) for completion in completions]
            )
            return [
                Piece(index, text, _steps(completion), completion.finish_reason, completion)
                for index, (text, completion) in enumerate(zip(texts, completions, strict=True))
            ]
        parts: list[list[Piece]] = [[] for _ in self.requests]
        async for piece in self.pieces():
            parts[piece.choice].append(piece)
        return [
            Piece(
                index,
                "".join(piece.text for piece in pieces),
                [step for piece in pieces for step in piece.steps],
                pieces[-1].finish_reason,
                pieces[-1].end,
            )
            for index, pieces in enumerate(parts)
        ]

    async def pieces(self) -> AsyncIterator[Piece]:
        """Pieces of all answers as they come, each answer's last one with its reason. Raises as `whole`."""
        texts = [TextStream(self._tokenizer, self._stops) for _ in self.requests]
        unfinished = set(range(len(texts)))
        while unfinished:
            index, step = await self._events.get()
            text = texts[index]
            if index not in unfinished or (text.stopped and step is not None):
                continue  # the engine was ahead of a stop text
            if step is None:
                unfinished.discard(index)
                end = self.futures[index].result()
                rest, reason = text.finish(), "stop" if text.stopped else end.finish_reason
                yield Piece(index, rest, [], reason, end)
                continue
            new = text.push(step.token)
            # The log-probabilities of a prompt come with the end, even if the text has ended before.
            is_last = text.stopped and not self.requests[index].prompt_logprobs
            if is_last:
                unfinished.discard(index)
                self.futures[index].cancel()
            yield Piece(index, new, [step], "stop" if is_last else None)

    def _reporter(self, index: int, *, is_end: bool = False) -> Callable[[Any], None]:
        """Passes what the engine's thread reports to the event loop."""

        def report(step: Any) -> None:
            # A closed loop has nobody who waits.
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._events.put_nowait, (index, None if is_end else step))

        return report


def _steps(completion: Completion) -> list[Step]:
    logprobs: Sequence[TokenLogprob | None] = completion.logprobs or [None] * len(completion.tokens)
    return [Step(token, logprob) for token, logprob in zip(completion.tokens, logprobs, strict=True)]


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of the work, which is cancelled if the client (or the server) goes away.

    Args:
      receive: of a request whose body has been read: the next message can only be that the client is gone.
      work: is awaited.

    Raises:
      ClientDisconnect: the client is gone.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(receive())
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        gone.cancel()
        task.cancel()  # a no-op if it is done
        await asyncio.gather(task, gone, return_exceptions=True)
