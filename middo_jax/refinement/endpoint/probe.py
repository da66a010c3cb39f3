"""Whether a server holds its replies to a schema: one request that finds out, and the words it is kept in."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from middo_jax.refinement.endpoint.cache import AnswerCache
from middo_jax.refinement.endpoint.faults import RequestRefused
from middo_jax.refinement.endpoint.request import Messages, Requests

JSON, TEXT = "json", "text"  # as the cache keeps the finding


@dataclasses.dataclass(frozen=True)
class Probe:
    """A short request with a schema.

    Attributes:
      messages: do not mention the schema: only a server that enforces it answers in its form.
      response_format: the schema.
      max_tokens: of the answer.
      is_held: whether an answer's text is in the schema's form.
      account: where the cost is entered.
    """

    messages: Messages
    response_format: Mapping[str, Any]
    max_tokens: int
    is_held: Callable[[str], bool]
    account: str = "probe"


def schema_refusal(cache: AnswerCache, requests: Requests) -> RequestRefused | None:
    """The refusal that any request with a schema met, as the cache keeps it; None if none did."""
    reason = cache.fact(requests.schema_fact)
    return None if reason is None else RequestRefused(f"the refiner refuses schemas: {reason}", reason)
