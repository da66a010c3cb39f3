"""The async client of any OpenAI-compatible chat endpoint: cached, bounded, retried, and paid for.

A request that failed is tried again only where that can help, and its last failure is final: it is never sent
again by the same client. The key is read from the environment and appears in no message, log or file.
"""

from __future__ import annotations

import asyncio
import dataclasses
import email.utils
import json
import math
import os
import random
import time
import urllib.parse
import weakref
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from middo_jax.config import ConfigError, RefineSettings
from middo_jax.refine.cache import Answer, AnswerCache, Usage, canonical, cost_usd, request_key
from middo_jax.refine.prompts import PROMPT_VERSION, Messages

RETRIED = {408, 409, 425, 429}  # and every 5xx
ENDPOINT_WIDE = {401, 402, 403, 404, 405, 429, 503}  # would meet any other request as well
OVERLOAD = {429, 503}
BACKOFF_LIMIT_S = 60.0
RETRY_AFTER_LIMIT_S = 600.0
FAILURES_IN_A_ROW = 8  # with no answer between them: no longer one sample's fault
WORDS = 300  # characters kept of what a server says


class RefinerError(RuntimeError):
    """A request that will not be answered. The text tells the user what to do.

    `reason` is the short form for one sample's row; `stops_stage` says that no other would fare better.
    """

    def __init__(self, message: str, reason: str, stops_stage: bool) -> None:
        super().__init__(message)
        self.reason = reason
        self.stops_stage = stops_stage


class RequestRefused(RefinerError):
    """The endpoint said no, and would again: 400, 401, 403, 404, 422 and their like, or an empty quota."""


class EndpointFailed(RefinerError):
    """The endpoint gave no usable answer in all of the tries."""


class BudgetReached(RefinerError):
    """One more request could pass `refine.budget_usd`. What is in flight is finished and kept."""


@dataclasses.dataclass(frozen=True)
class _Fault:
    """Why one try failed; `retry_after` in seconds."""

    words: str
    status: int | None = None
    retry_after: float | None = None
    can_succeed: bool = True
    endpoint_wide: bool = False

    @property
    def worth_waiting(self) -> bool:
        return self.can_succeed and (self.retry_after or 0.0) <= RETRY_AFTER_LIMIT_S


class ChatClient:
    """Asks one endpoint, remembers every answer, counts what it costs. For one event loop; `close()` it."""

    def __init__(
        self,
        settings: RefineSettings,
        base_url: str,
        model: str,
        cache: AnswerCache,
        seed: int | None = None,
        *,
        usage: Usage | None = None,
        backoff_base: float = 1.0,
    ) -> None:
        """Prepares the connection pool; nothing is sent yet.

        Args:
          settings: sampling, limits and prices.
          base_url: up to and including `/v1`.
          model: the name to ask for.
          cache: where answers are looked up and kept.
          seed: sent along where given.
          usage: counters to go on with, so that a budget spans several clients.
          backoff_base: seconds before the first retry, doubled for each one after.

        Raises:
          ConfigError: the key cannot be sent, or a budget is set without prices.
        """
        import openai

        if settings.budget_usd is not None and not (settings.prices.prompt or settings.prices.completion):
            raise ConfigError(
                "config: refine.budget_usd is set, but nothing counts against it: set refine.prices.prompt "
                "and refine.prices.completion, in US dollars a million tokens"
            )
        self.model = model
        self.usage = Usage() if usage is None else usage
        self._settings = settings
        self._cache = cache
        self._seed = seed
        self._backoff_base = backoff_base
        self._url = _shown(base_url)
        self._key = _read_key(settings.api_key_env)
        self._openai = openai.AsyncOpenAI(
            api_key=self._key or "none",  # the package insists on one, local servers don't
            base_url=base_url,
            max_retries=0,
            timeout=settings.timeout,
            # A proxy that the environment names cannot reach this machine's own loopback.
            http_client=openai.DefaultAsyncHttpxClient(trust_env=not _is_loopback(base_url)),
        )
        self._slots = asyncio.Semaphore(settings.concurrency)
        self._asking: weakref.WeakValueDictionary[str, asyncio.Lock] = weakref.WeakValueDictionary()
        self._final: dict[str, RefinerError] = {}
        self._stopped: RefinerError | None = None
        self._in_a_row = 0
        self._in_flight = 0
        self._reserved_usd = 0.0
        self._settled = asyncio.Condition()

    async def __aenter__(self) -> ChatClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the connections. The cache stays open: it belongs to the caller."""
        await self._openai.close()

    async def complete(self, messages: Messages, *, attempt: int = 0) -> Answer:
        """The answer to a conversation, from the cache or from the endpoint.

        Equal requests asked at the same time are sent once. Another `attempt` is another request.

        Raises:
          RequestRefused: the endpoint will not answer this.
          EndpointFailed: it did not within `refine.max_retries`.
          BudgetReached: asking could pass `refine.budget_usd`.
        """
        asked = {
            "messages": [{"role": m["role"], "content": _encodable(m["content"])} for m in messages],
            "model": self.model,
            "temperature": self._settings.temperature,
            "top_p": self._settings.top_p,
            "max_tokens": self._settings.max_tokens,
            **({} if self._seed is None else {"seed": self._seed}),
        }
        identity = {"seed": None, **asked, "prompt_version": PROMPT_VERSION, "attempt": attempt}
        key = request_key(identity)
        lock = self._asking.setdefault(key, asyncio.Lock())
        async with lock:
            if stored := self._cache.get(key):
                self.usage.cache_hits += 1
                return stored
            if key in self._final:
                # Without its old traceback, which would grow with every raise and hold all those frames.
                raise self._final[key].with_traceback(None)
            async with self._slots:
                return await self._send(key, asked, canonical(identity))

    async def _send(self, key: str, asked: dict[str, Any], request_json: str) -> Answer:
        """Tries until there is an answer or none is to be had, within the budget."""
        answers_before = self.usage.answers
        ceiling_usd = cost_usd(self._settings.prices, _token_ceiling(asked["messages"]), asked["max_tokens"])
        await self._reserve(ceiling_usd)
        try:
            for tries in range(1, self._settings.max_retries + 2):
                if self._stopped and self._stopped.stops_stage:
                    raise self._stopped.with_traceback(None)
                self.usage.requests += 1
                self.usage.retries += tries > 1
                outcome = await self._try(asked, ceiling_usd)
                if isinstance(outcome, Answer):
                    answer = dataclasses.replace(outcome, key=key)
                    self._cache.put(key, request_json, answer)  # before any await: it is paid for
                    return answer
                if not outcome.worth_waiting or tries > self._settings.max_retries:
                    break
                await asyncio.sleep(self._delay(outcome, tries))
            self._final[key] = self._give_up(
                outcome, tries, others_answered=self.usage.answers > answers_before
            )
            raise self._final[key]
        finally:
            await self._release(ceiling_usd)

    async def _try(self, asked: dict[str, Any], ceiling_usd: float) -> Answer | _Fault:
        """Sends once. A failure is returned and not raised, so that no traceback drags the request along."""
        import openai

        begun = time.perf_counter()
        try:
            # The package's own limit is one between two bytes; this one is for the whole answer.
            async with asyncio.timeout(self._settings.timeout):
                completion = await self._openai.chat.completions.create(**asked)
            answer, counted = _read(completion)
        except (openai.OpenAIError, TimeoutError, ValueError) as error:  # ValueError: a body that is not JSON
            return self._fault(error)
        finally:
            self.usage.seconds += time.perf_counter() - begun
        tokens = (answer.prompt_tokens, answer.completion_tokens, answer.cached_tokens)
        self.usage.add(answer, cost_usd(self._settings.prices, *tokens) if counted else ceiling_usd)
        self._in_a_row = 0
        return answer

    def _fault(self, error: Exception) -> _Fault:
        import openai

        if isinstance(error, openai.APIStatusError):
            status = error.status_code
            empty_quota = error.code == "insufficient_quota"  # answered with 429, yet waiting does not help
            return _Fault(
                self._words(error.body),
                status,
                retry_after(error.response.headers),
                can_succeed=(status in RETRIED or status >= 500) and not empty_quota,
                endpoint_wide=status in ENDPOINT_WIDE,
            )
        if isinstance(error, (openai.APITimeoutError, TimeoutError)):
            return _Fault(f"no answer within {self._settings.timeout:g} s (refine.timeout)")
        if isinstance(error, ValueError):
            return _Fault(self._words(f"unreadable reply: {error}"))
        cause = error.__cause__ or error
        return _Fault(
            self._words(f"{type(cause).__name__}: {cause}"),
            # Nobody listens there: whatever the sample, it cannot be its fault.
            endpoint_wide=type(cause).__name__ in {"ConnectError", "ConnectTimeout"},
        )

    def _delay(self, fault: _Fault, tries: int) -> float:
        """Seconds to wait: what the server asks for and some more, doubling; jitter parts those that failed
        together."""
        backoff = min(self._backoff_base * 2.0 ** (tries - 1), BACKOFF_LIMIT_S) * random.uniform(0.5, 1.0)
        return (fault.retry_after or 0.0) + backoff

    def _give_up(self, fault: _Fault, tries: int, others_answered: bool) -> RefinerError:
        # Samples that the endpoint refuses, too long ones say, may well stand side by side; so refusals in a
        # row tell something about the endpoint only while nothing was ever answered.
        telling = fault.can_succeed or not (self.usage.answers or self.usage.cache_hits)
        self._in_a_row += telling
        # Where others got through, an overload is this one's bad luck, and waiting for the rest is worth it.
        unlucky = fault.can_succeed and fault.status in OVERLOAD and others_answered
        stops = (fault.endpoint_wide and not unlucky) or self._in_a_row >= FAILURES_IN_A_ROW
        status = f" ({fault.status})" if fault.status else ""
        times = "1 try" if tries == 1 else f"{tries} tries"
        did = f"failed in {times}{status}" if fault.can_succeed else f"refused the request{status}"
        message = f"the refiner at {self._url} {did}: {fault.words}{self._advice(fault)}"
        reason = f"request {'failed' if fault.can_succeed else 'refused'}{status}: {fault.words}"
        error = (EndpointFailed if fault.can_succeed else RequestRefused)(message, reason, stops)
        if stops:
            self._stopped = error
        return error

    def _advice(self, fault: _Fault) -> str:
        if fault.can_succeed and not fault.worth_waiting:
            return f". It asks to wait {fault.retry_after:.0f} s; run the same command again then."
        name = self._settings.api_key_env
        if fault.status in (401, 403):
            state = "is set" if self._key else "is not set"
            return (
                f". The key is read from the environment variable {name} (refine.api_key_env), which {state}."
            )
        if fault.status in (404, 405):
            return (
                f". Asked for the model {self.model!r}; check refine.model, and refine.base_url, which "
                "usually ends in /v1."
            )
        if fault.endpoint_wide and fault.can_succeed:
            return (
                ". Every answer so far is kept; run the same command again once the endpoint can be reached."
            )
        return ""

    async def _reserve(self, ceiling_usd: float) -> None:
        """Sets money aside for the dearest answer there can be; what is in flight may turn out cheaper."""
        budget_usd = self._settings.budget_usd
        async with self._settled:
            while budget_usd is not None and not self._stopped:
                if self.usage.usd + self._reserved_usd + ceiling_usd <= budget_usd:
                    break
                if not self._in_flight:
                    self._stopped = BudgetReached(
                        f"refine.budget_usd of {budget_usd:g} is reached: {self.usage.usd:.4f} spent, and "
                        f"the next request could cost {ceiling_usd:.4f}",
                        "budget",
                        stops_stage=False,
                    )
                else:
                    await self._settled.wait()
            if self._stopped:
                raise self._stopped.with_traceback(None)
            self._in_flight += 1
            self._reserved_usd += ceiling_usd

    async def _release(self, ceiling_usd: float) -> None:
        async with self._settled:
            self._in_flight -= 1
            # Back to exactly nothing: sums and differences of floats seldom get there.
            self._reserved_usd = self._reserved_usd - ceiling_usd if self._in_flight else 0.0
            self._settled.notify_all()

    def _words(self, said: object) -> str:
        """What a server said, on one line, not without end, and without the key that some echo."""
        if isinstance(said, Mapping):
            said = said.get("message") or said.get("detail") or json.dumps(said, default=str)
        text = str(said)
        if self._key:  # before anything is cut, or half of it might stay
            text = text.replace(self._key, "***")
        line = " ".join(text.split()) or "(it gave no reason)"
        return line if len(line) <= WORDS else line[:WORDS] + "..."


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that a server asks to wait: `retry-after-ms`, or `retry-after` in seconds or as a date."""
    for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        text = headers.get(name, "")
        try:
            seconds = float(text) * unit
        except ValueError:
            continue
        return None if math.isnan(seconds) else max(seconds, 0.0)
    try:
        date = email.utils.parsedate_to_datetime(headers.get("retry-after", ""))
        return max(date.timestamp() - time.time(), 0.0)
    except (ValueError, OverflowError):
        return None


def _read(completion: Any) -> tuple[Answer, bool]:
    """The first choice, and whether tokens were counted. The package checks nothing of a body's shape."""
    choices = getattr(completion, "choices", None)
    choice = choices[0] if isinstance(choices, list) and choices else None
    message = getattr(choice, "message", None)
    if message is None:
        extra = getattr(completion, "model_extra", None) or {}
        raise ValueError(f"a reply without choices: {extra.get('error', completion)}")
    usage = getattr(completion, "usage", None)
    details = getattr(usage, "prompt_tokens_details", None)
    content = getattr(message, "content", None) or getattr(message, "refusal", None)
    answer = Answer(
        _encodable(content) if isinstance(content, str) else "",
        str(getattr(choice, "finish_reason", None) or "stop"),
        _count(usage, "prompt_tokens"),
        _count(usage, "completion_tokens"),
        _count(details, "cached_tokens"),
    )
    return answer, answer.prompt_tokens > 0


def _count(usage: object, name: str) -> int:
    count = getattr(usage, name, None)
    return count if isinstance(count, int) else 0


def _token_ceiling(messages: Messages) -> int:
    """An upper bound: a byte-level tokenizer makes at most one token a byte; a template adds a few a turn."""
    return 64 + sum(16 + len(m["content"].encode()) for m in messages)


def _encodable(text: str) -> str:
    """Text without lone surrogates, which JSON can escape but neither UTF-8 nor SQLite can hold."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _read_key(variable: str) -> str | None:
    """The key without the newline that `export KEY=$(cat file)` may leave; None where there is none."""
    key = os.environ.get(variable, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise ConfigError(f"config: the key in ${variable} holds characters that no HTTP header can carry")
    return key or None


def _shown(url: str) -> str:
    """A URL without user, password and query, fit for messages."""
    parts = urllib.parse.urlsplit(url)
    return urllib.parse.urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def _is_loopback(url: str) -> bool:
    host = urllib.parse.urlsplit(url).hostname or ""
    return host in {"localhost", "::1"} or host.startswith("127.")
