"""Asks an endpoint whether it can be used, before anything is spent: address, key, model name, one token."""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence

import openai

from middo_jax.config import RefineSettings
from middo_jax.refinement.endpoint.faults import Fault, RefinerError, advice, read_fault
from middo_jax.refinement.endpoint.servers import is_loopback, shown

TIMEOUT_S = 60.0  # a served model may have to be loaded first
_LIMITS = ("max_tokens", "max_completion_tokens")  # newer OpenAI models refuse the first name
_LISTED = 5  # names of models in a message


def preflight(urls: str | Sequence[str], model: str, settings: RefineSettings) -> None:
    """Requests the list of models and one token from each server.

    A server that has no list is asked for the token only. A refusal of the request's form (400) is no fault
    here, since the client adapts the form later.

    Raises:
      RefinerError: a server cannot be reached, refuses the key, or does not serve the model; the message says
        which, and what to do.
    """
    key = os.environ.get(settings.api_key_env, "").strip() or None
    for url in [urls] if isinstance(urls, str) else urls:
        with openai.OpenAI(
            api_key=key or "none",
            base_url=url,
            max_retries=1,
            timeout=min(TIMEOUT_S, settings.timeout),
            # A proxy from the environment cannot reach this machine's loopback.
            http_client=openai.DefaultHttpxClient(trust_env=not is_loopback(url)),
        ) as client:
            fault = _one_token(client, model, settings.timeout, key)
            if fault is None or fault.status == 400:
                continue
            said = advice(fault, False, model, settings.api_key_env, key)
            known = _models(client) if fault.status in (404, 422) else []
            raise RefinerError(
                f"the refiner at {shown(url)} cannot be used{fault.status_text}: {fault.words}{said}"
                f"{_names(known, model)} (refine.preflight=false skips this check)",
                fault.words,
                stops_stage=True,
            )


def _one_token(client: openai.OpenAI, model: str, timeout: float, key: str | None) -> Fault | None:
    """Why a request for one token fails; None if it does not."""
    fault = None
    for limit in _LIMITS:
        body = {"model": model, "messages": [{"role": "user", "content": "Hi"}], limit: 1}
        try:
            client.post("/chat/completions", body=body, cast_to=object)
            return None
        except openai.OpenAIError as error:
            fault = read_fault(error, timeout, key)
        if fault.status != 400:
            break
    return fault


def _models(client: openai.OpenAI) -> list[str]:
    """The names in the server's list of models; none if it has no list."""
    try:
        return [model.id for model in client.models.list().data or ()]
    except (openai.OpenAIError, AttributeError, TypeError, ValueError):
        return []


def _names(known: Sequence[str], model: str) -> str:
    if not known or model in known:
        return ""
    near = difflib.get_close_matches(model, known, n=_LISTED, cutoff=0.3) or list(known[:_LISTED])
    return f" It serves {', '.join(near)}."
