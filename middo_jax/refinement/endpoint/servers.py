"""The servers of one model: who takes the next request, who is away, and when to ask again.

A server is away when nobody listens, or when eight requests in a row, of different samples, failed there with
no answer between. Then it is left out, and tried with one request at a time, less and less often; the others
take the load, and if there are none, requests wait. So a restart costs time and no sample. What a server says
while it is away counts against the server and not against the request.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import random
import time
import urllib.parse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from middo_jax.refinement.endpoint.faults import LONGEST_WAIT_S, Fault, RefinerError
from middo_jax.refinement.endpoint.throttle import Clock, Throttle

if TYPE_CHECKING:
    from openai import AsyncOpenAI

FAILURES_IN_A_ROW = 8  # with no answer between them: no longer one sample's fault
LONGEST_TRIAL = 5.0  # times the first wait, between two trials of a server that is away


@dataclasses.dataclass(eq=False)
class Endpoint:
    """One server: how much it gets, and whether it is there."""

    url: str  # as it is shown, without user and password
    api: AsyncOpenAI
    throttle: Throttle
    has_answered: bool = False
    away_since: float | None = None
    trials: int = 0  # failed ones since it is away
    retry_at: float = 0.0
    on_trial: bool = False
    _failing: set[str] = dataclasses.field(default_factory=set)  # keys of requests, since the last answer

    def takes(self, now: float) -> bool:
        """Whether it may be sent one more."""
        if self.away_since is None:
            return self.throttle.has_room
        return not self.on_trial and now >= self.retry_at

    def answered(self) -> None:
        """It is there, whatever was thought of it."""
        self.has_answered, self.away_since, self.trials = True, None, 0
        self._failing.clear()

    def failed(self, fault: Fault, key: str) -> bool:
        """Takes in a fault of a request known by `key`; says whether the server is at fault."""
        if self.away_since is not None:
            return True
        self._failing.add(key)
        return fault.away or len(self._failing) >= FAILURES_IN_A_ROW


class Endpoints:
    """All of them. `take` one, tell what came of it, `give_back`; for one event loop."""

    def __init__(
        self, endpoints: Sequence[Endpoint], most_trials: int, backoff_s: float, clock: Clock = time.monotonic
    ) -> None:
        """Args:
        endpoints: at least one.
        most_trials: after which a server that never answered is given up.
        backoff_s: before the first trial of one that is away, doubled for each one after.
        clock: gives seconds.
        """
        self.all = tuple(endpoints)
        self._most_trials = most_trials
        self._backoff_s = backoff_s
        self._clock = clock
        self._waiting: collections.deque[asyncio.Future[Endpoint | None]] = collections.deque()
        self._stopped: RefinerError | None = None

    @property
    def away(self) -> list[Endpoint]:
        """Those that are left out for now."""
        return [endpoint for endpoint in self.all if endpoint.away_since is not None]

    async def take(self) -> Endpoint:
        """The least loaded one that has room, in the order of asking.

        Raises:
          RefinerError: what `stop` was told.
        """
        turn: asyncio.Future[Endpoint | None] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        self._admit()
        try:
            endpoint = await turn
        except asyncio.CancelledError:
            if not turn.cancelled() and (endpoint := turn.result()):  # admitted and cancelled at once
                self.give_back(endpoint)
            raise
        if self._stopped is None and endpoint is not None:
            return endpoint
        if endpoint is not None:  # stopped after it was admitted
            self.give_back(endpoint)
        assert self._stopped is not None
        # Without its old traceback, which would grow with every raise and hold all those frames.
        raise self._stopped.with_traceback(None)

    def give_back(self, endpoint: Endpoint) -> None:
        """Ends what `take` began."""
        endpoint.throttle.in_flight -= 1
        endpoint.on_trial = False
        self._admit()

    def failed(self, endpoint: Endpoint, fault: Fault, key: str) -> bool:
        """Takes in a fault; says whether it is the server's, so that the request's try does not count."""
        if not endpoint.failed(fault, key):
            return False
        self.leave_out(endpoint)
        return True

    def leave_out(self, endpoint: Endpoint) -> None:
        """Counts a server as away, or as away still, and has it tried again later."""
        now = self._clock()
        if endpoint.away_since is None:
            endpoint.away_since, endpoint.trials = now, 0
        elif now < endpoint.retry_at:  # a request that was under way when it went
            return
        delay = self._backoff_s * min(2.0**endpoint.trials, LONGEST_TRIAL) * random.uniform(0.5, 1.0)
        endpoint.trials += 1
        endpoint.retry_at = now + delay
        asyncio.get_running_loop().call_later(delay + 0.01, self._admit)  # not a tick too early

    @property
    def hopeless(self) -> bool:
        """Whether all are away and have been for too long."""
        return all(self._is_given_up(endpoint) for endpoint in self.all)

    def stop(self, error: RefinerError) -> None:
        """Admits nobody any more: all who wait get `error`."""
        self._stopped = error
        self._admit()

    def _is_given_up(self, endpoint: Endpoint) -> bool:
        if endpoint.away_since is None:
            return False
        if not endpoint.has_answered:  # perhaps it is a wrong address
            return endpoint.trials > self._most_trials
        return self._clock() - endpoint.away_since > LONGEST_WAIT_S

    def _admit(self) -> None:
        now = self._clock()
        while self._waiting:
            if self._waiting[0].done():  # cancelled
                self._waiting.popleft()
                continue
            if self._stopped:
                self._waiting.popleft().set_result(None)
                continue
            free = [endpoint for endpoint in self.all if endpoint.takes(now)]
            if not free:
                return
            endpoint = min(free, key=lambda e: e.throttle.in_flight / e.throttle.limit)
            endpoint.throttle.in_flight += 1
            endpoint.on_trial = endpoint.away_since is not None
            self._waiting.popleft().set_result(endpoint)


def shown(url: str) -> str:
    """A URL without user, password and query, fit for messages."""
    parts = urllib.parse.urlsplit(url)
    return urllib.parse.urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def is_loopback(url: str) -> bool:
    """Whether a URL leads to this machine."""
    host = urllib.parse.urlsplit(url).hostname or ""
    return host in {"localhost", "::1"} or host.startswith("127.")
