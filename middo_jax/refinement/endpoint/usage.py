"""What requests cost: counters, prices, and the most that one of them can take."""

from __future__ import annotations

import dataclasses
import math

from middo_jax.config import Prices

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
