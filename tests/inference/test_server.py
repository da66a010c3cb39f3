"""The embedded endpoint over real sockets, asked by OpenAI's own client."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import http.client
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam
from support.tiny_model import write_tiny_model

from middo_jax.config import ConfigError, ServeSettings
from middo_jax.data.example import Message
from middo_jax.data.tokenize import tokenize_prompt
from middo_jax.inference.engine import Completion, Engine
from middo_jax.inference.sampling import Request
from middo_jax.inference.server import build_app, load_engine, serve_forever, serve_in_background

CONTEXT = 128
SETTINGS = ServeSettings(max_batch=3, max_context=CONTEXT)
QUESTION: list[ChatCompletionMessageParam] = [{"role": "user", "content": "What is the capital of France?"}]


@dataclasses.dataclass
class Served:
    """A running endpoint and what stands behind it."""

    engine: Engine
    tokenizer: object
    url: str
    client: openai.OpenAI


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def served(model_dir) -> Iterator[Served]:
    engine, tokenizer, eos_ids = load_engine(model_dir, SETTINGS)
    app = build_app(engine, tokenizer, "tiny", eos_ids)
    with (
        engine,
        serve_in_background(app) as url,
        openai.OpenAI(api_key="none", base_url=url, max_retries=0) as client,
    ):
        yield Served(engine, tokenizer, url, client)


def post(served: Served, body: bytes) -> tuple[int, dict]:
    """Posts bytes that OpenAI's client would not send."""
    connection = http.client.HTTPConnection("127.0.0.1", int(served.url.split(":")[2].split("/")[0]))
    connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    return response.status, json.loads(response.read())


def ask(served: Served, **settings) -> Any:
    """A ChatCompletion; Any, since here all of its optional fields are set."""
    return served.client.chat.completions.create(**({"model": "tiny", "messages": QUESTION} | settings))


def test_a_completion_is_the_engines_answer_to_the_rendered_messages(served):
    completion = ask(served, max_tokens=12, temperature=0)
    prompt = tokenize_prompt([Message("user", "What is the capital of France?")], served.tokenizer).tolist()
    expected = served.engine.generate([Request(prompt, 12)])[0]
    choice = completion.choices[0]
    assert choice.message.role == "assistant"
    assert choice.message.content == served.tokenizer.decode(expected.tokens, skip_special_tokens=True)
    assert choice.finish_reason == "length"
    assert completion.id.startswith("chatcmpl-")
    assert completion.model == "tiny"
    usage = completion.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (
        len(prompt),
        12,
        len(prompt) + 12,
    )


def test_an_end_of_turn_token_ends_the_answer(model_dir, served):
    prompt = tokenize_prompt([Message("user", "What is the capital of France?")], served.tokenizer).tolist()
    whole = served.engine.generate([Request(prompt, 12)])[0].tokens
    app = build_app(served.engine, served.tokenizer, "tiny", frozenset({whole[5]}))
    with serve_in_background(app) as url, openai.OpenAI(api_key="none", base_url=url) as client:
        completion = client.chat.completions.create(model="tiny", messages=QUESTION, temperature=0)
    assert completion.choices[0].finish_reason == "stop"
    assert completion.usage is not None
    assert completion.usage.completion_tokens == whole.index(whole[5])


def test_a_stop_text_cuts_the_answer(served):
    whole = ask(served, max_tokens=20, temperature=0).choices[0].message.content
    stop = whole[4:6]
    choice = ask(served, max_tokens=20, temperature=0, stop=[stop, "never said"]).choices[0]
    assert choice.message.content == whole[: whole.index(stop)]
    assert choice.finish_reason == "stop"


def test_greedy_answers_are_equal_whatever_the_concurrency(served):
    questions = [f"Tell me about the number {'7' * n}, please." for n in range(12)]

    def answer(question: str) -> str | None:
        messages = [{"role": "user", "content": question}]
        return ask(served, messages=messages, max_tokens=15, temperature=0).choices[0].message.content

    alone = [answer(question) for question in questions]
    with concurrent.futures.ThreadPoolExecutor(len(questions)) as pool:
        assert list(pool.map(answer, questions)) == alone
    assert len(set(alone)) > 1


def test_a_seed_repeats_a_sampled_answer(served):
    first, second, other = (
        ask(served, max_tokens=20, temperature=1.0, top_p=0.95, seed=seed).choices[0].message.content
        for seed in (-5, -5, 2**63)
    )
    assert first == second != other


def test_max_tokens_is_clipped_to_the_context(served):
    for settings in ({"max_tokens": 100_000}, {"max_completion_tokens": 100_000}, {}):
        completion = ask(served, temperature=0, **settings)
        assert completion.usage.total_tokens <= CONTEXT
        if completion.choices[0].finish_reason == "length":
            assert completion.usage.total_tokens == CONTEXT


def test_messages_may_have_parts_a_system_turn_and_unknown_fields(served):
    parts = [{"type": "text", "text": "What is the capital"}, {"type": "text", "text": " of France?"}]
    plain = ask(served, temperature=0, max_tokens=8)
    in_parts = ask(
        served, messages=[{"role": "user", "content": parts}], temperature=0, max_tokens=8, user="me"
    )
    assert in_parts.choices[0].message == plain.choices[0].message
    with_system = ask(served, messages=[{"role": "system", "content": "Be brief."}, *QUESTION], max_tokens=1)
    assert with_system.usage.prompt_tokens > plain.usage.prompt_tokens


def test_models_and_health(served):
    assert [model.id for model in served.client.models.list()] == ["tiny"]
    connection = http.client.HTTPConnection("127.0.0.1", served.client.base_url.port)
    connection.request("GET", "/health")
    response = connection.getresponse()
    assert (response.status, json.loads(response.read())) == (200, {"status": "ok"})


def test_a_prompt_that_fills_the_context_is_refused_as_openai_does(served):
    with pytest.raises(openai.BadRequestError, match="maximum context length is 128 tokens") as caught:
        ask(served, messages=[{"role": "user", "content": "word " * 500}])
    assert caught.value.code == "context_length_exceeded"
    assert caught.value.param == "messages"
    assert caught.value.type == "invalid_request_error"


@pytest.mark.parametrize(
    ("settings", "param"),
    [
        ({"stream": True}, "stream"),
        ({"n": 2}, "n"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages.0.role"),
    ],
)
def test_what_is_not_offered_is_refused_by_name(served, settings, param):
    with pytest.raises(openai.BadRequestError, match=param) as caught:
        ask(served, **settings)
    assert caught.value.param == param


def test_another_model_and_another_path_are_not_found(served):
    with pytest.raises(openai.NotFoundError, match="'gpt-9' is not served here, only 'tiny'") as caught:
        ask(served, model="gpt-9")
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError, match="Not Found"):
        served.client.embeddings.create(model="tiny", input="x")


def test_broken_bodies_get_an_error_body(served):
    for body in (b"", b"{", b"[]", b'{"messages": "hello"}', b"\xff"):
        status, answer = post(served, body)
        assert status == 400
        assert set(answer["error"]) == {"message", "type", "param", "code"}


class SilentEngine(Engine):
    """Takes one request and never answers it."""

    def __init__(self) -> None:
        self.max_context = CONTEXT
        self.asked = threading.Event()
        self.future: concurrent.futures.Future[Completion] = concurrent.futures.Future()

    def submit(self, request: Request) -> concurrent.futures.Future[Completion]:
        self.asked.set()
        return self.future


@pytest.mark.parametrize("who_leaves", ["client", "server"])
def test_whoever_leaves_the_request_is_cancelled(served, who_leaves):
    engine = SilentEngine()
    cancelled = threading.Event()
    engine.future.add_done_callback(lambda _: cancelled.set())
    body = json.dumps({"messages": QUESTION}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with contextlib.ExitStack() as server, contextlib.ExitStack() as client:
        app = build_app(engine, served.tokenizer, "tiny", frozenset())
        port = int(server.enter_context(serve_in_background(app)).split(":")[2].removesuffix("/v1"))
        client.enter_context(socket.create_connection(("127.0.0.1", port))).sendall(head + body)
        assert engine.asked.wait(timeout=30)
        assert not cancelled.is_set()
        {"client": client, "server": server}[who_leaves].close()
        assert cancelled.wait(timeout=30)
    assert engine.future.cancelled()


def test_an_engine_that_has_ended_is_a_server_error(model_dir):
    engine, tokenizer, eos_ids = load_engine(model_dir, SETTINGS)
    engine.close()
    with (
        serve_in_background(build_app(engine, tokenizer, "tiny", eos_ids)) as url,
        openai.OpenAI(api_key="none", base_url=url, max_retries=0) as client,
    ):
        with pytest.raises(openai.InternalServerError, match="takes no more requests") as caught:
            client.chat.completions.create(model="tiny", messages=QUESTION)
        assert caught.value.status_code == 503


def test_a_taken_port_is_named(served):
    port = served.client.base_url.port
    app = build_app(served.engine, served.tokenizer, "tiny", frozenset())
    with (
        pytest.raises(ConfigError, match=rf"cannot listen on .* port {port}: .*; port 0 takes a free one"),
        serve_in_background(app, port=port),
    ):
        pass
    with pytest.raises(ConfigError, match=rf"cannot listen on .* port {port}: .*; port 0 takes a free one"):
        serve_forever(app, port=port)


def test_the_server_is_gone_after_the_block(served):
    app = build_app(served.engine, served.tokenizer, "tiny", frozenset())
    with serve_in_background(app) as url:
        port = int(url.split(":")[2].removesuffix("/v1"))
        socket.create_connection(("127.0.0.1", port)).close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))
