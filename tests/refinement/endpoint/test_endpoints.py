"""Several servers of one model, servers that go and come back, and accounts with limits."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from typing import Any

import pytest
from support.scripted_server import SETTINGS, ScriptedServer, ask, fault, good, user

from middo_jax.config import RequestRate, TokenRate
from middo_jax.refinement.endpoint import servers
from middo_jax.refinement.endpoint.cache import AnswerCache
from middo_jax.refinement.endpoint.client import WINDOW, ChatClient
from middo_jax.refinement.endpoint.faults import EndpointFailed, RequestRefused
from middo_jax.refinement.endpoint.request import Answer
from middo_jax.refinement.endpoint.servers import FAILURES_IN_A_ROW, Endpoints
from middo_jax.refinement.prompts import requests

pytest_plugins = ["support.scripted_server"]

NOBODY = "http://127.0.0.1:9/v1"


@pytest.fixture
def other() -> Iterator[ScriptedServer]:
    server = ScriptedServer()
    server.start()
    yield server
    server.stop()


def texts(n: int) -> list[str]:
    return [f"q{i}" for i in range(n)]


def test_several_share_the_load(server: ScriptedServer, other: ScriptedServer, cache: AnswerCache) -> None:
    server.script = other.script = lambda text, n: 0.02
    settings = SETTINGS.model_copy(update={"concurrency": 8})
    answers, client = ask([server.url, other.url], cache, *texts(60), settings=settings)
    assert all(isinstance(answer, Answer) for answer in answers)
    assert server.requests + other.requests == 60
    assert min(server.requests, other.requests) > 20
    assert client.ledger.here.requests == 60


def test_a_slow_one_gets_less(server: ScriptedServer, other: ScriptedServer, cache: AnswerCache) -> None:
    server.script = lambda text, n: 0.02
    other.script = lambda text, n: 0.2
    ask([server.url, other.url], cache, *texts(60), settings=SETTINGS.model_copy(update={"concurrency": 8}))
    assert server.requests > 2 * other.requests > 0


def test_one_that_is_dead_is_left_out(server: ScriptedServer, cache: AnswerCache) -> None:
    server.script = lambda text, n: 0.005
    answers, client = ask([NOBODY, server.url], cache, *texts(40))
    assert all(isinstance(answer, Answer) for answer in answers)
    assert server.requests == 40
    assert [endpoint.url for endpoint in client.endpoints.away] == [NOBODY]
    # What it failed was no try of a request's own, and it was not asked for each of them.
    assert 40 < client.ledger.here.requests < 60
    assert client.ledger.here.failed == 0


def test_one_that_comes_back_is_used_again(
    server: ScriptedServer, other: ScriptedServer, cache: AnswerCache
) -> None:
    server.script = lambda text, n: 0.02
    other.script = lambda text, n: fault(502) if other.requests <= 12 else 0.02
    answers, client = ask([server.url, other.url], cache, *texts(120))
    assert all(isinstance(answer, Answer) for answer in answers)
    assert client.endpoints.away == []
    assert other.requests > 30


def test_all_gone_for_a_while_costs_no_sample(server: ScriptedServer, cache: AnswerCache) -> None:
    """Longer than any request's own tries would last."""
    down_from, down_for = 10, 1.0
    began: list[float] = []

    def script(text: str, n: int) -> Any:
        if server.requests <= down_from:
            return good("fine")
        began.append(time.monotonic())
        return fault(500) if began[-1] - began[0] < down_for else good("fine")

    server.script = script
    settings = SETTINGS.model_copy(update={"max_retries": 1, "concurrency": 16})
    answers, client = ask(server.url, cache, *texts(60), settings=settings)
    assert all(isinstance(answer, Answer) for answer in answers)
    assert client.ledger.here.failed == 0
    # Asked with one request at a time while it was away, and less and less often.
    assert client.ledger.here.retries < 4 * FAILURES_IN_A_ROW + 100


def test_one_that_stays_away_stops_the_stage(
    server: ScriptedServer, cache: AnswerCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(servers, "LONGEST_WAIT_S", 0.5)
    server.script = lambda text, n: good("fine") if server.requests <= 10 else fault(503)
    answers, _ = ask(server.url, cache, *texts(60), settings=SETTINGS.model_copy(update={"max_retries": 1}))
    kept = [answer for answer in answers if isinstance(answer, Answer)]
    lost = [answer for answer in answers if not isinstance(answer, Answer)]
    assert len(kept) == len(cache) == 10
    assert all(isinstance(error, EndpointFailed) and error.stops_stage for error in lost)
    assert "run the same command again" in str(lost[0])


def test_one_bad_sample_does_not_make_a_server_bad(server: ScriptedServer, cache: AnswerCache) -> None:
    server.script = lambda text, n: fault(500) if text == "bad" else good("fine")
    settings = SETTINGS.model_copy(update={"max_retries": FAILURES_IN_A_ROW + 2, "concurrency": 1})
    answers, _ = ask(server.url, cache, "bad", settings=settings)
    assert isinstance(answers[0], EndpointFailed)
    assert not answers[0].stops_stage
    assert server.asked("bad") == settings.max_retries + 1


def test_a_refusal_at_one_of_several_is_final(
    server: ScriptedServer, other: ScriptedServer, cache: AnswerCache
) -> None:
    server.script = other.script = lambda text, n: fault(401, "bad key")
    answers, _ = ask([server.url, other.url], cache, *texts(20))
    assert all(isinstance(answer, RequestRefused) and answer.stops_stage for answer in answers)
    assert server.requests + other.requests <= 8
    assert server.url in str(answers[0])


def test_more_than_half_of_the_last_requests_failing_stops_the_stage(
    server: ScriptedServer, cache: AnswerCache
) -> None:
    def script(text: str, n: int) -> Any:
        number = int(text[1:])
        bad = number % 5 == 0 if number < 150 else number % 5 != 0
        return fault(400, "too long") if bad else good("fine")

    server.script = script
    settings = SETTINGS.model_copy(update={"concurrency": 2})
    answers, client = ask(server.url, cache, *texts(600), settings=settings)
    stopped = [i for i, answer in enumerate(answers) if getattr(answer, "stops_stage", False)]
    # 0.2 x of the older, 0.8 y of the newer, x + y = 200: over a half once y passes 100.
    assert 240 <= stopped[0] <= 260
    assert f"of the last {WINDOW} requests failed" in str(answers[stopped[0]])
    assert server.requests <= stopped[0] + 3
    assert len(cache) == client.ledger.here.answers == sum(isinstance(a, Answer) for a in answers)


def test_requests_a_minute_are_a_ceiling(
    server: ScriptedServer, cache: AnswerCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("middo_jax.refinement.endpoint.throttle.MINUTE_S", 0.5)
    settings = SETTINGS.model_copy(update={"per_minute": RequestRate(requests=10)})
    began = time.monotonic()
    ask(server.url, cache, *texts(30), settings=settings)
    assert server.requests == 30
    assert time.monotonic() - began > 1.0


def test_tokens_a_minute_are_a_ceiling_that_knows_what_answers_took(
    server: ScriptedServer, cache: AnswerCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("middo_jax.refinement.endpoint.throttle.MINUTE_S", 0.5)
    server.script = lambda text, n: good("fine", 10, 15)
    # By its ceiling of 101 tokens per minute holds two requests; by the 25 that it took, eight.
    settings = SETTINGS.model_copy(update={"per_minute": TokenRate(tokens=225), "concurrency": 1})
    began = time.monotonic()
    ask(server.url, cache, *texts(24), settings=settings)
    assert time.monotonic() - began > 1.0


def test_tokens_of_a_refusal_are_given_back(
    server: ScriptedServer, cache: AnswerCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("middo_jax.refinement.endpoint.throttle.MINUTE_S", 20.0)
    server.script = lambda text, n: fault(503) if n < 2 else good("fine")
    ask(server.url, cache, "a", settings=SETTINGS.model_copy(update={"per_minute": TokenRate(tokens=150)}))
    first, *_, last = server.times["a"]
    assert last - first < 10


def test_a_waiter_that_is_cancelled_gives_its_place_back(server: ScriptedServer, cache: AnswerCache) -> None:
    server.script = lambda text, n: 0.1
    settings = SETTINGS.model_copy(update={"concurrency": 1})

    async def go() -> tuple[Answer, Endpoints]:
        async with ChatClient(requests("m", settings), server.url, cache) as client:
            tasks = [asyncio.create_task(client.complete(user(text))) for text in texts(4)]
            await asyncio.sleep(0.05)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            return await client.complete(user("last")), client.endpoints

    answer, after = asyncio.run(go())
    assert answer.text == "late"
    assert after.all[0].throttle.in_flight == 0
