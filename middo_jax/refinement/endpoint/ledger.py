"""The ledger: the spending of a round, by account. It survives the process.

A try is entered before it is sent, and its maximum cost is reserved. Its answer and its actual cost, which
replaces the reserve, are then written in one transaction. So a killed process leaves no answer without its
cost and no cost without its answer, and tries in flight stay reserved.
"""

from __future__ import annotations

from middo_jax.config import Prices
from middo_jax.refinement.endpoint.cache import AnswerCache
from middo_jax.refinement.endpoint.request import Answer
from middo_jax.refinement.endpoint.usage import Ceiling, Usage, cost_usd


class Ledger:
    """The entries of one round by account, in the cache's file, so that a restart continues the count.

    Runs that share a cache are distinguished by name. Answers from the cache are counted but not stored: they
    are free, and every start counts them anew.

    Attributes:
      here: sum since this object was made.
      by_account: sums of the round over all starts.
      run: sum of the run over all rounds and starts.
    """

    def __init__(self, cache: AnswerCache, run: str = "run", round_index: int = 0) -> None:
        self._cache, self._run, self._round = cache, run, round_index
        self.here, self.run = Usage(), Usage()
        self.by_account: dict[str, Usage] = {}
        for (entered, account), usage in cache.spent(run).items():
            self.run.add(usage)
            if entered == round_index:
                self.by_account[account] = usage

    @property
    def round(self) -> Usage:
        """The sum of the round over its accounts."""
        total = Usage()
        for usage in self.by_account.values():
            total.add(usage)
        return total

    def hit(self, account: str) -> None:
        """Counts an answer from the cache."""
        self._count(account, Usage(from_cache=1))

    def failed(self, account: str) -> None:
        """Counts a request that was given up."""
        self._enter(account, Usage(failed=1))

    def begin(self, account: str, most: Ceiling, retry: bool) -> None:
        """Enters a try that is about to be sent."""
        change = Usage(requests=1, retries=int(retry), aside_tokens=most.tokens, aside_usd=most.usd)
        self._enter(account, change)

    def end(self, account: str, most: Ceiling, seconds: float, *, charged: bool) -> None:
        """Enters the failure of a try. If it may be charged for, its reserve stays."""
        if charged:
            self._enter(account, Usage(seconds=seconds))
        else:
            self._enter(account, Usage(seconds=seconds, aside_tokens=-most.tokens, aside_usd=-most.usd))

    def answered(
        self, account: str, most: Ceiling, seconds: float, answer: Answer, request_json: str, prices: Prices
    ) -> None:
        """Enters the cost of an answer and stores the answer, in one transaction."""
        counts = (answer.prompt_tokens, answer.completion_tokens, answer.cached_tokens)
        counted = answer.prompt_tokens > 0
        change = Usage(
            answers=1,
            prompt_tokens=counts[0],
            completion_tokens=counts[1],
            cached_tokens=counts[2],
            aside_tokens=-most.tokens if counted else 0,
            seconds=seconds,
            usd=cost_usd(prices, *counts) if counted else 0.0,
            aside_usd=-most.usd if counted else 0.0,
        )
        self._enter(account, change, (request_json, answer))

    def to_json(self) -> dict[str, dict[str, float]]:
        """The round's counters by account."""
        return {account: self.by_account[account].to_json() for account in sorted(self.by_account)}

    def _enter(self, account: str, change: Usage, answer: tuple[str, Answer] | None = None) -> None:
        self._cache.enter(self._run, self._round, account, change, answer)
        self._count(account, change)

    def _count(self, account: str, change: Usage) -> None:
        for usage in (self.here, self.run, self.by_account.setdefault(account, Usage())):
            usage.add(change)
