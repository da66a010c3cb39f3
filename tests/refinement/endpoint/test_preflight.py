"""The check of a refiner before anything is spent: what it asks, what it says, what it lets pass."""

from __future__ import annotations

import contextlib
import http.server
import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from middo_jax.config import RefineSettings
from middo_jax.refinement.endpoint.faults import RefinerError
from middo_jax.refinement.endpoint.preflight import preflight

KEY = "sk-marker-77"
SETTINGS = RefineSettings(api_key_env="MIDDO_TEST_KEY", timeout=5)


@contextlib.contextmanager
def server(
    status: int = 200, models: list[str] | None = None, refuses: str = "", said: Any = None
) -> Iterator[tuple[str, list]]:
    """(URL, the requests): it answers with `status` and `said`, and with 400 to the field `refuses`."""
    asked: list[tuple[str, Any, str | None]] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def _reply(self, code: int, value: Any) -> None:
            data = json.dumps(value).encode()
            self.send_response(code)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self) -> None:
            asked.append((self.path, None, self.headers["authorization"]))
            if models is None:
                self._reply(404, {"error": {"message": "no such path"}})
            else:
                self._reply(
                    200, {"object": "list", "data": [{"id": name, "object": "model"} for name in models]}
                )

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            asked.append((self.path, body, self.headers["authorization"]))
            if refuses in body:
                self._reply(400, {"error": {"message": f"Unsupported parameter: '{refuses}'"}})
            elif said is not None:
                self._reply(status, said)
            elif status != 200:
                self._reply(status, {"error": {"message": f"no, {KEY}"}})
            else:
                choice = {
                    "index": 0,
                    "message": {"role": "assistant", "content": "Hi"},
                    "finish_reason": "length",
                }
                self._reply(200, {"id": "x", "object": "chat.completion", "choices": [choice]})

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as serving:
        thread = threading.Thread(target=serving.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{serving.server_port}/v1", asked
        finally:
            serving.shutdown()
            thread.join()


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIDDO_TEST_KEY", KEY)


def test_one_token_is_asked_of_each_server_with_the_key() -> None:
    with server() as (one, asked), server(models=["x", "m"]) as (other, asked_too):
        assert preflight((one, other), "m", SETTINGS) == []
    (path, body, key), *rest = asked
    assert (path, body["model"], body["max_tokens"], key) == ("/v1/chat/completions", "m", 1, f"Bearer {KEY}")
    assert rest == [("/v1/models", None, f"Bearer {KEY}")]  # which this server does not have
    assert len(asked_too) == 2


def test_a_server_that_answers_to_a_name_that_it_does_not_list_is_warned_of() -> None:
    with server(models=["qwen2.5-7b", "gpt-4o\x1b[31m"]) as (url, _):
        [warning] = preflight(url, "qwen-7b", SETTINGS)
    assert warning.startswith("warning: the refiner at http://127.0.0.1:")
    assert "its list of models does not have 'qwen-7b'. It serves qwen2.5-7b" in warning
    assert "\x1b" not in warning


def test_a_refused_form_is_one_if_the_list_does_not_have_the_model() -> None:
    with (
        server(400, ["other"]) as (url, _),
        pytest.raises(RefinerError, match=r"\(400\).* It serves other\."),
    ):
        preflight(url, "m", SETTINGS)
    with server(400, ["m"]) as (url, _):
        assert preflight(url, "m", SETTINGS) == []


def test_the_other_name_of_the_limit_is_tried() -> None:
    with server(refuses="max_tokens") as (url, asked):
        preflight(url, "m", SETTINGS)
    assert [sorted(body)[0] for _, body, _ in asked if body] == ["max_tokens", "max_completion_tokens"]


@pytest.mark.parametrize(
    ("status", "models", "message"),
    [
        (
            401,
            None,
            r"cannot be used \(401\): no, \*\*\*\. The key is read from .* MIDDO_TEST_KEY .*, which is set",
        ),
        (404, ["gpt-4o", "qwen2.5-7b"], r"'qwen-7b'; check refine.model.* It serves qwen2.5-7b"),
        (
            404,
            None,
            r"check refine.model, and refine.base_url, which usually ends in /v1\. \(refine.preflight",
        ),
        (500, None, r"cannot be used \(500\)"),
    ],
)
def test_what_is_wrong_is_said(status: int, models: list[str] | None, message: str) -> None:
    with server(status, models) as (url, _), pytest.raises(RefinerError, match=message) as raised:
        preflight(url, "qwen-7b", SETTINGS)
    assert KEY not in str(raised.value)
    assert raised.value.stops_stage


def test_a_server_that_is_not_there() -> None:
    with server() as (url, _):
        pass
    with pytest.raises(
        RefinerError,
        match=r"the refiner at http://127\.0\.0\.1:\d+/v1 cannot be used: Connect.*check refine\.base_url",
    ):
        preflight(url, "m", SETTINGS)


def test_a_refused_form_is_no_fault_here() -> None:
    with server(400) as (url, asked):
        preflight(url, "m", SETTINGS)
    assert [body.keys() & {"max_tokens", "max_completion_tokens"} for _, body, _ in asked if body] == [
        {"max_tokens"},
        {"max_completion_tokens"},
    ]


# What servers answer to a model that they do not have, by their issues: vLLM, Ollama, OpenAI, the router of
# llama.cpp, LiteLLM, DeepSeek, Mistral, LM Studio, and a proxy that hides vLLM's refusal in a status 200.
NO_MODEL = [
    (404, {"error": {"message": "The model `m` does not exist.", "type": "NotFoundError", "param": "model"}}),
    (404, {"object": "error", "message": "The model `m` does not exist.", "param": None, "code": 404}),
    (404, {"error": {"message": 'model "m" not found, try pulling it first', "type": "api_error"}}),
    (404, {"error": {"message": "It does not exist or you have no access.", "code": "model_not_found"}}),
    (400, {"error": {"code": 400, "message": "model not found", "type": "invalid_request_error"}}),
    (400, {"error": {"message": {"error": "/chat/completions: Invalid model name passed in model=m"}}}),
    (400, {"error": {"message": "Model Not Exist", "type": "invalid_request_error"}}),
    (400, {"object": "error", "message": "Invalid model: m", "type": "invalid_model", "code": "1500"}),
    (400, {"error": 'Invalid model identifier "m". Please specify a valid downloaded model.'}),
    (200, {"code": 404, "message": "The model `m` does not exist.", "object": "error"}),
]


@pytest.mark.parametrize(("status", "said"), NO_MODEL)
def test_a_model_that_a_server_without_a_list_does_not_have(status: int, said: Any) -> None:
    with server(status, said=said) as (url, asked), pytest.raises(RefinerError) as raised:
        preflight(url, "m", SETTINGS)
    assert "Asked for the model 'm'; check refine.model. (refine.preflight=false" in str(raised.value)
    assert [path for path, _, _ in asked] == ["/v1/chat/completions", "/v1/models"]


@pytest.mark.parametrize(
    "said",
    [
        "Unsupported parameter: 'max_tokens' is not supported with this model.",
        "Could not finish the message because max_tokens or model output limit was reached.",
        "Invalid model parameter: max_tokens",
        "This model's maximum context length is 0 tokens. The template was not found",
    ],
)
def test_other_refusals_that_speak_of_a_model(said: str) -> None:
    with server(400, said={"error": {"message": said, "type": "invalid_request_error"}}) as (url, _):
        assert preflight(url, "m", SETTINGS) == []


def test_an_address_that_answers_with_something_else() -> None:
    with (
        server(said="<html>Chat</html>") as (url, _),
        pytest.raises(
            RefinerError, match=r"has no choices: <html>Chat</html>\. Check refine.base_url, which"
        ),
    ):
        preflight(url, "m", SETTINGS)
