"""Reserves money and tokens before a request is sent, so that a budget is never exceeded."""

from __future__ import annotations

import asyncio

from middo_jax.config import ConfigError, Dollars, RefineSettings, Tokens
from middo_jax.refinement.endpoint.faults import BudgetReached
from middo_jax.refinement.endpoint.ledger import Ledger
from middo_jax.refinement.endpoint.usage import Ceiling

NOTHING = Ceiling(0, 0.0)
ROUNDING_USD = 1e-9  # tolerance for sums of floats


class Budget:
    """The amount that a run may still spend, over all its rounds and starts.

    Reserved amounts count as spent: the most expensive answer possible for each request in flight and for
    each try of unknown cost.
    """

    def __init__(self, settings: RefineSettings, ledger: Ledger) -> None:
        """Raises ConfigError if a budget in US dollars is set without prices."""
        usd = settings.budget.usd if isinstance(settings.budget, Dollars) else None
        if usd is not None and not (settings.prices.prompt or settings.prices.completion):
            raise ConfigError(
                "config: refine.budget.usd is set, but nothing counts against it: set refine.prices.prompt "
                "and refine.prices.completion, in US dollars per million tokens"
            )
        self._usd = usd
        self._tokens = settings.budget.tokens if isinstance(settings.budget, Tokens) else None
        self._ledger = ledger
        self._in_flight = 0
        self._settled = asyncio.Condition()
        self._reached: BudgetReached | None = None

    async def begin(self, account: str, most: Ceiling, retry: bool) -> None:
        """Enters a try in the ledger. Waits while requests in flight may still turn out cheap enough.

        Raises:
          BudgetReached: the try could exceed a budget. All later calls raise it too.
        """
        async with self._settled:
            while not self._reached and (limit := self.passed_by(most)):
                if self._in_flight:
                    await self._settled.wait()
                else:
                    self._reached = BudgetReached(limit, "budget")
            if self._reached:
                raise self._reached.with_traceback(None)
            self._ledger.begin(account, most, retry)
            self._in_flight += 1

    async def end(self) -> None:
        """Ends a try, after its result was entered in the ledger."""
        self._in_flight -= 1
        if self._usd is not None or self._tokens is not None:
            async with self._settled:
                self._settled.notify_all()

    def passed_by(self, most: Ceiling, planned: Ceiling = NOTHING) -> str | None:
        """The message if one more try, besides what is `planned`, could exceed a budget; otherwise None."""
        run = self._ledger.run
        aside_usd, aside_tokens = run.aside_usd + planned.usd, run.aside_tokens + planned.tokens
        if self._usd is not None and run.usd + aside_usd + most.usd > self._usd + ROUNDING_USD:
            return (
                f"refine.budget.usd of {self._usd:g} is reached: {run.usd:.4f} spent by this run, "
                f"{aside_usd:.4f} set aside for tries whose cost is not known, and the next request "
                f"could cost {most.usd:.4f}"
            )
        if self._tokens is not None and run.tokens + aside_tokens + most.tokens > self._tokens:
            return (
                f"refine.budget.tokens of {self._tokens:,} is reached: {run.tokens:,} used by this run, "
                f"{aside_tokens:,} set aside for tries whose number is not known, and the next request "
                f"could take {most.tokens:,}"
            )
        return None
