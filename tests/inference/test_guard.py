"""Who may send requests, how large they may be, and that the rest is not read."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from middo_jax.config import ConfigError
from middo_jax.inference.bodies import Bodies
from middo_jax.inference.errors import ApiError, show_error
from middo_jax.inference.guard import TOKEN_VARIABLE, Access, Guard

TOKEN = "a-token-of-24-characters"
JSON = {"content-type": "application/json"}


def client(access: Access, max_bytes: int = 100, seconds: float = 5) -> TestClient:
    bodies = Bodies(max_bytes, seconds=seconds)

    async def echo(request: Request) -> PlainTextResponse:
        return PlainTextResponse(str(len(await bodies.receive(request))))

    app = Starlette(
        routes=[Route("/x", echo, methods=["GET", "POST"]), Route("/health", echo)],
        middleware=[Middleware(Guard, access=access, max_bytes=max_bytes)],
        exception_handlers={ApiError: show_error},
    )
    return TestClient(app, base_url="http://127.0.0.1:8000")


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"host": "localhost:8000"}, 200),
        ({"host": "[::1]:8000"}, 200),
        ({"host": "evil.example:8000"}, 403),  # DNS rebinding
        ({"host": "127.0.0.1@evil.example"}, 403),
        ({"host": "[::1"}, 403),
        ({"host": ""}, 403),
        ({"origin": "http://127.0.0.1:8000"}, 200),
        ({"origin": "http://127.0.0.1:9000"}, 403),
        ({"origin": "https://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"host": "evil.example", "origin": "http://evil.example"}, 403),
    ],
)
def test_host_and_origin_must_be_the_servers_own(headers: dict[str, str], status: int) -> None:
    response = client(Access()).post("/x", content=b"{}", headers=JSON | headers)
    assert response.status_code == status
    if status == 403:
        assert response.json()["error"]["code"] == "forbidden"


@pytest.mark.parametrize(
    ("content_type", "status"),
    [
        ("application/json", 200),
        ("Application/JSON; charset=utf-8", 200),
        ("text/plain", 415),
        ("application/x-www-form-urlencoded", 415),
        ("application/json-seq", 415),
        ("", 415),
    ],
)
def test_only_json_is_accepted(content_type: str, status: int) -> None:
    response = client(Access()).post("/x", content=b"{}", headers={"content-type": content_type})
    assert response.status_code == status


@pytest.mark.parametrize(
    ("authorization", "status"),
    [
        (f"Bearer {TOKEN}", 200),
        (f"bearer {TOKEN}", 200),
        (None, 401),
        ("Bearer ", 401),
        (f"Bearer {TOKEN}x", 401),
        (f"Bearer {TOKEN[:-1]}", 401),
        (f"Basic {TOKEN}", 401),
        (TOKEN, 401),
        ("Bearer ü".encode().decode("latin-1"), 401),
    ],
)
def test_a_token_is_asked_for(authorization: str | None, status: int) -> None:
    headers: dict[str, Any] = JSON if authorization is None else JSON | {"authorization": authorization}
    encoded = {name: value.encode("latin-1") for name, value in headers.items()}
    asked = client(Access(TOKEN, only_loopback=False))
    assert asked.post("/x", content=b"{}", headers=encoded).status_code == status
    assert asked.get("/x", headers=encoded).status_code == status
    assert asked.get("/health").status_code == 200


def test_with_a_token_any_name_of_the_machine_will_do() -> None:
    headers = JSON | {"authorization": f"Bearer {TOKEN}", "host": "gpu-7.lan:8000"}
    assert (
        client(Access(TOKEN, only_loopback=False)).post("/x", content=b"{}", headers=headers).status_code
        == 200
    )


def test_a_body_over_the_limit_is_refused_before_it_is_read() -> None:
    """By its length; or, sent in chunks, as soon as it is over."""

    async def received(headers: list[tuple[bytes, bytes]]) -> tuple[int, int]:
        n_read, sent = 0, []

        async def receive() -> dict[str, Any]:
            nonlocal n_read
            n_read += 40
            assert n_read < 1000, "it reads on and on"
            return {"type": "http.request", "body": b"x" * 40, "more_body": True}

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": "/x", "query_string": b"", "root_path": ""}
        same = [(b"host", b"localhost"), (b"content-type", b"application/json")]
        await client(Access()).app(scope | {"headers": same + headers}, receive, send)
        assert (b"connection", b"close") in sent[0]["headers"]
        return sent[0]["status"], n_read

    assert asyncio.run(received([(b"content-length", b"101")])) == (413, 0)
    assert asyncio.run(received([(b"content-length", b"9" * 5000)])) == (413, 0)
    assert asyncio.run(received([(b"transfer-encoding", b"chunked")])) == (413, 120)
    assert client(Access()).post("/x", content=b"x" * 100, headers=JSON).text == "100"


def test_a_body_that_does_not_come_is_given_up() -> None:
    async def status() -> int:
        sent = []

        async def receive() -> dict[str, Any]:
            await asyncio.sleep(60)
            raise AssertionError

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": "/x", "query_string": b"", "root_path": ""}
        headers = [(b"host", b"localhost"), (b"content-type", b"application/json"), (b"content-length", b"9")]
        await client(Access(), seconds=0.05).app(scope | {"headers": headers}, receive, send)
        return sent[0]["status"]

    assert asyncio.run(status()) == 408


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "192.168.0.7", "gpu-7.lan"])
def test_an_address_that_others_reach_needs_a_token(monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    assert Access.to("127.0.0.1") == Access(None, only_loopback=True)
    with pytest.raises(ConfigError, match=r"no loopback address.*\$MIDDO_SERVE_TOKEN"):
        Access.to(host)
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
    assert Access.to(host) == Access(TOKEN, only_loopback=False)
    assert Access.to("localhost") == Access(TOKEN, only_loopback=True)
    monkeypatch.setenv(TOKEN_VARIABLE, "short")
    with pytest.raises(ConfigError, match="at least 16"):
        Access.to(host)
