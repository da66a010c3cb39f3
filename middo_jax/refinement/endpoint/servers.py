"""The servers of one model: which takes the next request, which are away, and when they are tried again.

A server is away if it accepts no connection, or if eight requests of different samples failed there without
an answer in between. It is then left out, and tried with one request at a time, less and less often. The
other servers take the load; without any, requests wait. So the restart of a server costs time but no sample.
The failures of a server that is away do not count as tries of the requests.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import random
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from middo_jax.refinement.endpoint.faults import LONGEST_WAIT_S, Fault, RefinerError
from middo_jax.refinement.endpoint.throttle import Clock, Throttle

if TYPE_CHECKING:
    from openai import AsyncOpenAI

FAILURES_IN_A_ROW = 8  # without an answer in between: then the server is at fault, not a sample
LONGEST_TRIAL = (
    5.0  # maximum wait between two trials of a server that is away, as a multiple of the first wait
)


@dataclasses.dataclass(eq=False)
class Endpoint:
    """One server, the limit of its requests in flight, and whether it is away."""

    url: str  # for messages, without user and password
    api: AsyncOpenAI
    throttle: Throttle
    has_answered: bool = False
    away_since: float | None = None
    trials: int = 0  # failed trials since it is away
    retry_at: float = 0.0
    on_trial: bool = False
    _failing: set[str] = dataclasses.field(
        default_factory=set
    )  # keys of the requests that failed since the last answer

    def takes(self, now: float) -> bool:
        """Whether one more request may be sent to this server."""
        if self.away_since is None:
            return self.throttle.has_room
        return not self.on_trial and now >= self.retry_at

    def answered(self) -> None:
        """Records that the server works."""
        self.has_answered, self.away_since, self.trials = True, None, 0
        self._failing.clear()

    def failed(self, fault: Fault, key: str) -> bool:
        """Records a fault of the request `key`. Returns whether the server is at fault."""
        if self.away_since is not None:
            return True
        self._failing.add(key)
        return fault.away or len(self._failing) >= FAILURES_IN_A_ROW


class Endpoints:
    """All servers. `take` one, report how the try ended, `give_back`. For one event loop."""

    def __init__(
        self, endpoints: Sequence[Endpoint], most_trials: int, backoff_s: float, clock: Clock = time.monotonic
    ) -> None:
        """Starts with all servers present.

        Args:
          endpoints: at least one.
          most_trials: number of trials after which a server that never answered is given up.
          backoff_s: seconds before the first trial of a server that is away, doubled for each further one.
          clock: returns seconds.
        """
        self.all = tuple(endpoints)
        self._most_trials = most_trials
        self._backoff_s = backoff_s
        self._clock = clock
        self._waiting: collections.deque[asyncio.Future[Endpoint | None]] = collections.deque()
        self._stopped: RefinerError | None = None

    @property
    def away(self) -> list[Endpoint]:
        """The servers that are left out for now."""
        return [endpoint for endpoint in self.all if endpoint.away_since is not None]

    async def take(self) -> Endpoint:
        """The least loaded server that can take a request. Callers are served in the order of their calls.

        Raises:
          RefinerError: the error that was given to `stop`.
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
        # Without its old traceback, which would grow with every raise and keep all its frames alive.
        raise self._stopped.with_traceback(None)

    def give_back(self, endpoint: Endpoint) -> None:
        """Ends what `take` began."""
        endpoint.throttle.in_flight -= 1
        endpoint.on_trial = False
        self._admit()

    def failed(self, endpoint: Endpoint, fault: Fault, key: str) -> bool:
        """Records a fault. Returns whether the server is at fault, so that the try does not count."""
        if not endpoint.failed(fault, key):
            return False
        self.leave_out(endpoint)
        return True

    def leave_out(self, endpoint: Endpoint) -> None:
        """Marks a server as away and schedules its next trial."""
        now = self._clock()
        if endpoint.away_since is None:
            endpoint.away_since, endpoint.trials = now, 0
        elif now < endpoint.retry_at:  # a request that was already in flight when the server went away
            return
        delay = self._backoff_s * min(2.0**endpoint.trials, LONGEST_TRIAL) * random.uniform(0.5, 1.0)
        endpoint.trials += 1
        endpoint.retry_at = now + delay
        asyncio.get_running_loop().call_later(delay + 0.01, self._admit)  # not a tick too early

    @property
    def hopeless(self) -> bool:
        """Whether all servers have been away for too long."""
        return all(self._is_given_up(endpoint) for endpoint in self.all)

    def stop(self, error: RefinerError) -> None:
        """Serves no call of `take` any more: all waiting calls raise `error`."""
        self._stopped = error
        self._admit()

    def _is_given_up(self, endpoint: Endpoint) -> bool:
        if endpoint.away_since is None:
            return False
        if not endpoint.has_answered:  # the address may be wrong
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
