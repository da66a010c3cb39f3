"""A stream whose client does not read ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, cast

import pytest

from middo_jax.inference import stream as stream_module
from middo_jax.inference.answers import Writer
from middo_jax.inference.generation import Generation, Piece
from middo_jax.inference.stream import EventStream


class Endless:
    """A generation that goes on until it is closed, and the writer of its pieces."""

    is_closed = False

    async def pieces(self) -> AsyncIterator[Piece]:
        while True:
            yield Piece(0, "word", [])

    def chunk(self, piece: Piece) -> dict[str, str]:
        return {"text": piece.text}

    def close(self) -> None:
        self.is_closed = True


def test_a_client_that_does_not_read_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_module, "WRITE_SECONDS", 0.02)
    endless, sent = Endless(), list[Any]()

    async def answer() -> None:
        async def never() -> Any:
            await asyncio.sleep(60)

        async def send(message: Any) -> None:
            sent.append(message)
            if len(sent) > 3:
                await asyncio.sleep(60)  # as the server does while the client reads nothing

        stream = EventStream(cast(Generation, endless), cast(Writer, endless), includes_usage=False)
        await stream({"type": "http"}, never, send)

    asyncio.run(asyncio.wait_for(answer(), 10))
    assert endless.is_closed
    assert len(sent) == 4
