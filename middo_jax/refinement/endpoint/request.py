"""One chat request: its body, the key of its answer, and how the answer is read."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from middo_jax.config import RefineSettings
from middo_jax.refinement.endpoint.address import Secrets
from middo_jax.refinement.endpoint.ending import ending

Messages = list[dict[str, str]]
_REASON_CHARS = 64  # kept of a finish reason


@dataclasses.dataclass(frozen=True)
class Answer:
    """An endpoint's answer.

    Attributes:
      text: of the answer.
      finish_reason: as the server spells it, see `ending`.
      prompt_tokens, completion_tokens: 0 if the server does not count them.
      cached_tokens: prompt tokens from the server's own prefix cache.
      from_cache: whether the answer is from our cache and was free.
      key: of the request.
    """

    text: str
    finish_reason: str
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    from_cache: bool = False
    key: str = ""


@dataclasses.dataclass(frozen=True)
class PreparedRequest:
    """A request: `body` is sent, `canonical` identifies the request, `key` is the hash of `canonical`."""

    key: str
    body: dict[str, Any]
    canonical: str


@dataclasses.dataclass(frozen=True)
class Requests:
    """Builds the requests of one stage from the values that they share.

    Attributes:
      model: the model's name at the server.
      settings: sampling and limits.
      seed: is sent, plus the attempt, unless None.
      prompt_version: part of every key, so that answers to older prompts are not reused.
    """

    model: str
    settings: RefineSettings
    seed: int | None = None
    prompt_version: str = ""

    def build(
        self,
        messages: Messages,
        *,
        attempt: int = 0,
        response_format: Mapping[str, Any] | None = None,
        max_tokens: int | None = None,
    ) -> PreparedRequest:
        """A request with the sampling of the settings.

        Its key depends on its body, the model's revision, the version of the prompts and the attempt. It does
        not depend on the server's address or the API key.

        Args:
          messages: the conversation.
          attempt: requests of different attempts are different requests.
          response_format: a schema that the server is to enforce; None for free text.
          max_tokens: None: `refine.max_tokens`.
        """
        settings = self.settings
        body = {
            "messages": [{"role": m["role"], "content": encodable(m["content"])} for m in messages],
            "model": self.model,
            "temperature": settings.temperature,
            "top_p": 1.0,  # all tokens, as published
            "max_tokens": settings.max_tokens if max_tokens is None else max_tokens,
        }
        if self.seed is not None:
            body["seed"] = self.seed + attempt  # a later attempt is another sample
        if response_format is not None:
            body["response_format"] = dict(response_format)
        identity = {
            "seed": None,
            "response_format": None,
            **body,
            "model_revision": settings.model_revision,
            "prompt_version": self.prompt_version,
            "attempt": attempt,
        }
        return PreparedRequest(request_key(identity), body, canonical(identity))

    @property
    def form_fact(self) -> str:
        """The cache's name for the fact whether this model's server enforces schemas."""
        return f"form of {self.served}"

    @property
    def schema_fact(self) -> str:
        """The cache's name for the reason why this model's server refuses schemas, if it does."""
        return f"schema refused by {self.served}"

    @property
    def served(self) -> str:
        """The model and its revision. The cache stores facts about servers under this name."""
        return f"{self.model} {self.settings.model_revision or ''}".rstrip()


def canonical(request: Mapping[str, Any]) -> str:
    """A request as JSON with sorted keys and no spaces: equal requests give equal text."""
    return json.dumps(request, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def request_key(request: Mapping[str, Any]) -> str:
    """SHA-256 of the canonical request, in hexadecimal."""
    return hashlib.sha256(canonical(request).encode("ascii")).hexdigest()


def read_answer(body: Any, key: str, secrets: Secrets) -> Answer:
    """The answer in a chat completion's JSON: its first choice, without `secrets` that the server echoes.

    The content may be a text, or a list of parts whose texts are joined. A reply that a limit or a filter
    ended may have no text. Any other reply without text is unreadable, so that the request is tried again.

    Raises:
      ValueError: the reply has no choice or no text, or the server broke it off.
    """
    try:
        choice = body["choices"][0]
        message = choice["message"]
        content, refusal = _content(message.get("content")), message.get("refusal")
    except (TypeError, LookupError, AttributeError):
        said = body.get("error", body) if isinstance(body, dict) else body
        raise ValueError(f"a reply without choices: {said}") from None
    reason = secrets.hidden(encodable(str(choice.get("finish_reason") or "stop")))[:_REASON_CHARS]
    if not content and isinstance(refusal, str) and refusal:
        content, reason = refusal, "content_filter"
    how = ending(reason)
    if how == "broken":
        raise ValueError(f"the server broke the answer off (finish_reason {reason!r})")
    if content is None and how == "whole":
        called = " but tool calls" if message.get("tool_calls") or message.get("function_call") else ""
        raise ValueError(f"a reply without text{called} (finish_reason {reason!r})")
    usage = body.get("usage")
    prompt_tokens = _count(usage, "prompt_tokens")
    details = usage.get("prompt_tokens_details") if isinstance(usage, dict) else None
    return Answer(
        text=secrets.hidden_in_answer(encodable(content or "")),
        finish_reason=reason,
        prompt_tokens=prompt_tokens,
        completion_tokens=_count(usage, "completion_tokens"),
        cached_tokens=min(_count(details, "cached_tokens"), prompt_tokens),
        key=key,
    )


def _content(content: Any) -> str | None:
    """The text of a message's content; None if there is none.

    [{"type": "thinking", "thinking": "Hm."}, {"type": "text", "text": "A bird."}]  ->  "A bird."
    """
    if isinstance(content, str):
        return content
    parts = [content] if isinstance(content, dict) else content
    if not isinstance(parts, list):
        return None
    texts = [text for part in parts if (text := _part_text(part)) is not None]
    return "".join(texts) if texts else None


def _part_text(part: Any) -> str | None:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict) or part.get("type", "text") not in ("text", "output_text"):
        return None
    text = part.get("text", part.get("content"))
    if isinstance(text, dict):  # {"text": {"value": "..."}}
        text = text.get("value")
    return text if isinstance(text, str) else None


def _count(usage: Any, name: str) -> int:
    count = usage.get(name) if isinstance(usage, dict) else None
    return count if isinstance(count, int) and 0 < count < 2**53 else 0  # servers may send nonsense


def encodable(text: str) -> str:
    """Text without lone surrogates, which JSON can escape but UTF-8 and SQLite cannot represent."""
    return text.encode("utf-8", "replace").decode("utf-8")
