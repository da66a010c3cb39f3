"""The client against a scripted server over real sockets: what is retried, what is final, what is kept."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from starlette.responses import JSONResponse, Response
from support.scripted_server import SETTINGS, ScriptedServer, ask, dripping, dropped, fault, good, user

from middo_jax.config import ConfigError, Dollars, Prices, RefineSettings
from middo_jax.data.example import Example, Message
from middo_jax.refinement.endpoint.cache import AnswerCache, CacheError
from middo_jax.refinement.endpoint.client import ChatClient
from middo_jax.refinement.endpoint.faults import (
    BudgetReached,
    EndpointFailed,
    RefinerError,
    RequestRefused,
    retry_after,
)
from middo_jax.refinement.endpoint.ledger import Ledger
from middo_jax.refinement.endpoint.request import Answer, canonical, request_key
from middo_jax.refinement.endpoint.servers import FAILURES_IN_A_ROW
from middo_jax.refinement.endpoint.usage import Usage
from middo_jax.refinement.prompts import requests
from middo_jax.refinement.rewrite import run
from middo_jax.refinement.tasks import Task, Verdict

pytest_plugins = ["support.scripted_server"]

KEY = "sk-very-secret-0123456789"


def test_sends_what_was_set_and_counts_what_came(server: ScriptedServer, cache: AnswerCache) -> None:
    server.script = lambda text, n: good(
        "hello", 1000, 200, prompt_tokens_details={"cached_tokens": 400, "other": 1}
    )
    settings = RefineSettings(
        temperature=0.0, max_tokens=77, prices=Prices(prompt=2.0, cached=1.0, completion=10.0)
    )
    [answer], client = ask(server.url, cache, "a", settings=settings, seed=7)
    assert (answer.text, answer.finish_reason, answer.from_cache) == ("hello", "stop", False)
    assert server.bodies == [
        {"messages": user("a"), "model": "m", "temperature": 0.0, "top_p": 1.0, "max_tokens": 77, "seed": 7}
    ]
    usage = client.ledger.here
    assert (usage.requests, usage.retries, usage.answers) == (1, 0, 1)
    assert (usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens) == (1000, 200, 400)
    assert usage.usd == pytest.approx((600 * 2 + 400 * 1 + 200 * 10) / 1e6)


def test_second_run_asks_nothing_and_pays_nothing(server: ScriptedServer, cache: AnswerCache) -> None:
    texts = [f"q{i}" for i in range(20)]
    server.script = lambda text, n: good(f"answer to {text}")
    first, _ = ask(server.url, cache, *texts)
    second, client = ask("http://127.0.0.1:9/elsewhere", cache, *texts)
    assert server.requests == len(cache) == 20
    assert [dataclasses.replace(a, from_cache=True) for a in first] == second
    assert (client.ledger.here.from_cache, client.ledger.here.requests, client.ledger.here.usd) == (
        20,
        0,
        0.0,
    )


def test_cache_tells_requests_apart(server: ScriptedServer, cache: AnswerCache) -> None:
    ask(server.url, cache, "a")
    ask(server.url, cache, "a", settings=SETTINGS.model_copy(update={"temperature": 0.5}))
    ask(server.url, cache, "a", seed=1)

    async def again() -> None:
        async with ChatClient(requests("m", SETTINGS), server.url, cache) as client:
            await client.complete(user("a"), attempt=1)
        async with ChatClient(requests("other", SETTINGS), server.url, cache) as client:
            await client.complete(user("a"))

    asyncio.run(again())
    assert server.requests == len(cache) == 5


def test_equal_requests_in_flight_are_sent_once(server: ScriptedServer, cache: AnswerCache) -> None:
    server.script = lambda text, n: 0.1
    answers, _ = ask(server.url, cache, "same", "same", "same")
    assert server.requests == 1
    assert {answer.text for answer in answers} == {"late"}


def test_concurrency_is_bounded_and_used(server: ScriptedServer, cache: AnswerCache) -> None:
    server.script = lambda text, n: 0.02
    ask(server.url, cache, *(f"q{i}" for i in range(24)))
    assert server.most == SETTINGS.concurrency


TRANSIENT: dict[str, Callable[[], Response | float]] = {
    "408": lambda: fault(408),
    "409": lambda: fault(409),
    "429": lambda: fault(429),
    "500": lambda: fault(500),
    "503": lambda: fault(503),
    "hangs": lambda: 1.5,
    "drops": dropped,
    "drips": dripping,
    "not json": lambda: Response(b'{"id": ', media_type="application/json"),
    "a page": lambda: Response(b"<html>try later</html>", media_type="text/html"),
    "no choices": lambda: JSONResponse({"error": {"message": "busy"}}),
}


@pytest.mark.parametrize("name", TRANSIENT)
def test_transient_faults_are_tried_again(server: ScriptedServer, cache: AnswerCache, name: str) -> None:
    settings = SETTINGS.model_copy(update={"timeout": 0.5})
    server.script = lambda text, n: TRANSIENT[name]() if n < 2 else good("at last")
    [answer], client = ask(server.url, cache, "a", settings=settings)
    assert answer.text == "at last"
    assert (server.asked("a"), client.ledger.here.requests, client.ledger.here.retries) == (3, 3, 2)
    assert client.ledger.here.prompt_tokens == 10


@pytest.mark.parametrize("name", TRANSIENT)
def test_tries_are_bounded_and_failures_not_kept(
    server: ScriptedServer, cache: AnswerCache, name: str
) -> None:
    settings = SETTINGS.model_copy(update={"timeout": 0.2, "max_retries": 2})
    server.script = lambda text, n: TRANSIENT[name]()
    [failure, same], _ = ask(server.url, cache, "a", "a", settings=settings)
    assert isinstance(failure, EndpointFailed)
    assert same is failure
    assert server.asked("a") == 3  # final: not sent again for the second one who asks
    assert len(cache) == 0
    server.script = lambda text, n: good("recovered")
    assert ask(server.url, cache, "a")[0][0].text == "recovered"


@pytest.mark.parametrize(
    ("status", "stops"), [(400, False), (413, False), (422, False), (401, True), (403, True), (404, True)]
)
def test_refusals_are_final_at_once(
    server: ScriptedServer, cache: AnswerCache, status: int, stops: bool
) -> None:
    server.script = lambda text, n: fault(status, "prompt is too long")
    [refusal, same], _ = ask(server.url, cache, "a", "a")
    assert isinstance(refusal, RequestRefused)
    assert refusal.stops_stage is stops
    assert same is refusal
    assert server.asked("a") == 1
    assert "prompt is too long" in str(refusal)
    assert refusal.reason == f"request refused ({status}): prompt is too long"
    assert ("OPENAI_API_KEY" in str(refusal)) is (status in (401, 403))
    assert len(cache) == 0


def test_an_empty_quota_is_not_waited_for(server: ScriptedServer, cache: AnswerCache) -> None:
    server.script = lambda text, n: JSONResponse(
        {"error": {"message": "pay first", "code": "insufficient_quota"}}, 429
    )
    [refusal], _ = ask(server.url, cache, "a")
    assert isinstance(refusal, RequestRefused)
    assert refusal.stops_stage
    assert server.requests == 1


def test_a_refused_endpoint_is_left_alone(server: ScriptedServer, cache: AnswerCache) -> None:
    server.script = lambda text, n: fault(401)
    answers, _ = ask(server.url, cache, *(f"q{i}" for i in range(50)))
    assert all(isinstance(a, RequestRefused) and a.stops_stage for a in answers)
    assert server.requests <= SETTINGS.concurrency


def test_retry_after_is_honoured(server: ScriptedServer, cache: AnswerCache) -> None:
    server.script = lambda text, n: fault(429, retry_after="0.4") if n == 0 else good("ok")
    [answer], _ = ask(server.url, cache, "a")
    first, second = server.times["a"]
    assert answer.text == "ok"
    assert second - first >= 0.4


def test_too_long_a_wait_is_reported_instead(server: ScriptedServer, cache: AnswerCache) -> None:
    server.script = lambda text, n: fault(429, retry_after="7200")
    [failure], _ = ask(server.url, cache, "a")
    assert isinstance(failure, EndpointFailed)
    assert failure.stops_stage
    assert "7200 s" in str(failure)
    assert server.requests == 1


def test_retry_after_is_read_in_all_its_forms() -> None:
    assert retry_after({}) is None
    assert retry_after({"retry-after": "3"}) == 3.0
    assert retry_after({"retry-after": "-3"}) == 0.0
    assert retry_after({"retry-after-ms": "250", "retry-after": "9"}) == 0.25
    assert retry_after({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}) == 0.0
    assert (retry_after({"retry-after": "Wed, 21 Oct 2099 07:28:00 GMT"}) or 0) > 1e6
    for nonsense in ("soon", "nan", "Wed, 99 Oct 2015"):
        assert retry_after({"retry-after": nonsense}) is None


def test_nobody_listening_stops_the_stage(cache: AnswerCache) -> None:
    [failure], client = ask("http://127.0.0.1:9/v1", cache, "a")
    assert isinstance(failure, EndpointFailed)
    assert failure.stops_stage
    assert "127.0.0.1:9" in str(failure)
    assert client.ledger.here.requests == SETTINGS.max_retries + 1


def test_one_broken_request_does_not_stop_the_others(server: ScriptedServer, cache: AnswerCache) -> None:
    server.script = lambda text, n: fault(500) if text == "bad" else good("fine")
    answers, _ = ask(server.url, cache, "a", "bad", "b", "c")
    assert [type(a) for a in answers] == [Answer, EndpointFailed, Answer, Answer]
    assert not answers[1].stops_stage


@pytest.mark.parametrize("status", [400, 500])
def test_a_row_of_failures_stops_the_stage(server: ScriptedServer, cache: AnswerCache, status: int) -> None:
    server.script = lambda text, n: fault(status)
    settings = SETTINGS.model_copy(update={"max_retries": 0, "concurrency": 1})
    answers, _ = ask(server.url, cache, *(f"q{i}" for i in range(40)), settings=settings)
    assert [a.stops_stage for a in answers].index(True) == FAILURES_IN_A_ROW - 1
    assert server.requests == FAILURES_IN_A_ROW


def test_refusals_in_a_row_after_an_answer_are_the_samples_own(
    server: ScriptedServer, cache: AnswerCache
) -> None:
    server.script = lambda text, n: good("fine") if text == "q0" else fault(400, "too long")
    settings = SETTINGS.model_copy(update={"concurrency": 1})
    answers, _ = ask(server.url, cache, *(f"q{i}" for i in range(40)), settings=settings)
    assert not any(a.stops_stage for a in answers[1:])
    assert server.requests == 40


def test_an_overload_that_others_get_through_does_not_stop_the_stage(
    server: ScriptedServer, cache: AnswerCache
) -> None:
    server.script = lambda text, n: fault(429) if text == "unlucky" else good("fine")
    settings = SETTINGS.model_copy(update={"max_retries": 2})
    answers, _ = ask(server.url, cache, "unlucky", *(f"q{i}" for i in range(20)), settings=settings)
    assert isinstance(answers[0], EndpointFailed)
    assert not answers[0].stops_stage
    # That others get through says that it may, too: a refusal then counts as a quarter of a try.
    assert 3 < server.asked("unlucky") <= 9
    assert all(isinstance(a, Answer) for a in answers[1:])


def test_failures_between_answers_are_no_row(server: ScriptedServer, cache: AnswerCache) -> None:
    server.script = lambda text, n: fault(500) if int(text) % 2 else good("fine")
    settings = SETTINGS.model_copy(update={"max_retries": 0, "concurrency": 1})
    answers, _ = ask(server.url, cache, *(str(i) for i in range(40)), settings=settings)
    assert [isinstance(a, Answer) for a in answers] == [i % 2 == 0 for i in range(40)]
    assert not any(a.stops_stage for a in answers[1::2])


def test_nothing_is_retried_at_an_endpoint_that_refused(server: ScriptedServer, cache: AnswerCache) -> None:
    server.script = lambda text, n: fault(500, retry_after="0.3") if text == "waiting" else fault(401)
    answers, _ = ask(server.url, cache, "waiting", "refused")
    assert all(isinstance(a, RequestRefused) and a.stops_stage for a in answers)
    assert server.asked("waiting") == 1


def test_a_final_failure_is_not_waited_for(server: ScriptedServer, cache: AnswerCache) -> None:
    server.script = lambda text, n: fault(500, retry_after="30")
    begun = time.monotonic()
    ask(server.url, cache, "a", settings=SETTINGS.model_copy(update={"max_retries": 0}))
    assert time.monotonic() - begun < 10


PRICED = SETTINGS.model_copy(update={"prices": Prices(prompt=1.0, completion=100.0)})


def test_budget_is_never_passed_and_keeps_what_was_in_flight(
    server: ScriptedServer, cache: AnswerCache
) -> None:
    # Every answer is as dear as it may be: 100 completion tokens, 0.01 dollars.
    server.script = lambda text, n: good("dear", 10, 100)
    settings = PRICED.model_copy(update={"budget": Dollars(usd=0.055)})
    answers, client = ask(server.url, cache, *(f"q{i}" for i in range(30)), settings=settings)
    kept = [a for a in answers if isinstance(a, Answer)]
    assert len(kept) == server.requests == len(cache) == 5
    assert client.ledger.here.usd == pytest.approx(5 * 0.01001)
    assert client.ledger.here.usd <= 0.055
    assert all(isinstance(a, BudgetReached) and not a.stops_stage for a in answers if a not in kept)


def test_budget_waits_for_what_turns_out_cheaper(server: ScriptedServer, cache: AnswerCache) -> None:
    # Only two of the dearest fit at a time, but the real ones cost a tenth.
    server.script = lambda text, n: good("cheap", 10, 10)
    settings = PRICED.model_copy(update={"budget": Dollars(usd=0.025)})
    answers, client = ask(server.url, cache, *(f"q{i}" for i in range(12)), settings=settings)
    assert all(isinstance(a, Answer) for a in answers)
    assert client.ledger.here.usd == pytest.approx(12 * 0.00101)


def test_cached_answers_come_free_after_the_budget(server: ScriptedServer, cache: AnswerCache) -> None:
    server.script = lambda text, n: good("dear", 10, 100)
    settings = PRICED.model_copy(update={"budget": Dollars(usd=0.0125)})
    ask(server.url, cache, "known", settings=PRICED, ledger=Ledger(cache, "another run"))
    answers, client = ask(server.url, cache, "x", "y", "known", settings=settings)
    assert [type(a) for a in answers] == [Answer, BudgetReached, Answer]
    assert client.ledger.here.usd == pytest.approx(0.01001)


def test_uncounted_answers_cost_their_upper_bound(server: ScriptedServer, cache: AnswerCache) -> None:
    server.script = lambda text, n: good("uncounted", 0, 0)
    [_], client = ask(server.url, cache, "a", settings=PRICED)
    assert client.ledger.here.usd == 0
    assert client.ledger.here.aside_usd >= 100 * 100 / 1e6


def test_a_budget_needs_prices(cache: AnswerCache) -> None:
    with pytest.raises(ConfigError, match=r"refine\.prices\.prompt"):
        ChatClient(requests("m", RefineSettings(budget=Dollars(usd=1.0))), "http://127.0.0.1:9/v1", cache)


@pytest.mark.parametrize("pad", [0, 280, 290])
def test_the_key_is_sent_and_appears_nowhere_else(
    server: ScriptedServer, cache: AnswerCache, monkeypatch: pytest.MonkeyPatch, pad: int
) -> None:
    monkeypatch.setenv("REFINER_KEY", KEY + "\n")
    settings = SETTINGS.model_copy(update={"api_key_env": "REFINER_KEY"})

    def script(text: str, n: int) -> Response:
        # Some servers echo the key; a long echo may be cut in its middle.
        return good("fine") if text == "ok" else fault(int(text), "x" * pad + f" bad key {KEY}")

    server.script = script
    shown = ""
    for text in ("ok", "400", "500", "401"):
        try:
            ask_one = ask(server.url, cache, text, settings=settings)[0][0]
            if isinstance(ask_one, RefinerError):
                raise ask_one
        except RefinerError as error:
            shown += "".join(traceback.format_exception(error)) + error.reason + repr(error)
    assert server.keys == {f"Bearer {KEY}"}
    assert "REFINER_KEY" in shown
    assert "sk-ver" not in shown
    files = list(cache.path.parent.glob("llm_cache.sqlite*"))
    assert files
    assert all(KEY.encode() not in file.read_bytes() for file in files)


def test_a_key_that_no_header_can_carry(cache: AnswerCache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-sécret")
    with pytest.raises(ConfigError, match="OPENAI_API_KEY") as caught:
        ChatClient(requests("m", SETTINGS), "http://127.0.0.1:9/v1", cache)
    assert "cret" not in str(caught.value)


def test_without_a_key_a_dummy_is_sent(server: ScriptedServer, cache: AnswerCache) -> None:
    ask(server.url, cache, "a")
    assert server.keys == {"Bearer none"}


def test_urls_are_shown_without_password(cache: AnswerCache) -> None:
    [failure], _ = ask("http://me:hidden@127.0.0.1:9/v1", cache, "a")
    assert "http://127.0.0.1:9/v1" in str(failure)
    assert "hidden" not in str(failure)


@pytest.fixture
def with_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")


@pytest.mark.usefixtures("with_a_proxy")
def test_loopback_is_not_reached_through_a_proxy(server: ScriptedServer, cache: AnswerCache) -> None:
    assert ask(server.url, cache, "a")[0][0].text == "fine"


@pytest.mark.usefixtures("with_a_proxy")
def test_the_servers_of_a_job_get_their_token_and_no_proxy_learns_it(
    server: ScriptedServer, cache: AnswerCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    token, other = "0123456789abcdef" * 4, server.url.replace("127.0.0.1", "0.0.0.0")  # no loopback address
    server.script = lambda text, n: good(f"Your token is {token}.")
    [answer], _ = ask(other, cache, "a", sends_key=False, token=token)
    assert answer.text == "Your token is ***."
    assert server.keys == {f"Bearer {token}"}
    assert ask(other, cache, "a")[0][0].from_cache  # the key of an answer does not depend on it
    settings = SETTINGS.model_copy(update={"max_retries": 0})
    [failure], _ = ask(other, cache, "b", settings=settings)  # any other server is asked through the proxy
    assert isinstance(failure, EndpointFailed)


def test_text_that_utf8_cannot_hold(server: ScriptedServer, cache: AnswerCache) -> None:
    # JSON can escape half of a surrogate pair; neither the wire nor SQLite can hold one.
    choice = {"message": {"role": "assistant", "content": "a\ud83d"}, "finish_reason": "stop"}
    body = json.dumps({"choices": [choice]}).encode()
    server.script = lambda text, n: Response(body, media_type="application/json")
    [answer], _ = ask(server.url, cache, "q\ud83d")
    assert answer.text == "a?"
    assert ask(server.url, cache, "q\ud83d")[0][0].from_cache


def test_cache_survives_the_process_and_ignores_key_order(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "llm_cache.sqlite"
    key = request_key({"b": 1, "a": "é"})
    assert key == request_key({"a": "é", "b": 1})
    assert key != request_key({"a": "e", "b": 1})
    answer = Answer("text\0é", "stop", 1, 2, 3, key=key)
    first = AnswerCache(path)
    first.enter("r", 0, "quality", Usage(answers=1), (canonical({"a": "é", "b": 1}), answer))
    second = AnswerCache(path)  # while the first is open and was never closed: WAL, committed at the put
    assert second.get(key) == dataclasses.replace(answer, from_cache=True, key=key)
    assert second.get("unknown") is None
    second.enter("r", 0, "quality", Usage(answers=1), ("{}", Answer("paid twice", "stop", key=key)))
    assert first.get(key) == second.get(key) == dataclasses.replace(answer, from_cache=True, key=key)
    first.close()
    second.close()


def test_a_file_that_is_no_cache(tmp_path: Path) -> None:
    path = tmp_path / "llm_cache.sqlite"
    path.write_text("these are my notes, not a database" * 100)
    with pytest.raises(CacheError, match=r"llm_cache\.sqlite"):
        AnswerCache(path)
    assert path.read_text().startswith("these are my notes")


def tasks(n: int) -> list[Task]:
    samples = [Example((Message("user", f"Q{i}"), Message("assistant", f"A{i}"))) for i in range(n)]
    return [Task("rewrite", ("quality",), sample) for sample in samples]


def refiner(text: str, n: int) -> Response:
    if "<original>" in text:
        number = text.partition("<original>\nQ")[2].split("\n")[0]
        return good(f"<prompt>Better Q{number}</prompt>")
    return good(f"An answer to: {text}")


def test_a_stage_that_stopped_goes_on_where_it_was(server: ScriptedServer, tmp_path: Path) -> None:
    """interrupted + resumed == uninterrupted, in every row, and nothing is paid twice."""
    planned = tasks(30)

    def rows(outcomes: list[Any]) -> str:
        every = [(o.to_json(), list(o.request_rows())) for o in outcomes]
        return json.dumps(every)

    def stage(cache: AnswerCache) -> list[Any]:
        return run(
            planned, ChatClient(requests("m", SETTINGS), server.url, cache, backoff_s=0.01), SETTINGS, 0
        )

    server.script = refiner
    whole = AnswerCache(tmp_path / "whole.sqlite")
    expected = rows(stage(whole))
    whole.close()
    assert server.requests == 60

    server.times.clear()
    server.bodies.clear()
    broken = AnswerCache(tmp_path / "broken.sqlite")
    server.script = lambda text, n: refiner(text, n) if server.requests <= 25 else fault(401, "expired")
    with pytest.raises(RequestRefused, match="expired"):
        stage(broken)
    assert len(broken) == 25
    assert server.requests <= 25 + SETTINGS.concurrency
    paid = server.requests
    server.script = refiner
    assert rows(stage(broken)) == expected
    assert server.requests - paid == 60 - 25
    broken.close()


def test_a_stage_under_faults_ends_every_task(server: ScriptedServer, cache: AnswerCache) -> None:
    def script(text: str, n: int) -> Response | float:
        number = int("".join(c for c in text.partition("Q")[2].split("\n")[0] if c.isdigit()) or 0)
        if n == 0:
            broken = {0: fault(429, retry_after="0.05"), 1: fault(500), 2: dropped()}.get(number % 10)
            if broken is not None:
                return broken
        return fault(400, "too long") if number % 10 == 3 else refiner(text, n)

    server.script = script
    done: list[str] = []
    planned = tasks(60)
    client = ChatClient(requests("m", SETTINGS), server.url, cache, backoff_s=0.01)
    outcomes = run(planned, client, SETTINGS, 0, on_done=lambda outcome: done.append(outcome.task.task_id))
    assert [o.task for o in outcomes] == planned
    assert sorted(done) == sorted(task.task_id for task in planned)
    for i, outcome in enumerate(outcomes):
        assert (outcome.example is None) is (i % 10 == 3), outcome.verdict
        assert outcome.verdict == (Verdict(None, "request refused (400): too long") if i % 10 == 3 else None)
    assert client.ledger.here.answers == len(cache) == 2 * 54
    assert client.ledger.here.requests == server.requests
    assert client.ledger.here.prompt_tokens == 10 * client.ledger.here.answers


def test_a_stage_beyond_its_budget_says_so(server: ScriptedServer, cache: AnswerCache) -> None:
    server.script = refiner
    settings = PRICED.model_copy(update={"budget": Dollars(usd=0.05)})
    outcomes = run(tasks(200), ChatClient(requests("m", settings), server.url, cache), settings, 0)
    verdicts = {outcome.verdict for outcome in outcomes}
    assert verdicts == {None, Verdict(None, "budget")}
    assert len(outcomes) == 200
