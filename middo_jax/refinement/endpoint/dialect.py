"""The names of a request's fields at a server: learnt from its refusals, once, and kept in the cache.

Newer OpenAI models refuse `max_tokens` and expect `max_completion_tokens`. They and others refuse `top_p`,
`seed` and any `temperature` but their own. The keys of answers do not depend on these names.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from typing import Any

from middo_jax.refinement.endpoint.cache import AnswerCache

LIMITS = ("max_tokens", "max_completion_tokens")  # two names of one field
OPTIONAL = ("temperature", "top_p", "seed")
LEFT_OUT = "left out"

_log = logging.getLogger(__name__)

_CODES = {"unsupported_parameter", "unsupported_value", "unknown_parameter", "extra_forbidden"}
_UNSUPPORTED = re.compile(
    r"unsupported|not supported|(?:not|n't) support|unrecogni[sz]ed|unknown (?:parameter|argument|field|name)"
    r"|unexpected (?:keyword|argument|field|parameter)|not permitted|not allowed|extra (?:inputs|fields)"
    r"|deprecated|cannot both|only[^.]{0,40}\b(?:allowed|supported)|use .?max_completion_tokens"
    r"|invalid (?:parameter|argument)\b",
    re.IGNORECASE,
)
_NAMED = re.compile(r"\b(?:max_tokens|max_completion_tokens|temperature|top_p|seed)\b")
# How servers say that they have no model of the requested name. Not: "this model does not support ...".
_NO_MODEL = re.compile(
    r"\bmodel\b(?!'s)(?:(?!\.\s).){0,200}?\b(?:(?:does not|doesn't|not) exist|not (?:be )?found|not a valid"
    r"|is not (?:available|served))"
    r"|\b(?:invalid|unknown|no such|unrecogni[sz]ed|not found the|not a valid) model\b"
    r"(?! (?:parameter|argument|option|setting|output))|模型不存在",
    re.IGNORECASE,
)
_NO_MODEL_CODE = re.compile(
    r"model_?not_?(?:found|exist)|(?:invalid|unknown)_?model\b|deployment_?not_?found", re.IGNORECASE
)


def refused_field(said: object) -> str | None:
    """The field of a request that a refusal complains about; None if it has another reason.

    {"message": "Unsupported parameter: 'max_tokens' ...", "param": "max_tokens"}  ->  "max_tokens"
    """
    if isinstance(said, Mapping) and isinstance(said.get("error"), Mapping):
        said = said["error"]
    for text, code, field in _complaints(said):
        named = [match.group() for match in _NAMED.finditer(f"{field} {text}")]
        if not named or not (code in _CODES or _UNSUPPORTED.search(text)):
            continue
        # "`temperature` and `top_p` cannot both be specified": leaving out one of them is enough.
        return "top_p" if "cannot both" in text and "top_p" in named else named[0]
    return None


def refuses_model(said: object) -> bool:
    """Whether a refusal complains that the server has no model of the request's name.

    OpenAI, vLLM and Ollama refuse with 404; llama.cpp's router, LiteLLM, DeepSeek and others with 400.

    {"message": "model not found", "type": "invalid_request_error"}  ->  True
    {"message": "'max_tokens' is not supported with this model"}  ->  False
    """
    if isinstance(said, Mapping) and isinstance(said.get("error"), Mapping):
        said = said["error"]
    kind = str(said.get("type") or "") if isinstance(said, Mapping) else ""
    return any(
        field == "model"
        or bool(_NO_MODEL_CODE.search(f"{code} {kind}"))
        or bool(_NO_MODEL.search(text, 0, 1_000))
        for text, code, field in _complaints(said)
    )


def _complaints(said: object) -> Iterator[tuple[str, str, str]]:
    """(message, code, field) of each complaint in a refusal, in the formats of OpenAI and of pydantic."""
    if isinstance(said, str):
        yield said, "", ""
    if not isinstance(said, Mapping):
        return
    details = next((said[name] for name in ("detail", "errors", "message") if said.get(name)), "")
    for detail in details if isinstance(details, list) else [details]:
        if isinstance(detail, Mapping):
            at = detail.get("loc") or [detail.get("param") or ""]
            field = str(at[-1]) if isinstance(at, (list, tuple)) else str(at)
            told = next((detail[name] for name in ("msg", "message", "error") if detail.get(name)), "")
            yield str(told), str(detail.get("type") or ""), field
        else:
            yield str(detail), str(said.get("code") or ""), str(said.get("param") or "")


class Dialect:
    """The fields of requests as the servers of one model accept them."""

    def __init__(self, cache: AnswerCache, served: str) -> None:
        """Reads the findings from the cache.

        Args:
          cache: stores the findings.
          served: the model and its revision, see `Requests.served`.
        """
        self._cache, self._served = cache, served
        self._names: dict[str, str] = {}  # a field -> its name for this server, or LEFT_OUT
        for field in (LIMITS[0], *OPTIONAL):
            if known := cache.fact(self._fact(field)):
                self._names[field] = known
        self._tried = {(field, name) for field, name in self._names.items()}

    def sent(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """A request's body with the fields as the server accepts them."""
        named = {self._names.get(field, field): value for field, value in body.items()}
        named.pop(LEFT_OUT, None)
        return named

    def adapt(self, field: str | None, sent: Mapping[str, Any]) -> bool:
        """Learns that a server refused a field. Returns whether the request should be sent again.

        Args:
          field: as `refused_field` returns it.
          sent: the body that was refused.
        """
        if field is None or field not in sent:
            return False
        ours = LIMITS[0] if field in LIMITS else field
        if self._names.get(ours, ours) != field:  # another request has learnt it meanwhile
            return True
        other = LIMITS[field == LIMITS[0]] if field in LIMITS else LEFT_OUT
        if (ours, other) in self._tried:
            return False
        self._tried |= {(ours, field), (ours, other)}
        self._names[ours] = self._cache.learn(self._fact(ours), other, replace=True)
        instead = "left out, and the server's own applies" if other == LEFT_OUT else f"sent as {other!r}"
        _log.warning("the refiner refuses the field %r: from now on it is %s", field, instead)
        return True

    def _fact(self, field: str) -> str:
        return f"{field} of {self._served}"
