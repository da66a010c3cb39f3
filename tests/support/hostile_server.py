"""A chat endpoint that does what endpoints do to a client on a bad day: a program of its own.

    python hostile_server.py --port 8123 --log log.jsonl --scale 20 --faults

Every time in it is divided by `scale`: 1 is real life, 20 for tests. What happens to a try is a function of
the request and of how often it was tried, so that two runs meet the same faults. The log has one line a
try, with what it was charged: only an answer that was sent whole costs anything.

Without faults an answer takes about two seconds. With them, of all tries:
  10 % 429, half with Retry-After: 2 · 5 % 500 · 3 % never answered · 3 % dropped in the middle of the body
  2.5 % a body that is no JSON · 2.5 % an answer that is no JSON, though it was asked for · 3 % cut off
  2 % empty · 1 % 400, of requests and not of tries: these are final
and besides: 503 for the first ten seconds, five times slower for the next twenty, and an overload of sixty
seconds from second `overload` on, when four in five are refused and the rest take five times as long. With
`gather` nobody is answered before so many ask at once.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import hashlib
import json
import math
import re
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

LATENCY_S = 2.0
FAULTS = {  # shares of tries
    "429": 0.05,
    "429 retry-after": 0.05,
    "500": 0.05,
    "hang": 0.03,
    "drop": 0.03,
    "body": 0.025,
    "content": 0.025,
    "length": 0.03,
    "empty": 0.02,
}
REFUSED = 0.01  # share of requests
LOADING_S, WARMING_S, OVERLOAD_S = 10.0, 20.0, 60.0
OVERLOAD_REFUSED = 0.8
RETRY_AFTER_S = 2.0
SLOWER = 5.0


def chance(*of: object) -> float:
    """A number in [0, 1) that depends on nothing else."""
    digest = hashlib.sha256(json.dumps(of).encode()).digest()
    return int.from_bytes(digest[:7]) / 2**56


def words(text: str) -> int:
    """What this server takes for tokens."""
    return len(text.split())


def better(number: str) -> str:
    """The new prompt for `Question NUMBER`."""
    return f"Please answer question {number} briefly."


def sample_of(body: dict[str, Any]) -> int:
    """The number of the sample that a request is about."""
    said = "\n".join(turn["content"] for turn in body["messages"])
    return int(re.findall(r"uestion (\d+) (?:is long|briefly)", said)[-1])


def answer(prompt: str) -> str:
    """The answer to a new prompt."""
    return f"This is the answer to: {prompt}"


class Hostile:
    """The endpoint: one kind of fault a try, or an answer."""

    def __init__(self, given: argparse.Namespace) -> None:
        log: Path = given.log
        self._log = log.open("a", encoding="utf-8", buffering=1)
        self._scale, self._faults, self._overload = given.scale, given.faults, given.overload
        self._gather, self._gathered = given.gather, asyncio.Event()
        self._in_flight = 0
        self._tries: collections.Counter[str] = collections.Counter()
        # A restart remembers when it all began, with the first request, and what was tried.
        self._began = log.with_suffix(".began")
        for line in log.read_text(encoding="utf-8").splitlines():
            self._tries[json.loads(line)["key"]] += 1

    def fate(self, key: str, tried: int) -> tuple[str, float]:
        """(what happens, how many times slower)."""
        if not self._faults:
            return "answer", 1.0
        if not self._began.exists():
            self._began.write_text(str(time.time()))
        now = (time.time() - float(self._began.read_text())) * self._scale
        if now < LOADING_S:
            return "loading", 1.0
        slower = SLOWER if now < LOADING_S + WARMING_S else 1.0
        if self._overload <= now < self._overload + OVERLOAD_S:
            if chance("overload", key, tried, int(now)) < OVERLOAD_REFUSED:
                return "overload", 1.0
            slower = SLOWER
        if chance("refused", key) < REFUSED:
            return "400", 1.0
        drawn = chance("fault", key, tried)
        for name, share in FAULTS.items():
            if drawn < share:
                return name, slower
            drawn -= share
        return "answer", slower

    async def chat(self, request: Request) -> Response:
        """One try."""
        self._in_flight += 1
        if self._in_flight >= self._gather:
            self._gathered.set()
        try:
            await self._gathered.wait()
            return await self._try(request)
        finally:
            self._in_flight -= 1

    async def _try(self, request: Request) -> Response:
        body = await request.json()
        key = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()[:16]
        tried = self._tries[key]
        self._tries[key] += 1
        what, slower = self.fate(key, tried)
        seconds = LATENCY_S * math.exp(0.4 * (2 * chance("latency", key, tried) - 1)) * slower / self._scale
        line: dict[str, Any] = {"key": key, "try": tried, "what": what, "prompt": 0, "completion": 0}
        line |= {"sample": sample_of(body), "slower": slower, "began": time.time()}
        if what == "hang":  # a restart would end it without a word
            self._log.write(json.dumps(line) + "\n")
            while not await request.is_disconnected():
                await asyncio.sleep(0.2)
            return Response(status_code=499)
        response = await self._respond(what, seconds, body, line, request)
        line["ended"] = time.time()
        self._log.write(json.dumps(line) + "\n")
        return response

    async def _respond(
        self, what: str, seconds: float, body: dict[str, Any], line: dict[str, Any], request: Request
    ) -> Response:
        if what in ("429", "429 retry-after", "overload", "loading", "400", "500"):
            status = {"overload": 503, "loading": 503}.get(what) or int(what[:3])
            wait = {"retry-after": f"{RETRY_AFTER_S / self._scale}"} if what == "429 retry-after" else None
            return JSONResponse({"error": {"message": f"{what}, on purpose"}}, status, wait)
        await asyncio.sleep(seconds)
        if what == "body":
            return Response(b'{"choices": [{"mess', media_type="application/json")
        said, finish_reason = self._said(body), "stop"
        if what == "content" and "response_format" in body:
            said = said[: len(said) // 2].replace('"}', "")
        if what == "length":
            said, finish_reason = said[: len(said) // 2], "length"
        if what == "empty":
            said = ""
        usage = {
            "prompt_tokens": sum(words(m["content"]) for m in body["messages"]),
            "completion_tokens": words(said),
        }
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": said},
            "finish_reason": finish_reason,
        }
        reply = JSONResponse({"object": "chat.completion", "choices": [choice], "usage": usage})
        if what == "drop":

            async def half() -> AsyncIterator[bytes]:
                yield bytes(reply.body[: len(reply.body) // 2])

            return StreamingResponse(half(), headers={"content-length": str(len(reply.body))})
        if await request.is_disconnected():
            line["what"] = "gone"
            return Response(status_code=499)
        line |= {"prompt": usage["prompt_tokens"], "completion": usage["completion_tokens"]}
        return reply

    def _said(self, body: dict[str, Any]) -> str:
        turns = [m["content"] for m in body["messages"]]
        asked = next((t for t in reversed(turns) if "\nQuestion " in t), None)
        if asked is None:
            return answer(turns[-1])
        number = asked.partition("\nQuestion ")[2].split()[0]
        return json.dumps({"prompt": better(number)})


def main() -> None:
    """Serves until it is told to stop."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--faults", action="store_true")
    parser.add_argument("--overload", type=float, default=60.0, help="second at which it begins")
    parser.add_argument("--gather", type=int, default=1, help="requests at once before the first answer")
    given = parser.parse_args()
    hostile = Hostile(given)
    app = Starlette(routes=[Route("/v1/chat/completions", hostile.chat, methods=["POST"])])
    # Errors are quiet: a dropped body is one to the server, and here on purpose. When it is told to stop,
    # what it has answered gets a second to arrive: one lost on its way both sides would count otherwise.
    uvicorn.run(
        app,
        port=given.port,
        log_level="critical",
        lifespan="off",
        backlog=4096,
        timeout_graceful_shutdown=1,
    )


if __name__ == "__main__":
    main()
