"""Who may send requests, and how large they may be. Both are checked before a body is read.

A page in the user's browser can send requests to loopback addresses, and with DNS rebinding it can read the
answers. Such requests have an Origin header or a foreign name in the Host header, and a page cannot send JSON
to another origin without a preflight request, which is refused here. So the Host must be loopback, an Origin
the server's own, and the content JSON. An address that other machines reach is protected by a token.
"""

from __future__ import annotations

import dataclasses
import hmac
import os
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from middo_jax.config import ConfigError
from middo_jax.inference.bodies import too_large
from middo_jax.inference.errors import ApiError
from middo_jax.loopback import is_loopback

TOKEN_VARIABLE = "MIDDO_SERVE_TOKEN"
SHORTEST_TOKEN = 16  # characters
OPEN_PATH = "/health"  # asked by programs that restart servers, without a token


@dataclasses.dataclass(frozen=True)
class Access:
    """Who may send requests.

    Attributes:
      token: must be in `Authorization: Bearer TOKEN`; None: none is needed.
      only_loopback: the Host header must name a loopback address.
    """

    token: str | None = None
    only_loopback: bool = True

    @classmethod
    def to(cls, host: str) -> Access:
        """Access to a server that listens on `host`, with the token in $MIDDO_SERVE_TOKEN if there is one.

        Raises:
          ConfigError: the address is not loopback and there is no token, or the token is too short.
        """
        token = os.environ.get(TOKEN_VARIABLE) or None
        if token is None and not is_loopback(host):
            raise ConfigError(
                f"config: {host or 'an empty address'} is no loopback address: other machines can reach "
                f"the server. Set ${TOKEN_VARIABLE} to a token of at least {SHORTEST_TOKEN} characters, for "
                "example from `openssl rand -hex 16`; clients send it as their API key"
            )
        if token is not None and not (
            len(token) >= SHORTEST_TOKEN and token.isascii() and token.isprintable()
        ):
            raise ConfigError(
                f"config: ${TOKEN_VARIABLE} must have at least {SHORTEST_TOKEN} printable ASCII characters"
            )
        return cls(token, is_loopback(host))


class Guard:
    """ASGI middleware: refuses what `Access` does not allow, and what is not JSON or too large."""

    def __init__(self, app: ASGIApp, access: Access, max_bytes: int) -> None:
        self.app, self.access, self.max_bytes = app, access, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on, or answers it with a refusal."""
        if scope["type"] == "http":
            try:
                self._check(scope["method"], scope["path"], Headers(scope=scope))
            except ApiError as error:
                await error.response()(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def _check(self, method: str, path: str, headers: Headers) -> None:
        """Raises ApiError; reads headers only."""
        self._check_origin(headers)
        self._check_token(path, headers)
        if method == "POST":
            content_types = headers.getlist("content-type")
            if [value.partition(";")[0].strip().lower() for value in content_types] != ["application/json"]:
                raise ApiError(
                    415,
                    "Content-Type must be application/json",
                    "Content-Type",
                    headers={"connection": "close"},
                )
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length[:20]) > self.max_bytes:
            raise too_large(self.max_bytes)

    def _check_origin(self, headers: Headers) -> None:
        host = headers.get("host", "")
        if self.access.only_loopback and not is_loopback(_host_name(host)):
            raise ApiError(
                403, f"Host: {host!r} is not this server; ask for 127.0.0.1 or localhost", "Host", "forbidden"
            )
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2].lower() != host.lower():
            raise ApiError(
                403, f"Origin: web pages of {origin!r} may not use this server", "Origin", "forbidden"
            )

    def _check_token(self, path: str, headers: Headers) -> None:
        if self.access.token is None or path == OPEN_PATH:
            return
        scheme, _, given = headers.get("authorization", "").partition(" ")
        # In constant time: how long the comparison takes must not depend on how much of the token is right.
        is_token = hmac.compare_digest(given.strip().encode(), self.access.token.encode())
        if scheme.lower() != "bearer" or not is_token:
            raise ApiError(
                401,
                f"the token is missing or wrong; send the server's ${TOKEN_VARIABLE} as the API key",
                "Authorization",
                "invalid_api_key",
                {"www-authenticate": "Bearer", "connection": "close"},
            )


def _host_name(host: str) -> str:
    """The name in a Host header, without its port; "" if it is malformed."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""
