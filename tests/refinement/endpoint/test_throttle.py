"""The adapting limit against models of servers, in virtual time; and an account's limits a minute."""

from __future__ import annotations

import asyncio
import dataclasses
import heapq
import itertools
import math
import random
import statistics
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from middo_jax.refinement.endpoint import throttle
from middo_jax.refinement.endpoint.throttle import FALL, START, PerMinute, RateLimits, Throttle

MEAN_TOKENS = 200


@dataclasses.dataclass
class World:
    """A client with a throttle and one server, in virtual seconds.

    `server(world)` is asked for each request how long it will take; None refuses it at once.
    """

    server: Callable[[World], float | None]
    most: int
    requests: int
    seed: int = 0
    now: float = 0.0
    serving: int = 0
    refused: int = 0
    tries: int = 0

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self.throttle = Throttle(self.most, lambda: self.now)
        self.limits: list[float] = []  # at every answer
        self.tokens = 0

    def run(self) -> World:
        """Until all are answered; refused ones wait in their place and try again."""
        events: list[Any] = []
        order = itertools.count()
        waiting = [0] * self.requests  # how often each was refused
        answered = 0

        def ask(refusals: int) -> None:
            self.tries += 1
            self.tokens = max(1, round(self.rng.lognormvariate(math.log(MEAN_TOKENS) - 0.18, 0.6)))
            seconds = self.server(self)
            if seconds is None:
                self.refused += 1
                heapq.heappush(events, (self.now + 0.02, next(order), "refused", self.now, refusals + 1, 0))
            else:
                self.serving += 1
                heapq.heappush(events, (self.now + seconds, next(order), "answer", self.now, 0, self.tokens))

        while answered < self.requests:
            while waiting and self.throttle.has_room:
                self.throttle.in_flight += 1
                ask(waiting.pop())
            self.now, _, what, began, refusals, tokens = heapq.heappop(events)
            if what == "answer":
                self.throttle.answered(began, tokens)
                self.throttle.in_flight -= 1
                self.serving -= 1
                self.limits.append(self.throttle.limit)
                answered += 1
            elif what == "refused":
                self.throttle.overloaded(began)
                delay = 2.0 ** min(refusals - 1, 6) * self.rng.uniform(0.5, 1.0)
                heapq.heappush(events, (self.now + delay, next(order), "again", began, refusals, 0))
            else:
                self.throttle.in_flight -= 1
                waiting.append(refusals)
        return self

    @property
    def rate(self) -> float:
        """Answers a second."""
        return self.requests / self.now

    @property
    def settled(self) -> list[float]:
        """The limits of the second half."""
        return self.limits[len(self.limits) // 2 :]


def queue(slots: int, seconds_a_token: float = 0.01) -> Callable[[World], float]:
    """Serves so many at once; the others wait."""
    free_at = [0.0] * slots

    def server(world: World) -> float:
        begins = max(heapq.heappop(free_at), world.now)
        heapq.heappush(free_at, begins + world.tokens * seconds_a_token)
        return begins + world.tokens * seconds_a_token - world.now

    return server


def batching(alone: float = 0.008, each: float = 0.0001) -> Callable[[World], float]:
    """Decodes all at once; a step takes longer with each."""
    return lambda world: world.tokens * (alone + each * (world.serving + 1))


def refusing(slots: int, seconds: float) -> Callable[[World], float | None]:
    """Serves so many at once and refuses the others."""
    return lambda world: None if world.serving >= slots else seconds * world.rng.uniform(0.5, 1.5)


def unlucky(share: float) -> Callable[[World], float | None]:
    """Has room for everybody, and refuses some all the same."""
    return lambda world: None if world.rng.random() < share else 2.0 * world.rng.uniform(0.5, 1.5)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("slots", [4, 8, 64])
def test_a_queue_is_kept_full_and_short(slots: int, seed: int) -> None:
    world = World(queue(slots), 1000, 400 * slots, seed).run()
    assert world.rate > 0.93 * slots / (0.01 * MEAN_TOKENS)
    assert min(world.settled) >= slots
    assert statistics.median(world.settled) < 6 * slots


@pytest.mark.parametrize("seed", range(3))
def test_a_server_that_batches_is_loaded_beyond_the_latency_of_one(seed: int) -> None:
    """Answers come five times slower than alone, and that is right: the throughput is what grows."""
    world = World(batching(), 1000, 20_000, seed).run()
    assert world.rate > 0.7 / (0.0001 * MEAN_TOKENS)
    assert 150 < statistics.median(world.settled) <= 1000


@pytest.mark.parametrize(("slots", "requests"), [(1, 200), (8, 2000), (64, 6000)])
def test_a_server_that_refuses_gets_what_it_can_take(slots: int, requests: int) -> None:
    world = World(refusing(slots, 10.0), 1000, requests).run()
    assert world.rate > 0.8 * slots / 10.0
    assert 0.5 * slots <= statistics.median(world.settled) <= max(1.5 * slots, 4)
    assert world.refused < 0.6 * world.tries


def test_a_few_unlucky_refusals_are_no_overload() -> None:
    lucky, bad = World(unlucky(0.0), 64, 4000).run(), World(unlucky(0.13), 64, 4000).run()
    assert bad.now < 1.5 * lucky.now
    assert statistics.mean(bad.settled) > 0.9 * 64


def test_a_server_that_is_slowed_down_by_others_is_not_given_up() -> None:
    def server(world: World) -> float:
        slower = 5.0 if 100 < world.now < 300 else 1.0
        return 2.0 * slower * world.rng.uniform(0.7, 1.3)

    world = World(server, 64, 12_000).run()
    assert min(world.limits[1000:]) < FALL * 64  # it did ask whether it was its own doing
    assert world.limits[-1] == 64
    # 200 seconds at a fifth of the rate cost 160 of them, and finding that out little more.
    assert world.now < 12_000 * 2.0 / 64 + 160 + 120


def used(most: int = 100, seconds: float = 1.0) -> tuple[Throttle, Callable[[], None]]:
    """A throttle that is used up, and what answers one of its requests."""
    now = [0.0]
    limited = Throttle(most, lambda: now[0])
    limited.in_flight = most

    def answer() -> None:
        now[0] += seconds / limited.limit
        limited.answered(now[0] - seconds, MEAN_TOKENS)

    return limited, answer


def test_it_rises_by_one_in_four_answers_up_to_its_own_limit() -> None:
    limited, answer = used(most=6)
    assert limited.limit == START
    for _ in range(4):
        answer()
    assert limited.limit == START + 1
    for _ in range(100):
        answer()
    assert limited.limit == 6
    assert Throttle(2).limit == 2


def test_it_does_not_rise_unless_it_is_used_up() -> None:
    limited, answer = used()
    limited.in_flight = 1
    for _ in range(100):
        answer()
    assert limited.limit == START


def test_it_falls_by_a_quarter_once_a_round_trip() -> None:
    now = [0.0]
    limited = Throttle(100, lambda: now[0])
    limited.limit, limited.in_flight = 40.0, 40
    for _ in range(40):
        now[0] += 0.05
        limited.answered(now[0] - 2.0, MEAN_TOKENS)
    limited.in_flight = 1  # so that it does not rise meanwhile
    before = limited.limit
    for _ in range(60):
        limited.overloaded(now[0])
    assert limited.limit == pytest.approx(before * FALL)
    now[0] += 1.0
    for _ in range(60):
        limited.overloaded(now[0])  # quick refusals within the same two seconds
    assert limited.limit == pytest.approx(before * FALL)
    now[0] += 2.0
    for _ in range(60):
        limited.overloaded(now[0] - 2.5)  # of requests that were under way when it fell
        limited.overloaded(now[0])
    assert limited.limit == pytest.approx(before * FALL**2)


def test_it_never_falls_below_one() -> None:
    now = [0.0]
    limited = Throttle(100, lambda: now[0])
    for _ in range(100):
        limited.overloaded(now[0])
    assert limited.limit == START  # as long as it has answered nobody
    limited.answered(-1.0, MEAN_TOKENS)
    for _ in range(1000):
        now[0] += 1.0
        limited.overloaded(now[0] - 0.1)
    assert limited.limit == 1.0
    assert limited.has_room


# An account's limits -------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0, 30), st.integers(1, 50)), min_size=1, max_size=60), st.integers(1, 100)
)
def test_no_minute_holds_more_than_it_may(asked: list[tuple[float, int]], most: int) -> None:
    now = [0.0]
    limit = PerMinute(most, lambda: now[0])
    taken: list[tuple[float, int]] = []
    for pause, amount in asked:
        now[0] += pause
        wait = limit.wait_s(amount)
        assert 0 <= wait <= throttle.MINUTE_S + 1e-9
        if wait and taken:  # no longer than needed
            inside = [n for when, n in taken if when > now[0] + 0.999 * wait - 60]
            assert sum(inside) + amount > most
        now[0] += wait
        limit.take(amount)
        taken.append((now[0], amount))
        inside = [n for when, n in taken if when > now[0] - 60 + 1e-6]
        assert sum(inside) <= most or inside == [amount]  # one that is too much for any minute goes alone


def test_what_was_taken_is_corrected() -> None:
    now = [0.0]
    limit = PerMinute(100, lambda: now[0])
    first = limit.take(90)
    assert limit.wait_s(50) == 60
    limit.correct(first, 20)
    assert limit.wait_s(50) == 0
    now[0] = 61.0
    limit.correct(first, 90)  # too late: it counts no more
    assert limit.wait_s(100) == 0


def test_requests_and_tokens_are_both_limited() -> None:
    now = [0.0]

    async def sleep(seconds: float) -> None:
        now[0] += seconds

    async def ask(limits: RateLimits, n: int, tokens: float) -> list[float]:
        times = []
        for _ in range(n):
            await limits.take(tokens)
            times.append(now[0])
        return times

    def clock() -> float:
        return now[0]

    assert asyncio.run(ask(RateLimits(None, None, clock, sleep), 50, 1e9)) == [0.0] * 50
    assert asyncio.run(ask(RateLimits(3, None, clock, sleep), 7, 1e9)) == [0, 0, 0, 60, 60, 60, 120]
    now[0] = 0.0
    assert asyncio.run(ask(RateLimits(3, 100, clock, sleep), 4, 50)) == [0, 0, 60, 60]
