"""The async client of any OpenAI-compatible chat endpoint, or of several that serve one model.

What was answered once is never asked again; what failed is tried again only where that can help, and its last
failure is final. The key is read from the environment and appears in no message, log or file.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import os
import random
import time
import weakref
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from middo_jax.config import ConfigError, RefineSettings, RequestRate, TokenRate
from middo_jax.refinement.endpoint.budget import Budget
from middo_jax.refinement.endpoint.cache import AnswerCache
from middo_jax.refinement.endpoint.dialect import Dialect
from middo_jax.refinement.endpoint.faults import (
    OVERLOAD,
    BudgetReached,
    EndpointFailed,
    Fault,
    RefinerError,
    RequestRefused,
    advice,
    read_fault,
)
from middo_jax.refinement.endpoint.ledger import Ledger
from middo_jax.refinement.endpoint.probe import JSON, TEXT, Probe, schema_refusal
from middo_jax.refinement.endpoint.request import Answer, ChatRequest, Messages, Requests, read_answer
from middo_jax.refinement.endpoint.room import watch_context
from middo_jax.refinement.endpoint.servers import (
    FAILURES_IN_A_ROW,
    Endpoint,
    Endpoints,
    is_loopback,
    shown,
)
from middo_jax.refinement.endpoint.throttle import RateLimits, Throttle
from middo_jax.refinement.endpoint.usage import CHARACTERS_A_TOKEN, Ceiling, ceiling, estimated_tokens

WINDOW = 200  # requests, of which more than half may not fail
DOUBLINGS = 3  # of the wait between two tries; longer ones would outlast the overload
REFUSAL = 0.25  # of a try: one in an overload, while others get through, costs nothing and tells little
CONNECT_TIMEOUT_S = 10.0
SECRET_CHARS = 16  # of a key that is one; local servers take any word


class ChatClient:
    """Asks, remembers every answer, and enters what it costs. For one event loop; `close()` it."""

    def __init__(
        self,
        requests: Requests,
        base_url: str | Sequence[str],
        cache: AnswerCache,
        *,
        sends_key: bool = True,
        ledger: Ledger | None = None,
        backoff_s: float = 1.0,
    ) -> None:
        """Prepares the connection pools; nothing is sent yet.

        Args:
          requests: the model and the settings with which it is asked.
          base_url: up to and including `/v1`; several are servers of the same model.
          cache: where answers are looked up and kept.
          sends_key: whether requests carry the key of `refine.api_key_env`; otherwise a dummy. The key is
            for the server that the user named, and for no other.
          ledger: where costs are entered, so that a budget spans several clients.
          backoff_s: before the first retry, doubled for each one after.

        Raises:
          ConfigError: the key cannot be sent, or a budget is set without prices.
        """
        settings = requests.settings
        self.model = requests.model
        self.ledger = Ledger(cache) if ledger is None else ledger
        self._requests = requests
        self._settings = settings
        self._cache = cache
        self._backoff_s = backoff_s
        self._dialect = Dialect(cache, requests.served)
        self._key = _read_key(settings.api_key_env) if sends_key else None
        urls = (base_url,) if isinstance(base_url, str) else tuple(base_url)
        self.endpoints = Endpoints(
            [_connect(url, self._key, settings) for url in urls], settings.max_retries, backoff_s
        )
        self._budget = Budget(settings, self.ledger)
        limit = settings.per_minute
        self._rates = RateLimits(
            limit.requests if isinstance(limit, RequestRate) else None,
            limit.tokens if isinstance(limit, TokenRate) else None,
        )
        self._asking: weakref.WeakValueDictionary[str, asyncio.Lock] = weakref.WeakValueDictionary()
        self._final: dict[str, RefinerError] = {}
        self._ended: collections.deque[bool] = collections.deque(maxlen=WINDOW)  # whether with an answer
        self._stopped: RefinerError | None = None
        self._stopping = asyncio.Event()

    async def __aenter__(self) -> ChatClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the connections. The cache stays open: it belongs to the caller."""
        for endpoint in self.endpoints.all:
            await endpoint.api.close()

    async def honours(self, probe: Probe) -> bool:
        """Whether the server holds its replies to a schema; found out once per model and kept in the cache.

        If the request with the schema fails, the same one without it tells a server that fails at schemas
        from one that fails at everything. The finding is kept, since the requests that follow depend on it.

        Raises:
          RefinerError: the server does not answer.
        """
        name = self._requests.form_fact
        if known := self._cache.fact(name):
            return known == JSON
        request, plain = (
            self._requests.build(probe.messages, response_format=form, max_tokens=probe.max_tokens)
            for form in (probe.response_format, None)
        )
        try:
            answer = self._cache.get(request.key) or await self._ask(request, probe.account)
        except BudgetReached:
            return False
        except (RequestRefused, EndpointFailed) as error:
            if error.stops_stage:
                raise
            if isinstance(error, EndpointFailed):  # llama-cpp-python's server says 500 to what it cannot read
                with contextlib.suppress(BudgetReached):
                    await self._ask(plain, probe.account)
            return self._cache.learn(name, TEXT) == JSON
        return self._cache.learn(name, JSON if probe.is_held(answer.text) else TEXT) == JSON

    async def refuse_schema(self, reason: str) -> None:
        """Keeps that the server refuses schemas: no request with one is sent any more."""
        self._cache.learn(self._requests.schema_fact, reason)

    async def complete(
        self,
        messages: Messages,
        *,
        attempt: int = 0,
        account: str = "all",
        response_format: Mapping[str, Any] | None = None,
        max_tokens: int | None = None,
    ) -> Answer:
        """The answer to a conversation, from the cache or from an endpoint.

        Equal requests asked at the same time are sent once. Another `attempt` is another request; its
        cost is entered under `account`.

        Raises:
          RequestRefused: the endpoint will not answer this.
          EndpointFailed: it did not within `refine.max_retries`, or is away.
          BudgetReached: asking could pass a budget.
        """
        request = self._requests.build(
            messages, attempt=attempt, response_format=response_format, max_tokens=max_tokens
        )
        lock = self._asking.setdefault(request.key, asyncio.Lock())
        async with lock:
            if stored := self._cache.get(request.key):
                self.ledger.hit(account)
                return stored
            if response_format is not None and (refusal := schema_refusal(self._cache, self._requests)):
                raise refusal
            if request.key in self._final:
                # Without its old traceback, which would grow with every raise and hold all those frames.
                raise self._final[request.key].with_traceback(None)
            try:
                answer = await self._ask(request, account)
            except (RequestRefused, EndpointFailed) as error:
                if error is not self._stopped:
                    error = self._failed(error, account)
                    self._final[request.key] = error
                raise error from None
            self._ended.append(True)
            return answer

    async def _ask(self, request: ChatRequest, account: str) -> Answer:
        """Tries until there is an answer or none is to be had."""
        answers_before = self.ledger.here.answers
        most = ceiling(self._settings.prices, request.body["messages"], request.body["max_tokens"])
        tries, sent = 0.0, 0
        while True:
            endpoint = await self.endpoints.take()
            delay, body = 0.0, self._dialect.sent(request.body)
            try:
                outcome = await self._try(endpoint, request, body, account, most, retry=sent > 0)
                if isinstance(outcome, Answer):
                    return outcome
                sent += 1
                if self._dialect.adapt(outcome.field, body):
                    endpoint.answered()
                    continue
                if self._is_away(endpoint, outcome, request.key):
                    if self.endpoints.hopeless:
                        raise self._gave_up(outcome, endpoint.trials, stops=True)
                    continue
                others_answered = self.ledger.here.answers > answers_before
                tries += REFUSAL if outcome.status in OVERLOAD and others_answered else 1.0
                if not outcome.worth_waiting or tries > self._settings.max_retries:
                    silent = outcome.worth_waiting and outcome.endpoint_wide and not others_answered
                    if silent and endpoint.has_answered:  # an outage, not the first that was seen of it
                        self.endpoints.leave_out(endpoint)
                        continue
                    # Where others got through, an overload is this one's bad luck: the rest may fare better.
                    unlucky = outcome.retried and outcome.overload and others_answered
                    raise self._gave_up(outcome, sent, stops=outcome.endpoint_wide and not unlucky)
                delay = self._delay(outcome, sent)
                if outcome.overload:  # it keeps its place meanwhile, so that less is asked of the server
                    await self._sleep(delay)
            finally:
                self.endpoints.give_back(endpoint)
            if not outcome.overload:
                await self._sleep(delay)

    async def _try(
        self,
        endpoint: Endpoint,
        request: ChatRequest,
        body: dict[str, Any],
        account: str,
        most: Ceiling,
        *,
        retry: bool,
    ) -> Answer | Fault:
        """Sends `body` once, for the request.

        A failure is returned and not raised, so that no traceback drags the request along.
        """
        import openai

        taken = await self._rates.take(
            estimated_tokens(request.body["messages"]) + request.body["max_tokens"]
        )
        await self._budget.begin(account, most, retry)
        began = time.monotonic()
        try:
            try:
                # The package's own limit is one between two bytes; this one is for the whole answer.
                async with asyncio.timeout(self._settings.timeout):
                    # Not by the typed method, which would take the body apart twice and check nothing of it.
                    reply = await endpoint.api.post("/chat/completions", body=body, cast_to=object)
                answer = self._without_key(read_answer(reply, request.key))
            except (
                openai.OpenAIError,
                TimeoutError,
                ValueError,
            ) as error:  # ValueError: a body that is not JSON
                fault = read_fault(error, self._settings.timeout, self._key)
                self.ledger.end(account, most, time.monotonic() - began, charged=fault.charged)
                if fault.overload:
                    endpoint.throttle.overloaded(began)
                if not fault.charged:
                    self._rates.correct(taken, 0)
                return fault
            # Before any await: it is paid for.
            seconds = time.monotonic() - began
            self.ledger.answered(account, most, seconds, answer, request.canonical, self._settings.prices)
        finally:
            await self._budget.end()
        watch_context(self._cache, request.body["messages"], answer)
        tokens = answer.completion_tokens or len(answer.text) // CHARACTERS_A_TOKEN
        endpoint.throttle.answered(began, tokens)
        endpoint.answered()
        self._rates.correct(taken, answer.prompt_tokens + tokens)
        return answer

    def _without_key(self, answer: Answer) -> Answer:
        """The answer, should it shout the key back. A short key is a dummy, a word that texts may hold."""
        if self._key is None or len(self._key) < SECRET_CHARS or self._key not in answer.text:
            return answer
        return dataclasses.replace(answer, text=answer.text.replace(self._key, "***"))

    def _is_away(self, endpoint: Endpoint, fault: Fault, key: str) -> bool:
        """Whether a fault is the server's rather than the request's, so that the try does not count."""
        if not fault.worth_waiting:
            if not fault.retried:
                endpoint.answered()  # it has, if only with a refusal
            return False
        return self.endpoints.failed(endpoint, fault, key)

    def _delay(self, fault: Fault, sent: int) -> float:
        """Seconds to wait: what the server asks for and some more, doubling; jitter parts those that failed
        together."""
        backoff = self._backoff_s * 2.0 ** min(sent - 1, DOUBLINGS) * random.uniform(0.5, 1.0)
        return (fault.retry_after or 0.0) + backoff

    async def _sleep(self, seconds: float) -> None:
        """Sleeps, unless the stage stops meanwhile."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._stopping.wait()

    def _gave_up(self, fault: Fault, tries: int, *, stops: bool) -> RefinerError:
        times = "1 try" if tries == 1 else f"{tries} tries"
        did = f"failed in {times}" if fault.retried else "refused the request"
        urls = ", ".join(endpoint.url for endpoint in self.endpoints.all)
        help_ = advice(fault, stops, self.model, self._settings.api_key_env, self._key)
        message = f"the refiner at {urls} {did}{fault.status_text}: {fault.words}{help_}"
        reason = f"request {'failed' if fault.retried else 'refused'}{fault.status_text}: {fault.words}"
        error = (EndpointFailed if fault.retried else RequestRefused)(message, reason, stops)
        if stops:
            self._stop(error)
        return error

    def _failed(self, error: RefinerError, account: str) -> RefinerError:
        """Counts a request that was given up; the error to raise, which stops the stage if too many were."""
        self.ledger.failed(account)
        self._ended.append(False)
        if self._stopped:
            return error
        failed, here = self._ended.count(False), self.ledger.here
        nothing_works = failed >= FAILURES_IN_A_ROW and not (here.answers or here.from_cache)
        if nothing_works or (failed > WINDOW / 2 and len(self._ended) == WINDOW):
            message = (
                f"{failed} of the last {len(self._ended)} requests failed, so the rest is not asked. Every "
                f"answer so far is kept. The last failure: {error}"
            )
            error = type(error)(message, error.reason, stops_stage=True)
            self._stop(error)
        return error

    def _stop(self, error: RefinerError) -> None:
        """Nothing more is sent; what is in flight is finished and kept."""
        self._stopped = error
        self.endpoints.stop(error)
        self._stopping.set()


def _connect(url: str, key: str | None, settings: RefineSettings) -> Endpoint:
    import openai

    # By its type: the package has had more than one HTTP library.
    limits = type(openai.DEFAULT_CONNECTION_LIMITS)(
        max_connections=settings.concurrency, max_keepalive_connections=settings.concurrency
    )
    api = openai.AsyncOpenAI(
        api_key=key or "none",  # the package insists on one, local servers don't
        base_url=url,
        max_retries=0,
        timeout=openai.Timeout(settings.timeout, connect=min(CONNECT_TIMEOUT_S, settings.timeout)),
        http_client=openai.DefaultAsyncHttpxClient(
            limits=limits,
            # A proxy that the environment names cannot reach this machine's own loopback.
            trust_env=not is_loopback(url),
        ),
    )
    return Endpoint(shown(url), api, Throttle(settings.concurrency))


def _read_key(variable: str) -> str | None:
    """The key without the newline that `export KEY=$(cat file)` may leave; None where there is none."""
    key = os.environ.get(variable, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise ConfigError(f"config: the key in ${variable} holds characters that no HTTP header can carry")
    return key or None
