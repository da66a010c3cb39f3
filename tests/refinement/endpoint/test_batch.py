"""Refining by batch files ends with the rows of the live way; a batch's failures are no answers."""

from __future__ import annotations

import asyncio
import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from support.command import Middo
from support.loop_fixture import Finished, contents, fake_answer, selected
from support.scripted_server import SETTINGS

from middo_jax.config import Dollars, Prices, Tokens
from middo_jax.refinement.endpoint.batch import BatchClient, Result, read_results
from middo_jax.refinement.endpoint.cache import AnswerCache
from middo_jax.refinement.endpoint.faults import NotAnswered, RefinerError, RequestRefused
from middo_jax.refinement.endpoint.ledger import Ledger
from middo_jax.refinement.endpoint.request import Answer
from middo_jax.refinement.prompts import requests
from middo_jax.refinement.rewrite import find_form
from middo_jax.rundir import RoundDir, RunError, read_jsonl, write_jsonl

pytest_plugins = ["support.command", "support.loop_fixture", "support.scripted_server"]


def answered(row: dict[str, Any]) -> dict[str, Any]:
    """A line of a batch's results, as the fake refiner answers."""
    text = fake_answer(row["body"]["messages"][-1]["content"])
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    usage = {"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12}
    body = {"object": "chat.completion", "choices": [choice], "usage": usage}
    response = {"status_code": 200, "request_id": "r", "body": body}
    return {"id": "b", "custom_id": row["custom_id"], "response": response, "error": None}


def failed(row: dict[str, Any], status: int, message: str) -> dict[str, Any]:
    response = {"status_code": status, "body": {"error": {"message": message}}}
    return {"id": "b", "custom_id": row["custom_id"], "response": response, "error": None}


def test_write_run_and_read_until_nothing_is_left(finished: Finished, middo: Middo, tmp_path: Path) -> None:
    live, offline = selected(finished, tmp_path / "live"), selected(finished, tmp_path / "offline")
    ask, results = tmp_path / "ask.jsonl", tmp_path / "results.jsonl"
    common = ("refine.response_format=text", "refine.prices.prompt=1000000")
    middo("refine", live, *common)
    asked = len(finished.requests)

    said = middo("refine", offline, "--write-batch", ask, *common).out
    assert f"requests are in {ask}" in said
    command = shlex.join(["middo", "refine", str(offline), *common])  # whole: its settings are in every key
    assert f"{command} --read-batch RESULTS --write-batch NEXT" in said
    first = read_jsonl(ask)
    assert {row["method"] for row in first} == {"POST"}
    assert {row["url"] for row in first} == {"/v1/chat/completions"}
    assert all(len(row["custom_id"]) == 64 and row["body"]["model"] == "fake" for row in first)
    assert len({row["custom_id"] for row in first}) == len(first)
    assert not (offline / "refined.jsonl").exists()

    cycles, said = 0, "{}"
    while (not said.startswith("tasks") and "waiting" in said) or cycles == 0:
        write_jsonl(results, map(answered, reversed(read_jsonl(ask))))  # a batch keeps no order
        said = middo("refine", offline, "--read-batch", results, "--write-batch", ask, "--json", *common).out
        cycles += 1
        assert cycles < 10
    assert json.loads(said)["accepted"] > 0
    assert cycles >= 2  # a prompt, then its answer
    assert len(finished.requests) == asked  # nobody was asked
    same = ("refined.jsonl", "requests.jsonl", "candidates.jsonl", "merged.jsonl")
    assert contents(live, *same) == contents(offline, *same)
    spent, batched = (RoundDir(folder).stages()["refine"]["usage"] for folder in (live, offline))
    for axis, usage in spent.items():
        for name in ("answers", "prompt_tokens", "completion_tokens", "usd"):
            assert batched[axis][name] == pytest.approx(usage[name])


def test_failures_are_asked_again_or_end_their_sample(
    finished: Finished, middo: Middo, tmp_path: Path
) -> None:
    here = selected(finished, tmp_path / "run")
    ask, results = tmp_path / "ask.jsonl", tmp_path / "results.jsonl"
    set_ = ("refine.response_format=text", "refine.max_attempts=1")
    middo("refine", here, "--write-batch", ask, *set_)
    first = read_jsonl(ask)
    rows = [failed(first[0], 400, "content policy"), failed(first[1], 500, "busy")]
    rows += [{"custom_id": first[2]["custom_id"], "response": None, "error": {"message": "expired"}}]
    write_jsonl(results, [*rows, *map(answered, first[3:])])
    told = middo("refine", here, "--read-batch", results, "--write-batch", ask, "--json", *set_).json
    assert told["taken"] == len(first) - 2
    assert told["failed"] == 2
    assert told["first_failure"] in ("(500) busy", "expired")
    again = [row["custom_id"] for row in read_jsonl(ask)]
    assert {first[1]["custom_id"], first[2]["custom_id"]} <= set(again)
    assert first[0]["custom_id"] not in again

    # Whoever gives the refusal once more ends with it; its sample keeps its original.
    last = tmp_path / "last.jsonl"
    for _ in range(3):
        write_jsonl(last, [rows[0], *map(answered, read_jsonl(ask))])
        told = middo("refine", here, "--read-batch", last, "--write-batch", ask, "--json", *set_).json
    assert told["tasks"] > 0
    ends = [(row["gate"], row["detail"]) for row in read_jsonl(here / "refined.jsonl")]
    assert ends.count((None, "request refused: (400) content policy")) == 1
    cache = AnswerCache(here / "llm_cache.sqlite")
    assert cache.get(first[0]["custom_id"]) is None
    cache.close()


def test_what_does_not_belong_is_refused(finished: Finished, middo: Middo, tmp_path: Path) -> None:
    here = selected(finished, tmp_path / "run")
    ask, results = tmp_path / "ask.jsonl", tmp_path / "results.jsonl"
    middo("refine", here, "--write-batch", ask)
    results.write_text('{"custom_id": "a"}\nno json\n', encoding="utf-8")
    assert f"{results}:2: not a result of a batch" in middo("refine", here, "--read-batch", results).err
    write_jsonl(results, map(answered, read_jsonl(ask)))
    other = middo("refine", here, "--read-batch", results, "refine.temperature=0.7")
    assert "none of the results belongs to a request" in other.err
    assert "refine.model is missing" in middo("refine", here, "--write-batch", ask, "refine.model=null").err
    assert "no such file" in middo("refine", here, "--read-batch", tmp_path / "none").err.lower()
    for taken in (here / "dataset.jsonl", here / "new.jsonl", tmp_path / "run" / ".." / "run" / "new.jsonl"):
        assert "would be among the files that are read" in middo("refine", here, "--write-batch", taken).err
    theirs = tmp_path / "theirs.jsonl"
    for text in ('{"instruction": "Add.", "output": "5"}\n', results.read_text(encoding="utf-8")):
        theirs.write_text(text, encoding="utf-8")
        assert "has no requests of a batch" in middo("refine", here, "--write-batch", theirs).err
        assert theirs.read_text(encoding="utf-8") == text
    # Read without a next file, it says what to do.
    assert "--write-batch FILE" in middo("refine", here, "--read-batch", results).out


def test_results_of_one_request_in_several_files(tmp_path: Path) -> None:
    row = {"custom_id": "k", "body": {"messages": [{"content": "hi"}]}}
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    write_jsonl(one, [answered(row)])
    write_jsonl(two, [failed(row, 500, "busy")])
    for order in ([one, two], [two, one]):
        result = read_results(order)["k"]
        assert result.answer is not None
        assert result.answer.prompt_tokens == 7
    two.write_text("[]\n", encoding="utf-8")
    with pytest.raises(RunError, match=r"two\.jsonl:1"):
        read_results([two])


@pytest.mark.parametrize("limit", [Tokens(tokens=3 * 190 + 100), Dollars(usd=3 * 190.0 + 100)])
def test_no_more_waits_than_the_budget_may_pay(cache: AnswerCache, limit: Dollars | Tokens) -> None:
    """A request of ten bytes can take 90 tokens of prompt and 100 of answer, here at a dollar each."""
    settings = SETTINGS.model_copy(update={"prices": Prices(prompt=1e6, completion=1e6), "budget": limit})
    client = BatchClient(requests("m", settings), cache, Ledger(cache))

    def asked(n: int) -> list[str]:
        said = []
        for i in range(n):
            try:
                asyncio.run(client.complete([{"role": "user", "content": f"question {i}"}]))
                said.append("Answer")
            except RefinerError as error:
                said.append(type(error).__name__)
        return said

    assert asked(5) == ["NotAnswered"] * 3 + ["BudgetReached"] * 2
    results = {key: Result(Answer("a", "stop", 10, 5, key=key)) for key in client.waiting}
    assert len(client.take(results)) == 3
    client.start_over()
    # They took 45 of 570: there is room again.
    assert asked(5) == ["Answer"] * 3 + ["NotAnswered"] * 2


def test_a_batch_client_asks_nobody(cache: AnswerCache) -> None:
    settings = SETTINGS.model_copy(update={"response_format": "auto", "prices": Prices(prompt=1e6)})
    client = BatchClient(requests("m", settings), cache, Ledger(cache))
    assert asyncio.run(find_form(client, settings)) == "text"
    turn = [{"role": "user", "content": "hi"}]
    for _ in range(2):
        with pytest.raises(NotAnswered):
            asyncio.run(client.complete(turn, account="quality"))
    [key] = client.waiting
    assert client.take({key: Result(None, "busy"), "other": Result(None, "x", is_final=True)}) == set()
    assert client.take({key: Result(None, "no", is_final=True)}) == {key}
    with pytest.raises(RequestRefused, match="no"):
        asyncio.run(client.complete(turn, account="quality"))
    assert client.ledger.here.failed == 1
    assert len(cache) == 0
