"""Limits of requests: a limit in flight that adapts to the server, and an account's limits per minute.

While the limit is used up, it rises by one for every four answers. It falls by a quarter, at most once per
round trip, if the server is overloaded: if more than a quarter of its replies are refusals (429, 503) or
time-outs, or if it has become too slow. Fewer refusals do not count as overload.

A server that batches does not refuse requests when it has too many, it becomes slower. But it also becomes
slower while more requests still increase its throughput, so latency alone is no criterion. Kleinrock's power
is one: throughput over latency, which has its maximum at the knee of the curve (Kleinrock 1979, "Power and
deterministic rules of thumb for probabilistic problems in computer communications"). With n requests in
flight and s seconds per token, the power is n / s^2. So from the point of maximum power, s may grow with the
square root of n. Strain is s divided by that value: above 1.5 the limit stops rising, above 2 it falls.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import math
import statistics
import time
from collections.abc import Awaitable, Callable

START = 4.0  # requests in flight at the start
RISE = 0.25  # of the limit, per answer
FALL = 0.75  # factor
OVERLOAD_SHARE = 0.25  # of replies
REPLIES = 20  # minimum number of replies over which the share is averaged
STRAINED = 1.5  # strain above which the limit does not rise
SWAMPED = 2.0  # strain above which the limit falls
PATIENCE = 8  # strained rounds after which the limit falls once, to test whether our requests are the cause
CONVINCED = 4  # falls without effect after which our requests are not the cause
LOWERED = (
    0.9  # a fall has an effect if the strain is at most this part of what it was; 0.56 if we are the cause
)
ROUND = 16  # minimum number of answers that are judged together
OVERHEAD_TOKENS = 16  # time before the first token, in tokens
MINUTE_S = 60.0

Clock = Callable[[], float]
Sleep = Callable[[float], Awaitable[None]]


class Throttle:
    """The limit of requests in flight at one server."""

    def __init__(self, most: int, clock: Clock = time.monotonic) -> None:
        """`most` is the maximum of the limit; `clock` returns seconds."""
        self.limit = min(START, float(most))
        self.in_flight = 0
        self._most = float(most)
        self._clock = clock
        self._strain = Strain()
        self._overload_share = 0.0  # moving average
        self._round_trip_s = 0.0  # moving average
        self._fell_at = -math.inf

    @property
    def has_room(self) -> bool:
        """Whether one more request may be sent."""
        return self.in_flight < int(self.limit)

    def answered(self, began: float, tokens: int) -> None:
        """Records an answer. Its request must still count as in flight.

        Args:
          began: when the request was sent, by the clock.
          tokens: of the answer.
        """
        now = self._clock()
        seconds = now - began
        self._round_trip_s += (seconds - self._round_trip_s) * (0.25 if self._round_trip_s else 1.0)
        self._reply(0.0)
        if self.in_flight < int(self.limit):  # the limit was not used up, so the time says nothing about it
            return
        self._strain.measure(began, now, tokens, self.in_flight, self.limit)
        if self._strain.falls:
            self._fall(now)
        elif self._strain.may_rise:
            self.limit = min(self.limit + RISE, self._most)

    def overloaded(self, began: float) -> None:
        """Records a refusal or a time-out of a request that was sent at `began`."""
        self._reply(1.0)
        now = self._clock()
        if not self._round_trip_s:  # the server has not answered yet, so a lower limit would not help
            return
        # Requests that were sent before the last fall say nothing about the present limit. Refusals arrive
        # before answers, so a fall needs a whole round trip to show an effect.
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
    """How many times slower the server is than at its best, corrected for the number of requests in flight.

    It is measured by the median of a round of answers. If falls of the limit do not lower it, other clients
    or the server itself are the cause: then the present measurement becomes the new best.
    """

    may_rise: bool = True
    falls: bool = False  # True for one call, after the last answer of a round
    _best: tuple[float, float] | None = None  # requests in flight and seconds per token at maximum power
    _first: float = math.inf  # strain before the first of several falls
    _falls: int = 0
    _strained: int = 0  # rounds in a row
    _round_began: float = -math.inf
    _measured: list[tuple[float, float]] = dataclasses.field(default_factory=list)  # as `_best`

    def measure(self, began: float, now: float, tokens: int, in_flight: int, limit: float) -> None:
        """Records one answer. The last answer of a round decides about the limit."""
        self.falls = False
        if began < self._round_began:  # sent under the previous limit
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
        # With fewer requests than at its best, the server is expected to be as fast, not faster.
        return pace / (self._best[1] * math.sqrt(max(in_flight / self._best[0], 1.0)))


@dataclasses.dataclass
class Taken:
    """An amount, and the time at which it was taken."""

    when: float
    amount: float


class PerMinute:
    """A maximum amount in any sixty seconds."""

    def __init__(self, most: int, clock: Clock = time.monotonic) -> None:
        self._most = most
        self._clock = clock
        self._taken: collections.deque[Taken] = collections.deque()  # oldest first
        self._sum = 0.0

    def wait_s(self, amount: float) -> float:
        """Seconds until `amount` more fits. More than the maximum waits until nothing else counts."""
        now = self._expire()
        over, wait = self._sum + amount - self._most, 0.0
        for taken in self._taken:
            if over <= 0:
                break
            over -= taken.amount
            wait = taken.when + MINUTE_S - now
        return wait

    def take(self, amount: float) -> Taken:
        """Counts `amount` from now on. Call `correct` with the result when the actual amount is known."""
        self._taken.append(Taken(self._clock(), amount))
        self._sum += amount
        return self._taken[-1]

    def correct(self, taken: Taken, amount: float) -> None:
        """Replaces a taken amount by the actual one."""
        if taken.when > self._expire() - MINUTE_S:
            self._sum += amount - taken.amount
            taken.amount = amount

    def _expire(self) -> float:
        now = self._clock()
        while self._taken and self._taken[0].when <= now - MINUTE_S:
            self._sum -= self._taken.popleft().amount
        return now


class RateLimits:
    """An account's limits of requests and tokens per minute, over all servers."""

    def __init__(
        self,
        requests: int | None,
        tokens: int | None,
        clock: Clock = time.monotonic,
        sleep: Sleep = asyncio.sleep,
    ) -> None:
        """None is no limit; `clock` returns seconds, `sleep` waits for a number of seconds."""
        self._sleep = sleep
        self._requests = None if requests is None else PerMinute(requests, clock)
        self._tokens = None if tokens is None else PerMinute(tokens, clock)
        self._turn = asyncio.Lock()

    async def take(self, tokens: float) -> Taken | None:
        """Waits until a request with this estimate of tokens may be sent, in the order of the calls."""
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
        """Replaces the estimate by the actual number of tokens."""
        if self._tokens and taken:
            self._tokens.correct(taken, tokens)
