"""A chat endpoint on a thread of the test's own process that answers as it is told, and the client asking it.

A plugin of pytest: the fixtures `server` and `cache` are for every module that names it.
PYTEST_DONT_REWRITE: it has one assertion, and test modules import it too.
"""

from __future__ import annotations

import asyncio
import collections
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from middo_jax.config import RefineSettings
from middo_jax.refinement.endpoint.cache import AnswerCache
from middo_jax.refinement.endpoint.client import ChatClient
from middo_jax.refinement.endpoint.faults import RefinerError
from middo_jax.refinement.endpoint.request import Answer
from middo_jax.refinement.prompts import requests


def good(text: str, prompt_tokens: int = 10, completion_tokens: int = 5, **more: Any) -> Response:
    usage = {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        **more,
    }
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    return JSONResponse({"id": "x", "object": "chat.completion", "choices": [choice], "usage": usage})


def fault(status: int, message: str = "no", **headers: str) -> Response:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return JSONResponse({"error": {"message": message}}, status, named)


def dropped() -> Response:
    async def half() -> AsyncIterator[bytes]:
        yield b'{"id": '

    return StreamingResponse(half(), headers={"content-length": "1000", "content-type": "application/json"})


def dripping() -> Response:
    """A whole answer, too late, though no two of its bytes are far apart."""

    async def slow() -> AsyncIterator[bytes]:
        for _ in range(30):
            yield b" "
            await asyncio.sleep(0.05)
        yield bytes(good("late").body)

    return StreamingResponse(slow(), media_type="application/json")


class ScriptedServer:
    """Answers as `script(last message, how often it was asked before)` says; a float is a wait."""

    def __init__(self) -> None:
        self.script: Callable[[str, int], Response | float] = lambda text, n: good("fine")
        self.times: dict[str, list[float]] = collections.defaultdict(list)
        self.bodies: list[dict[str, Any]] = []
        self.keys: set[str] = set()
        self.now = self.most = 0
        app = Starlette(routes=[Route("/v1/chat/completions", self._answer, methods=["POST"])])
        # lifespan off and errors quiet: a dropped body is an error to the server, and here on purpose.
        self._server = uvicorn.Server(
            uvicorn.Config(app, port=0, log_level="critical", lifespan="off", timeout_graceful_shutdown=1)
        )
        self._thread = threading.Thread(target=self._server.run, daemon=True)

    async def _answer(self, request: Request) -> Response:
        body = await request.json()
        text = body["messages"][-1]["content"]
        self.times[text].append(time.monotonic())
        self.bodies.append(body)
        self.keys.add(request.headers["authorization"])
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            reply = self.script(text, len(self.times[text]) - 1)
            if isinstance(reply, Response):
                return reply
            await asyncio.sleep(reply)
            return good("late")
        finally:
            self.now -= 1

    def start(self) -> None:
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(timeout=5)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.servers[0].sockets[0].getsockname()[1]}/v1"

    def asked(self, text: str) -> int:
        return len(self.times[text])

    @property
    def requests(self) -> int:
        return len(self.bodies)


@pytest.fixture(scope="module")
def running() -> Iterator[ScriptedServer]:
    server = ScriptedServer()
    server.start()
    yield server
    server.stop()


@pytest.fixture
def server(running: ScriptedServer) -> ScriptedServer:
    running.script = lambda text, n: good("fine")
    running.times.clear()
    running.bodies.clear()
    running.keys.clear()
    running.most = 0
    return running


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[AnswerCache]:
    cache = AnswerCache(tmp_path / "llm_cache.sqlite")
    yield cache
    cache.close()


@pytest.fixture(autouse=True)
def _no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


SETTINGS = RefineSettings(max_retries=3, timeout=5.0, concurrency=4, max_tokens=100, response_format="text")


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def ask(
    url: str | Sequence[str],
    cache: AnswerCache,
    *texts: str,
    settings: RefineSettings = SETTINGS,
    seed: int | None = None,
    **more: Any,
) -> tuple[list[Any], ChatClient]:
    """Asks all texts at once; a RefinerError stands in its answer's place."""

    async def go() -> tuple[list[Any], ChatClient]:
        async with ChatClient(requests("m", settings, seed), url, cache, backoff_s=0.01, **more) as client:
            asked = (client.complete(user(text)) for text in texts)
            answers = await asyncio.gather(*asked, return_exceptions=True)
        return answers, client

    answers, client = asyncio.run(go())
    for answer in answers:
        assert isinstance(answer, Answer | RefinerError), answer
    return answers, client
