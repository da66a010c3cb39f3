"""The refiner's answers: what one is, what it cost, and where all are kept.

The cache is a SQLite file with one row a request, keyed by what was asked, not by whom.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sqlite3
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from middo_jax.config import Prices


@dataclasses.dataclass(frozen=True)
class Answer:
    """What an endpoint answered. Token counts are 0 where the server does not tell them.

    `cached_tokens` are the prompt tokens that the server had in its own prefix cache; `from_cache` says that
    the whole answer came from ours and cost nothing.
    """

    text: str
    finish_reason: str
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    from_cache: bool = False
    key: str = ""


@dataclasses.dataclass
class Usage:
    """What was asked for and what it cost. `requests` counts every try, `seconds` the sum of their durations.

    `usd` follows `refine.prices`; an answer without token counts is charged with its upper bound. A try that
    timed out or broke off is counted as a request, but nobody can know whether the server charges for it.
    """

    requests: int = 0
    retries: int = 0
    answers: int = 0
    cache_hits: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    seconds: float = 0.0
    usd: float = 0.0

    def add(self, answer: Answer, usd: float) -> None:
        """Counts an answer that the endpoint has just given."""
        self.answers += 1
        self.prompt_tokens += answer.prompt_tokens
        self.completion_tokens += answer.completion_tokens
        self.cached_tokens += answer.cached_tokens
        self.usd += usd

    def to_json(self) -> dict[str, float]:
        """All counters by name."""
        return dataclasses.asdict(self)


def cost_usd(prices: Prices, prompt_tokens: int, completion_tokens: int, cached_tokens: int = 0) -> float:
    """US dollars for one answer; `cached_tokens` are part of `prompt_tokens`, at a price of their own."""
    fresh = prompt_tokens - cached_tokens
    cached = prices.prompt if prices.cached is None else prices.cached
    usd = fresh * prices.prompt + cached_tokens * cached + completion_tokens * prices.completion
    return usd / 1e6


class CacheError(RuntimeError):
    """The cache file cannot be used; the message says what to do."""


def canonical(request: Mapping[str, Any]) -> str:
    """A request as JSON with sorted keys and no spaces: equal requests give equal text."""
    return json.dumps(request, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def request_key(request: Mapping[str, Any]) -> str:
    """SHA-256 of the canonical request, in hexadecimal."""
    return hashlib.sha256(canonical(request).encode("ascii")).hexdigest()


class AnswerCache:
    """Answers by request key, in a SQLite file that several runs may share.

    Only answers are stored, never failures. Every `put` is committed at once: what was paid for survives the
    process. To be used from one thread.
    """

    def __init__(self, path: str | Path) -> None:
        """Opens or creates the file.

        Raises:
          CacheError: the file is no cache, or its folder cannot be written.
        """
        self.path = Path(path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(self.path, timeout=30.0)  # seconds to wait for another run's write
            self._db.execute("PRAGMA journal_mode=WAL")
            # In WAL mode NORMAL loses a commit only when the machine itself goes down, not the process.
            self._db.execute("PRAGMA synchronous=NORMAL")
            self._db.execute(
                "CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, request TEXT NOT NULL, "
                "text TEXT NOT NULL, finish_reason TEXT NOT NULL, prompt_tokens INTEGER NOT NULL, "
                "completion_tokens INTEGER NOT NULL, cached_tokens INTEGER NOT NULL)"
            )
            self._db.commit()
        except (OSError, sqlite3.Error) as e:
            raise CacheError(
                f"{self.path}: cannot be used as the refiner's cache ({e}); move it away or make it writable"
            ) from e

    def get(self, key: str) -> Answer | None:
        """The stored answer with `from_cache` set, or None."""
        row = self._db.execute(
            "SELECT text, finish_reason, prompt_tokens, completion_tokens, cached_tokens FROM answers "
            "WHERE key = ?",
            (key,),
        ).fetchone()
        return Answer(*row, from_cache=True, key=key) if row else None

    def put(self, key: str, request_json: str, answer: Answer) -> None:
        """Stores an answer durably. Of two runs that paid for the same request the first one's stays."""
        with self._db:
            self._db.execute(
                "INSERT OR IGNORE INTO answers VALUES (?, ?, ?, ?, ?, ?, ?)",
                (
                    key,
                    request_json,
                    answer.text,
                    answer.finish_reason,
                    answer.prompt_tokens,
                    answer.completion_tokens,
                    answer.cached_tokens,
                ),
            )

    def __len__(self) -> int:
        return self._db.execute("SELECT COUNT(*) FROM answers").fetchone()[0]

    def close(self) -> None:
        """Closes the file."""
        self._db.close()
