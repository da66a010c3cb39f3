"""Incomplete bodies have a limited memory together, and slow ones keep nobody out."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest
from starlette.requests import ClientDisconnect, Request

from middo_jax.inference import bodies as bodies_module
from middo_jax.inference.bodies import Bodies
from middo_jax.inference.errors import ApiError

LENGTH = 1000


@pytest.fixture(autouse=True)
def short_is_up_to_100_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies_module, "LONG_BODY", 100)


class Client:
    """Sends a body in parts, when told to."""

    def __init__(self, bodies: Bodies, length: int | None = LENGTH) -> None:
        headers = [] if length is None else [(b"content-length", b"%d" % length)]
        self._messages = asyncio.Queue[dict[str, Any]]()
        scope = {"type": "http", "method": "POST", "path": "/x", "headers": headers}
        self.receiving = asyncio.ensure_future(bodies.receive(Request(scope, self._messages.get)))

    async def send(self, n_bytes: int, *, is_last: bool = False) -> None:
        """Sends a part, and lets the server work until it has nothing to do."""
        self._messages.put_nowait({"type": "http.request", "body": b"x" * n_bytes, "more_body": not is_last})
        await settle()

    def leave(self) -> None:
        self._messages.put_nowait({"type": "http.disconnect"})

    def refusal(self) -> ApiError:
        error = self.receiving.exception()
        assert isinstance(error, ApiError)
        return error


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, 30))


@pytest.mark.parametrize("length", [LENGTH, None])
def test_bodies_that_are_held_have_a_limited_memory(length: int | None) -> None:
    """100 clients send all but the last byte."""

    async def hold() -> None:
        bodies = Bodies(LENGTH)
        clients = [Client(bodies, length) for _ in range(100)]
        for client in clients:
            await client.send(LENGTH - 1)
        held = [client for client in clients if not client.receiving.done()]
        assert len(held) == 8
        refusal = clients[-1].refusal()
        assert (refusal.status, refusal.code) == (429, "overloaded")
        assert refusal.headers == {"retry-after": "1", "connection": "close"}
        short = Client(bodies, length)
        await short.send(100, is_last=True)
        assert len(await short.receiving) == 100
        assert held.pop(0).refusal().status == 429
        for client in held:
            await client.send(1, is_last=True)
            assert len(await client.receiving) == LENGTH
        after = Client(bodies, length)
        await after.send(LENGTH, is_last=True)
        assert len(await after.receiving) == LENGTH

    run(hold())


def test_slow_bodies_keep_no_other_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies_module, "QUICK_SECONDS", 0.0)

    async def compete() -> None:
        bodies = Bodies(LENGTH, most_bytes=2 * LENGTH)
        silent = Client(bodies)  # takes no room, whatever length it claims
        slow = [Client(bodies) for _ in range(2)]
        for client in slow:
            await client.send(LENGTH - 1)
        for _ in range(2):
            quick = Client(bodies)
            await quick.send(LENGTH, is_last=True)
            assert len(await quick.receiving) == LENGTH
        assert slow[0].refusal().status == 429
        assert not slow[1].receiving.done()  # one was enough
        await slow[1].send(1, is_last=True)
        assert len(await slow[1].receiving) == LENGTH
        await silent.send(LENGTH, is_last=True)
        assert len(await silent.receiving) == LENGTH

    run(compete())


@pytest.mark.parametrize("end", ["cancelled", "gone", "too large", "late", "read"])
def test_room_is_free_again_however_a_body_ends(end: str) -> None:
    async def end_and_come_again() -> None:
        bodies = Bodies(LENGTH, most_bytes=LENGTH, seconds=0.02 if end == "late" else 30)
        for _ in range(3):
            client = Client(bodies)
            await client.send(LENGTH - 1)
            assert not client.receiving.done()
            if end == "cancelled":
                client.receiving.cancel()
            elif end == "gone":
                client.leave()
            elif end == "too large":
                await client.send(2)
            elif end == "read":
                await client.send(1, is_last=True)
            [result] = await asyncio.gather(client.receiving, return_exceptions=True)
            expected = {"cancelled": asyncio.CancelledError, "gone": ClientDisconnect, "read": bytes}
            assert isinstance(result, expected.get(end, ApiError))
            if isinstance(result, ApiError):
                assert result.status == {"too large": 413, "late": 408}[end]

    run(end_and_come_again())
