"""Money and tokens: counted by axis, kept over restarts, never more than the budget."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pydantic
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.responses import JSONResponse, Response
from support.scripted_server import SETTINGS, ScriptedServer, ask, fault, good, user

from middo_jax.config import Dollars, Prices, RefineSettings, Tokens
from middo_jax.data.example import Example, Message
from middo_jax.refinement.endpoint.cache import AnswerCache
from middo_jax.refinement.endpoint.client import ChatClient
from middo_jax.refinement.endpoint.faults import BudgetReached
from middo_jax.refinement.endpoint.ledger import Ledger
from middo_jax.refinement.endpoint.request import Answer
from middo_jax.refinement.endpoint.usage import Ceiling, Usage, ceiling, cost_usd
from middo_jax.refinement.meter import Meter
from middo_jax.refinement.prompts import requests
from middo_jax.refinement.tasks import Exchange, Outcome, Task, Verdict

pytest_plugins = ["support.scripted_server"]

PRICED = SETTINGS.model_copy(update={"prices": Prices(prompt=1.0, completion=100.0)})
DEAR = 10e-6 + 100 * 100e-6  # dollars for 10 prompt tokens and 100 of completion, the most that is asked for


def dear(text: str, n: int) -> Response:
    return good("dear", 10, 100)


# The ledger ----------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["complexity", "quality", "probe"]),
            st.sampled_from(["answered", "uncounted", "refused", "timed out", "in flight", "failed"]),
            st.integers(1, 5000),
            st.integers(0, 2000),
        ),
        max_size=30,
    )
)
def test_what_is_entered_adds_up_and_is_kept(
    tmp_path_factory: pytest.TempPathFactory, tries: list[Any]
) -> None:
    path, prices = tmp_path_factory.mktemp("ledger") / "cache.sqlite", Prices(prompt=1.0, completion=2.0)
    cache = AnswerCache(path)
    ledger, most = Ledger(cache, "a", 1), Ceiling(7000, 0.011)
    for number, (axis, how, prompt_tokens, completion_tokens) in enumerate(tries):
        if how == "failed":
            ledger.failed(axis)
            continue
        ledger.begin(axis, most, retry=number % 2 == 1)
        counts = (prompt_tokens, completion_tokens) if how == "answered" else (0, 0)
        if how in ("answered", "uncounted"):
            answer = Answer("text", "stop", *counts, key=str(number))
            ledger.answered(axis, most, 0.5, answer, "{}", prices)
        elif how != "in flight":
            ledger.end(axis, most, 0.5, charged=how == "timed out")
    answered = [(prompt, completion) for _, how, prompt, completion in tries if how == "answered"]
    unknown = sum(how in ("uncounted", "timed out", "in flight") for _, how, *_ in tries)
    assert ledger.run.requests == sum(how != "failed" for _, how, *_ in tries)
    assert ledger.run.tokens == sum(map(sum, answered))
    assert ledger.run.usd == pytest.approx(sum(cost_usd(prices, *counts) for counts in answered))
    assert ledger.run.aside_tokens == unknown * most.tokens
    assert ledger.run.aside_usd == pytest.approx(unknown * most.usd, abs=1e-12)
    assert len(cache) == sum(how in ("answered", "uncounted") for _, how, *_ in tries)
    cache.close()

    cache = AnswerCache(path)
    again, other = Ledger(cache, "a", 2), Ledger(cache, "b", 1)
    assert again.here == other.run == Usage()
    assert again.by_account == {}  # of another round
    assert Ledger(cache, "a", 1).to_json() == ledger.to_json()
    for name, value in ledger.run.to_json().items():
        assert again.run.to_json()[name] == pytest.approx(value, abs=1e-12)
    cache.close()


def test_axes_are_told_apart(server: ScriptedServer, cache: AnswerCache) -> None:
    async def go() -> Ledger:
        async with ChatClient(requests("m", SETTINGS), server.url, cache) as client:
            await client.complete(user("a"), account="complexity")
            await client.complete(user("b"), account="quality")
            await client.complete(user("c"), account="quality")
            await client.complete(user("c"), account="complexity")
            return client.ledger

    ledger = asyncio.run(go())
    told = ledger.to_json()
    assert [told[axis]["requests"] for axis in ("complexity", "quality")] == [1, 2]
    assert [told[axis]["from_cache"] for axis in ("complexity", "quality")] == [1, 0]
    assert ledger.round == ledger.here
    assert ledger.round.prompt_tokens == 30


def test_a_ceiling_is_one() -> None:
    for text in ("a", "é" * 100, "日本語" * 50, "\N{GRINNING FACE}" * 20):
        # A byte-level tokenizer makes at most one token a byte.
        assert ceiling(Prices(), user(text), 50).tokens >= len(text.encode()) + 50


# Budgets -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [Dollars(usd=5.5 * DEAR), Tokens(tokens=5 * 110 + 150)])
def test_a_budget_holds_over_restarts_and_rounds(
    server: ScriptedServer, cache: AnswerCache, limit: Dollars | Tokens
) -> None:
    server.script = dear
    kept = 0
    for start in range(3):
        settings = PRICED.model_copy(update={"budget": limit})
        ledger = Ledger(cache, "run", round_index=start)
        asked = [f"start {start} q{i}" for i in range(4)]
        answers, _ = ask(server.url, cache, *asked, settings=settings, ledger=ledger)
        kept += sum(isinstance(answer, Answer) for answer in answers)
        assert all(isinstance(answer, Answer | BudgetReached) for answer in answers)
        assert ledger.run.usd <= 5.5 * DEAR
    assert kept == server.requests == 5
    # Another run has a purse of its own.
    answers, _ = ask(
        server.url,
        cache,
        "mine",
        settings=PRICED.model_copy(update={"budget": limit}),
        ledger=Ledger(cache, "2"),
    )
    assert isinstance(answers[0], Answer)


def test_a_try_that_may_have_been_charged_counts_against_the_budget(
    server: ScriptedServer, cache: AnswerCache
) -> None:
    server.script = lambda text, n: 1.0 if text == "hangs" else dear(text, n)
    settings = PRICED.model_copy(update={"budget": Dollars(usd=2.5 * DEAR), "timeout": 0.2, "max_retries": 0})
    ask(server.url, cache, "hangs", settings=settings)
    answers, client = ask(server.url, cache, "a", "b", settings=settings)
    assert sorted(type(answer).__name__ for answer in answers) == ["Answer", "BudgetReached"]
    assert "set aside for tries whose cost is not known" in str(next(a for a in answers if a != answers[0]))
    assert client.ledger.run.usd + client.ledger.run.aside_usd <= 2.5 * DEAR


def test_a_refusal_costs_nothing(server: ScriptedServer, cache: AnswerCache) -> None:
    server.script = lambda text, n: fault(400) if text == "bad" else fault(503) if n == 0 else dear(text, n)
    _, client = ask(
        server.url, cache, "bad", "a", settings=PRICED.model_copy(update={"budget": Dollars(usd=1.5 * DEAR)})
    )
    assert client.ledger.run.aside_usd == pytest.approx(0.0, abs=1e-12)
    assert client.ledger.run.usd == pytest.approx(DEAR)


def test_counts_that_make_no_sense_are_not_believed(server: ScriptedServer, cache: AnswerCache) -> None:
    for number, usage in enumerate(
        [{"prompt_tokens": -5}, {"prompt_tokens": "many"}, {"prompt_tokens": 10**30}, [], "x", None]
    ):
        choice = {"message": {"role": "assistant", "content": "ok"}, "finish_reason": "stop"}
        body = {"choices": [choice], "usage": usage}
        server.script = lambda text, n, body=body: JSONResponse(body)
        answers, client = ask(server.url, cache, f"q{number}", ledger=Ledger(cache, str(number)))
        assert answers[0].text == "ok"
        assert client.ledger.here.tokens == 0
        assert client.ledger.here.aside_tokens > 0


# kill -9 ---------------------------------------------------------------------------------------------

ASKING = """
import asyncio, sys
from pathlib import Path
from middo_jax.config import Dollars, Prices, RefineSettings, Tokens
from middo_jax.refinement import AnswerCache, ChatClient, Ledger
from middo_jax.refinement.prompts import requests

async def main(url, path):
    settings = RefineSettings(concurrency=8, prices=Prices(prompt=1.0, completion=1.0))
    cache = AnswerCache(path)
    async with ChatClient(requests("m", settings), url, cache, ledger=Ledger(cache, "killed")) as client:
        turns = ([{"role": "user", "content": f"q{i:02d}"}] for i in range(60))
        await asyncio.gather(*(client.complete(turn, account="quality") for turn in turns))

asyncio.run(main(sys.argv[1], Path(sys.argv[2])))
"""


@pytest.mark.multiprocess
def test_killed_at_any_moment_only_requests_in_flight_are_paid_twice(
    server: ScriptedServer, tmp_path: Path
) -> None:
    rng, kills = random.Random(3), 0
    server.script = lambda text, n: 0.03
    env = {name: value for name, value in os.environ.items() if not name.startswith("OPENAI_")}
    command = [sys.executable, "-c", ASKING, server.url, str(tmp_path / "cache.sqlite")]
    for _ in range(6):
        before = server.requests
        process = subprocess.Popen(command, env=env)
        stop_after = rng.randint(3, 20)
        while process.poll() is None and server.requests < before + stop_after:
            time.sleep(0.001)
        time.sleep(rng.uniform(0.0, 0.03))
        process.send_signal(signal.SIGKILL)
        kills += process.wait() != 0
    assert subprocess.run(command, env=env).returncode == 0
    assert kills > 2
    assert 60 <= server.requests <= 60 + 8 * kills
    cache = AnswerCache(tmp_path / "cache.sqlite")
    run = Ledger(cache, "killed").run
    assert len(cache) == run.answers == 60
    assert run.prompt_tokens == 60 * 10  # every answer is kept with its cost, or neither is
    # A request that never got to the server may have been entered too, but none that did is missing.
    assert run.requests >= server.requests
    assert run.aside_tokens == (run.requests - 60) * ceiling(Prices(), user("q00"), 1024).tokens
    cache.close()


# The line while it runs ------------------------------------------------------------------------------


def test_the_line_tells_what_is_spent_and_what_the_rest_may_cost(cache: AnswerCache) -> None:
    now = [0.0]
    ledger = Ledger(cache, "run")
    meter = Meter(ledger, total=10, clock=lambda: now[0])
    sample = Example((Message("user", "q"), Message("assistant", "a")))
    task = Task("rewrite", ("quality",), sample)
    prices = Prices(prompt=1e4, completion=1e4)  # a dollar for a hundred tokens

    def ended(from_cache: bool, accepted: bool = True) -> str:
        answer = Answer("text", "stop", 60, 40, from_cache=from_cache, key=str(random.random()))
        if from_cache:
            ledger.hit("quality")
        else:
            ledger.begin("quality", Ceiling(200, 2.0), retry=False)
            ledger.answered("quality", Ceiling(200, 2.0), 1.0, answer, "{}", prices)
        exchange = Exchange("prompt", "m", user("q"), answer)
        return meter.ended(Outcome(task, sample if accepted else None, None, (exchange,)))

    now[0] = 30.0
    assert ended(from_cache=True) == (
        "1 to be judged, 1 answers from the cache, 0 requests failed, 0 tokens/min"
    )
    line = ended(from_cache=False)
    assert "200 tokens/min, $1.00 spent, $9.00 projected" in line  # 8 others at a dollar
    ledger.failed("quality")
    assert "1 requests failed" in ended(from_cache=False, accepted=False)
    assert meter.done == 3


def test_a_server_that_is_away_is_named(server: ScriptedServer, cache: AnswerCache) -> None:
    _, client = ask(["http://me:hidden@127.0.0.1:9/v1", server.url], cache, *(f"q{i}" for i in range(8)))
    meter = Meter(client.ledger, 1, client.endpoints.all)
    task = Task("rewrite", ("quality",), Example((Message("user", "q"), Message("assistant", "a"))))
    line = meter.ended(Outcome(task, None, Verdict(None, "refused")))
    assert line.endswith("away: http://127.0.0.1:9/v1")


def test_unknown_formats_and_urls_are_refused() -> None:
    for wrong in ({"response_format": "xml"}, {"base_url": "localhost:8000"}, {"base_url": []}):
        with pytest.raises(pydantic.ValidationError):
            RefineSettings.model_validate(wrong)
