"""How a new prompt is asked for and read: JSON by a schema, or tagged text, told once and kept."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.responses import JSONResponse, Response
from support.scripted_server import SETTINGS, ScriptedServer, fault, good

from middo_jax.config import RefineSettings
from middo_jax.data.example import Example, Message
from middo_jax.refinement import prompts
from middo_jax.refinement.endpoint.cache import AnswerCache
from middo_jax.refinement.endpoint.client import ChatClient
from middo_jax.refinement.endpoint.faults import EndpointFailed, RequestRefused
from middo_jax.refinement.parse import parse_prompt
from middo_jax.refinement.prompts import requests
from middo_jax.refinement.rewrite import find_form, run
from middo_jax.refinement.tasks import Outcome, Task, Verdict
from middo_jax.refinement.words import SHIPPED

pytest_plugins = ["support.scripted_server"]

AUTO = SETTINGS.model_copy(update={"response_format": "auto", "accept": "sane", "max_corrections": 2})
PROBE = prompts.PROBE[0]["content"]


def cut(text: str) -> Response:
    """An answer that ended at its limit."""
    body = json.loads(bytes(good(text).body))
    body["choices"][0]["finish_reason"] = "length"
    return JSONResponse(body)


def task(number: int = 0) -> Task:
    return Task(
        "rewrite",
        ("quality",),
        Example(
            (Message("user", "abcdefghijklmnopqrstuvwxyz"[number] + " is what?"), Message("assistant", "A"))
        ),
    )


def refine(
    server: ScriptedServer, cache: AnswerCache, *tasks: Task, settings: RefineSettings = AUTO
) -> tuple[list[Outcome], ChatClient]:
    client = ChatClient(requests("m", settings), server.url, cache, backoff_s=0.01)
    return run(tasks or (task(),), client, settings, 0), client


# Reading -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "prompt"),
    [
        ('{"prompt": "Name a bird."}', "Name a bird."),
        ('```json\n{"prompt": "Name a bird."}\n```', "Name a bird."),
        ('Here it is:\n{"prompt": "Name a bird."}\nEnjoy!', "Name a bird."),
        ('{"prompt": "draft"} or better {"prompt": "final"}', "final"),
        ('{"prompt": "Two\nlines"}', "Two\nlines"),
        ('{"thought": "hm", "prompt": "Name a bird."}', "Name a bird."),
        ('Here: {"notes": {"n": 1}, "prompt": "Name a bird.", "answer": "A heron."} Done.', "Name a bird."),
        ('{"Prompt": "Name a bird."}', "Name a bird."),
        ('{"PROMPT ": "Name a bird.", "language": "en"}', "Name a bird."),
        ('{"Prompt": "draft", "prompt": "final"}', "final"),
        ('[{"prompt": "Name a bird."}]', "Name a bird."),
        ('```json\n[{"prompt": "Name a bird."}]\n```', "Name a bird."),
        ('{"result": {"prompt": "Name a bird."}}', "Name a bird."),
        ('{"prompt": {"text": "Name a bird."}}', "Name a bird."),
        ('{"prompt": ["Name a bird."]}', "Name a bird."),
        ('{"prompt": ["Name a bird.", "Name a tree."]}', None),
        ('{"original": {"prompt": "old"}, "prompt": "new"}', "new"),
        ('Here: {"original": {"prompt": "old"}, "prompt": "new"}.', "new"),
        ('{"prompt": "Name a bird.",}', "Name a bird."),
        ('{"type": "object", "properties": {"prompt": {"type": "string"}}}', None),
        ('{"prompt": {"type": "string"}}', None),
        ('{"prompt": "<prompt>Name a bird.</prompt>"}', "Name a bird."),
        ('{"prompt": "Explain <prompt> and {\\"prompt\\": 1}"}', 'Explain <prompt> and {"prompt": 1}'),
        ('<prompt>Write JSON like {"prompt": "x"}</prompt>', 'Write JSON like {"prompt": "x"}'),
        ('<prompt>"Name a bird."</prompt>', "Name a bird."),
        ("<prompt>“Name a bird.”</prompt>", "Name a bird."),
        ('<prompt>"Birds" or "fish"?</prompt>', '"Birds" or "fish"?'),
        ("<prompt>**</prompt>", "**"),
        ('{"prompt": ""}', ""),
        ('{"prompt": "Name a', None),
        ('{"prompt": 5}', None),
        ('{"question": "Name a bird."}', None),
        ('["Name a bird."]', None),
    ],
)
def test_read(reply: str, prompt: str | None) -> None:
    assert parse_prompt(reply) == prompt


# Before a letter \r, \t and \n are read as the backslash of a command, \b and \f anywhere, which no text has:
# see test_refine_replies.py.
@given(st.text().filter(lambda text: re.search("[\b\f]|[\r\t\n][A-Za-z]", f"{text} b") is None))
def test_what_was_written_as_json_is_read_back(prompt: str) -> None:
    read = parse_prompt(json.dumps({"prompt": f"a {prompt} b"}))
    assert read == f"a {prompt} b".strip()


@pytest.mark.parametrize(
    "prompt",
    [
        "Q:\nName a bird.",
        "Solve for x:\n2x = 4",
        "A:\n1\nB:\n2",
        "Note b:\n- item",
        "x:\t5",
        "See C:\\temp\\new",
    ],
)
def test_a_line_break_behind_a_letter_and_a_colon_is_no_path(prompt: str) -> None:
    assert parse_prompt(json.dumps({"prompt": prompt})) == prompt


@given(st.text())
def test_no_reply_is_too_odd_to_read(reply: str) -> None:
    for text in (reply, '{"prompt": ' + reply):
        read = parse_prompt(text)
        assert read is None or read == read.strip()


@pytest.mark.parametrize("piece", ['{"prompt":', '{"prompt": {', '{"a": ', '["', '{"prompt": "', '"}'])
def test_degenerate_replies_are_read_in_no_time(piece: str) -> None:
    assert parse_prompt(piece * (100_000 // len(piece))) is None


# Asking --------------------------------------------------------------------------------------------


def honours_the_schema(server: ScriptedServer) -> Any:
    """Answers as JSON exactly where a schema asks for it."""

    def script(text: str, n: int) -> Response:
        wanted = server.bodies[-1].get("response_format")
        return good(json.dumps({"prompt": "Better?"}) if wanted else "Because.")

    return script


def ignores_the_schema(text: str, n: int) -> Response:
    return good("<prompt>Better?</prompt>" if "<original>" in text else "Blue.")


def refuses_the_schema(server: ScriptedServer) -> Any:
    def script(text: str, n: int) -> Response:
        if "response_format" in server.bodies[-1]:
            return fault(400, "response_format is not supported")
        return ignores_the_schema(text, n)

    return script


def test_a_server_that_honours_a_schema_is_asked_by_it(server: ScriptedServer, cache: AnswerCache) -> None:
    server.script = honours_the_schema(server)
    outcomes, _ = refine(server, cache, task(0), task(1))
    assert [o.example.prompt if o.example else None for o in outcomes] == ["Better?", "Better?"]
    probe, *asked = server.bodies
    assert probe["messages"] == prompts.PROBE
    by_schema = [body for body in asked if "response_format" in body]
    assert len(by_schema) == 2
    assert by_schema[0]["response_format"] == prompts.RESPONSE_FORMAT
    for body in by_schema:
        assert body["messages"][-1]["content"].endswith(prompts.FORMS["json"])
        assert parse_prompt(body["messages"][1]["content"]) in SHIPPED.written
        json.loads(body["messages"][1]["content"])
    assert all("<prompt>" not in turn["content"] for body in asked for turn in body["messages"])


@pytest.mark.parametrize("how", ["ignores", "refuses"])
def test_a_server_that_does_not_is_asked_for_tags(
    server: ScriptedServer, cache: AnswerCache, how: str
) -> None:
    server.script = ignores_the_schema if how == "ignores" else refuses_the_schema(server)
    outcomes, client = refine(server, cache)
    assert outcomes[0].example
    assert [("response_format" in body) for body in server.bodies] == [True, False, False]
    assert server.bodies[1]["messages"][-1]["content"].endswith(prompts.FORMS["text"])
    assert client.ledger.here.failed == 0  # to find that out is no failure


def test_a_server_that_chokes_on_a_schema_is_asked_for_tags(
    server: ScriptedServer, cache: AnswerCache
) -> None:
    """As llama-cpp-python's does: it answers 500, every time."""

    def script(text: str, n: int) -> Response:
        return fault(500) if "response_format" in server.bodies[-1] else ignores_the_schema(text, n)

    server.script = script
    outcomes, client = refine(server, cache)
    assert outcomes[0].example
    tries = SETTINGS.max_retries + 1
    asked = [("response_format" in body) for body in server.bodies]
    assert asked == [True] * tries + [False] * 3  # the same without a schema, the new prompt, its answer
    assert server.bodies[tries]["messages"] == prompts.PROBE
    assert client.ledger.here.failed == 0


@pytest.mark.parametrize("honours", [True, False])
def test_it_is_found_out_once_and_kept(server: ScriptedServer, tmp_path: Path, honours: bool) -> None:
    server.script = honours_the_schema(server) if honours else ignores_the_schema
    cache = AnswerCache(tmp_path / "cache.sqlite")
    refine(server, cache, task(0))
    cache.close()
    # Another server, with the other opinion: what was asked so far was asked by the first one's.
    server.script = ignores_the_schema if honours else honours_the_schema(server)
    cache = AnswerCache(tmp_path / "cache.sqlite")
    before = server.requests
    outcomes, client = refine(server, cache, task(0))
    assert outcomes[0].example
    assert server.requests == before
    assert asyncio.run(find_form(client, AUTO)) == ("json" if honours else "text")
    # Weights with another revision may be served otherwise.
    refine(server, cache, task(0), settings=AUTO.model_copy(update={"model_revision": "2"}))
    assert server.asked(PROBE) == 2
    cache.close()


def test_set_by_hand_nothing_is_found_out(server: ScriptedServer, cache: AnswerCache) -> None:
    server.script = honours_the_schema(server)
    for form in ("text", "json"):
        refine(server, cache, settings=AUTO.model_copy(update={"response_format": form}))
    assert server.asked(PROBE) == 0


def test_a_key_that_is_wrong_is_found_out_by_the_first_request(
    server: ScriptedServer, cache: AnswerCache
) -> None:
    server.script = lambda text, n: fault(401, "bad key")
    with pytest.raises(RequestRefused, match="bad key"):
        refine(server, cache, *(task(i) for i in range(20)))
    assert server.requests == 1


def test_a_server_that_fails_tells_nothing_of_schemas(server: ScriptedServer, cache: AnswerCache) -> None:
    server.script = lambda text, n: fault(500)
    with pytest.raises(EndpointFailed):
        refine(server, cache)
    server.script = honours_the_schema(server)
    refine(server, cache)
    assert any("response_format" in body for body in server.bodies[-2:])


# Asking again --------------------------------------------------------------------------------------


def test_two_corrections_then_the_raw_answers_are_kept(server: ScriptedServer, cache: AnswerCache) -> None:
    server.script = lambda text, n: good("no tags here")
    [outcome], _ = refine(server, cache)
    assert outcome.verdict == Verdict("readable", "unparsable")
    assert [exchange.step for exchange in outcome.exchanges] == ["prompt", "correction", "correction"]
    assert [row["answer"] for row in outcome.request_rows()] == ["no tags here"] * 3
    roles = [[turn["role"] for turn in body["messages"]] for body in server.bodies[1:]]
    assert [len(turns) for turns in roles] == [3, 5, 7]


def test_a_cut_answer_gets_twice_the_room_once(server: ScriptedServer, cache: AnswerCache) -> None:
    def script(text: str, n: int) -> Response:
        room = server.bodies[-1]["max_tokens"]
        if "<original>" in text:
            return good("<prompt>Better?</prompt>")
        return cut("Because it") if room == 100 else good("Because it is so.")

    server.script = script
    settings = AUTO.model_copy(update={"response_format": "text"})
    [outcome], client = refine(server, cache, settings=settings)
    assert outcome.example
    assert outcome.example.response == "Because it is so."
    assert [body["max_tokens"] for body in server.bodies] == [100, 100, 200]
    assert [row["finish_reason"] for row in outcome.request_rows()] == ["stop", "length", "stop"]
    assert client.ledger.here.answers == 3
    # Both are kept: a second start asks nothing.
    again, _ = refine(server, cache, settings=settings)
    assert again[0].to_json() == outcome.to_json()
    assert server.requests == 3


@pytest.mark.parametrize("status", [None, 400])
def test_a_cut_answer_stays_cut_where_there_is_no_more_room(
    server: ScriptedServer, cache: AnswerCache, status: int | None
) -> None:
    def script(text: str, n: int) -> Response:
        if "<original>" in text:
            return good("<prompt>Better?</prompt>")
        if status and server.bodies[-1]["max_tokens"] > 100:
            return fault(status, "maximum context length")
        return cut("Because it")

    server.script = script
    [outcome], _ = refine(server, cache, settings=AUTO.model_copy(update={"response_format": "text"}))
    assert outcome.verdict == Verdict("answer_readable", "truncated answer")
    assert server.requests == 3


# A schema that is refused later ----------------------------------------------------------------------


def refuses_grammars(server: ScriptedServer, status: int = 400, probe_passes: bool = True) -> Any:
    """Honours the probe's schema, or not even that, and refuses each later one."""

    def script(text: str, n: int) -> Response:
        if "response_format" not in server.bodies[-1]:
            return ignores_the_schema(text, n)
        if text == PROBE and probe_passes:
            return good('{"prompt": "red"}')
        return fault(status, "failed to parse grammar")

    return script


@pytest.mark.parametrize("form", ["auto", "json"])
@pytest.mark.parametrize("status", [400, 422, 500])
def test_a_schema_that_is_refused_later_is_given_up_once(
    server: ScriptedServer,
    cache: AnswerCache,
    caplog: pytest.LogCaptureFixture,
    form: str,
    status: int,
) -> None:
    server.script = refuses_grammars(server, status)
    settings = AUTO.model_copy(update={"response_format": form, "concurrency": 16})
    outcomes, _ = refine(server, cache, *(task(i) for i in range(12)), settings=settings)
    assert all(outcome.example for outcome in outcomes)
    refused = [b for b in server.bodies if "response_format" in b and b["messages"] != prompts.PROBE]
    assert len(refused) == (1 if status < 500 else SETTINGS.max_retries + 1)
    assert sum("failed to parse grammar" in record.message for record in caplog.records) == 1
    # Kept: a second start sends no schema, and asks nothing again.
    asked = server.requests
    again, _ = refine(server, cache, *(task(i) for i in range(12)), settings=settings)
    assert [o.to_json() for o in again] == [o.to_json() for o in outcomes]
    assert server.requests == asked


def test_a_sample_that_is_refused_in_any_form_says_nothing_of_schemas(
    server: ScriptedServer, cache: AnswerCache
) -> None:
    honours = honours_the_schema(server)

    def script(text: str, n: int) -> Response:
        return fault(400, "context length") if "<original>\na is" in text else honours(text, n)

    server.script = script
    outcomes, _ = refine(server, cache, task(0), task(1), task(2))
    assert [bool(outcome.example) for outcome in outcomes] == [False, True, True]
    assert outcomes[0].verdict == Verdict(None, "request refused (400): context length")
    asked_by_schema = [b for b in server.bodies if "response_format" in b]
    assert len(asked_by_schema) == 4  # the probe and each sample


def test_once_a_schema_was_answered_only_the_sample_falls_back(
    server: ScriptedServer, cache: AnswerCache
) -> None:
    honours = honours_the_schema(server)

    def script(text: str, n: int) -> Response:
        if "<original>\nb is" in text:
            return refuses_grammars(server)(text, n)
        return honours(text, n)

    server.script = script
    settings = AUTO.model_copy(update={"concurrency": 1})
    outcomes, _ = refine(server, cache, task(0), task(1), task(2), settings=settings)
    assert all(outcome.example for outcome in outcomes)
    by_schema = [
        "response_format" in b for b in server.bodies if "<original>" in b["messages"][-1]["content"]
    ]
    assert by_schema == [True, True, False, True]
