"""Answers as server-sent events: `data: {...}` per piece, at the end `data: [DONE]`."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from middo_jax.inference.answers import Json, Writer
from middo_jax.inference.errors import of
from middo_jax.inference.generation import Generation, while_connected

HEADERS = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-store"}

WRITE_SECONDS = 60.0  # in which a client must have read what was sent to it


class EventStream(Response):
    """Sends a generation as it comes and closes it at the end, or when the client is gone
    or has not read for WRITE_SECONDS.

    An error after the beginning is an event with OpenAI's error object; no `[DONE]` follows it.
    """

    def __init__(self, generation: Generation, writer: Writer, includes_usage: bool) -> None:
        super().__init__(headers=HEADERS)
        self._generation, self._writer, self._includes_usage = generation, writer, includes_usage

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the response."""
        with contextlib.closing(self._generation), contextlib.suppress(ClientDisconnect):
            await while_connected(receive, self._send(send))

    async def _send(self, send: Send) -> None:
        headers = [(name, value) for name, value in self.raw_headers if name != b"content-length"]
        await _put(send, {"type": "http.response.start", "status": 200, "headers": headers})
        async for event in self._events():
            await _put(send, {"type": "http.response.body", "body": event, "more_body": True})
        await _put(send, {"type": "http.response.body", "body": b""})

    async def _events(self) -> AsyncIterator[bytes]:
        n_tokens = 0
        try:
            async for piece in self._generation.pieces():
                n_tokens += len(piece.steps)
                # Held-back text makes empty pieces, which nobody needs.
                if piece.text or piece.finish_reason or piece.steps[0].logprob:
                    yield _event(self._writer.chunk(piece))
        except Exception as error:
            yield _event(of(error).body())
            return
        if self._includes_usage:
            yield _event(self._writer.usage_chunk(n_tokens))
        yield b"data: [DONE]\n\n"


async def _put(send: Send, message: Message) -> None:
    """Sends a message. Raises ClientDisconnect if the client does not read, as if it had left."""
    try:
        async with asyncio.timeout(WRITE_SECONDS):
            await send(message)
    except TimeoutError:
        raise ClientDisconnect from None


def _event(value: Json) -> bytes:
    return f"data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()
