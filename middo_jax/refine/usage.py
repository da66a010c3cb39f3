"""What refining costs: counters, prices, and a ledger by axis that survives the process.

A try is entered before it is sent, with the most that it can cost set aside; its answer, its counts and the
end of that reserve are then one transaction. So a process that is killed leaves neither an answer without its
cost nor a cost without its answer, and what was in flight stays set aside.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from middo_jax.config import Prices

if TYPE_CHECKING:
    from middo_jax.refine.cache import Answer, AnswerCache

CHARACTERS_A_TOKEN = 4  # of English


@dataclasses.dataclass
class Usage:
    """What was asked for and what it cost, as sums.

    `requests` counts every try and `seconds` how long they took; `retries` those after a request's first,
    `failed` requests that were given up. `usd` follows `refine.prices`. What is `aside` is the upper bound of
    tries whose cost nobody told: in flight, timed out, broken off, or answered without token counts.
    """

    requests: int = 0
    retries: int = 0
    answers: int = 0
    failed: int = 0
    from_cache: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    aside_tokens: int = 0
    seconds: float = 0.0
    usd: float = 0.0
    aside_usd: float = 0.0

    @property
    def tokens(self) -> int:
        """Prompt and completion together."""
        return self.prompt_tokens + self.completion_tokens

    def add(self, change: Usage) -> None:
        """Adds every counter of `change`."""
        for name in FIELDS:
            setattr(self, name, getattr(self, name) + getattr(change, name))

    def to_json(self) -> dict[str, float]:
        """All counters by name."""
        return dataclasses.asdict(self)


FIELDS = tuple(field.name for field in dataclasses.fields(Usage))


@dataclasses.dataclass(frozen=True)
class Ceiling:
    """The most that one try can cost."""

    tokens: int
    usd: float


def cost_usd(prices: Prices, prompt_tokens: int, completion_tokens: int, cached_tokens: int = 0) -> float:
    """US dollars for one answer; `cached_tokens` are part of `prompt_tokens`, at a price of their own."""
    fresh = prompt_tokens - cached_tokens
    cached = prices.prompt if prices.cached is None else prices.cached
    usd = fresh * prices.prompt + cached_tokens * cached + completion_tokens * prices.completion
    return usd / 1e6


def estimated_tokens(messages: list[dict[str, str]]) -> int:
    """A guess, a token for four characters: about right for English, too few for most other languages."""
    return sum(math.ceil(len(message["content"]) / CHARACTERS_A_TOKEN) for message in messages)


def ceiling(prices: Prices, messages: list[dict[str, str]], max_tokens: int) -> Ceiling:
    """An upper bound: a byte-level tokenizer makes at most one token a byte; a template adds a few a turn."""
    prompt_tokens = 64 + sum(16 + len(message["content"].encode()) for message in messages)
    return Ceiling(prompt_tokens + max_tokens, cost_usd(prices, prompt_tokens, max_tokens))


class Ledger:
    """Entries of one round of a run, by axis; kept in the cache's file, so that a restart goes on counting.

    `here` counts since this was opened, `by_axis` the round over all starts, `run` all rounds and starts.
    Runs that share a cache are told apart by name. Answers from the cache are counted but not kept: they cost
    nothing, and every start gives them anew.
    """

    def __init__(self, cache: AnswerCache, run: str = "run", round_index: int = 0) -> None:
        self._cache, self._run, self._round = cache, run, round_index
        self.here, self.run = Usage(), Usage()
        self.by_axis: dict[str, Usage] = {}
        for (entered, axis), usage in cache.spent(run).items():
            self.run.add(usage)
            if entered == round_index:
                self.by_axis[axis] = usage

    @property
    def round(self) -> Usage:
        """The round's sum over its axes."""
        total = Usage()
        for usage in self.by_axis.values():
            total.add(usage)
        return total

    def hit(self, axis: str) -> None:
        """Counts an answer that the cache had."""
        self._count(axis, Usage(from_cache=1))

    def failed(self, axis: str) -> None:
        """Counts a request that was given up."""
        self._enter(axis, Usage(failed=1))

    def begin(self, axis: str, most: Ceiling, retry: bool) -> None:
        """Enters a try that is about to be sent."""
        change = Usage(requests=1, retries=int(retry), aside_tokens=most.tokens, aside_usd=most.usd)
        self._enter(axis, change)

    def end(self, axis: str, most: Ceiling, seconds: float, *, charged: bool) -> None:
        """Enters a try's failure. One that may have been charged for stays set aside."""
        if charged:
            self._enter(axis, Usage(seconds=seconds))
        else:
            self._enter(axis, Usage(seconds=seconds, aside_tokens=-most.tokens, aside_usd=-most.usd))

    def answered(
        self, axis: str, most: Ceiling, seconds: float, answer: Answer, request_json: str, prices: Prices
    ) -> None:
        """Enters an answer and keeps it, in one transaction."""
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
        self._enter(axis, change, (request_json, answer))

    def to_json(self) -> dict[str, dict[str, float]]:
        """The round's counters by axis."""
        return {axis: self.by_axis[axis].to_json() for axis in sorted(self.by_axis)}

    def _enter(self, axis: str, change: Usage, answer: tuple[str, Answer] | None = None) -> None:
        self._cache.enter(self._run, self._round, axis, change, answer)
        self._count(axis, change)

    def _count(self, axis: str, change: Usage) -> None:
        for usage in (self.here, self.run, self.by_axis.setdefault(axis, Usage())):
            usage.add(change)


def per_thousand(usage: Mapping[str, float], accepted: int) -> float | None:
    """US dollars for a thousand accepted samples, None where none was accepted."""
    return usage["usd"] / accepted * 1000 if accepted else None
