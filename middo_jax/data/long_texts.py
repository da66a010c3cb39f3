"""Tokenizes long texts by their ends: what `truncate` drops from the middle is not tokenized at all.

A row of 10 MB has millions of tokens, of which `model.max_length` remain. Only the parts that can remain are
tokenized: the beginning of the rendered text, and the text around the beginning of the last answer. The
number of their tokens proves that the parts suffice; else they are made longer.

The result equals that of tokenizing the whole text where words end at spaces or line breaks, as in all
tokenizers in use: each part begins at such a place, and tokens near its other end are not kept. A text
without any of them may be divided at other places.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CHARS_PER_TOKEN = 16  # of a part's first length; four are usual
_MARGIN = 64  # tokens at the end of a part that are not kept
_LONGER = 4  # factor of a part that has too few tokens
_LONG = 8  # a text of so many parts is long
# Where a word begins: after a line break, or at a space between words.
_WORD_START = re.compile(r"(?<=\n)(?=\w)|(?<=\w) (?=\w)")


class Encoded(NamedTuple):
    """Token ids, and the characters of the text that each covers."""

    tokens: list[int]
    offsets: list[tuple[int, int]]


def is_long(text: str, max_length: int) -> bool:
    """Whether a text has so many characters that only its parts are tokenized."""
    return len(text) > _LONG * _part_chars(max_length)


def encode_around(
    tokenizer: PreTrainedTokenizerBase, text: str, answer: int, max_length: int
) -> Encoded | None:
    """The tokens that a cut to `max_length` can keep; None if all of the text must be tokenized.

    Args:
      tokenizer: a fast one.
      text: a rendered conversation.
      answer: where its last answer begins, in characters.
      max_length: tokens that are kept.
    """
    chars, needed = _part_chars(max_length), max_length + _MARGIN
    while _LONGER * chars < len(text):
        first, last = min(chars, answer), min(answer + chars, len(text))
        begin = _word_start(text, answer - chars, chars) if answer > 2 * chars else first
        head = _encode(tokenizer, text, 0, first) if begin > first else Encoded([], [])
        around = _encode(tokenizer, text, begin if begin > first else 0, last)
        before = sum(stop <= answer for _, stop in around.offsets)
        is_enough = last == len(text) or len(around.tokens) - before >= needed
        if begin > first:
            is_enough = is_enough and min(before, len(head.tokens)) >= needed
        if is_enough:
            return Encoded(head.tokens + around.tokens, head.offsets + around.offsets)
        chars *= _LONGER
    return None


def first_tokens(
    tokenizer: PreTrainedTokenizerBase, text: str, max_length: int, *, add_special_tokens: bool
) -> list[int]:
    """All tokens of a text, or the first ones of a long text if they are surely over `max_length`.

    For texts that are refused if they have over `max_length` tokens. The beginning must have twice as many,
    since its last tokens may be others in the whole text.
    """
    chars = _part_chars(max_length)
    while _LONGER * chars < len(text):
        tokens = tokenizer(text[:chars], add_special_tokens=add_special_tokens, verbose=False)["input_ids"]
        if len(tokens) >= 2 * (max_length + _MARGIN):
            return tokens
        chars *= _LONGER
    return tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]


def last_tokens(tokenizer: PreTrainedTokenizerBase, text: str, max_length: int) -> tuple[list[int], bool]:
    """(a text's last `max_length` tokens, whether it has more)."""
    chars = _part_chars(max_length)
    while is_long(text, max_length) and _LONGER * chars < len(text):
        begin = _word_start(text, len(text) - chars, chars)
        tokens = _encode(tokenizer, text, begin, len(text)).tokens
        if len(tokens) >= max_length + _MARGIN:
            return tokens[-max_length:], True
        chars *= _LONGER
    tokens = _encode(tokenizer, text, 0, len(text)).tokens
    return tokens[-max_length:], len(tokens) > max_length


def both_ends(text: str, max_length: int) -> str:
    """A long text without its middle, so that more than `max_length` tokens remain at each end."""
    chars = _LONG * _part_chars(max_length) // 2
    return f"{text[:chars]} … {text[-chars:]}" if is_long(text, max_length) else text


def _part_chars(max_length: int) -> int:
    return _CHARS_PER_TOKEN * (max_length + _MARGIN)


def _word_start(text: str, start: int, chars: int) -> int:
    """The first place from `start` on where a word begins; `start` itself if there is none near it."""
    found = _WORD_START.search(text, start, start + chars // 4)
    return found.start() if found else start


def _encode(tokenizer: PreTrainedTokenizerBase, text: str, start: int, stop: int) -> Encoded:
    encoded = tokenizer(
        text[start:stop], add_special_tokens=False, return_offsets_mapping=True, verbose=False
    )
    offsets: Sequence[tuple[int, int]] = encoded["offset_mapping"]
    return Encoded(list(encoded["input_ids"]), [(start + begin, start + end) for begin, end in offsets])
