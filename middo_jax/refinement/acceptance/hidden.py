"""Characters of a text that nobody sees: controls, halves of characters, and invisible ones. Pure functions.

Invisible characters can hide words from a reader and from the gates, reverse the order in which a line is
shown, or carry a message of their own (tags, U+E0000 to U+E007F). But scripts and emoji need some of them:
Persian and Indic scripts need joiners, Thai and Khmer need spaces of no width, right-to-left scripts need
marks of direction, and flags need tags.
"""

from __future__ import annotations

import re
import unicodedata
from typing import NamedTuple

_SURELY_PLAIN = re.compile(r"[\n\t -~]*")
# Without the overrides, U+202D and U+202E, which reverse any text.
_DIRECTIONS = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u2066\u2067\u2068\u2069")
_JOINERS = frozenset("\u200b\u200c\u200d")
# What a joiner or a space of no width may follow: letters without case, marks, symbols, modifiers of emoji.
_JOINED = frozenset({"Lo", "Mn", "Mc", "So", "Sk"})
_FLAG = re.compile("\U0001f3f4[\U000e0020-\U000e007e]{2,6}\U000e007f")  # of a region, such as Wales


class Hidden(NamedTuple):
    """A character that a text should not contain: its code point, and the gate's name for its kind."""

    code: str
    kind: str


def hidden_character(text: str, given: str = "") -> Hidden | None:
    """The first control, half or invisible character that a text does not need; None if there is none.

    Control characters other than line feed and tab, and halves of surrogate pairs, are never needed. An
    invisible one is needed if it occurs in `given`, or where its script requires it, see `_is_needed`.

    "Name\\x1b a bird." -> ("U+001B", "control character"); "Na\\u200bme" -> ("U+200B", "invisible character")
    """
    plain = _SURELY_PLAIN.match(text)
    assert plain is not None
    if plain.end() == len(text):
        return None
    rest = _FLAG.sub("\U0001f3f4", text[plain.end() :])
    before = text[plain.end() - 1] if plain.end() else ""
    known, is_right_to_left = {*given}, any(map(_is_right_to_left, rest))
    for character in rest:
        category = unicodedata.category(character)
        if (category == "Cc" and character not in "\n\t") or category == "Cs":
            return Hidden(f"U+{ord(character):04X}", "control character")
        if (
            category == "Cf"
            and character not in known
            and not _is_needed(character, before, is_right_to_left)
        ):
            return Hidden(f"U+{ord(character):04X}", "invisible character")
        before = character
    return None


def _is_right_to_left(character: str) -> bool:
    return unicodedata.bidirectional(character) in ("R", "AL") and unicodedata.category(character)[0] == "L"


def _is_needed(character: str, before: str, is_right_to_left: bool) -> bool:
    """Whether a script requires an invisible character after `before`.

    Joiners and spaces of no width follow letters without case, marks or symbols. Marks of direction, other
    than overrides, and the signs of numbers of right-to-left scripts are for texts with letters of such a
    script.
    """
    if character in _JOINERS:
        return bool(before) and unicodedata.category(before) in _JOINED
    is_sign = unicodedata.bidirectional(character) in ("AN", "AL")
    return is_right_to_left and (character in _DIRECTIONS or is_sign)
