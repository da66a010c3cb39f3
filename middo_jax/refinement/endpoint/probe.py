"""The request that finds out whether a server enforces a schema."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from middo_jax.refinement.endpoint.request import Messages

JSON, TEXT = "json", "text"  # the finding as the cache stores it


@dataclasses.dataclass(frozen=True)
class Probe:
    """A short request with a schema.

    Attributes:
      messages: do not mention the schema, so that only a server that enforces it answers in its form.
      response_format: the schema.
      max_tokens: maximum of the answer.
      is_held: returns whether an answer's text has the schema's form.
      account: the ledger's account for the cost.
    """

    messages: Messages
    response_format: Mapping[str, Any]
    max_tokens: int
    is_held: Callable[[str], bool]
    account: str = "probe"
