"""A loopback server that answers from a recording; what it lacks goes to the embedded endpoint.

The refiner's client asks it like any server, so everything behind the client is as with a real one.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import threading
from collections.abc import Callable, Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from middo_jax.inference.bodies import Bodies
from middo_jax.inference.errors import ApiError, show_error
from middo_jax.inference.guard import Access, Guard
from middo_jax.refinement import AnswerCache, Outcome
from middo_jax.refinement.endpoint.recording import Recording, sent_body
from middo_jax.rundir.records import RecordedRow

MAX_BYTES = 64 << 20  # of a request's body


@dataclasses.dataclass
class Replay:
    """The routes. `embedded` makes the application for other requests, when the first of them comes."""

    recording: Recording
    embedded: Callable[[], ASGIApp]
    _app: ASGIApp | None = None
    _lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)
    _bodies: Bodies = dataclasses.field(default_factory=lambda: Bodies(MAX_BYTES))

    def app(self) -> Starlette:
        """The server as an ASGI application."""
        return Starlette(
            routes=[Route("/v1/chat/completions", self.chat, methods=["POST"])],
            middleware=[Middleware(Guard, access=Access(), max_bytes=MAX_BYTES)],
            exception_handlers={ApiError: show_error, HTTPException: show_error},
        )

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        text = await self._bodies.receive(request)
        try:
            body = json.loads(text)
            answer = self.recording.answer(body) if isinstance(body, dict) else None
        except (ValueError, RecursionError):
            answer = None  # the embedded endpoint says what is wrong with it
        if answer is None:
            app = await asyncio.get_running_loop().run_in_executor(None, self._elsewhere)
            return _Forwarded(app, text)
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": answer.text},
            "finish_reason": answer.finish_reason,
        }
        usage = {
            "prompt_tokens": answer.prompt_tokens,
            "completion_tokens": answer.completion_tokens,
            "total_tokens": answer.prompt_tokens + answer.completion_tokens,
        }
        facts = {"id": "recorded", "object": "chat.completion", "created": 0, "model": self.recording.model}
        return JSONResponse({**facts, "choices": [choice], "usage": usage})

    def _elsewhere(self) -> ASGIApp:
        with self._lock:
            if self._app is None:
                self._app = self.embedded()
            return self._app


class _Forwarded(Response):
    """The response of another application to a request whose body was read already."""

    def __init__(self, app: ASGIApp, body: bytes) -> None:
        super().__init__()
        self._to, self._given = app, body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        given: list[dict[str, Any]] = [{"type": "http.request", "body": self._given, "more_body": False}]

        async def again() -> Any:
            return given.pop() if given else await receive()

        await self._to(scope, again, send)


def attributed(
    outcomes: Sequence[Outcome], cache: AnswerCache, recording: Recording, embedded: str
) -> tuple[list[Outcome], RecordedRow]:
    """The outcomes with their real writers in the lineage, and how many answers were recorded.

    Counted are the requests of the tasks, whether their answers came from the server or the cache, so that a
    resumed run counts as an uninterrupted one.

    Args:
      outcomes: of the stage.
      cache: has every request that was answered.
      recording: the recorded answers.
      embedded: the model that wrote the others.
    """
    found: list[Outcome] = []
    n = misses = 0
    for outcome in outcomes:
        missed = [_is_missed(exchange.answer.key, cache, recording) for exchange in outcome.exchanges]
        n, misses = n + len(missed), misses + sum(missed)
        names = [*([recording.model] if not all(missed) else []), *([embedded] if any(missed) else [])]
        child = outcome.example
        if child is not None and names != [recording.model]:
            lineage = dataclasses.replace(child.lineage, refiner="+".join(names))
            outcome = dataclasses.replace(outcome, example=dataclasses.replace(child, lineage=lineage))
        found.append(outcome)
    facts: RecordedRow = {
        "file": str(recording.path),
        "model": recording.model,
        "embedded": embedded,
        "answers": n,
        "misses": misses,
    }
    return found, facts


def _is_missed(key: str, cache: AnswerCache, recording: Recording) -> bool:
    request_json = cache.request(key)
    return request_json is None or recording.answer(sent_body(request_json)) is None
