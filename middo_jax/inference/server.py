"""The embedded endpoint: OpenAI's chat completions and completions over an Engine.

    engine, tokenizer, eos_ids = load_engine(model_dir, settings)
    app = build_app(engine, tokenizer, "my-model", eos_ids)
    with engine, serve_in_background(app) as base_url:      # http://127.0.0.1:PORT/v1
        ...

A request passes the guard (who asks, how much), is read into a model of its fields and tokenized on another
thread, answered by the engine, and written as OpenAI's clients expect it. docs/serving.md says what is
promised.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
import json
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import jax
from jax.sharding import Mesh
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from middo_jax.config import ServeSettings
from middo_jax.data.example import Message
from middo_jax.data.long_texts import first_tokens
from middo_jax.data.tokenize import TemplateError, eos_token_ids, load_tokenizer, tokenize_prompt
from middo_jax.inference import sampling
from middo_jax.inference.answers import ChatWriter, CompletionWriter, Writer
from middo_jax.inference.bodies import Bodies
from middo_jax.inference.engine import Engine
from middo_jax.inference.errors import ApiError, show_error
from middo_jax.inference.generation import Generation, while_connected
from middo_jax.inference.guard import Access, Guard
from middo_jax.inference.intake import BODIES, Intake, overloaded
from middo_jax.inference.openapi import describe
from middo_jax.inference.requests import (
    ChatRequest,
    CompletionRequest,
    GenerationRequest,
)
from middo_jax.inference.stream import EventStream
from middo_jax.inference.text import text_of
from middo_jax.models.loading import load, locate
from middo_jax.parallel.mesh import make_mesh

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Asked = TypeVar("Asked", bound=GenerationRequest)

MAX_WAITING = 1024  # answers that are queued or being computed; a further request is to come later
SMALLEST_BODY_LIMIT = 1 << 20
BYTES_PER_TOKEN = 64  # of a request's body, far more than any text's


def build_app(
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    model_name: str,
    eos_ids: frozenset[int],
    access: Access | None = None,
) -> Starlette:
    """The endpoint as an ASGI application: chat completions, completions, models, health, its description.

    Args:
      engine: answers; the caller closes it.
      tokenizer: has a chat template.
      model_name: the only one that may be asked for.
      eos_ids: tokens that end an answer.
      access: who may send requests; None: any program on this machine.
    """
    max_bytes = max(SMALLEST_BODY_LIMIT, BYTES_PER_TOKEN * engine.max_context)
    served = _Served(engine, tokenizer, model_name, eos_ids, max_bytes)
    app = Starlette(
        routes=[
            Route("/v1/chat/completions", served.chat, methods=["POST"]),
            Route("/v1/completions", served.complete, methods=["POST"]),
            Route("/v1/models", served.models),
            Route("/health", served.health),
            Route("/openapi.json", served.openapi),
        ],
        middleware=[Middleware(Guard, access=access or Access(), max_bytes=max_bytes)],
        exception_handlers={
            ApiError: show_error,
            HTTPException: show_error,
            ClientDisconnect: _answer_nobody,
            Exception: show_error,
        },
    )
    app.state.engine = engine  # so that whoever serves the application sees whether the engine has ended
    return app


async def _answer_nobody(_: Request, __: Exception) -> Response:
    return Response(status_code=499)


@dataclasses.dataclass
class _Served:
    """A model behind its routes."""

    engine: Engine
    tokenizer: PreTrainedTokenizerBase
    model_name: str
    eos_ids: frozenset[int]
    max_bytes: int
    started: int = dataclasses.field(default_factory=lambda: int(time.time()))
    waiting: set[concurrent.futures.Future[Any]] = dataclasses.field(default_factory=set)
    n_being_read: int = 0  # answers that are asked for by requests whose prompts are not tokenized yet

    def __post_init__(self) -> None:
        self.bodies = Bodies(self.max_bytes)
        self.intake = Intake(BODIES * self.max_bytes)

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        return await self._answer(request, ChatRequest, self._read_chat)

    async def complete(self, request: Request) -> Response:
        """POST /v1/completions."""
        return await self._answer(request, CompletionRequest, self._read_texts)

    async def models(self, _: Request) -> Response:
        """GET /v1/models."""
        card = {"id": self.model_name, "object": "model", "created": self.started, "owned_by": "middo-jax"}
        return JSONResponse({"object": "list", "data": [card]})

    async def health(self, _: Request) -> Response:
        """GET /health."""
        if self.engine.is_running:
            return JSONResponse({"status": "ok"})
        return JSONResponse({"status": "stopped"}, status_code=503)

    async def openapi(self, _: Request) -> Response:
        """GET /openapi.json."""
        return JSONResponse(describe(self.model_name))

    async def _answer(
        self, request: Request, kind: type[Asked], read: Callable[[Asked], tuple[list[list[int]], Writer]]
    ) -> Response:
        answering = self._response(kind, await self.bodies.receive(request), read)
        return await while_connected(request.receive, answering)

    async def _response(
        self, kind: type[Asked], body: bytes, read: Callable[[Asked], tuple[list[list[int]], Writer]]
    ) -> Response:
        n_bytes = len(body)
        # It counts as one answer before it is parsed: short bodies that wait for that are limited, too.
        with self.intake.admitted(n_bytes), self._counted(1):
            asked = await self.intake.run(functools.partial(kind.parse, body), n_bytes)
            del body  # it may be long, and the answer may take long
            if asked.model not in (None, self.model_name):
                message = f"model: {asked.model!r} is not served here, only {self.model_name!r}"
                raise ApiError(404, message, "model", "model_not_found")
            with self._counted(asked.n_answers - 1):
                prompts, writer = await self.intake.run(lambda: read(asked), n_bytes)
                generation = self._begin(asked, prompts)
        if asked.stream:
            return EventStream(generation, writer, asked.includes_usage)
        with contextlib.closing(generation):
            pieces = await generation.whole()
        # It costs no turn of those that wait: the answer is there.
        text = await self.intake.run(lambda: json.dumps(writer.whole(pieces), ensure_ascii=False).encode(), 0)
        return Response(text, media_type="application/json")

    @contextlib.contextmanager
    def _counted(self, n_answers: int) -> Iterator[None]:
        """Counts answers that are not in the engine yet. Raises ApiError if too many wait."""
        n_waiting = len(self.waiting) + self.n_being_read
        if n_waiting + n_answers > MAX_WAITING:
            raise overloaded(f"{n_waiting} answers are waiting, and at most {MAX_WAITING} may")
        self.n_being_read += n_answers
        try:
            yield
        finally:
            self.n_being_read -= n_answers

    def _read_chat(self, asked: ChatRequest) -> tuple[list[list[int]], Writer]:
        try:
            turns = [Message(message.role, message.text) for message in asked.messages]
            tokens = tokenize_prompt(turns, self.tokenizer, max_length=self.engine.max_context).tolist()
        except TemplateError as error:
            raise ApiError(400, str(error), "messages") from error
        self._require_room(tokens, asked)
        return [tokens], ChatWriter(asked, self.model_name, self.tokenizer, [tokens])

    def _read_texts(self, asked: CompletionRequest) -> tuple[list[list[int]], Writer]:
        prompts = [self._tokens(prompt, asked) for prompt in asked.prompts]
        echoes = [
            prompt if isinstance(prompt, str) else text_of(prompt, self.tokenizer)
            for prompt in (asked.prompts if asked.echo else ())
        ]
        return prompts, CompletionWriter(asked, self.model_name, self.tokenizer, prompts, echoes)

    def _tokens(self, prompt: str | list[int], asked: CompletionRequest) -> list[int]:
        tokens = self._first_tokens(prompt) if isinstance(prompt, str) else prompt
        if not tokens:
            raise ApiError(400, "prompt: it has no tokens", "prompt")
        self._require_room(tokens, asked)
        vocab_size = self.engine.config.vocab_size
        if max(tokens) >= vocab_size:
            raise ApiError(400, f"prompt: {max(tokens)} is not below the vocabulary's {vocab_size}", "prompt")
        return tokens

    def _first_tokens(self, text: str) -> list[int]:
        return first_tokens(self.tokenizer, text, self.engine.max_context, add_special_tokens=True)

    def _require_room(self, tokens: Sequence[int], asked: GenerationRequest) -> None:
        """Raises ApiError if a prompt leaves no room for an answer."""
        context, name = self.engine.max_context, asked.text_field
        if len(tokens) > context or (len(tokens) == context and asked.most_tokens != 0):
            raise ApiError(
                400,
                f"This model's maximum context length is {context} tokens, but the {name} has at least "
                f"{len(tokens)} tokens and leaves no room for an answer. Shorten it.",
                name,
                "context_length_exceeded",
            )

    def _begin(self, asked: GenerationRequest, prompts: Sequence[list[int]]) -> Generation:
        """Passes the requests to the engine: one per answer, `n` per prompt."""
        requests = []
        for prompt in prompts:
            room = self.engine.max_context - len(prompt)
            wanted = room if asked.most_tokens is None else asked.most_tokens
            requests += [
                sampling.Request(
                    prompt,
                    max_tokens=min(wanted, room),
                    temperature=1.0 if asked.temperature is None else asked.temperature,
                    top_p=asked.top_p or 1.0,
                    top_k=asked.top_k or 0,
                    seed=secrets.randbits(32) if asked.seed is None else asked.seed + choice,
                    stop_ids=self.eos_ids,
                    logprobs=asked.has_logprobs,
                    prompt_logprobs=asked.has_prompt_logprobs,
                )
                for choice in range(asked.n_choices)
            ]
        in_pieces = bool(asked.stream)
        generation = Generation(self.engine, requests, self.tokenizer, asked.stop_texts, in_pieces=in_pieces)
        for future in generation.futures:
            self.waiting.add(future)
            future.add_done_callback(self.waiting.discard)
        return generation


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
