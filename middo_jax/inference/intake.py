"""Reads the bodies of requests on one thread: parses and tokenizes them, and lets none delay the others much.

Tokenizing 1 MB of text takes about a second. So short bodies overtake long ones, and long ones that wait are
limited in number of bytes.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import heapq
import itertools
from collections.abc import Callable, Iterator
from typing import TypeVar

from middo_jax.inference.errors import ApiError

T = TypeVar("T")

LONG_BODY = 1 << 16  # bytes; shorter ones are limited by the number of answers that may wait
BODIES = 8  # of the greatest length that may be read or wait to be


class Intake:
    """Takes turns by fair queueing: a body is read when its bytes would have been, had all been read at once.

    Bodies of 1000, 1000 and 10 bytes that come in this order are read in the order first, third, second. A
    long body does not starve either: each body that is read brings its turn nearer.

    For one event loop.

    Args:
      most_bytes: of long bodies that wait or are being read.
    """

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._long_bytes = 0
        # One thread: a tokenizer may not be used by several at a time.
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "middo-read")
        self._is_busy = False
        self._clock = 0.0  # bytes of each waiting body that would have been read by now
        self._numbers = itertools.count()
        # (the clock at its end, a number that makes entries differ, its bytes, wakes its task)
        self._waiting: list[tuple[float, int, int, asyncio.Future[None]]] = []

    @contextlib.contextmanager
    def admitted(self, n_bytes: int) -> Iterator[None]:
        """Counts a body until the block ends.

        Raises:
          ApiError: it is long, and too many long ones wait.
        """
        counted = n_bytes if n_bytes > LONG_BODY else 0
        if counted and self._long_bytes + counted > self._most_bytes:
            raise overloaded(f"long requests of {self._long_bytes:,} bytes wait to be read")
        self._long_bytes += counted
        try:
            yield
        finally:
            self._long_bytes -= counted

    async def run(self, work: Callable[[], T], n_bytes: int) -> T:
        """The result of work on a body of `n_bytes`, done on the thread when it is the body's turn."""
        await self._turn(n_bytes)
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)
        finally:
            self._next()

    async def _turn(self, n_bytes: int) -> None:
        if not self._is_busy:
            self._is_busy = True
            return
        turn = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (self._clock + n_bytes, next(self._numbers), n_bytes, turn))
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():  # it had its turn already, and does not take it
                self._next()
            raise

    def _next(self) -> None:
        while self._waiting:
            n_waiting = len(self._waiting)
            _, _, n_bytes, turn = heapq.heappop(self._waiting)
            if not turn.done():
                self._clock += n_bytes / n_waiting
                turn.set_result(None)
                return
        self._is_busy = False


def overloaded(why: str, headers: dict[str, str] | None = None) -> ApiError:
    """The refusal of a request that may be answered later."""
    return ApiError(
        429, f"{why}; try again later", code="overloaded", headers={"retry-after": "1", **(headers or {})}
    )
