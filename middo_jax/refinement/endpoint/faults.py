"""Failures of requests: how they are read from exceptions, classified, and explained to the user.

Three questions decide what happens after a failure. Can the same request succeed later (5xx, 429, time-outs,
dropped connections, unreadable replies), or is the failure final (400, 401, 403, 404 and the like)? Is the
request at fault, or the endpoint? May the server charge for the try?
"""

from __future__ import annotations

import dataclasses
import email.utils
import json
import math
import time
from collections.abc import Mapping

import openai

from middo_jax.refinement.endpoint.address import Secrets
from middo_jax.refinement.endpoint.dialect import refused_field, refuses_model

RETRIED = {408, 409, 425, 429}  # and every 5xx
OVERLOAD = {429, 503}
UNREAD = {400, 422}  # the server does not accept the request as it is
ENDPOINT_WIDE = {401, 402, 403, 404, 405, 429, 502, 503, 504}  # any other request would fail alike
LONGEST_WAIT_S = 600.0  # maximum `Retry-After`, and maximum time that a server may be away
WORDS = 300  # characters kept of a server's message


class RefinerError(RuntimeError):
    """A request will not be answered. The message says what to do.

    Attributes:
      reason: the short form for the row of one sample.
      stops_stage: whether any other request would fail alike.
    """

    def __init__(self, message: str, reason: str, stops_stage: bool = False) -> None:
        super().__init__(message)
        self.reason = reason
        self.stops_stage = stops_stage


class RequestRefused(RefinerError):
    """The endpoint refuses the request for good: 400, 401, 403, 404, 422 and the like, or an empty quota."""


class EndpointFailed(RefinerError):
    """The endpoint gave no usable answer in any of the tries, or is away."""


class BudgetReached(RefinerError):
    """One more request could exceed `refine.budget`. Requests in flight are finished."""


class NotAnswered(RefinerError):
    """The request was not sent: it waits for a batch, and its task with it."""


@dataclasses.dataclass(frozen=True)
class Fault:
    """Why one try failed.

    Attributes:
      words: the server's message or the exception's.
      status: the HTTP status, if there was one.
      retry_after: seconds that the server asks to wait.
      retried: whether the same request may succeed later.
      endpoint_wide: whether any other request would have failed alike.
      away: whether no server accepts connections.
      overload: whether the server has too many requests.
      charged: whether the server may charge for the try.
      field: the field of the request that the server refuses, if it refuses one.
      no_model: whether the server says that it has no model of the requested name.
    """

    words: str
    status: int | None = None
    retry_after: float | None = None
    retried: bool = True
    endpoint_wide: bool = False
    away: bool = False
    overload: bool = False
    charged: bool = False
    field: str | None = None
    no_model: bool = False

    @property
    def worth_waiting(self) -> bool:
        """Whether to try again: the request may succeed, and the server does not ask for a long wait."""
        return self.retried and (self.retry_after or 0.0) <= LONGEST_WAIT_S

    @property
    def status_text(self) -> str:
        """ " (429)", or "" without a status."""
        return f" ({self.status})" if self.status else ""


def read_fault(error: Exception, timeout: float, secrets: Secrets) -> Fault:
    """The fault that an exception of the openai package describes; `secrets` are removed from its words."""
    if isinstance(error, openai.APIStatusError):
        status = error.status_code
        empty_quota = error.code == "insufficient_quota"  # has status 429, but waiting does not help
        return Fault(
            words(error.body, secrets),
            status,
            retry_after(error.response.headers),
            retried=(status in RETRIED or status >= 500) and not empty_quota,
            endpoint_wide=status in ENDPOINT_WIDE or status < 400,  # a redirect that is not followed
            overload=status in OVERLOAD and not empty_quota,
            field=refused_field(error.body) if status in UNREAD else None,
            no_model=status < 500 and refuses_model(error.body),
        )
    cause = error.__cause__ or error
    if type(cause).__name__ in {"ConnectError", "ConnectTimeout"}:
        told = words(f"{type(cause).__name__}: {cause}", secrets)
        return Fault(told, endpoint_wide=True, away=True)
    if isinstance(error, (openai.APITimeoutError, TimeoutError)):
        return Fault(f"no answer within {timeout:g} s (refine.timeout)", overload=True, charged=True)
    if isinstance(cause, (ValueError, RecursionError)):
        return Fault(words(f"unreadable reply: {cause}", secrets), charged=True)
    return Fault(words(f"{type(cause).__name__}: {cause}", secrets), charged=True)


def words(said: object, secrets: Secrets) -> str:
    """A server's message on one line of printable characters, limited in length.

    Without the API key, which some servers echo.
    """
    if isinstance(said, Mapping):
        said = said.get("message") or said.get("detail") or json.dumps(said, default=str)
    text = secrets.hidden(str(said))  # before the text is cut, so that no part of a key stays
    line = " ".join(text.split()) or "(it gave no reason)"
    line = line if len(line) <= WORDS else line[:WORDS] + "..."
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in line)


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that a server asks to wait: `retry-after-ms`, or `retry-after` in seconds or as a date."""
    for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        text = headers.get(name, "")
        try:
            seconds = float(text) * unit
        except ValueError:
            continue
        return None if math.isnan(seconds) else max(seconds, 0.0)
    try:
        date = email.utils.parsedate_to_datetime(headers.get("retry-after", ""))
        return max(date.timestamp() - time.time(), 0.0)
    except (ValueError, OverflowError):
        return None


def advice(fault: Fault, stops: bool, model: str, api_key_env: str, has_key: bool) -> str:
    """What the user can do about a fault that ended a request or the stage, as a sentence; or ""."""
    if fault.retried and not fault.worth_waiting:
        return f". It asks to wait {fault.retry_after:.0f} s; run the same command again then."
    if fault.status in (401, 403):
        state = "is set" if has_key else "is not set"
        return (
            f". The key is read from the environment variable {api_key_env} (refine.api_key_env), which "
            f"{state}."
        )
    if fault.no_model:
        return f". Asked for the model {model!r}; check refine.model."
    if fault.status in (404, 405):
        return (
            f". Asked for the model {model!r}; check refine.model, and refine.base_url, which usually ends "
            "in /v1."
        )
    if stops and fault.retried:
        return ". Every answer so far is kept; run the same command again once the endpoint can be reached."
    return ""
