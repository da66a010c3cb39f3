"""Servers that know a field of a request by another name, or not at all."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from starlette.responses import JSONResponse, Response
from support.scripted_server import SETTINGS, ScriptedServer, ask, good, user

from middo_jax.refinement.endpoint.batch import BatchClient, read_results
from middo_jax.refinement.endpoint.cache import AnswerCache
from middo_jax.refinement.endpoint.dialect import refused_field
from middo_jax.refinement.endpoint.faults import NotAnswered, RequestRefused
from middo_jax.refinement.endpoint.ledger import Ledger
from middo_jax.refinement.prompts import requests

pytest_plugins = ["support.scripted_server"]

GREEDY = SETTINGS.model_copy(update={"temperature": 0.0})


def openai_error(param: str, message: str, code: str = "unsupported_parameter") -> dict[str, Any]:
    return {"error": {"message": message, "type": "invalid_request_error", "param": param, "code": code}}


LIMIT = openai_error(
    "max_tokens",
    "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' "
    "instead.",
)
WARMTH = openai_error(
    "temperature",
    "Unsupported value: 'temperature' does not support 0 with this model. Only the default (1) value is "
    "supported.",
    "unsupported_value",
)
EXTRA = {
    "detail": [{"type": "extra_forbidden", "loc": ["body", "seed"], "msg": "Extra inputs are not permitted"}]
}


def strict(server: ScriptedServer, *refused: tuple[str, Any, int]) -> Callable[[str, int], Response]:
    """Refuses a body with any of these fields, but for temperature 1."""

    def script(text: str, n: int) -> Response:
        body = server.bodies[-1]
        for field, said, status in refused:
            if field in body and not (field == "temperature" and body[field] == 1):
                return JSONResponse(said, status)
        return good("fine")

    return script


def test_a_model_of_other_fields_is_asked_by_them_once_found_out(
    server: ScriptedServer, cache: AnswerCache, caplog: pytest.LogCaptureFixture
) -> None:
    server.script = strict(
        server, ("max_tokens", LIMIT, 400), ("temperature", WARMTH, 400), ("seed", EXTRA, 422)
    )
    [answer], client = ask(server.url, cache, "a", settings=GREEDY, seed=7)
    assert answer.text == "fine"
    assert server.requests == 4
    last = server.bodies[-1]
    assert last["max_completion_tokens"] == SETTINGS.max_tokens
    assert not {"max_tokens", "temperature", "seed"} & last.keys()
    assert client.ledger.here.failed == 0
    assert len([r for r in caplog.records if "refuses the field" in r.message]) == 3
    # Kept: for the next client too. And the answer is known by the key that it had before.
    [_, other], _ = ask(server.url, cache, "a", "b", settings=GREEDY, seed=7)
    assert (other.text, server.requests) == ("fine", 5)


def test_requests_in_flight_together_all_find_out(server: ScriptedServer, cache: AnswerCache) -> None:
    server.script = strict(server, ("max_tokens", LIMIT, 400))
    answers, client = ask(server.url, cache, *map(str, range(12)))
    assert [answer.text for answer in answers] == ["fine"] * 12
    assert client.ledger.here.failed == 0


def test_a_server_that_went_back_is_followed_once(server: ScriptedServer, cache: AnswerCache) -> None:
    server.script = strict(server, ("max_tokens", LIMIT, 400))
    ask(server.url, cache, "a")
    unknown = {"error": {"message": "Unrecognized request argument supplied: max_completion_tokens"}}
    server.script = strict(server, ("max_completion_tokens", unknown, 400))
    [answer], _ = ask(server.url, cache, "b")
    assert answer.text == "fine"
    server.script = strict(server, ("max_completion_tokens", unknown, 400), ("max_tokens", LIMIT, 400))
    [refused], _ = ask(server.url, cache, "c")
    assert isinstance(refused, RequestRefused)


@pytest.mark.parametrize(
    ("said", "field"),
    [
        (LIMIT, "max_tokens"),
        (LIMIT["error"], "max_tokens"),
        (WARMTH, "temperature"),
        (EXTRA, "seed"),
        ({"message": "invalid temperature: only 1 is allowed for this model"}, "temperature"),
        ({"message": "`temperature` and `top_p` cannot both be specified for this model."}, "top_p"),
        ({"message": "Unrecognized request argument supplied: seed"}, "seed"),
        ("top_p is not supported by this model", "top_p"),
        ({"message": "max_tokens is too large: 100. This model has room for 50 tokens."}, None),
        ({"message": "temperature must be between 0 and 2", "param": "temperature"}, None),
        ({"message": "response_format is not supported"}, None),
        ({"message": "content policy", "code": "unsupported_value"}, None),
        (None, None),
        (["temperature"], None),
    ],
)
def test_which_field_is_refused(said: object, field: str | None) -> None:
    assert refused_field(said) == field


def test_a_batch_is_written_anew_with_the_fields_that_the_server_knows(
    cache: AnswerCache, tmp_path: Path
) -> None:
    import asyncio

    client = BatchClient(requests("m", GREEDY), cache, Ledger(cache))

    def bodies() -> list[dict[str, Any]]:
        client.start_over()
        with pytest.raises(NotAnswered):
            asyncio.run(client.complete(user("a")))
        client.write(tmp_path / "ask.jsonl")
        return [json.loads(line) for line in (tmp_path / "ask.jsonl").read_text().splitlines()]

    [row] = bodies()
    response = {"status_code": 400, "body": LIMIT}
    (tmp_path / "out.jsonl").write_text(json.dumps({"custom_id": row["custom_id"], "response": response}))
    results = read_results([tmp_path / "out.jsonl"])
    for _ in range(2):  # the old results given once more change nothing
        assert client.take(results) == set()
        [again] = bodies()
        assert again["custom_id"] == row["custom_id"]
        assert again["body"]["max_completion_tokens"] == 100
        assert "max_tokens" not in again["body"]
