"""Asks an endpoint whether it can be used, before anything is spent: address, key, model name, one token."""

from __future__ import annotations

import asyncio
import difflib
from collections.abc import Sequence

import openai

from middo_jax.config import RefineSettings
from middo_jax.refinement.endpoint.address import Address, Secrets, shown
from middo_jax.refinement.endpoint.client import connect, read_key
from middo_jax.refinement.endpoint.faults import Fault, RefinerError, advice, read_fault
from middo_jax.refinement.endpoint.receiving import limited_to

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
    key = read_key(settings.api_key_env)
    for url in [urls] if isinstance(urls, str) else urls:
        asyncio.run(_check(Address.of(url), model, settings, key))


async def _check(address: Address, model: str, settings: RefineSettings, key: str | None) -> None:
    secrets = Secrets([key, *address.secrets])
    patient = settings.model_copy(update={"timeout": min(TIMEOUT_S, settings.timeout)})
    async with connect(address, key, patient).api as api:
        with limited_to(1):
            fault = await _one_token(api, model, patient.timeout, secrets)
            if fault is None or fault.status == 400:
                return
            known = await _models(api) if fault.status in (404, 422) else []
    said = advice(fault, False, model, settings.api_key_env, key is not None)
    raise RefinerError(
        f"the refiner at {shown(address.url)} cannot be used{fault.status_text}: {fault.words}{said}"
        f"{_names(known, model)} (refine.preflight=false skips this check)",
        fault.words,
        stops_stage=True,
    )


async def _one_token(api: openai.AsyncOpenAI, model: str, timeout: float, secrets: Secrets) -> Fault | None:
    """Why a request for one token fails; None if it does not."""
    fault = None
    for limit in _LIMITS:
        body = {"model": model, "messages": [{"role": "user", "content": "Hi"}], limit: 1}
        try:
            await api.post("/chat/completions", body=body, cast_to=object)
            return None
        except openai.OpenAIError as error:
            fault = read_fault(error, timeout, secrets)
        if fault.status != 400:
            break
    return fault


async def _models(api: openai.AsyncOpenAI) -> list[str]:
    """The names in the server's list of models; none if it has no list."""
    try:
        return [model.id for model in (await api.models.list()).data or ()]
    except (openai.OpenAIError, AttributeError, TypeError, ValueError):
        return []


def _names(known: Sequence[str], model: str) -> str:
    if not known or model in known:
        return ""
    near = difflib.get_close_matches(model, known, n=_LISTED, cutoff=0.3) or list(known[:_LISTED])
    return f" It serves {', '.join(near)}."
