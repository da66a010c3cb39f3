"""The progress line of refining: done, from the cache, failed, tokens per minute, spent, projected."""

from __future__ import annotations

import time
from collections.abc import Sequence

from middo_jax.refinement.endpoint.ledger import Ledger
from middo_jax.refinement.endpoint.servers import Endpoint
from middo_jax.refinement.endpoint.throttle import Clock
from middo_jax.refinement.tasks import Outcome


class Meter:
    """Measures one pass over tasks: their cost so far, and the projected cost of all."""

    def __init__(
        self,
        ledger: Ledger,
        total: int,
        endpoints: Sequence[Endpoint] = (),
        clock: Clock = time.monotonic,
    ) -> None:
        """`total`: number of tasks; `endpoints`: servers that are named while they are away."""
        self._ledger, self._total, self._endpoints, self._clock = ledger, total, endpoints, clock
        self._began = clock()
        self._usd_before, self._tokens_before = ledger.run.usd, ledger.here.tokens
        self.done = self._readable = self._paid = 0

    def ended(self, outcome: Outcome) -> str:
        """Counts a task that ended. Returns the text of the progress line."""
        self.done += 1
        self._readable += outcome.example is not None
        self._paid += any(not exchange.answer.from_cache for exchange in outcome.exchanges)
        here, minutes = self._ledger.here, (self._clock() - self._began) / 60
        said = [
            f"{self._readable:,} to be judged",
            f"{here.from_cache:,} answers from the cache",
            f"{here.failed:,} requests failed",
        ]
        if minutes > 0:
            said.append(f"{(here.tokens - self._tokens_before) / minutes:,.0f} tokens/min")
        if spent := self._ledger.run.usd:
            said.append(f"${spent:.2f} spent, ${self._projected():.2f} projected")
        if away := [endpoint.url for endpoint in self._endpoints if endpoint.away_since is not None]:
            said.append(f"away: {', '.join(away)}")
        return ", ".join(said)

    def _projected(self) -> float:
        """The spending of the run after this pass, if the other tasks cost as much as those so far."""
        spent = self._ledger.run.usd
        per_task = (spent - self._usd_before) / self._paid if self._paid else 0.0
        return spent + per_task * (self._total - self.done)
