"""One chat request: the body that is sent, the key it is kept under, and its answer read."""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

from middo_jax.config import RefineSettings
from middo_jax.refine.cache import Answer, canonical, request_key
from middo_jax.refine.prompts import PROMPT_VERSION, Form, Messages, response_format


class Refiner(Protocol):
    """Whoever answers requests: a served model, or results that a batch brought back."""

    model: str

    async def complete(
        self,
        messages: Messages,
        *,
        attempt: int = 0,
        axis: str = "all",
        form: Form | None = None,
        max_tokens: int | None = None,
    ) -> Answer:
        """The answer to a conversation, or a RefinerError."""
        ...

    async def form(self) -> Form:
        """How a new prompt is asked for: as JSON by a schema, or as tagged text."""
        ...

    async def close(self) -> None:
        """Ends what it holds open."""
        ...


@dataclasses.dataclass(frozen=True)
class ChatRequest:
    """What is sent, and what tells it from every other request: also the model's revision, the version of the
    prompts and the attempt, but neither the endpoint's address nor the key.
    """

    key: str
    body: dict[str, Any]
    canonical: str

    @classmethod
    def build(
        cls,
        messages: Messages,
        model: str,
        settings: RefineSettings,
        seed: int | None = None,
        *,
        attempt: int = 0,
        form: Form | None = None,
        max_tokens: int | None = None,
    ) -> ChatRequest:
        """A request under the settings' sampling.

        Args:
          messages: the conversation.
          model: the name to ask for.
          settings: sampling and limits.
          seed: sent along where given.
          attempt: another one is another request.
          form: "json" has the server hold the reply to the schema; None for a reply that is free text.
          max_tokens: None takes the settings'.
        """
        body = {
            "messages": [{"role": m["role"], "content": encodable(m["content"])} for m in messages],
            "model": model,
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "max_tokens": settings.max_tokens if max_tokens is None else max_tokens,
        }
        if seed is not None:
            body["seed"] = seed
        if form == "json":
            body["response_format"] = response_format()
        identity = {
            "seed": None,
            "response_format": None,
            **body,
            "model_revision": settings.model_revision,
            "prompt_version": PROMPT_VERSION,
            "attempt": attempt,
        }
        return cls(request_key(identity), body, canonical(identity))


def read_answer(body: Any, key: str) -> Answer:
    """The first choice of a chat completion's JSON.

    Raises:
      ValueError: there is no choice in it.
    """
    try:
        choice = body["choices"][0]
        message = choice["message"]
        content = message.get("content") or message.get("refusal")
    except (TypeError, LookupError, AttributeError):
        said = body.get("error", body) if isinstance(body, dict) else body
        raise ValueError(f"a reply without choices: {said}") from None
    usage = body.get("usage")
    prompt_tokens = _count(usage, "prompt_tokens")
    details = usage.get("prompt_tokens_details") if isinstance(usage, dict) else None
    return Answer(
        text=encodable(content) if isinstance(content, str) else "",
        finish_reason=str(choice.get("finish_reason") or "stop"),
        prompt_tokens=prompt_tokens,
        completion_tokens=_count(usage, "completion_tokens"),
        cached_tokens=min(_count(details, "cached_tokens"), prompt_tokens),
        key=key,
    )


def _count(usage: Any, name: str) -> int:
    count = usage.get(name) if isinstance(usage, dict) else None
    return count if isinstance(count, int) and 0 < count < 2**53 else 0  # else a server's nonsense


def encodable(text: str) -> str:
    """Text without lone surrogates, which JSON can escape but neither UTF-8 nor SQLite can hold."""
    return text.encode("utf-8", "replace").decode("utf-8")
