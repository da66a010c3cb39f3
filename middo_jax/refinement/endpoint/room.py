"""Whether a server read all of a request: told from the prompt tokens that it counted."""

from __future__ import annotations

import logging
import re

from middo_jax.refinement.endpoint.cache import AnswerCache
from middo_jax.refinement.endpoint.request import Answer, Messages
from middo_jax.refinement.endpoint.usage import CHARACTERS_A_TOKEN

SHARE = 0.5  # of the expected tokens: no tokenizer in use needs as few
FEWEST = 256  # tokens that are missing before anybody is told

_log = logging.getLogger(__name__)

_RUN = re.compile(r"([\s\W_])\1{3,}")  # indentation and rules: one token each
_DENSE = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]")  # scripts with about two characters a token


def expected_tokens(messages: Messages) -> int:
    """About how many tokens a conversation has at the least: a token per four characters of English."""
    text = _RUN.sub(r"\1", "".join(message["content"] for message in messages))
    dense = len(_DENSE.findall(text))
    return (len(text) - dense) // CHARACTERS_A_TOKEN + dense // 2


def watch_context(cache: AnswerCache, messages: Messages, answer: Answer) -> None:
    """Warns, once while the cache is open, of a server that cut a prompt without saying so."""
    read, expected = answer.prompt_tokens, expected_tokens(messages)
    # Some servers do not count what they had cached.
    if not read or answer.cached_tokens >= read or read > SHARE * expected or expected - read < FEWEST:
        return
    if "context" not in cache.said:
        cache.said.add("context")
        _log.warning(
            "the refiner read %s of about %s tokens of a request: its context is too small, and what did not "
            "fit was cut without a word. Raise the context of the server (llama.cpp: --ctx-size, Ollama: "
            "num_ctx, vLLM: --max-model-len)",
            f"{read:,}",
            f"{expected:,}",
        )
