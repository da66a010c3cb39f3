"""Contexts and continuations as tokens: which tokens of a text belong to the part that is scored.

lm-eval (`TemplateLM._encode_pair`) tokenizes the context alone and the whole text, and takes from the whole
text all tokens after the first n, where n is the length of the context alone. That is right where both begin
alike. Where a token spans the boundary they do not: the context "The cat" and the continuation "s" may be
the three tokens [The][ cat] and [The][ cats], and nothing is left to score; lm-eval then ends the run with an
AssertionError.

Here the boundary is found by the characters of each token in the whole text: a token is scored if it ends
behind the context. So a token that spans the boundary is scored, and the context is what is before it:
([The], [ cats]). Where no token spans the boundary, both rules give the same tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

TEXTS_AT_A_TIME = 1024  # the offsets are Python tuples, so more would take much memory


class Pair(NamedTuple):
    """The tokens of a context and of its continuation; the context has at least one."""

    context: list[int]
    continuation: list[int]


class Encoder:
    """A tokenizer as lm-eval's own models use it.

    Args:
      tokenizer: a fast one, which reports the characters of each token.
      add_special_tokens: whether texts get the tokens that the tokenizer puts around them, such as BOS; a
        text that begins with `prefix` itself, as a rendered chat does, gets none.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, add_special_tokens: bool = True) -> None:
        self.tokenizer = tokenizer
        self._adds = add_special_tokens
        prefix = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if not isinstance(prefix, int):
            raise ValueError(
                f"{tokenizer.name_or_path}: the tokenizer has neither a BOS nor an EOS token; a text without "
                "context needs one of them before it"
            )
        self.prefix: int = prefix
        self._prefix_text = str(tokenizer.decode([prefix]))

    def text(self, text: str) -> list[int]:
        """The tokens of a text."""
        return self._encoded([text])[0][0]

    def pairs(self, requests: Sequence[tuple[str, str]]) -> list[Pair]:
        """The tokens of (context, continuation) pairs, in their order.

        White space at the end of a context is moved to the continuation, as in lm-eval. Without a context,
        the context is the prefix token. A continuation without tokens stays empty.
        """
        moved = [_without_trailing_space(*request) for request in requests]
        with_context = [i for i, (context, _) in enumerate(moved) if context]
        encoded = dict(
            zip(with_context, self._encoded(["".join(moved[i]) for i in with_context]), strict=True)
        )
        return [
            self._split(*encoded[i], len(context)) if context else self._without_context(continuation)
            for i, (context, continuation) in enumerate(moved)
        ]

    def _split(self, tokens: list[int], ends: list[int], boundary: int) -> Pair:
        first = next((i for i, end in enumerate(ends) if end > boundary), len(tokens))
        return Pair(tokens[:first] or [self.prefix], tokens[first:])

    def _without_context(self, continuation: str) -> Pair:
        tokens = self._tokens([continuation], False)["input_ids"][0]
        if tokens[:1] == [self.prefix]:
            return Pair(tokens[:1], tokens[1:])
        return Pair([self.prefix], tokens)

    def _encoded(self, texts: Sequence[str]) -> list[tuple[list[int], list[int]]]:
        """The tokens of each text, and the character behind each token; 0 for a token that was added."""
        found: dict[int, tuple[list[int], list[int]]] = {}
        for adds in (False, True):
            chosen = [i for i, text in enumerate(texts) if self._adds_to(text) == adds]
            for start in range(0, len(chosen), TEXTS_AT_A_TIME):
                some = chosen[start : start + TEXTS_AT_A_TIME]
                encoded = self._tokens([texts[i] for i in some], adds)
                ends = ([end for _, end in offsets] for offsets in encoded["offset_mapping"])
                found |= zip(some, zip(encoded["input_ids"], ends, strict=True), strict=True)
        return [found[i] for i in range(len(texts))]

    def _adds_to(self, text: str) -> bool:
        return self._adds and not text.startswith(self._prefix_text)

    def _tokens(self, texts: list[str], adds: bool) -> dict[str, list]:
        encoded = self.tokenizer(texts, add_special_tokens=adds, return_offsets_mapping=True, verbose=False)
        return {name: encoded[name] for name in ("input_ids", "offset_mapping")}


def _without_trailing_space(context: str, continuation: str) -> tuple[str, str]:
    kept = context.rstrip()
    return kept, context[len(kept) :] + continuation
