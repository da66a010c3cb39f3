"""Texts as the report shows them: excerpts, and the words that a rewrite changed. Pure functions."""

from __future__ import annotations

import difflib
import math
import re

MAX_DIFF_CELLS = 1_000_000  # words before x words after; above it difflib needs more than about a second
MIN_KEPT_WORDS = 0.2  # texts that share fewer words are not edits of each other, so no word is marked


def excerpt_of(text: str, most: int) -> str:
    """The first `most` characters of a text, and how many more there are."""
    more = len(text) - most
    return text if more <= 0 else f"{text[:most]} [... and {more:,} more characters]"


Spans = list[tuple[bool, str]]


def word_diff(before: str, after: str) -> tuple[Spans, Spans]:
    """Splits both texts into (changed, text) spans by a diff of their words; the spans join to the text.

    White space belongs to the unchanged spans next to it. Texts that share less than a fifth of their words,
    and texts that are too long to compare, are returned unmarked.

    word_diff("a red fox", "a fox ran")  ->  [(F, "a "), (T, "red"), (F, " fox")], [(F, "a fox "), (T, "ran")]
    """
    words = [re.findall(r"\s+|\S+", text) for text in (before, after)]
    plain = ([(False, before)], [(False, after)])
    if math.prod(len(w) for w in words) > MAX_DIFF_CELLS:
        return plain
    # All white space is one token, so that re-wrapped text counts as unchanged.
    tokens = [[" " if w.isspace() else w for w in ws] for ws in words]
    matcher = difflib.SequenceMatcher(lambda w: w == " ", *tokens, autojunk=False)
    kept = [False] * len(words[0]), [False] * len(words[1])
    for a, b, size in matcher.get_matching_blocks():
        kept[0][a : a + size] = kept[1][b : b + size] = [True] * size
    common = sum(k for w, k in zip(tokens[0], kept[0], strict=True) if w != " ")
    if common < MIN_KEPT_WORDS * max(sum(w != " " for w in ws) for ws in tokens):
        return plain
    return _spans(words[0], kept[0]), _spans(words[1], kept[1])


def _spans(words: list[str], kept: list[bool]) -> Spans:
    changed = [not k and not w.isspace() for w, k in zip(words, kept, strict=True)]
    for i in range(1, len(words) - 1):  # a space between two changed words is marked with them
        changed[i] |= words[i].isspace() and changed[i - 1] and changed[i + 1]
    spans: Spans = []
    for word, mark in zip(words, changed, strict=True):
        if spans and spans[-1][0] == mark:
            spans[-1] = (mark, spans[-1][1] + word)
        else:
            spans.append((mark, word))
    return spans
