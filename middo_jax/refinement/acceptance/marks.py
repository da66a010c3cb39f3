"""What is written around and between digits and is a part of the number: signs, percent, fraction bars.

Pure functions. What a text may say in words ("minus 5", "50 percent", "two thirds") is read as well.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from fractions import Fraction as Rational
from typing import NamedTuple

_MINUS = "-−–"
_CURRENCY = "$€£¥₹"
_AROUND = 32  # characters before a number that may hold its sign
_NEGATIVE = r"(?:minus|negative|moins|menos|meno|минус|мінус|eksi|âm|マイナス|负|負|마이너스|سالب|ऋण)"
_NEGATIVE_BEFORE = re.compile(rf"{_NEGATIVE}\s*\Z", re.IGNORECASE)
_SAYS_NEGATIVE = re.compile(
    rf"{_NEGATIVE}|\b(?:below|under|unter|sous|bajo|abaixo|sotto|onder|ниже|fall|fell|drop\w*|decreas\w*|declin\w*|loss|debt)\b",
    re.IGNORECASE,
)
# After "7 -5", "(x) -5" and "x -5" the minus subtracts. Letters that are words of a language are not listed.
_TERM = re.compile(r"(?:[\d)\]}]|(?<!\w)[bcdfghklmnpqrstx])\Z")
_PERCENT = (
    r"(?:\\?[%％]|per\s?cent|pct\b|prozent|pour\s?cent|por\s?cien|por\s?cento|per\s?cento|procent|процент|відсотк"
    r"|phần trăm|persen|パーセント|퍼센트|प्रतिशत|بالمئة|في المائة)"
)
_PERCENT_BEHIND = re.compile(rf"\s?{_PERCENT}", re.IGNORECASE)
_PERCENT_BEFORE = re.compile(r"(?:[%％٪]|百分之|yüzde\s)\Z", re.IGNORECASE)
_SAYS_PERCENT = re.compile(rf"{_PERCENT}|٪|百分|yüzde|percentage", re.IGNORECASE)
_VULGAR = "¼½¾⅐⅑⅒⅓⅔⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞"
_FRACTION = re.compile(
    r"(?<![\w.,/⁄])(?:(?P<whole>\d{1,6})[ \u00a0])?(?P<top>\d{1,6})\s?[/⁄]\s?(?P<bottom>\d{1,6})"
    r"(?![\d/⁄]|[.,]\d)"
    rf"|(?:(?<![\d.,])(?P<vulgar_whole>\d{{1,6}})[ \u00a0]?)?(?P<vulgar>[{_VULGAR}])"
    r"|\\[dtc]?frac\s*\{\s*(?P<tex_top>\d{1,6})\s*\}\s*\{\s*(?P<tex_bottom>\d{1,6})\s*\}"
)
_RATIO = re.compile(
    r"(?<![\d.,])(\d{1,6})\s*(?:out of|of|over|in|to|von|sur|de|su|из|:)\s*(\d{1,6})(?![\d.,]?\d)"
)
_SPELT = {
    **dict.fromkeys(("half", "halves"), 2),
    **dict.fromkeys(("third", "thirds"), 3),
    **dict.fromkeys(("quarter", "quarters", "fourth", "fourths"), 4),
    **dict.fromkeys(("fifth", "fifths"), 5),
    **dict.fromkeys(("eighth", "eighths"), 8),
    **dict.fromkeys(("tenth", "tenths"), 10),
}
_COUNTS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_SPELT_FRACTION = re.compile(
    rf"\b(?:(?P<count>{'|'.join(_COUNTS)})[ -])?(?P<part>{'|'.join(_SPELT)})\b", re.IGNORECASE
)


class WrittenFraction(NamedTuple):
    """A fraction in a text.

    Attributes:
      start, end: its place in the text.
      values: its interpretations, as it is written first: "6/4" -> 6/4, 3/2, 1.5.
      parts: the whole numbers that it is written with.
    """

    start: int
    end: int
    values: tuple[str, ...]
    parts: tuple[str, ...]


def fractions(text: str) -> Iterator[WrittenFraction]:
    """The fractions of a text: 3/4, 1 1/2, ½, \\frac{3}{4}. A date such as 3/4/2021 is none."""
    for match in _FRACTION.finditer(text):
        if vulgar := match["vulgar"]:
            value, whole = Rational(unicodedata.numeric(vulgar)).limit_denominator(10), match["vulgar_whole"]
            top, bottom = value.numerator, value.denominator
        else:
            top, bottom = int(match["top"] or match["tex_top"]), int(match["bottom"] or match["tex_bottom"])
            whole = match["whole"]
        if bottom == 0 or (
            whole and top >= bottom
        ):  # "in 2020 24/7": two numbers, of which the second is one
            continue
        parts = (*([str(int(whole))] if whole else []), str(top), str(bottom))
        yield WrittenFraction(match.start(), match.end(), _values(int(whole or 0), top, bottom), parts)


def _values(whole: int, top: int, bottom: int) -> tuple[str, ...]:
    value = whole + Rational(top, bottom)
    written = f"{whole} {top}/{bottom}" if whole else f"{top}/{bottom}"
    return tuple(dict.fromkeys([written, str(value), *_decimal(value)]))


def _decimal(value: Rational) -> list[str]:
    """A fraction as a decimal, if that ends: 3/4 -> 0.75."""
    digits = next((n for n in range(10) if (value * 10**n).denominator == 1), None)
    if digits is None:
        return []
    shifted = str(int(value * 10**digits)).rjust(digits + 1, "0")
    return [f"{shifted[:-digits]}.{shifted[-digits:]}" if digits else shifted]


def percent_as_decimal(number: str) -> str:
    """ "12.5" -> "0.125", as a number that is followed by a percent sign is also written."""
    try:
        value = Rational(number) / 100
    except ValueError:  # a version such as 3.11.2
        return f"{number}%"
    return (_decimal(value) or [str(value)])[0]


def worded_fractions(text: str) -> set[str]:
    """Fractions that a text has in words: "two thirds" and "2 out of 3" -> 2/3, "half" -> 1/2."""
    spelt = (
        (_COUNTS.index(match["count"].lower()) + 1 if match["count"] else 1, _SPELT[match["part"].lower()])
        for match in _SPELT_FRACTION.finditer(text)
    )
    ratios = ((int(match[1]), int(match[2])) for match in _RATIO.finditer(text))
    return {value for top, bottom in (*spelt, *ratios) if bottom for value in _values(0, top, bottom)}


def is_negative(text: str, start: int) -> bool:
    """Whether the number at `start` has a sign: "-5", "-$5", "(−5", "minus 5"; not "7 - 5", "7 -5", "A-5"."""
    before = text[max(0, start - _AROUND) : start].rstrip(_CURRENCY)
    if _NEGATIVE_BEFORE.search(before):
        return True
    if before[-1:] not in tuple(_MINUS):
        return False
    term = before[:-1]
    if term[-1:].isspace():
        return not _TERM.search(term.rstrip())
    return not term or not (term[-1].isalnum() or term[-1] in f")]}}.%_{_MINUS}")


def is_percent(text: str, start: int, end: int) -> bool:
    """Whether a number is a percentage: "50%", "50 percent", "%50"."""
    return bool(_PERCENT_BEHIND.match(text, end) or _PERCENT_BEFORE.search(text[max(0, start - 8) : start]))


def says_negative(text: str) -> bool:
    """Whether words of a text may be the sign of one of its numbers: "5 degrees below zero"."""
    return _SAYS_NEGATIVE.search(text) is not None


def says_percent(text: str) -> bool:
    """Whether numbers of a text may be percentages without a sign of their own: "5 to 10 %"."""
    return _SAYS_PERCENT.search(text) is not None
