"""One chat request: the body that is sent, the key under which its answer is kept, and the answer read."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from middo_jax.config import RefineSettings
from middo_jax.refinement.endpoint.ending import ending

Messages = list[dict[str, str]]


@dataclasses.dataclass(frozen=True)
class Answer:
    """What an endpoint answered. Token counts are 0 where the server does not tell them.

    `cached_tokens` are the prompt tokens that the server had in its own prefix cache; `from_cache` says that
    the whole answer came from ours and cost nothing.
    """

    text: str
    finish_reason: str
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    from_cache: bool = False
    key: str = ""


@dataclasses.dataclass(frozen=True)
class ChatRequest:
    """A request: `body` is sent, `canonical` tells it from all others, `key` is the hash of that."""

    key: str
    body: dict[str, Any]
    canonical: str


@dataclasses.dataclass(frozen=True)
class Requests:
    """Builds the requests of one stage; holds what they have in common.

    Attributes:
      model: the name to ask for.
      settings: sampling and limits.
      seed: sent along where given.
      prompt_version: part of every key, so that answers to older prompts are not taken for new ones.
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
    ) -> ChatRequest:
        """A request under the settings' sampling.

        Its key also depends on the model's revision, the version of the prompts and the attempt, but neither
        on the server's address nor on the API key.

        Args:
          messages: the conversation.
          attempt: another attempt is another request.
          response_format: a schema to which the server holds the reply; None for free text.
          max_tokens: None takes the settings'.
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
            body["seed"] = self.seed
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
        return ChatRequest(request_key(identity), body, canonical(identity))

    @property
    def form_fact(self) -> str:
        """The name under which the cache keeps whether this model's server honours schemas."""
        return f"form of {self.served}"

    @property
    def schema_fact(self) -> str:
        """The name under which the cache keeps why this model's server refuses schemas, if it does."""
        return f"schema refused by {self.served}"

    @property
    def served(self) -> str:
        """The model and its revision, by which the cache tells what is known of its servers."""
        return f"{self.model} {self.settings.model_revision or ''}".rstrip()


def canonical(request: Mapping[str, Any]) -> str:
    """A request as JSON with sorted keys and no spaces: equal requests give equal text."""
    return json.dumps(request, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def request_key(request: Mapping[str, Any]) -> str:
    """SHA-256 of the canonical request, in hexadecimal."""
    return hashlib.sha256(canonical(request).encode("ascii")).hexdigest()


def read_answer(body: Any, key: str) -> Answer:
    """The first choice of a chat completion's JSON.

    Content may be a text or a list of parts, of which the text is taken. A reply that a limit or a filter
    ended may have no text. Any other reply without text is unreadable: the same request may be answered yet.

    Raises:
      ValueError: there is no choice in it, no text, or the server broke it off.
    """
    try:
        choice = body["choices"][0]
        message = choice["message"]
        content, refusal = _content(message.get("content")), message.get("refusal")
    except (TypeError, LookupError, AttributeError):
        said = body.get("error", body) if isinstance(body, dict) else body
        raise ValueError(f"a reply without choices: {said}") from None
    reason = str(choice.get("finish_reason") or "stop")
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
        text=encodable(content or ""),
        finish_reason=reason,
        prompt_tokens=prompt_tokens,
        completion_tokens=_count(usage, "completion_tokens"),
        cached_tokens=min(_count(details, "cached_tokens"), prompt_tokens),
        key=key,
    )


def _content(content: Any) -> str | None:
    """The text of a message's content; None where there is none.

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
    return count if isinstance(count, int) and 0 < count < 2**53 else 0  # else a server's nonsense


def encodable(text: str) -> str:
    """Text without lone surrogates, which JSON can escape but neither UTF-8 nor SQLite can hold."""
    return text.encode("utf-8", "replace").decode("utf-8")
