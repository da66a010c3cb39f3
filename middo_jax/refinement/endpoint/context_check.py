"""Detects that a server cut a prompt to its context, by the prompt tokens that it counts."""

from __future__ import annotations

import logging
import re

from middo_jax.refinement.endpoint.cache import AnswerCache
from middo_jax.refinement.endpoint.request import Answer, Messages
from middo_jax.refinement.endpoint.usage import CHARACTERS_PER_TOKEN

SHARE = 0.5  # of the expected tokens: every tokenizer in use needs more
FEWEST = 256  # missing tokens from which on there is a warning

_log = logging.getLogger(__name__)

_RUN = re.compile(r"([\s\W_])\1{3,}")  # indentation and lines of one sign: one token each
_DENSE = re.compile(
    r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]"
)  # scripts with about two characters per token


def expected_tokens(messages: Messages) -> int:
    """A low estimate of a conversation's tokens: one per four characters, one per two in dense scripts."""
    text = _RUN.sub(r"\1", "".join(message["content"] for message in messages))
    dense = len(_DENSE.findall(text))
    return (len(text) - dense) // CHARACTERS_PER_TOKEN + dense // 2


def check_context(cache: AnswerCache, messages: Messages, answer: Answer) -> None:
    """Warns that a server cut a prompt silently, once per opened cache."""
    read, expected = answer.prompt_tokens, expected_tokens(messages)
    # Some servers do not count the tokens in their prefix cache.
    if not read or answer.cached_tokens >= read or read > SHARE * expected or expected - read < FEWEST:
        return
    if "context" not in cache.said:
        cache.said.add("context")
        _log.warning(
            "the refiner read %s of about %s tokens of a request: its context is too small, and the rest "
            "was cut silently. Raise the context of the server (llama.cpp: --ctx-size, Ollama: "
            "num_ctx, vLLM: --max-model-len)",
            f"{read:,}",
            f"{expected:,}",
        )
