"""What the cache already has about a request: its answer, or the refusal of its schema."""

from __future__ import annotations

from middo_jax.refinement.endpoint.cache import AnswerCache
from middo_jax.refinement.endpoint.faults import RequestRefused
from middo_jax.refinement.endpoint.ledger import Ledger
from middo_jax.refinement.endpoint.request import Answer, PreparedRequest, Requests


def stored_answer(
    request: PreparedRequest, account: str, requests: Requests, cache: AnswerCache, ledger: Ledger
) -> Answer | None:
    """The answer that the cache has for a request, counted in the ledger; None if it has none.

    Raises:
      RequestRefused: there is no answer, and the model's server is known to refuse requests with a schema.
    """
    if stored := cache.get(request.key):
        ledger.hit(account)
        return stored
    if "response_format" in request.body and (reason := cache.fact(requests.schema_fact)) is not None:
        raise RequestRefused(f"the refiner refuses schemas: {reason}", reason)
    return None


def keep_schema_refusal(reason: str, requests: Requests, cache: AnswerCache) -> None:
    """Records that the model's server refuses schemas; see `stored_answer`."""
    cache.learn(requests.schema_fact, reason)
