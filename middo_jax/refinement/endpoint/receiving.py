"""The HTTP client below the openai package. It limits what a server can make us read, and where a key goes.

- A body is decompressed here, piece by piece, and cut off at a limit. The library's own decompression has no
  limit: 3 MB of gzip make 3 GB of text.
- A redirect to another origin is not followed. Neither the key nor the texts go there.
- JSON that is nested too deep or not in UTF-8 is refused before it is parsed: parsers and printers of JSON
  are recursive.
- Cookies are not kept.
"""

from __future__ import annotations

import contextlib
import contextvars
import http.cookiejar
import json
import zlib
from collections.abc import Iterator
from typing import Any

import openai

from middo_jax.refinement.endpoint.address import shown
from middo_jax.rundir.nesting import NestedTooDeep, NotUtf8, require_flat

TOKEN_BYTES = 256  # of JSON per token: the longest tokens in use are 128 spaces or line breaks
FRAME_BYTES = 262_144  # of an answer, besides the bytes of its tokens
ERROR_BYTES = 65_536  # kept of the body of a refusal
REDIRECTS = 3

# The limit of the answer that is awaited, in bytes of its decompressed body.
_most_bytes = contextvars.ContextVar("most_bytes", default=FRAME_BYTES)


class UnreadableReply(ValueError):
    """A reply that is not read to its end: it is too large, or compressed in an unknown way."""


def answer_bytes(max_tokens: int) -> int:
    """The maximum size of an answer's body in bytes, decompressed."""
    return FRAME_BYTES + max_tokens * TOKEN_BYTES


@contextlib.contextmanager
def limited_to(max_tokens: int) -> Iterator[None]:
    """Within the block, this task's answers may be as long as `max_tokens` tokens can be."""
    token = _most_bytes.set(answer_bytes(max_tokens))
    try:
        yield
    finally:
        _most_bytes.reset(token)


class BoundedClient(openai.DefaultAsyncHttpxClient):
    """The package's HTTP client with the limits of this module. Redirects are followed within one origin."""

    def __init__(self, **options: Any) -> None:
        super().__init__(cookies=_NoCookies(), **options)

    async def send(self, request: Any, *, stream: bool = False, **options: Any) -> Any:
        """Sends a request and reads the whole answer.

        Raises:
          UnreadableReply, NestedTooDeep, NotUtf8: the answer exceeds a limit, or is not in UTF-8.
        """
        del stream  # no caller in this package streams
        options["follow_redirects"] = False
        left = REDIRECTS
        while True:
            response = await super().send(request, stream=True, **options)
            try:
                following = response.next_request
                if following is None:
                    return await _received(response)
                if following.method != request.method or _origin(following.url) != _origin(request.url):
                    return _as_refusal(response, f"it redirects to {shown(str(following.url))}")
                if left == 0:
                    return _as_refusal(response, f"it redirects more than {REDIRECTS} times")
            finally:
                await response.aclose()
            request, left = following, left - 1


class _NoCookies(http.cookiejar.CookieJar):
    def extract_cookies(self, response: Any, request: Any) -> None:
        """Keeps none: they would accumulate, and go back to whoever sent them."""


def _origin(url: Any) -> tuple[Any, ...]:
    ports = {"http": 80, "https": 443}
    return url.scheme, url.host, url.port or ports.get(url.scheme)


async def _received(response: Any) -> Any:
    """The response with its whole body; a refusal's body is cut, since only its beginning is shown."""
    most = _most_bytes.get() if response.is_success else ERROR_BYTES
    body = await _body(response, most)
    if len(body) > most and response.is_success:
        raise UnreadableReply(f"it is longer than {most:,} bytes, the most that max_tokens allows for")
    body = body[:most]
    try:
        require_flat(body)
    except (NestedTooDeep, NotUtf8):
        if response.is_success:
            raise
        body = json.dumps(body.decode("utf-8", "replace")).encode()
    return _with_body(response, body)


async def _body(response: Any, most: int) -> bytes:
    """The decompressed body, or its first `most` + 1 bytes. No more than that is ever decompressed."""
    unpack = _unpacker(response.headers.get("content-encoding", ""))
    body, packed = bytearray(), 0
    async for chunk in response.aiter_raw():
        packed += len(chunk)
        if unpack is None:
            body += chunk[: most + 1 - len(body)]
        else:
            try:
                body += unpack.decompress(chunk, most + 1 - len(body))
            except zlib.error as error:
                raise UnreadableReply(f"its compression is damaged ({error})") from None
        if len(body) > most:
            return bytes(body)
        if packed > most + FRAME_BYTES:  # compressed data may be endless and contain nothing
            raise UnreadableReply(f"it is longer than {packed:,} bytes compressed")
    if unpack is not None and not unpack.eof:
        raise UnreadableReply("its compressed body ends too early")
    return bytes(body)


def _unpacker(encoding: str) -> Any:
    """What decompresses a body, None if it is not compressed."""
    encoding = encoding.strip().lower()
    if encoding in ("", "identity"):
        return None
    if encoding not in ("gzip", "x-gzip", "deflate"):
        raise UnreadableReply(f"it is compressed ({encoding[:40]}), though it was asked for as it is")
    return zlib.decompressobj(wbits=32 + zlib.MAX_WBITS)  # gzip or zlib, by the header


def _as_refusal(response: Any, why: str) -> Any:
    message = f"{why}; neither the key nor any text was sent there. Set refine.base_url to it if you trust it"
    return _with_body(response, json.dumps({"error": {"message": message}}).encode())


def _with_body(response: Any, body: bytes) -> Any:
    """The same response with another body. By its own type: the package has changed its HTTP library."""
    dropped = ("content-encoding", "content-length", "transfer-encoding")
    headers = [(name, value) for name, value in response.headers.multi_items() if name.lower() not in dropped]
    return type(response)(response.status_code, headers=headers, content=body, request=response.request)
