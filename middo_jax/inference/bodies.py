"""Receives the bodies of requests, which may come slowly and without a length, into a limited memory."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import Iterator

from starlette.requests import Request

from middo_jax.inference.errors import ApiError
from middo_jax.inference.intake import BODIES, LONG_BODY, overloaded

BODY_SECONDS = 60.0  # within which a body must have come
QUICK_SECONDS = 1.0  # after which a body gives way to long ones


@dataclasses.dataclass(eq=False)
class _Coming:
    """A body of which a part has come.

    Attributes:
      deadline: ends the receiving of it.
      since: the loop's time when it began.
      n_bytes: that have come.
      gave_way: it was ended before its time.
    """

    deadline: asyncio.Timeout
    since: float
    n_bytes: int = 0
    gave_way: bool = False


class Bodies:
    """Receives bodies. All that are incomplete have `most_bytes` together, whatever lengths they claim.

    Beyond that, the body that began first gives way: to a short one at once, to a long one if it has been
    coming for QUICK_SECONDS. So clients that send nearly all of a body and hold the rest keep nobody out for
    longer.

    For one event loop.

    Args:
      max_bytes: of one body.
      most_bytes: of all incomplete ones; None: BODIES of the greatest length.
      seconds: in which a body must have come.
    """

    def __init__(self, max_bytes: int, most_bytes: int | None = None, seconds: float = BODY_SECONDS) -> None:
        self.max_bytes = max_bytes
        self._most_bytes = BODIES * max_bytes if most_bytes is None else most_bytes
        self._seconds = seconds
        self._n_bytes = 0
        self._coming: dict[_Coming, None] = {}  # those with bytes, in the order in which they began

    async def receive(self, request: Request) -> bytes:
        """The body of a request.

        Raises:
          ApiError: it is over the limit, has not come in time, or there is no room for it now.
          ClientDisconnect: the client is gone.
        """
        body = bytearray()
        coming: _Coming | None = None
        try:
            async with asyncio.timeout(self._seconds) as deadline:
                coming = _Coming(deadline, asyncio.get_running_loop().time())
                with self._counted(coming):
                    async for part in request.stream():
                        if len(body) + len(part) > self.max_bytes:
                            raise too_large(self.max_bytes)
                        self._add(coming, len(part))
                        body += part
        except TimeoutError:
            if coming is not None and coming.gave_way:
                raise _no_room() from None
            raise ApiError(
                408,
                f"the body has not come within {self._seconds:g} s",
                headers={"connection": "close"},
            ) from None
        return bytes(body)

    @contextlib.contextmanager
    def _counted(self, coming: _Coming) -> Iterator[None]:
        try:
            yield
        finally:
            self._forget(coming)

    def _add(self, coming: _Coming, n_bytes: int) -> None:
        """Counts bytes; ends bodies that give way to them. Raises ApiError if there is no room even so."""
        if not n_bytes or coming.gave_way:
            return
        now = asyncio.get_running_loop().time()
        is_short = coming.n_bytes + n_bytes <= LONG_BODY
        while self._n_bytes + n_bytes > self._most_bytes:
            first = next(iter(self._coming), coming)
            if first is coming or not (is_short or now - first.since >= QUICK_SECONDS):
                raise _no_room()
            self._forget(first)
            if not first.deadline.expired():
                first.gave_way = True
                first.deadline.reschedule(now)
        coming.n_bytes += n_bytes
        self._n_bytes += n_bytes
        self._coming[coming] = None

    def _forget(self, coming: _Coming) -> None:
        if coming in self._coming:
            del self._coming[coming]
            self._n_bytes -= coming.n_bytes


def too_large(max_bytes: int) -> ApiError:
    """The refusal of a body over the limit; the connection is closed, because the body is not read."""
    return ApiError(
        413,
        f"the request's body is over {max_bytes} bytes",
        code="too_large",
        headers={"connection": "close"},
    )


def _no_room() -> ApiError:
    """The refusal of a body of which no more is read."""
    return overloaded("other requests are being received", {"connection": "close"})
