"""Every field of a request is checked against its range, and a refusal names it."""

from __future__ import annotations

import json
from typing import Any

import pydantic
import pytest

from middo_jax.inference.errors import ApiError
from middo_jax.inference.requests import ChatRequest, CompletionRequest

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}]}
TEXT: dict[str, Any] = {"prompt": "Hi"}
# (field, the values at the ends of its range, values beyond them)
BOTH = [
    ("temperature", [0, 0.0, 100], [-1e-9, 100.1, 1e300, float("nan"), float("inf"), "1", True]),
    ("top_p", [1e-9, 1], [0, 1.0001, float("nan"), -1]),
    ("top_k", [0, 2**31 - 1], [-1, 2**31, 10**30, 1.5, "5", True]),
    ("seed", [-(2**63), 2**64 - 1], [-(2**63) - 1, 2**64, 0.5]),
    ("n", [1, 16], [0, -1, 17, 10**9]),
    ("stop", ["x", [], ["x"] * 16, "x" * 1024], ["x" * 1025, ["x"] * 17, [1], 7, {}]),
    ("stream", [True, False], [1, "yes"]),
    ("frequency_penalty", [0, 0.0, None], [0.1, False]),
    ("presence_penalty", [0, None], [-0.1]),
    ("repetition_penalty", [1, None], [1.1, True]),
    ("min_p", [0, None], [0.1]),
    ("logit_bias", [{}, None], [{"1": 2}]),
    ("response_format", [{"type": "text"}], [{"type": "json_object"}]),
    ("user", ["me", 7, None], []),
]
IN_CHAT = [
    ("max_tokens", [1, 2**31 - 1], [0, -1, 2**31]),
    ("max_completion_tokens", [1, 2**31 - 1], [0, 2**31]),
    ("logprobs", [True, False], [1]),
    ("tools", [[], None], [[{"type": "function"}]]),
    ("tool_choice", ["none", "auto"], ["required"]),
    ("functions", [[], None], [[{"name": "f"}]]),
    ("function_call", ["none", "auto"], [{"name": "f"}]),
    ("modalities", [["text"], None], [["audio"]]),
    ("audio", [None], [{"voice": "x"}]),
    ("prediction", [None], [{"type": "content"}]),
    ("web_search_options", [None], [{}]),
    (
        "messages",
        [CHAT["messages"] * 4096],
        [
            [],
            {},
            "Hi",
            [[]],
            [{"role": "user"}],
            [{"role": "wizard", "content": ""}],
            CHAT["messages"] * 4097,
        ],
    ),
]
IN_COMPLETIONS = [
    ("max_tokens", [1, 2**31 - 1], [-1, 0, 2**31]),  # 0 needs echo
    ("logprobs", [0, 20], [-1, 21, True]),
    ("echo", [True, False], [1]),
    ("suffix", ["", None], ["end"]),
    ("best_of", [1, None], [2]),
    ("prompt", ["", ["a", "b"], [1, 2], [[1], [2]]], [[], [[]], [-1], [2**31], ["a", 1], [1.5], {}, None]),
]


@pytest.mark.parametrize(
    ("model", "fields", "field", "values", "beyond"),
    [
        *((ChatRequest, CHAT, *row) for row in BOTH + IN_CHAT),
        *((CompletionRequest, TEXT, *row) for row in BOTH + IN_COMPLETIONS),
    ],
)
def test_ranges(
    model: type[ChatRequest | CompletionRequest],
    fields: dict[str, Any],
    field: str,
    values: list[Any],
    beyond: list[Any],
) -> None:
    for value in values:
        model.parse(json.dumps({**fields, field: value}).encode())
    for value in beyond:
        with pytest.raises(ApiError) as caught:
            model.parse(json.dumps({**fields, field: value}).encode())
        assert caught.value.status == 400
        assert (caught.value.param or "").split(".")[0] == field, value
        assert caught.value.message.startswith(field)


@pytest.mark.parametrize(
    ("model", "fields", "param"),
    [
        (ChatRequest, {**CHAT, "top_logprobs": 2}, "top_logprobs"),
        (ChatRequest, {**CHAT, "logprobs": True, "top_logprobs": -1}, "top_logprobs"),
        (ChatRequest, {**CHAT, "logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        (ChatRequest, {**CHAT, "stream_options": {"include_usage": True}}, "stream_options"),
        (CompletionRequest, {"prompt": ["x"] * 65, "n": 2}, "n"),
        (CompletionRequest, {**TEXT, "stream": True, "echo": True, "logprobs": 0}, "stream"),
    ],
)
def test_fields_that_do_not_go_together(
    model: type[ChatRequest | CompletionRequest], fields: dict[str, Any], param: str
) -> None:
    with pytest.raises(ApiError) as caught:
        model.parse(json.dumps(fields).encode())
    assert caught.value.param == param


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff",
        b'{"messages": "\\ud800"}',
        b'{"top_k": ' + b"9" * 6000 + b"}",
        b'{"x":' + b"[" * 100_000,
        b'{"x":' * 5000 + b"1" + b"}" * 5000,
    ],
)
def test_broken_bodies(body: bytes) -> None:
    for model in (ChatRequest, CompletionRequest):
        with pytest.raises(ApiError) as caught:
            model.parse(body)
        assert caught.value.status == 400


# (beginning, item, end) of bodies with as many wrong items as there is room for.
MANY = [
    (ChatRequest, '{"messages":[{"role":"user","content":[', "1", "]}]}"),
    (ChatRequest, '{"messages":[', "1", "]}"),
    (ChatRequest, '{"messages":[{"role":"user","content":"Hi"}],"stop":[', "1", "]}"),
    (CompletionRequest, '{"prompt":[', '""', "]}"),
    (CompletionRequest, '{"prompt":[', '"",1', "]}"),
    (CompletionRequest, '{"prompt":[[', '""', "]]}"),
    (CompletionRequest, '{"prompt":[', "[-1]", "]}"),
]


@pytest.mark.parametrize(("model", "begin", "item", "end"), MANY)
def test_a_body_of_wrong_items_has_few_errors(
    model: type[ChatRequest | CompletionRequest], begin: str, item: str, end: str
) -> None:
    body = f"{begin}{','.join([item] * (20_000 // (len(item) + 1)))}{end}".encode()
    with pytest.raises(pydantic.ValidationError) as caught:
        model.model_validate_json(body)
    assert caught.value.error_count() < 10
    with pytest.raises(ApiError, match=r"^(messages|stop|prompt)"):
        model.parse(body)


def test_zero_tokens_are_for_scoring() -> None:
    asked = CompletionRequest.parse(
        b'{"prompt": [[1, 2], [3]], "max_tokens": 0, "echo": true, "logprobs": 1}'
    )
    assert asked.prompts == [[1, 2], [3]]
    assert CompletionRequest.parse(b'{"prompt": [1, 2]}').prompts == [[1, 2]]
    assert CompletionRequest.parse(b'{"prompt": ["a", "b"]}').prompts == ["a", "b"]
    assert CompletionRequest.parse(b'{"prompt": "a"}').prompts == ["a"]
