"""Tokens -> text: all at once, or as they come; and where a stop text ends it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BROKEN = "\N{REPLACEMENT CHARACTER}"  # of bytes that are no whole character (yet)


def text_of(tokens: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of tokens, without control tokens."""
    return str(tokenizer.decode(list(tokens), skip_special_tokens=True))


def cut(text: str, stops: Sequence[str]) -> str | None:
    """The text up to the first stop text; None if it has none."""
    end = min((text.index(stop) for stop in stops if stop in text), default=None)
    return None if end is None else text[:end]


@functools.lru_cache(maxsize=1 << 18)
def token_text(token: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """A token's own text; `token_id:7` for one that is only a part of a character."""
    text = str(tokenizer.decode([token]))
    return f"token_id:{token}" if BROKEN in text else text


def is_whole_text(token: int, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a token is text by itself, and not a part of a character."""
    return token_text(token, tokenizer) != f"token_id:{token}"


class TextStream:
    r"""The text of tokens that come one by one, in pieces that are final.

    A piece never ends within a character, and the pieces together are `text_of` of all tokens. With stop
    texts they end before the first one; what may be the beginning of one is held back.

      stops ["\n\n"], tokens "a", "b\n", "c", "\n\n", "d"  ->  "a", "b", "\nc", "" and `stopped`

    Attributes:
      stopped: a stop text has come; further tokens are ignored.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str] = ()) -> None:
        self._tokenizer, self._stops = tokenizer, stops
        self.stopped = False
        self._tokens: list[int] = []
        # Text of tokens[shown:] is decoded after that of tokens[context:shown], since a token's text may
        # depend on the ones before it (a leading space).
        self._context = self._shown = 0
        self._held = ""

    def push(self, token: int) -> str:
        """Adds a token; returns the text that is final now, often ""."""
        self._tokens.append(token)
        return self._release(self._new_text(is_last=False), is_last=False)

    def finish(self) -> str:
        """Returns what was held back, when no more tokens come."""
        return self._release(self._new_text(is_last=True), is_last=True)

    def _new_text(self, is_last: bool) -> str:
        before = text_of(self._tokens[self._context : self._shown], self._tokenizer)
        text = text_of(self._tokens[self._context :], self._tokenizer)
        if len(text) <= len(before) or (text.endswith(BROKEN) and not is_last):
            return ""
        self._context, self._shown = self._shown, len(self._tokens)
        return text[len(before) :]

    def _release(self, text: str, is_last: bool) -> str:
        if self.stopped:
            return ""
        text = self._held + text
        if (before_stop := cut(text, self._stops)) is not None:
            self.stopped, self._held = True, ""
            return before_stop
        keep = 0 if is_last else max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of the text that is a beginning of the stop text."""
    lengths = range(min(len(text), len(stop) - 1), 0, -1)
    return next((n for n in lengths if text.endswith(stop[:n])), 0)
