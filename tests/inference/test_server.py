"""The embedded endpoint over real sockets, asked by OpenAI's own client."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import http.client
import json
import select
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import schemathesis
from openai.types.chat import ChatCompletionMessageParam
from support.tiny_model import write_tiny_model

from middo_jax.config import ConfigError, ServeSettings
from middo_jax.data.example import Message
from middo_jax.data.tokenize import TemplateError, TokenizedExample, tokenize_prompt
from middo_jax.inference import engine as engine_module
from middo_jax.inference import server
from middo_jax.inference.engine import Engine
from middo_jax.inference.errors import ApiError
from middo_jax.inference.listening import serve_forever, serve_in_background
from middo_jax.inference.sampling import Request
from middo_jax.inference.server import build_app, load_engine
from middo_jax.inference.slots import Completion
from middo_jax.models.loading import load, locate
from middo_jax.passes.losses import score_examples

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
        ({"n": 17}, "n"),
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


def complete(served: Served, **settings) -> Any:
    """A Completion."""
    fields: dict[str, Any] = {"model": "tiny", "prompt": "What is", **settings}
    return served.client.completions.create(**fields)


def test_a_text_is_continued_as_the_engine_does(served):
    tokens = served.tokenizer("What is")["input_ids"]
    expected = served.tokenizer.decode(served.engine.generate([Request(tokens, 16)])[0].tokens)
    for prompt in ("What is", tokens, ["What is"], [tokens]):
        completion = complete(served, prompt=prompt, temperature=0)
        assert completion.choices[0].text == expected
        assert completion.choices[0].finish_reason == "length"
        assert completion.usage.prompt_tokens == len(tokens)
        assert completion.usage.completion_tokens == 16  # OpenAI's default
        assert completion.id.startswith("cmpl-")


def test_several_prompts_and_choices_are_in_order(served):
    prompts = ["What is", "Write a", "Once"]
    same = {"temperature": 1.0, "seed": 5, "max_tokens": 8}
    choices = complete(served, prompt=prompts, n=2, **same).choices
    assert [choice.index for choice in choices] == list(range(6))
    alone = [
        complete(served, prompt=prompt, **same | {"seed": 5 + i}).choices[0].text
        for prompt in prompts
        for i in range(2)
    ]
    assert [choice.text for choice in choices] == alone
    assert len(set(alone)) > 3
    chat = ask(served, n=3, **same)
    assert [choice.message.content for choice in chat.choices] == [
        ask(served, **same | {"seed": 5 + i}).choices[0].message.content for i in range(3)
    ]
    assert (
        len({choice.text for choice in complete(served, n=4, temperature=1.0).choices}) == 4
    )  # without a seed all differ


def scored(model_dir: Path, texts: list[list[int]]) -> list[float]:
    """Sums of the log-probabilities of all tokens but the first, from the pass that scores examples."""
    model = load(locate(model_dir))
    examples = [
        TokenizedExample(
            str(i), np.array(text, np.int32), np.arange(len(text)) > 0, np.arange(len(text)) < 1, False
        )
        for i, text in enumerate(texts)
    ]
    scores, _ = score_examples(model, examples, batch_tokens=256, chunk=64)
    return (-scores.loss_n * scores.n_targets_n).tolist()


def test_an_echo_has_the_log_probabilities_of_the_scoring_pass(model_dir, served):
    """Asked as lm-eval does: token ids, one more token, whose entry comes last."""
    rng = np.random.default_rng(0)
    texts = [rng.integers(3, 300, length).tolist() for length in (2, 17, 100, 40)]
    completion = complete(served, prompt=texts, max_tokens=1, logprobs=1, echo=True, temperature=0, seed=1)
    for choice, text, expected in zip(completion.choices, texts, scored(model_dir, texts), strict=True):
        logprobs = choice.logprobs
        assert logprobs.token_logprobs[0] is None
        assert logprobs.top_logprobs[0] is None
        assert len(logprobs.token_logprobs) == len(logprobs.tokens) == len(text) + 1
        np.testing.assert_allclose(sum(logprobs.token_logprobs[1:-1]), expected, rtol=1e-5)
        greedy = served.engine.generate([Request(text, 1)])[0].tokens
        assert logprobs.token_logprobs[-1] == max(logprobs.top_logprobs[-1].values())
        assert choice.text == served.tokenizer.decode([*text, *greedy], skip_special_tokens=True)


def test_scores_alone_need_no_token(model_dir, served):
    text = served.tokenizer("What is the capital of France?")["input_ids"]
    completion = complete(served, prompt=text, max_tokens=0, logprobs=0, echo=True)
    [choice] = completion.choices
    assert choice.text == "What is the capital of France?"
    assert completion.usage.completion_tokens == 0
    logprobs = choice.logprobs
    np.testing.assert_allclose(sum(logprobs.token_logprobs[1:]), scored(model_dir, [text])[0], rtol=1e-5)
    assert "".join(logprobs.tokens) == choice.text
    assert [choice.text[offset:] for offset in logprobs.text_offset] == [
        "".join(logprobs.tokens[i:]) for i in range(len(text))
    ]
    assert complete(served, prompt=text, max_tokens=0, echo=True).choices[0].logprobs is None
    with pytest.raises(openai.BadRequestError, match="0 only with echo"):
        complete(served, max_tokens=0)


def test_a_stop_token_has_an_entry_and_no_text(served):
    """A client that drops the last entry, as lm-eval does, drops no token of its own."""
    tokens = served.tokenizer("What is")["input_ids"]
    first = served.engine.generate([Request(tokens, 1)])[0].tokens[0]
    app = build_app(served.engine, served.tokenizer, "tiny", frozenset({first}))
    with serve_in_background(app) as url, openai.OpenAI(api_key="none", base_url=url) as client:
        completion = client.completions.create(
            model="tiny", prompt=tokens, max_tokens=1, echo=True, logprobs=1, temperature=0
        )
    [choice] = completion.choices
    assert choice.finish_reason == "stop"
    assert choice.text == "What is"
    assert choice.logprobs is not None
    assert len(choice.logprobs.token_logprobs or ()) == len(tokens) + 1


def test_log_probabilities_of_a_chat(served):
    choice = ask(served, temperature=0, max_tokens=6, logprobs=True, top_logprobs=3).choices[0]
    content = choice.logprobs.content
    assert len(content) == 6
    for token in content:
        assert len(token.top_logprobs) == 3
        assert (token.token, token.logprob) == (token.top_logprobs[0].token, token.top_logprobs[0].logprob)
        assert token.bytes is None or bytes(token.bytes).decode() == token.token
    assert ask(served, temperature=0, max_tokens=6).choices[0].logprobs is None


@pytest.mark.parametrize("stop", [None, ["e"]])
def test_a_streamed_chat_is_the_same_in_pieces(served, stop):
    same = {"max_tokens": 24, "temperature": 1.0, "seed": 3, "n": 2, "stop": stop, "logprobs": True}
    whole = ask(served, **same)
    chunks = list(ask(served, **same, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].usage == whole.usage
    assert chunks[-1].choices == []
    for choice in whole.choices:
        mine = [each for chunk in chunks for each in chunk.choices if each.index == choice.index]
        assert "".join(each.delta.content for each in mine) == choice.message.content
        assert [each.finish_reason for each in mine[:-1]] == [None] * (len(mine) - 1)
        assert mine[-1].finish_reason == choice.finish_reason
        assert mine[0].delta.role == "assistant"
        assert [t for each in mine for t in each.logprobs.content] == choice.logprobs.content
        assert len(mine) > 1


def test_a_streamed_text_is_the_same_in_pieces(served):
    same = {"max_tokens": 24, "temperature": 0, "prompt": ["What is", "Write a"], "echo": True}
    whole = complete(served, **same)
    chunks = list(complete(served, **same, stream=True))
    assert len(chunks) > 6
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    for choice in whole.choices:
        mine = [each for chunk in chunks for each in chunk.choices if each.index == choice.index]
        assert "".join(each.text for each in mine) == choice.text
        assert mine[-1].finish_reason == choice.finish_reason
    assert chunks[-1].usage is None


def test_a_client_that_leaves_a_stream_frees_its_slot(served):
    """All slots are taken by streams without end; their clients leave, and another one is answered."""
    streams = [
        served.client.completions.create(model="tiny", prompt="What", max_tokens=100_000, stream=True)
        for _ in range(SETTINGS.max_batch)
    ]
    for stream in streams:
        next(iter(stream))
        stream.close()
    assert len(complete(served, max_tokens=3, temperature=0).choices) == 1
    deadline = time.monotonic() + 30
    while any(slot.answer for slot in served.engine._slots):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_an_error_in_the_engine_fails_one_request(model_dir, monkeypatch):
    engine, tokenizer, eos_ids = load_engine(model_dir, SETTINGS)
    poison = tokenizer("zebra")["input_ids"]
    prefill = engine_module.prefill

    def broken(graphdef, params, cache, chunk, sampling):
        if chunk.tokens_1t[0, : len(poison)].tolist() == poison:
            raise MemoryError("no memory left")
        return prefill(graphdef, params, cache, chunk, sampling)

    monkeypatch.setattr(engine_module, "prefill", broken)
    app = build_app(engine, tokenizer, "tiny", eos_ids)
    with (
        engine,
        serve_in_background(app) as url,
        openai.OpenAI(api_key="none", base_url=url, max_retries=0) as client,
        concurrent.futures.ThreadPoolExecutor(8) as pool,
    ):

        def text(prompt: str) -> str:
            answer = client.completions.create(model="tiny", prompt=prompt, max_tokens=8, temperature=0)
            return answer.choices[0].text

        expected = [text(f"What {i}") for i in range(6)]
        bad = [pool.submit(text, "zebra") for _ in range(2)]
        good = [pool.submit(text, f"What {i}") for i in range(6)]
        for future in bad:
            with pytest.raises(openai.InternalServerError, match="MemoryError: no memory left") as caught:
                future.result()
            assert caught.value.status_code == 500
        assert [future.result() for future in good] == expected
        stream = client.completions.create(model="tiny", prompt="zebra", stream=True)
        with pytest.raises(openai.APIError, match="no memory left"):
            list(stream)
        assert text("What 0") == expected[0]


def test_too_many_answers_are_to_come_later(model_dir, monkeypatch):
    monkeypatch.setattr(server, "MAX_WAITING", 4)
    engine, tokenizer, eos_ids = load_engine(model_dir, SETTINGS)
    with (
        engine,
        serve_in_background(build_app(engine, tokenizer, "tiny", eos_ids)) as url,
        openai.OpenAI(api_key="none", base_url=url, max_retries=0) as client,
    ):
        with monkeypatch.context() as patch:
            patch.setattr(server, "first_tokens", None)  # refused before it is tokenized
            with pytest.raises(openai.RateLimitError, match="at most 4 may") as caught:
                client.completions.create(model="tiny", prompt="What", n=5)
        assert caught.value.response.headers["retry-after"] == "1"
        leave, parse = threading.Event(), server.CompletionRequest.parse
        with monkeypatch.context() as patch, concurrent.futures.ThreadPoolExecutor(5) as pool:
            patch.setattr(server.CompletionRequest, "parse", lambda body: leave.wait(20) and parse(body))
            create = client.completions.create
            asked = [pool.submit(create, model="tiny", prompt="What", max_tokens=1) for _ in range(5)]
            refused = next(concurrent.futures.as_completed(asked))  # while the others wait to be parsed
            leave.set()
            assert isinstance(refused.exception(), openai.RateLimitError)
        assert [each.exception() for each in asked if each is not refused] == [None] * 4
        for _ in range(3):  # what is answered does not count
            client.completions.create(model="tiny", prompt="What", n=4, max_tokens=1)


@pytest.mark.parametrize("step", ["parsing", "tokenizing"])
def test_reading_does_not_stop_the_server(served, monkeypatch, step):
    entered, leave = threading.Event(), threading.Event()

    def slow(*_: object, **__: object) -> None:
        entered.set()
        said = "too slow" if leave.wait(timeout=20) else "it stopped the server"
        raise TemplateError(said) if step == "tokenizing" else ApiError(400, said)

    if step == "parsing":
        monkeypatch.setattr(server.ChatRequest, "parse", slow)
    else:
        monkeypatch.setattr(server, "tokenize_prompt", slow)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        asked = pool.submit(ask, served)
        assert entered.wait(timeout=60)
        assert [model.id for model in served.client.models.list()] == ["tiny"]
        leave.set()
        with pytest.raises(openai.BadRequestError, match="too slow"):
            asked.result()


def test_a_mebibyte_of_wrong_items_is_one_refusal(served):
    body = b'{"messages":[{"role":"user","content":[' + b"1," * 524_000 + b"1]}]}"
    status, answer = post(served, body)
    assert (status, answer["error"]["param"]) == (400, "messages.0.content")
    assert len(answer["error"]["message"]) < 100


def test_bodies_that_are_held_keep_nobody_out(served):
    """Twelve connections send all but the last byte of a mebibyte; the memory has room for eight."""
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with contextlib.ExitStack() as stack:
        held = [
            stack.enter_context(socket.create_connection(("127.0.0.1", served.client.base_url.port)))
            for _ in range(12)
        ]
        for connection in held:
            connection.sendall(head + b"Content-Length: 1048576\r\n\r\n" + b" " * (1 << 18))
        for connection in held:
            with contextlib.suppress(ConnectionError):  # it was refused
                connection.sendall(b" " * ((1 << 20) - (1 << 18) - 1))
        assert complete(served, max_tokens=1).usage.completion_tokens == 1
        deadline = time.monotonic() + 30
        while len(select.select(held, [], [], 0.01)[0]) < 4:
            assert time.monotonic() < deadline


@pytest.mark.parametrize("field", ["messages", "prompt"])
def test_of_a_text_that_cannot_fit_only_the_beginning_is_tokenized(served, monkeypatch, field):
    longest = 0

    def counted(self: Any, text: str, **options: Any) -> Any:
        nonlocal longest
        longest = max(longest, len(text))
        return encode(self, text, **options)

    encode = type(served.tokenizer).__call__
    monkeypatch.setattr(type(served.tokenizer), "__call__", counted)
    text = "word " * 100_000
    send = complete if field == "prompt" else ask
    value = text if field == "prompt" else [{"role": "user", "content": text}]
    with pytest.raises(openai.BadRequestError, match="maximum context length is 128 tokens") as caught:
        send(served, **{field: value})
    assert caught.value.param == field
    assert 0 < longest < 10_000


def test_the_process_ends_with_its_engine(model_dir):
    engine, tokenizer, eos_ids = load_engine(model_dir, SETTINGS)
    threading.Timer(1, lambda: engine._end(MemoryError("device lost"))).start()
    with pytest.raises(RuntimeError, match="the engine has ended"):
        serve_forever(build_app(engine, tokenizer, "tiny", eos_ids))


def test_its_own_description_is_that_of_openais_types(served):
    described = json.loads(httpx.get(served.url.replace("/v1", "/openapi.json")).text)
    chat = described["components"]["schemas"]["ChatRequest"]
    assert chat["properties"]["model"]["anyOf"][0] == {"const": "tiny"}
    assert chat["properties"]["n"]["anyOf"][0] == {"type": "integer", "minimum": 1, "maximum": 16}
    assert chat["properties"]["tools"]["enum"] == [None, []]
    assert set(described["paths"]) == {
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/models",
        "/health",
    }


@pytest.mark.parametrize(
    ("path", "asked"), [("chat/completions", {"messages": QUESTION}), ("completions", {"prompt": "What"})]
)
def test_a_stream_is_as_described(served, path, asked):
    described = schemathesis.openapi.from_url(served.url.replace("/v1", "/openapi.json"))
    body = {"model": "tiny", "stream": True, "max_tokens": 2, **asked}
    case = described[f"/v1/{path}"]["POST"].Case(body=body, media_type="application/json")
    response = case.call()
    assert response.headers["content-type"][0].startswith("text/event-stream")
    assert len(response.content) > 100
    case.validate_response(response)


class SilentEngine(Engine):
    """Takes one request and never answers it."""

    def __init__(self) -> None:
        self.max_context = CONTEXT
        self.asked = threading.Event()
        self.future: concurrent.futures.Future[Completion] = concurrent.futures.Future()

    def submit(self, request: Request, *_: object, **__: object) -> concurrent.futures.Future[Completion]:
        self.asked.set()
        return self.future


@pytest.mark.parametrize("who_leaves", ["client", "server"])
def test_whoever_leaves_the_request_is_cancelled(served, who_leaves):
    engine = SilentEngine()
    cancelled = threading.Event()
    engine.future.add_done_callback(lambda _: cancelled.set())
    body = json.dumps({"messages": QUESTION}).encode()
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    ).encode()
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
