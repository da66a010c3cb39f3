"""What can go wrong with a request: read from an exception, told apart, and said to the user.

Three questions decide what happens next. Can the same request succeed later (5xx, 429, time-outs, dropped
connections, unreadable replies), or is the answer final (400, 401, 403, 404 and their like)? Is the request
at fault, or the endpoint? And may the server charge for what it did not deliver?
"""

from __future__ import annotations

import dataclasses
import email.utils
import json
import math
import time
from collections.abc import Mapping

from middo_jax.refinement.endpoint.dialect import refused_field

RETRIED = {408, 409, 425, 429}  # and every 5xx
OVERLOAD = {429, 503}
UNREAD = {400, 422}  # the server could not take the request as it was written
ENDPOINT_WIDE = {401, 402, 403, 404, 405, 429, 502, 503, 504}  # would meet any other request as well
LONGEST_WAIT_S = 600.0  # that a server may ask for, or be away
WORDS = 300  # characters kept of what a server says


class RefinerError(RuntimeError):
    """A request that will not be answered. The text tells the user what to do.

    `reason` is the short form for one sample's row; `stops_stage` says that no other would fare better.
    """

    def __init__(self, message: str, reason: str, stops_stage: bool = False) -> None:
        super().__init__(message)
        self.reason = reason
        self.stops_stage = stops_stage


class RequestRefused(RefinerError):
    """The endpoint said no, and would again: 400, 401, 403, 404, 422 and their like, or an empty quota."""


class EndpointFailed(RefinerError):
    """The endpoint gave no usable answer in all of the tries, or is away."""


class BudgetReached(RefinerError):
    """One more request could pass `refine.budget`. What is in flight is kept."""


class NotAnswered(RefinerError):
    """Nobody was asked: the request waits for a batch, and its task with it."""


@dataclasses.dataclass(frozen=True)
class Fault:
    """Why one try failed.

    `retry_after` is in seconds; `retried` says that the same request may succeed later; `endpoint_wide` that
    any other would have met the same; `away` that nobody listens; `overload` that there is too much at once;
    `charged` that the server may ask money for it; `field` that it refuses this field of the request.
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

    @property
    def worth_waiting(self) -> bool:
        """Whether to try again: it may succeed, and the server does not ask for hours."""
        return self.retried and (self.retry_after or 0.0) <= LONGEST_WAIT_S

    @property
    def status_text(self) -> str:
        """ " (429)", or nothing where there was no status."""
        return f" ({self.status})" if self.status else ""


def read_fault(error: Exception, timeout: float, key: str | None) -> Fault:
    """What an exception of the openai package says about a try; `key` is kept out of the words."""
    import openai

    if isinstance(error, openai.APIStatusError):
        status = error.status_code
        empty_quota = error.code == "insufficient_quota"  # answered with 429, yet waiting does not help
        return Fault(
            words(error.body, key),
            status,
            retry_after(error.response.headers),
            retried=(status in RETRIED or status >= 500) and not empty_quota,
            endpoint_wide=status in ENDPOINT_WIDE,
            overload=status in OVERLOAD and not empty_quota,
            field=refused_field(error.body) if status in UNREAD else None,
        )
    cause = error.__cause__ or error
    if type(cause).__name__ in {"ConnectError", "ConnectTimeout"}:
        told = words(f"{type(cause).__name__}: {cause}", key)
        return Fault(told, endpoint_wide=True, away=True)
    if isinstance(error, (openai.APITimeoutError, TimeoutError)):
        return Fault(f"no answer within {timeout:g} s (refine.timeout)", overload=True, charged=True)
    if isinstance(error, ValueError):
        return Fault(words(f"unreadable reply: {error}", key), charged=True)
    return Fault(words(f"{type(cause).__name__}: {cause}", key), charged=True)


def words(said: object, key: str | None) -> str:
    """What a server said, on one line, not without end, and without the key that some echo."""
    if isinstance(said, Mapping):
        said = said.get("message") or said.get("detail") or json.dumps(said, default=str)
    text = str(said)
    if key:  # before anything is cut, or half of it might stay
        text = text.replace(key, "***")
    line = " ".join(text.split()) or "(it gave no reason)"
    return line if len(line) <= WORDS else line[:WORDS] + "..."


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


def advice(fault: Fault, stops: bool, model: str, api_key_env: str, key: str | None) -> str:
    """What the user can do about a fault that ended a request, or the stage, as a sentence; or ""."""
    if fault.retried and not fault.worth_waiting:
        return f". It asks to wait {fault.retry_after:.0f} s; run the same command again then."
    if fault.status in (401, 403):
        state = "is set" if key else "is not set"
        return (
            f". The key is read from the environment variable {api_key_env} (refine.api_key_env), which "
            f"{state}."
        )
    if fault.status in (404, 405):
        return (
            f". Asked for the model {model!r}; check refine.model, and refine.base_url, which usually ends "
            "in /v1."
        )
    if stops and fault.retried:
        return ". Every answer so far is kept; run the same command again once the endpoint can be reached."
    return ""
