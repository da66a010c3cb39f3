"""Whether a server holds its replies to a schema: one request that finds out, and the words it is kept in."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from middo_jax.refine.endpoint.request import Messages

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
