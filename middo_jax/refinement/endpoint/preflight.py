"""Asks an endpoint whether it can be used, before anything is spent: address, key, model name, one token."""

from __future__ import annotations

import asyncio
import difflib
from collections.abc import Sequence

import openai

from middo_jax.config import RefineSettings
from middo_jax.refinement.endpoint.address import Address, Secrets, shown
from middo_jax.refinement.endpoint.client import connect, read_key
from middo_jax.refinement.endpoint.dialect import refuses_model
from middo_jax.refinement.endpoint.faults import Fault, RefinerError, advice, read_fault, words
from middo_jax.refinement.endpoint.receiving import limited_to

TIMEOUT_S = 60.0  # a served model may have to be loaded first
# Of a request. The last two: an answer that is no JSON, or exceeds a limit of `receiving`.
_FAILURES = (openai.OpenAIError, TimeoutError, ValueError, RecursionError)
_LIMITS = ("max_tokens", "max_completion_tokens")  # newer OpenAI models refuse the first name
_LISTED = 5  # names of models in a message
_LIST_TOKENS = 16_384  # limit of a list of models, as of an answer: about 4 MB


def preflight(urls: str | Sequence[str], model: str, settings: RefineSettings) -> list[str]:
    """Requests one token and the list of models (`/v1/models`) from each server; returns warnings.

    A server that has no list, or refuses it, is judged by the token alone. A refusal of the request's form
    (400) is no fault here, since the client adapts the form later; but it is one if its words or the list
    say that there is no such model. A server that answers although its list does not have the model is
    warned of: some answer to any name.

    Raises:
      RefinerError: a server cannot be reached, refuses the key, or does not serve the model; the message says
        which, and what to do.
    """
    key = read_key(settings.api_key_env)
    every = [urls] if isinstance(urls, str) else urls
    warnings = [asyncio.run(_check(Address.of(url), model, settings, key)) for url in every]
    return [warning for warning in warnings if warning is not None]


async def _check(address: Address, model: str, settings: RefineSettings, key: str | None) -> str | None:
    """The warning of one server, if there is one."""
    secrets = Secrets([key, *address.secrets])
    patient = settings.model_copy(update={"timeout": min(TIMEOUT_S, settings.timeout)})
    async with connect(address, key, patient).api as api:
        with limited_to(1):
            fault = await _one_token(api, model, patient.timeout, secrets)
        known: list[str] = []
        if fault is None or fault.no_model or fault.status in (400, 404, 422):
            with limited_to(_LIST_TOKENS):
                known = await _models(api, patient.timeout, secrets)
    is_form = fault is not None and fault.status == 400 and not fault.no_model
    if (fault is None or is_form) and (not known or model in known):
        return None
    if fault is None:
        return (
            f"warning: the refiner at {shown(address.url)} answers, but its list of models does not have "
            f"{model!r}.{_names(known, model)} Check refine.model"
        )
    told = advice(fault, False, model, settings.api_key_env, key is not None)
    if not told and fault.status is None and fault.retried:  # nobody answers
        told = ". Start the server, or check refine.base_url."
    why = fault.words.rstrip(".") + told
    raise RefinerError(
        f"the refiner at {shown(address.url)} cannot be used{fault.status_text}: {why}{_names(known, model)} "
        "(refine.preflight=false skips this check)",
        fault.words,
        stops_stage=True,
    )


async def _one_token(api: openai.AsyncOpenAI, model: str, timeout: float, secrets: Secrets) -> Fault | None:
    """Why a request for one token fails; None if it does not."""
    fault = None
    for limit in _LIMITS:
        body = {"model": model, "messages": [{"role": "user", "content": "Hi"}], limit: 1}
        try:
            async with asyncio.timeout(timeout):  # the package's own is for the time between two bytes
                reply = await api.post("/chat/completions", body=body, cast_to=object)
        except _FAILURES as error:
            fault = read_fault(error, timeout, secrets)
        else:
            return _without_choices(reply, secrets)
        if fault.status != 400 or fault.no_model:
            break
    return fault


def _without_choices(reply: object, secrets: Secrets) -> Fault | None:
    """The fault of a reply that is no chat completion: some proxies send a refusal with status 200."""
    if isinstance(reply, dict) and reply.get("choices"):
        return None
    said = (reply.get("error") or reply) if isinstance(reply, dict) else reply
    told, no_model = f"the reply has no choices: {words(said, secrets)}", refuses_model(said)
    hint = "" if no_model else ". Check refine.base_url, which usually ends in /v1."
    return Fault(told + hint, retried=False, charged=True, no_model=no_model)


async def _models(api: openai.AsyncOpenAI, timeout: float, secrets: Secrets) -> list[str]:
    """The names in the server's list of models; none if it has no list, or one that is too long to read."""
    try:
        async with asyncio.timeout(timeout):
            return [words(model.id, secrets) for model in (await api.models.list()).data or ()]
    except (*_FAILURES, AttributeError, TypeError):
        return []


def _names(known: Sequence[str], model: str) -> str:
    if not known or model in known:
        return ""
    near = difflib.get_close_matches(model, known, n=_LISTED, cutoff=0.3) or list(known[:_LISTED])
    return f" It serves {', '.join(near)}."
