"""Tokens -> text: all at once, or as they come; and where a stop text ends it."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BROKEN = "\N{REPLACEMENT CHARACTER}"  # of bytes that are no whole character (yet)
CONTEXT = 8  # tokens before a new one that its text may depend on; more than the bytes of a character
LONGEST_LOOK = 16  # fallback bytes in a row among which stop texts are looked for before the run has ended


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


@functools.lru_cache(maxsize=1 << 18)
def _has_no_text(token: int, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether decoding leaves a token out: a control token, or an id beyond the vocabulary."""
    # A space at the beginning of a text may decode to nothing, too, but it is not left out elsewhere.
    is_left_out = bool(tokenizer.decode([token])) or tokenizer.convert_ids_to_tokens(token) is None
    return is_left_out and not text_of([token], tokenizer)


@functools.lru_cache(maxsize=1 << 18)
def _is_fallback_byte(token: int, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a token is SentencePiece's `<0x0A>`, a byte of a character that has no token."""
    name = tokenizer.convert_ids_to_tokens(token)
    return bool(re.fullmatch("<0x[0-9A-F]{2}>", str(name))) and text_of([token], tokenizer) != name


class TextStream:
    r"""The text of tokens that come one by one, in pieces that are final.

    A piece never ends within a character, and the pieces together are `text_of` of all tokens. With stop
    texts they end before the first one; what may be the beginning of one is held back. The work per token
    does not depend on the number of tokens before it.

      stops ["\n\n"], tokens "a", "b\n", "c", "\n\n", "d"  ->  "a", "b", "\nc", "" and `stopped`

    SentencePiece decodes a run of fallback bytes as a whole: one wrong byte makes all of them replacement
    characters. So the text of such a run comes when the run has ended.

    Attributes:
      stopped: a stop text has come; further tokens are ignored.
      n_pending: characters of fallback bytes that will be returned unless a wrong byte follows.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str] = ()) -> None:
        self._tokenizer, self._stops = tokenizer, stops
        self.stopped = False
        self.n_pending = 0
        # The last tokens only. Those whose text is released give context, since a token's text may depend on
        # the ones before it (a leading space).
        self._tokens: list[int] = []
        self._n_done = 0  # characters of the text of `_tokens` that are final
        self._n_run = 0  # fallback bytes at the end
        self._held = ""

    def push(self, token: int) -> str:
        """Adds a token; returns the text that is final now, often ""."""
        if self.stopped or _has_no_text(token, self._tokenizer):
            return ""
        self._tokens.append(token)
        if _is_fallback_byte(token, self._tokenizer):
            self._n_run += 1
            return self._text_before_stop()
        self._n_run = self.n_pending = 0
        return self._release(self._new_text(), is_last=False)

    def finish(self) -> str:
        """Returns what was held back, when no more tokens come."""
        text = text_of(self._tokens, self._tokenizer)[self._n_done :]
        self._n_done += len(text)
        self.n_pending = 0
        return self._release(text, is_last=True)

    def _text_before_stop(self) -> str:
        """The text before a stop text that ends in a run of fallback bytes, as a line feed often does."""
        if self._n_run > LONGEST_LOOK:
            return ""
        text = text_of(self._tokens, self._tokenizer)
        new = "" if text.endswith(BROKEN) else text[self._n_done :]
        self.n_pending = len(new)
        return "" if cut(self._held + new, self._stops) is None else self._release(new, is_last=False)

    def _new_text(self) -> str:
        text = text_of(self._tokens, self._tokenizer)
        # Bytes that may yet become a character are the last ones, and are one replacement character.
        n_final = len(text) - text.endswith(BROKEN)
        new = text[self._n_done : n_final]
        self._n_done = max(self._n_done, n_final)
        if len(self._tokens) >= 2 * CONTEXT:
            self._forget(text)
        return new

    def _forget(self, text: str) -> None:
        """Keeps the last tokens only, if their text ends as the text of all does."""
        kept = self._tokens[-CONTEXT:]
        text_kept = text_of(kept, self._tokenizer)
        # They may begin within a character. So characters are counted from the end.
        n_done = self._n_done - len(text) + len(text_kept)
        if n_done >= 0 and text_kept[n_done:] == text[self._n_done :]:
            self._tokens, self._n_done = kept, n_done

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
