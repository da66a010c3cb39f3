"""What requests cost: counters, prices, and an upper bound for one request."""

from __future__ import annotations

import dataclasses
import math

from middo_jax.config import Prices

CHARACTERS_PER_TOKEN = 4  # of English


@dataclasses.dataclass
class Usage:
    """Sums over requests.

    Attributes:
      requests: tries that were sent.
      retries: those after a request's first try.
      answers: tries that were answered.
      failed: requests that were given up.
      from_cache: answers that the cache had.
      prompt_tokens, completion_tokens: as the servers count them.
      cached_tokens: prompt tokens from the servers' own prefix caches.
      aside_tokens, aside_usd: upper bounds for tries of unknown cost: in flight, timed out, broken off, or
        answered without token counts.
      seconds: duration of all tries.
      usd: cost by `refine.prices`.
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
        """Prompt and completion tokens together."""
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
    """The maximum cost of one try."""

    tokens: int
    usd: float


def cost_usd(prices: Prices, prompt_tokens: int, completion_tokens: int, cached_tokens: int = 0) -> float:
    """US dollars for one answer. `cached_tokens` are part of `prompt_tokens` and have their own price."""
    fresh = prompt_tokens - cached_tokens
    cached = prices.prompt if prices.cached is None else prices.cached
    usd = fresh * prices.prompt + cached_tokens * cached + completion_tokens * prices.completion
    return usd / 1e6


def tokens_of_text(text: str) -> int:
    """A text's tokens, estimated as one per four characters: about right for English, low for most others."""
    return math.ceil(len(text) / CHARACTERS_PER_TOKEN)


def estimated_tokens(messages: list[dict[str, str]]) -> int:
    """`tokens_of_text` over all messages."""
    return sum(tokens_of_text(message["content"]) for message in messages)


def ceiling(prices: Prices, messages: list[dict[str, str]], max_tokens: int) -> Ceiling:
    """The maximum cost of a request: at most one token per byte, plus some per turn for the template."""
    prompt_tokens = 64 + sum(16 + len(message["content"].encode()) for message in messages)
    return Ceiling(prompt_tokens + max_tokens, cost_usd(prices, prompt_tokens, max_tokens))
