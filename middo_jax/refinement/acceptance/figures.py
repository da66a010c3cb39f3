"""The numbers of a text in any spelling: 10,000.50 and 10000.5, .5 and 0,5, 1 000 and 1000, 1/2 and ½.

A separator either groups digits or ends the integer part. If the number alone does not show which, the
language of the text decides, then its other numbers. Otherwise the number has both interpretations. A sign, a
percent sign and a fraction bar are parts of their number; `marks` reads them. Pure functions.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from typing import NamedTuple

from middo_jax.refinement.acceptance.marks import fractions, is_negative, is_percent, percent_as_decimal

_SPACES = "\u00a0\u2009\u202f"  # spaces that separate groups of digits
_NUMBER = re.compile(rf"(?:(?<![\w.,)\]])\.)?\d+(?:[.,'’_\u066b\u066c{_SPACES}]\d+|[ ]\d{{3}}(?!\d))*")
_SEPARATOR = re.compile(rf"[.,'’_\u066b\u066c{_SPACES} ]")
_LIST_MARK = re.compile(r"^[ \t]*\d{1,3}[.)][ \t]", re.MULTILINE)  # numbers of list items do not count
_WORD = re.compile(r"[^\W\d_]+")
# Frequent words of languages in which a comma, or a point, ends the integer part of a number.
_WORDS = {
    ",": set(
        _WORD.findall(
            "der die das und ist ein eine einen mit für von wie le la les des et est une un du pour el los "
            "las y es del por con il lo gli di che per een het och att är med na się jest и на по из что"
        )
    ),
    ".": set(_WORD.findall("the of to is are what how with from find has have if for by between")),
}


class Figure(NamedTuple):
    """One number of a text.

    Attributes:
      plain: the likeliest interpretation; several numbers for a list without spaces.
      interpretations: all interpretations.
      parts: the integers with which a fraction is written; else empty.
    """

    plain: tuple[str, ...]
    interpretations: tuple[tuple[str, ...], ...]
    parts: tuple[str, ...] = ()


def figures(text: str, mark: str | None = None) -> list[Figure]:
    """The numbers of a text, in order.

    "1. Add 10,000.50 to 2,50." -> 10000.5 and 2.5. The number of the list item does not count.
    "It fell by 1/2 to -5 or 20%." -> 1/2 (also read as 0.5), -5 and 20% (also read as 0.2)

    Args:
      text: any text.
      mark: the decimal mark if it is known, see `decimal_mark`.
    """
    plain = _LIST_MARK.sub("", text)
    found = dict[int, Figure]()
    for fraction in fractions(plain):
        interpretations = [(value,) for value in fraction.values]
        found[fraction.start] = _figure(interpretations, plain, fraction.start, fraction.end, fraction.parts)
        plain = plain[: fraction.start] + "\0" * (fraction.end - fraction.start) + plain[fraction.end :]
    for match in _NUMBER.finditer(plain):
        interpretations = _interpretations(match.group(), mark)
        found[match.start()] = _figure(interpretations, plain, match.start(), match.end())
    return [figure for _, figure in sorted(found.items())]


def _figure(
    interpretations: list[tuple[str, ...]], text: str, start: int, end: int, parts: tuple[str, ...] = ()
) -> Figure:
    """A number with the sign before it and the percent sign behind it."""
    if is_percent(text, start, end):
        as_decimals = [(percent_as_decimal(values[0]),) for values in interpretations if len(values) == 1]
        interpretations = [(*values[:-1], f"{values[-1]}%") for values in interpretations] + as_decimals
    if is_negative(text, start):
        interpretations = [(f"-{values[0]}", *values[1:]) for values in interpretations]
    return Figure(interpretations[0], tuple(dict.fromkeys(interpretations)), parts)


def decimal_mark(text: str) -> str | None:
    """The decimal mark of a text's numbers, "," or "."; None if the text does not show it."""
    words = _WORD.findall(text.lower())
    votes = {mark: sum(word in known for word in words) for mark, known in _WORDS.items()}
    if votes[","] != votes["."]:
        return max(votes, key=lambda mark: votes[mark])
    told = {mark for match in _NUMBER.finditer(text) if (mark := _told_by(match.group()))}
    return told.pop() if len(told) == 1 else None


def _told_by(number: str) -> str | None:
    """The decimal mark that follows from one number; None if the number has several interpretations."""
    parts, marks = _split(number)
    as_group, as_decimal = _grouped(parts, marks), _decimal(parts, marks)
    if as_group is None and as_decimal is not None and marks[-1] in ".,":
        return marks[-1]
    if as_group is not None and as_decimal is None and marks and marks[0] in ".,":
        return "," if marks[0] == "." else "."
    return None


def _interpretations(number: str, mark: str | None) -> list[tuple[str, ...]]:
    """All interpretations of a number, the likeliest first."""
    parts, marks = _split(number)
    if not marks:
        return [(_whole(parts[0]),)]
    as_group, as_decimal = _grouped(parts, marks), _decimal(parts, marks)
    if as_group is not None and as_decimal is not None:
        if marks[-1] == mark:
            as_group = None
        elif mark is not None:
            as_decimal = None
        elif marks[-1] == "." and parts[-1] != "000":
            return [(as_decimal,), (as_group,)]
    found = [(value,) for value in (as_group, as_decimal) if value is not None]
    pieces = _pieces(number, mark)
    return [*found, pieces] if not found or set(marks) & {" "} or _may_list(parts, marks) else found


def _may_list(parts: list[str], marks: list[str]) -> bool:
    """Whether commas may separate numbers: "1,2" may be two numbers, "1,200" may not."""
    return set(marks) == {","} and not all(len(part) == 3 for part in parts[1:])


def _split(number: str) -> tuple[list[str], list[str]]:
    """("10,000.50") -> (["10", "000", "50"], [",", "."]), in ASCII digits; ".5" begins with "0"."""
    digits = "".join(str(unicodedata.decimal(c)) if c.isdecimal() else c for c in number)
    digits = f"0{digits}" if digits.startswith(".") else digits
    return _SEPARATOR.split(digits), _SEPARATOR.findall(digits)


def _grouped(parts: list[str], marks: list[str]) -> str | None:
    """The integer whose digits are grouped, by threes or as in 1,00,000;

    None if this interpretation is impossible.
    """
    first, *rest = parts
    if not rest or len(set(marks)) != 1 or marks[0] == "\u066b" or first.startswith("0") or len(first) > 3:
        return None
    by_twos = len(first) <= 2 and marks[0] == "," and all(len(part) == 2 for part in rest[:-1])
    if len(rest[-1]) != 3 or not (by_twos or all(len(part) == 3 for part in rest)):
        return None
    return _whole("".join(parts))


def _decimal(parts: list[str], marks: list[str]) -> str | None:
    """The number with a fraction; None if this interpretation is impossible."""
    if not marks or marks[-1] not in ".,\u066b" or marks[-1] in marks[:-1]:
        return None
    whole = _whole(parts[0]) if len(parts) == 2 else _grouped(parts[:-1], marks[:-1])
    if whole is None:
        return None
    fraction = parts[-1].rstrip("0")
    return f"{whole}.{fraction}" if fraction else whole


def _pieces(number: str, mark: str | None) -> tuple[str, ...]:
    """The number as several numbers. Parts that only points separate stay together: a version, a date."""
    if set(_split(number)[1]) == {"."}:
        return (".".join(part.lstrip("0") or "0" for part in _split(number)[0]),)

    def each() -> Iterator[str]:
        for piece in re.split(rf"[,'’_\u066c{_SPACES} ]", number):
            if piece.strip("."):
                yield from _interpretations(piece, mark)[0] if piece != number else (piece,)

    return tuple(each())


def _whole(digits: str) -> str:
    return digits.lstrip("0") or "0"
