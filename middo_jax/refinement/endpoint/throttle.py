"""How much at once: a limit in flight that adapts to the server, and an account's limits a minute.

The limit rises by one for every four answers while it is used up, and falls by a quarter, at most once a
round trip, when the server is overloaded: when more than a quarter of its replies are refusals (429, 503) or
time-outs, or when it is swamped. A few unlucky ones are no overload.

A server that batches does not refuse when it has too much: it slows down. But it also slows down while more
at once still pays, so latency alone does not tell. What does is Kleinrock's power, throughput over latency,
which is greatest at the knee (Kleinrock 1979, "Power and deterministic rules of thumb for probabilistic
problems in computer communications"). With n in flight and s seconds per token it is n / s^2. So s may grow
with the root of n, from where the power was greatest, and a half more; twice as much is too much.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import math
import statistics
import time
from collections.abc import Awaitable, Callable

START = 4.0  # requests in flight before anything is known
RISE = 0.25  # an answer
FALL = 0.75
OVERLOAD_SHARE = 0.25  # of replies
REPLIES = 20  # at least, over which the share is taken: a handful is soon unlucky
STRAINED = 1.5  # times slower than it should be: no longer growing
SWAMPED = 2.0  # times slower: shrinking
PATIENCE = 8  # rounds strained, before a fall is tried to see whether it is our doing
CONVINCED = 4  # falls that did not lower it: it is not
LOWERED = 0.9  # to at most so much of it; our own queue would be down to 0.56 by then
ROUND = 16  # answers at least that are judged together
OVERHEAD_TOKENS = 16  # what a request costs before its first token, as if in tokens
MINUTE_S = 60.0

Clock = Callable[[], float]
Sleep = Callable[[float], Awaitable[None]]


class Throttle:
    """The limit of requests in flight at one endpoint."""

    def __init__(self, most: int, clock: Clock = time.monotonic) -> None:
        """`most` is the limit's own limit; `clock` gives seconds."""
        self.limit = min(START, float(most))
        self.in_flight = 0
        self._most = float(most)
        self._clock = clock
        self._strain = Strain()
        self._overload_share = 0.0  # of late
        self._round_trip_s = 0.0  # of late
        self._fell_at = -math.inf

    @property
    def has_room(self) -> bool:
        """Whether one more may be sent."""
        return self.in_flight < int(self.limit)

    def answered(self, began: float, tokens: int) -> None:
        """Tells of an answer, while it still counts as in flight.

        Args:
          began: when it was asked, by the clock.
          tokens: of the answer.
        """
        now = self._clock()
        seconds = now - began
        self._round_trip_s += (seconds - self._round_trip_s) * (0.25 if self._round_trip_s else 1.0)
        self._reply(0.0)
        if self.in_flight < int(self.limit):  # not the limit's making
            return
        self._strain.measure(began, now, tokens, self.in_flight, self.limit)
        if self._strain.falls:
            self._fall(now)
        elif self._strain.may_rise:
            self.limit = min(self.limit + RISE, self._most)

    def overloaded(self, began: float) -> None:
        """Tells of a refusal or a time-out of a request that was asked at `began`."""
        self._reply(1.0)
        now = self._clock()
        if not self._round_trip_s:  # it answers nobody yet: there is nothing to be less of
            return
        # Requests that were under way when the limit fell say nothing new, and refusals outrun answers.
        fresh = began > self._fell_at and now - self._fell_at >= self._round_trip_s
        if fresh and self._overload_share > OVERLOAD_SHARE:
            self._fall(now)

    def _reply(self, overload: float) -> None:
        self._overload_share += (overload - self._overload_share) / max(self.limit, REPLIES)

    def _fall(self, now: float) -> None:
        self.limit = max(self.limit * FALL, 1.0)
        self._fell_at, self._overload_share = now, 0.0


@dataclasses.dataclass
class Strain:
    """How many times slower the server is than it should be with so much at once, by the median of a round of
    answers; 1 at its best.

    Where falls do not lower it, others are to blame, or the server is not what it was: then what is measured
    is the new best.
    """

    may_rise: bool = True
    falls: bool = False  # said once, by the answer that closes a round
    _best: tuple[float, float] | None = None  # in flight and seconds per token, where the power was greatest
    _first: float = math.inf  # strain before the first of the falls in a row
    _falls: int = 0
    _strained: int = 0  # rounds in a row
    _round_began: float = -math.inf
    _measured: list[tuple[float, float]] = dataclasses.field(default_factory=list)  # the same two

    def measure(self, began: float, now: float, tokens: int, in_flight: int, limit: float) -> None:
        """Takes in one answer; the last of a round judges it."""
        self.falls = False
        if began < self._round_began:  # asked under the limit before
            return
        self._measured.append((in_flight, (now - began) / (tokens + OVERHEAD_TOKENS)))
        if len(self._measured) >= max(ROUND, limit):
            self._judge(*map(statistics.median, zip(*self._measured, strict=True)))
            self._measured, self._round_began = [], now

    def _judge(self, in_flight: float, pace: float) -> None:
        strain = self._of(in_flight, pace)
        if strain < 1.0 or (self._falls == CONVINCED and strain > LOWERED * self._first):
            self._best, strain = (in_flight, pace), 1.0
        self.may_rise = strain <= STRAINED
        if self.may_rise:
            self._strained = self._falls = 0
            return
        self._strained += 1
        self.falls = strain > SWAMPED or self._strained >= PATIENCE
        if self.falls:
            if self._falls in (0, CONVINCED):
                self._first, self._falls = strain, 0
            self._falls += 1

    def _of(self, in_flight: float, pace: float) -> float:
        if self._best is None:
            return 0.0
        # With less at once than at its best the server should be as fast, not faster.
        return pace / (self._best[1] * math.sqrt(max(in_flight / self._best[0], 1.0)))


@dataclasses.dataclass
class Taken:
    """So much, at that time."""

    when: float
    amount: float


class PerMinute:
    """At most so many of something in any sixty seconds."""

    def __init__(self, most: int, clock: Clock = time.monotonic) -> None:
        self._most = most
        self._clock = clock
        self._taken: collections.deque[Taken] = collections.deque()  # oldest first
        self._sum = 0.0

    def wait_s(self, amount: float) -> float:
        """Seconds until `amount` more fits; what is more than a whole minute's waits for an empty one."""
        now = self._expire()
        over, wait = self._sum + amount - self._most, 0.0
        for taken in self._taken:
            if over <= 0:
                break
            over -= taken.amount
            wait = taken.when + MINUTE_S - now
        return wait

    def take(self, amount: float) -> Taken:
        """Counts `amount` from now on; `correct` what is returned once it is known better."""
        self._taken.append(Taken(self._clock(), amount))
        self._sum += amount
        return self._taken[-1]

    def correct(self, taken: Taken, amount: float) -> None:
        """What was taken turned out to be `amount`."""
        if taken.when > self._expire() - MINUTE_S:
            self._sum += amount - taken.amount
            taken.amount = amount

    def _expire(self) -> float:
        now = self._clock()
        while self._taken and self._taken[0].when <= now - MINUTE_S:
            self._sum -= self._taken.popleft().amount
        return now


class RateLimits:
    """An account's limits of requests and tokens per minute, for all endpoints, in the order of asking."""

    def __init__(
        self,
        requests: int | None,
        tokens: int | None,
        clock: Clock = time.monotonic,
        sleep: Sleep = asyncio.sleep,
    ) -> None:
        """None is no limit; `clock` gives seconds, `sleep` waits for some."""
        self._sleep = sleep
        self._requests = None if requests is None else PerMinute(requests, clock)
        self._tokens = None if tokens is None else PerMinute(tokens, clock)
        self._turn = asyncio.Lock()

    async def take(self, tokens: float) -> Taken | None:
        """Waits until one more request of about so many tokens may be sent."""
        if self._requests is None and self._tokens is None:
            return None
        async with self._turn:
            while wait := max(
                self._requests.wait_s(1) if self._requests else 0.0,
                self._tokens.wait_s(tokens) if self._tokens else 0.0,
            ):
                await self._sleep(wait)
            if self._requests:
                self._requests.take(1)
            return self._tokens.take(tokens) if self._tokens else None

    def correct(self, taken: Taken | None, tokens: int) -> None:
        """The request took so many tokens after all."""
        if self._tokens and taken:
            self._tokens.correct(taken, tokens)
