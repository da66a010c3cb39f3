"""The async client of any OpenAI-compatible chat endpoint, or of several that serve one model.

An answered request is never sent again. A failed request is tried again only if that can help; its last
failure is final. The API key is read from the environment and appears in no message, log or file.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import os
import random
import time
import weakref
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

import openai

from middo_jax.config import ConfigError, RefineSettings, RequestRate, TokenRate
from middo_jax.loopback import is_loopback
from middo_jax.refinement.endpoint.address import Address, Secrets
from middo_jax.refinement.endpoint.budget import Budget
from middo_jax.refinement.endpoint.cache import AnswerCache
from middo_jax.refinement.endpoint.context_check import check_context
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
from middo_jax.refinement.endpoint.probe import JSON, TEXT, Probe
from middo_jax.refinement.endpoint.receiving import BoundedClient, limited_to
from middo_jax.refinement.endpoint.request import Answer, Messages, PreparedRequest, Requests, read_answer
from middo_jax.refinement.endpoint.servers import FAILURES_IN_A_ROW, Endpoint, Endpoints
from middo_jax.refinement.endpoint.stored import keep_schema_refusal, stored_answer
from middo_jax.refinement.endpoint.throttle import RateLimits, Throttle
from middo_jax.refinement.endpoint.usage import CHARACTERS_PER_TOKEN, Ceiling, ceiling, estimated_tokens

WINDOW = 200  # requests; the stage stops if more than half of them failed
DOUBLINGS = 3  # of the wait between two tries; longer waits would outlast an overload
REFUSAL = 0.25  # of a try: weight of a refusal by overload while other requests are answered
CONNECT_TIMEOUT_S = 10.0


class ChatClient:
    """Sends requests, stores every answer, and enters its cost.

    For one event loop; call `close()` at the end.
    """

    def __init__(
        self,
        requests: Requests,
        base_url: str | Sequence[str],
        cache: AnswerCache,
        *,
        sends_key: bool = True,
        token: str | None = None,
        ledger: Ledger | None = None,
        backoff_s: float = 1.0,
    ) -> None:
        """Prepares the connection pools; sends nothing yet.

        Args:
          requests: builds the requests: the model and its settings.
          base_url: up to and including `/v1`; several are servers of the same model.
          cache: stores the answers.
          sends_key: whether requests carry the key of `refine.api_key_env`; otherwise a dummy. The key is
            only for the server that the user named.
          token: what the embedded servers of this job want in the place of that key. They are asked without a
            proxy, which would learn it.
          ledger: records costs; clients that share a ledger share its budget.
          backoff_s: seconds before the first retry, doubled for each further one.

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
        key = read_key(settings.api_key_env) if sends_key else token
        self._has_key = key is not None
        urls = (base_url,) if isinstance(base_url, str) else tuple(base_url)
        addresses = [Address.of(url) for url in urls]
        self._secrets = Secrets([key, *(secret for address in addresses for secret in address.secrets)])
        self.endpoints = Endpoints(
            [connect(address, key, settings, uses_proxy=token is None) for address in addresses],
            settings.max_retries,
            backoff_s,
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
        """Closes the connections. The caller closes the cache."""
        for endpoint in self.endpoints.all:
            await endpoint.api.close()

    async def honours(self, probe: Probe) -> bool:
        """Whether the server enforces a schema; found out once per model and kept in the cache.

        If the request with the schema fails, the same request without it shows whether the server fails at
        schemas only. The finding is kept, since the later requests depend on it.

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
            if isinstance(error, EndpointFailed):  # llama-cpp-python's server answers a bad request with 500
                with contextlib.suppress(BudgetReached):
                    await self._ask(plain, probe.account)
            return self._cache.learn(name, TEXT) == JSON
        return self._cache.learn(name, JSON if probe.is_held(answer.text) else TEXT) == JSON

    async def refuse_schema(self, reason: str) -> None:
        """Records that the server refuses schemas: no request with a schema is sent from then on."""
        keep_schema_refusal(reason, self._requests, self._cache)

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

        Equal requests at the same time are sent once. A request with another `attempt` is a different
        request. Its cost is entered under `account`.

        Raises:
          RequestRefused: the endpoint refuses this request.
          EndpointFailed: the endpoint did not answer within `refine.max_retries`, or is away.
          BudgetReached: the request could exceed a budget.
        """
        request = self._requests.build(
            messages, attempt=attempt, response_format=response_format, max_tokens=max_tokens
        )
        lock = self._asking.setdefault(request.key, asyncio.Lock())
        async with lock:
            if stored := stored_answer(request, account, self._requests, self._cache, self.ledger):
                return stored
            if request.key in self._final:
                # Without its old traceback, which would grow with every raise and keep all its frames alive.
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

    async def _ask(self, request: PreparedRequest, account: str) -> Answer:
        """Tries until there is an answer, or until further tries cannot help."""
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
                    if silent and endpoint.has_answered:  # an outage: the server has worked before
                        self.endpoints.leave_out(endpoint)
                        continue
                    # While other requests are answered, an overload says nothing about the rest.
                    unlucky = outcome.retried and outcome.overload and others_answered
                    raise self._gave_up(outcome, sent, stops=outcome.endpoint_wide and not unlucky)
                delay = self._delay(outcome, sent)
                if outcome.overload:  # still counts as in flight while it waits, which lowers the load
                    await self._sleep(delay)
            finally:
                self.endpoints.give_back(endpoint)
            if not outcome.overload:
                await self._sleep(delay)

    async def _try(
        self,
        endpoint: Endpoint,
        request: PreparedRequest,
        body: dict[str, Any],
        account: str,
        most: Ceiling,
        *,
        retry: bool,
    ) -> Answer | Fault:
        """Sends `body` once, for the request.

        A failure is returned and not raised, since a traceback would keep the request alive.
        """
        taken = await self._rates.take(
            estimated_tokens(request.body["messages"]) + request.body["max_tokens"]
        )
        await self._budget.begin(account, most, retry)
        began = time.monotonic()
        try:
            try:
                # The package's own time-out is for the time between two bytes; this one is for the answer.
                async with asyncio.timeout(self._settings.timeout):
                    with limited_to(request.body["max_tokens"]):
                        # Not the typed method, which parses the body twice and checks nothing.
                        reply = await endpoint.api.post("/chat/completions", body=body, cast_to=object)
                answer = read_answer(reply, request.key, self._secrets)
            except (
                *(openai.OpenAIError, TimeoutError),
                *(ValueError, RecursionError),  # a body that is not JSON, or exceeds a limit
            ) as error:
                fault = read_fault(error, self._settings.timeout, self._secrets)
                self.ledger.end(account, most, time.monotonic() - began, charged=fault.charged)
                if fault.overload:
                    endpoint.throttle.overloaded(began)
                if not fault.charged:
                    self._rates.correct(taken, 0)
                return fault
            # Before any await, so that no cancellation loses a paid answer.
            seconds = time.monotonic() - began
            self.ledger.answered(account, most, seconds, answer, request.canonical, self._settings.prices)
        finally:
            await self._budget.end()
        check_context(self._cache, request.body["messages"], answer)
        tokens = answer.completion_tokens or len(answer.text) // CHARACTERS_PER_TOKEN
        endpoint.throttle.answered(began, tokens)
        endpoint.answered()
        self._rates.correct(taken, answer.prompt_tokens + tokens)
        return answer

    def _is_away(self, endpoint: Endpoint, fault: Fault, key: str) -> bool:
        """Whether a fault is due to the server, not the request. Such a try does not count."""
        if not fault.worth_waiting:
            if not fault.retried:
                endpoint.answered()  # a refusal shows that the server works
            return False
        return self.endpoints.failed(endpoint, fault, key)

    def _delay(self, fault: Fault, sent: int) -> float:
        """Seconds to wait: what the server asks for, plus a back-off that doubles, with jitter."""
        backoff = self._backoff_s * 2.0 ** min(sent - 1, DOUBLINGS) * random.uniform(0.5, 1.0)
        return (fault.retry_after or 0.0) + backoff

    async def _sleep(self, seconds: float) -> None:
        """Sleeps, but not longer than until the stage stops."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._stopping.wait()

    def _gave_up(self, fault: Fault, tries: int, *, stops: bool) -> RefinerError:
        times = "1 try" if tries == 1 else f"{tries} tries"
        did = f"failed in {times}" if fault.retried else "refused the request"
        urls = ", ".join(endpoint.url for endpoint in self.endpoints.all)
        help_ = advice(fault, stops, self.model, self._settings.api_key_env, self._has_key)
        message = f"the refiner at {urls} {did}{fault.status_text}: {fault.words}{help_}"
        reason = f"request {'failed' if fault.retried else 'refused'}{fault.status_text}: {fault.words}"
        error = (EndpointFailed if fault.retried else RequestRefused)(message, reason, stops)
        if stops:
            self._stop(error)
        return error

    def _failed(self, error: RefinerError, account: str) -> RefinerError:
        """Counts a request that was given up.

        Returns the error to raise; it stops the stage after too many.
        """
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
        """Stops sending. Requests in flight are finished and their answers kept."""
        self._stopped = error
        self.endpoints.stop(error)
        self._stopping.set()


def connect(
    address: Address, key: str | None, settings: RefineSettings, *, uses_proxy: bool = True
) -> Endpoint:
    """A server with the limits of `receiving`; nothing is sent yet.

    Args:
      address: of the server.
      key: None if the server gets none.
      settings: time limits, number of connections.
      uses_proxy: whether a proxy of the environment is used, where the server is on another machine.
    """
    # By the type of the default, since the package has changed its HTTP library before.
    limits = type(openai.DEFAULT_CONNECTION_LIMITS)(
        max_connections=settings.concurrency, max_keepalive_connections=settings.concurrency
    )
    api = openai.AsyncOpenAI(
        api_key=key or "none",  # the package requires a key, local servers do not
        base_url=address.url,
        # Answers are short, and a server that compresses them could make us unpack anything.
        default_headers={"Accept-Encoding": "identity", **address.headers},
        default_query=address.query,
        max_retries=0,
        timeout=openai.Timeout(settings.timeout, connect=min(CONNECT_TIMEOUT_S, settings.timeout)),
        http_client=BoundedClient(
            limits=limits,
            # A proxy from the environment cannot reach this machine's loopback.
            trust_env=uses_proxy and not is_loopback(address.host),
        ),
    )
    return Endpoint(address.url, api, Throttle(settings.concurrency))


def read_key(variable: str) -> str | None:
    """The key without surrounding white space; None if it is not set.

    Raises:
      ConfigError: it cannot be sent.
    """
    key = os.environ.get(variable, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise ConfigError(f"config: the key in ${variable} has characters that an HTTP header cannot carry")
    return key or None
