"""The embedded endpoint: OpenAI's chat completions over an Engine.

    engine, tokenizer, eos_ids = load_engine(model_dir, settings)
    app = build_app(engine, tokenizer, "my-model", eos_ids)
    with engine, serve_in_background(app) as base_url:      # http://127.0.0.1:PORT/v1
        ...

It offers what a refiner needs and says so where it is asked for more (streaming, n > 1). Errors have OpenAI's
shape, so that its clients understand them. There is no authentication: loopback unless told otherwise.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import secrets
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import jax
import pydantic
import uvicorn
from jax.sharding import Mesh
from pydantic import Field
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from middo_jax.config import ConfigError, ServeSettings
from middo_jax.data.example import Message, Role
from middo_jax.data.tokenize import TemplateError, eos_token_ids, load_tokenizer, tokenize_prompt
from middo_jax.inference import sampling
from middo_jax.inference.engine import Completion, Engine
from middo_jax.models.source import load, locate
from middo_jax.parallel.mesh import make_mesh

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHUTDOWN_GRACE_S = 2  # for requests in flight when the server is told to stop


class ApiError(Exception):
    """A refusal that the client reads: `{"error": {"message", "type", "param", "code"}}`."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code


class TextPart(pydantic.BaseModel):
    """A piece of a message; of OpenAI's kinds only text."""

    type: Literal["text"]
    text: str


class ChatMessage(pydantic.BaseModel):
    """One turn."""

    role: Role
    content: str | list[TextPart]

    @property
    def text(self) -> str:
        """The content as one string."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(pydantic.BaseModel):
    """The fields of a chat completion request that are heeded; others are ignored. null is the default."""

    messages: list[ChatMessage] = Field(min_length=1)
    model: str | None = None
    max_tokens: pydantic.PositiveInt | None = None
    max_completion_tokens: pydantic.PositiveInt | None = None
    temperature: float | None = Field(None, ge=0, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0)  # not OpenAI's, but all local servers'
    seed: int | None = None
    stop: str | list[str] | None = None
    n: int | None = None
    stream: bool | None = None

    @classmethod
    def parse(cls, body: bytes) -> ChatRequest:
        """Reads a request's body.

        Raises:
          ApiError: it is no JSON, a field is missing or wrong, or asks for what is not offered.
        """
        try:
            request = cls.model_validate_json(body)
        except pydantic.ValidationError as error:
            first = error.errors(include_url=False)[0]
            param = ".".join(str(part) for part in first["loc"]) or None
            raise ApiError(400, f"{param or 'request body'}: {first['msg']}", param) from None
        if request.stream:
            raise ApiError(400, "stream: streaming is not supported; ask with stream=false", "stream")
        if request.n not in (None, 1):
            raise ApiError(400, f"n: only 1 choice a request is supported, not {request.n}", "n")
        return request

    @property
    def stop_texts(self) -> list[str]:
        """`stop` as a list, without empty strings."""
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return [text for text in stops if text]


def build_app(
    engine: Engine, tokenizer: PreTrainedTokenizerBase, model_name: str, eos_ids: frozenset[int]
) -> Starlette:
    """The endpoint as an ASGI application: /v1/chat/completions, /v1/models, /health.

    Args:
      engine: answers; it stays the caller's to close.
      tokenizer: has a chat template.
      model_name: the only one that may be asked for.
      eos_ids: tokens that end an answer.
    """
    served = _Served(engine, tokenizer, model_name, eos_ids)
    return Starlette(
        routes=[
            Route("/v1/chat/completions", served.chat, methods=["POST"]),
            Route("/v1/models", served.models),
            Route("/health", served.health),
        ],
        exception_handlers={ApiError: _show_error, HTTPException: _show_error, Exception: _show_error},
    )


@dataclasses.dataclass
class _Served:
    """A model behind its routes."""

    engine: Engine
    tokenizer: PreTrainedTokenizerBase
    model_name: str
    eos_ids: frozenset[int]
    started: int = dataclasses.field(default_factory=lambda: int(time.time()))

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        asked = ChatRequest.parse(await request.body())
        if asked.model not in (None, self.model_name):
            message = f"model: {asked.model!r} is not served here, only {self.model_name!r}"
            raise ApiError(404, message, "model", "model_not_found")
        prompt = _render(asked.messages, self.tokenizer)
        future = _submit(self.engine, self._engine_request(asked, prompt))
        try:
            completion = await _result_while_connected(request, future)
        except ClientDisconnect:
            return Response(status_code=499)  # read by nobody
        text = str(self.tokenizer.decode(completion.tokens, skip_special_tokens=True))
        text, finish_reason = _cut(text, asked.stop_texts, completion)
        return JSONResponse(self._completion(text, finish_reason, len(prompt), len(completion.tokens)))

    async def models(self, _: Request) -> Response:
        """GET /v1/models."""
        card = {"id": self.model_name, "object": "model", "created": self.started, "owned_by": "middo-jax"}
        return JSONResponse({"object": "list", "data": [card]})

    async def health(self, _: Request) -> Response:
        """GET /health."""
        if self.engine.is_running:
            return JSONResponse({"status": "ok"})
        return JSONResponse({"status": "stopped"}, status_code=503)

    def _engine_request(self, asked: ChatRequest, prompt: list[int]) -> sampling.Request:
        """Raises ApiError where the prompt leaves no room for an answer."""
        room = self.engine.max_context - len(prompt)
        if room < 1:
            raise ApiError(
                400,
                f"This model's maximum context length is {self.engine.max_context} tokens, but the messages "
                f"are {len(prompt)} tokens long and leave no room for an answer. Shorten the messages.",
                "messages",
                "context_length_exceeded",
            )
        return sampling.Request(
            prompt,
            max_tokens=min(asked.max_completion_tokens or asked.max_tokens or room, room),
            temperature=1.0 if asked.temperature is None else asked.temperature,
            top_p=asked.top_p or 1.0,
            top_k=asked.top_k or 0,
            seed=secrets.randbits(32) if asked.seed is None else asked.seed,
            stop_ids=self.eos_ids,
        )

    def _completion(
        self, text: str, finish_reason: str, n_prompt_tokens: int, n_tokens: int
    ) -> dict[str, Any]:
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": text},
            "logprobs": None,
            "finish_reason": finish_reason,
        }
        return {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": self.model_name,
            "choices": [choice],
            "usage": {
                "prompt_tokens": n_prompt_tokens,
                "completion_tokens": n_tokens,
                "total_tokens": n_prompt_tokens + n_tokens,
            },
        }


def _render(messages: list[ChatMessage], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    try:
        turns = [Message(message.role, message.text) for message in messages]
        return tokenize_prompt(turns, tokenizer).tolist()
    except TemplateError as error:
        raise ApiError(400, str(error), "messages") from error


def _submit(engine: Engine, request: sampling.Request) -> concurrent.futures.Future[Completion]:
    try:
        return engine.submit(request)
    except ValueError as error:
        raise ApiError(400, str(error)) from error
    except RuntimeError as error:  # closed, or failed before
        raise ApiError(503, str(error)) from error


async def _result_while_connected(
    request: Request, future: concurrent.futures.Future[Completion]
) -> Completion:
    """The engine's answer, whose slot is freed if the client (or the server) goes away.

    Raises:
      ClientDisconnect: the client has.
    """
    answer = asyncio.wrap_future(future)
    # The body has been read: the next message can only be that the client is gone.
    gone = asyncio.ensure_future(request.receive())
    try:
        await asyncio.wait((answer, gone), return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            raise ClientDisconnect
        return answer.result()
    finally:
        gone.cancel()
        future.cancel()  # a no-op on what is answered


def _cut(text: str, stops: list[str], completion: Completion) -> tuple[str, str]:
    """(the text up to the first stop text, why it ends)."""
    end = min((text.index(stop) for stop in stops if stop in text), default=None)
    return (text, completion.finish_reason) if end is None else (text[:end], "stop")


async def _show_error(_: Request, error: Exception) -> Response:
    if isinstance(error, ApiError):
        status, message, param, code = error.status, error.message, error.param, error.code
    elif isinstance(error, HTTPException):  # no such path, or another method
        status, message, param, code = error.status_code, error.detail, None, None
    else:
        status, message, param, code = 500, f"{type(error).__name__}: {error}", None, None
    kind = "server_error" if status >= 500 else "invalid_request_error"
    body: dict[str, Any] = {"message": message, "type": kind, "param": param, "code": code}
    return JSONResponse({"error": body}, status_code=status)


@contextlib.contextmanager
def serve_in_background(app: Starlette, host: str = "127.0.0.1", port: int = 0) -> Iterator[str]:
    """Serves on a thread of its own while the block runs; yields `http://HOST:PORT/v1`.

    Args:
      app: from `build_app`.
      host: an address of this machine.
      port: 0 takes a free one.

    Raises:
      ConfigError: the address cannot be bound.
      RuntimeError: the server ended before it answered; its log says why.
    """
    with _listen(host, port) as listener:
        server = _server(app)
        # A daemon: a server that does not stop must not keep the program from ending.
        thread = threading.Thread(target=server.run, args=([listener],), name="middo-serve", daemon=True)
        thread.start()
        try:
            while not server.started:
                if not thread.is_alive():
                    raise RuntimeError(f"the embedded endpoint on {_url(listener)} ended before it answered")
                time.sleep(0.01)
            yield _url(listener)
        finally:
            server.should_exit = True
            thread.join()


def serve_forever(app: Starlette, host: str = "127.0.0.1", port: int = 0) -> None:
    """Serves until interrupted; says on stderr where. Raises ConfigError if the address cannot be bound."""
    with _listen(host, port) as listener:
        print(f"serving on {_url(listener)} (Ctrl-C ends it)", file=sys.stderr, flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            _server(app).run([listener])


def _listen(host: str, port: int) -> socket.socket:
    # Bound here and handed over: between finding a free port and binding it, another program could take it.
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"config: cannot listen on {host}, port {port}: {error}; port 0 takes a free one"
        ) from error


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}/v1" if ":" in host else f"http://{host}:{port}/v1"


def _server(app: Starlette) -> uvicorn.Server:
    return uvicorn.Server(
        uvicorn.Config(
            app,
            lifespan="off",
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=SHUTDOWN_GRACE_S,
        )
    )


def load_engine(
    model_dir: str | Path,
    settings: ServeSettings,
    dtype: str = "float32",
    template: str | None = None,
    mesh: Mesh | None = None,
) -> tuple[Engine, PreTrainedTokenizerBase, frozenset[int]]:
    """(a running engine, its tokenizer, the tokens that end an answer) of any model that `locate` knows.

    The context is settings.max_context, or less if the model has fewer positions. Parameters are stored in
    `dtype` too: a decode step takes as long as reading them.

    Args:
      model_dir: a Hugging Face directory, a checkpoint of ours or a PEFT adapter.
      settings: how many requests are answered together, and how long they may be.
      dtype: of parameters and computing.
      template: of the chat; None is the tokenizer's own.
      mesh: the devices over which model and cache are split; None is the default device.

    Raises:
      CheckpointError, UnsupportedModel, TemplateError: the directory holds no model that can be served.
      ConfigError: a parameter does not divide by the mesh.
    """
    source = locate(Path(model_dir))
    tokenizer = load_tokenizer(source.base, template)
    model = load(source, dtype, mesh=None if mesh is None else local(mesh))
    max_context = min(settings.max_context, model.config.max_position_embeddings)
    engine = Engine(model.graphdef, model.params, settings.max_batch, max_context)
    return engine, tokenizer, eos_token_ids(source.base, tokenizer)


def local(mesh: Mesh) -> Mesh:
    """The mesh, or this process's part of one that spans several.

    Each process answers its own requests when they come, so that processes do not run the same programs.
    """
    if all(device.process_index == jax.process_index() for device in mesh.devices.flat):
        return mesh
    return make_mesh(devices=jax.local_devices())
