"""Whether a rewritten prompt keeps the numbers and the code blocks of its original. Pure functions."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

from middo_jax.refinement.acceptance.figures import Figure, decimal_mark, figures
from middo_jax.refinement.acceptance.marks import says_negative, says_percent, worded_fractions

_WORD = re.compile(r"[^\W\d_]+")
_SPELT = _WORD.findall("zero one two three four five six seven eight nine ten eleven twelve")
_FENCED = re.compile(r"^[ \t]*(?P<fence>`{3,}|~{3,})[^\n]*\n(?P<code>.*?)^[ \t]*(?P=fence)", re.DOTALL | re.M)
_SHOWN = 4  # maximum number of numbers in a reason


def numbers(text: str) -> list[str]:
    """The distinct numbers of a text in canonical form, in the order of their first appearance.

    "1. Add 1,000 and 2,50 to ٣." -> ["1000", "2.5", "3"]
    """
    return list(dict.fromkeys(number for figure in figures(text) for number in figure.plain))


def changed_numbers(original: str, rewrite: str, exchanged_only: bool = False) -> str | None:
    """Which numbers of the original prompt a rewrite does not keep, in words; None if it keeps all.

    A rewrite has to keep all of them, with their signs. It may spell them differently: "3" as "three" (up to
    twelve, in English), "1/2" as "0.5" and "half", "50%" as "50 percent" and "0.5", "-5" as "minus 5".

    Args:
      original: the sample's prompt.
      rewrite: the candidate's prompt.
      exchanged_only: for a task that makes a prompt easier. Numbers may be dropped together with the steps
        that need them, and numbers may be added, but dropped numbers may not be replaced by other ones.
    """
    mark = decimal_mark(f"{original}\n{rewrite}")
    before, after = figures(original, mark), figures(rewrite, mark)
    kept = _Kept(original, rewrite, after)
    lost = [figure.plain for figure in before if not kept.has(figure)]
    gone = [number for number in dict.fromkeys(itertools.chain(*lost)) if number not in kept.all]
    if not gone:
        return None
    if not exchanged_only:
        return f"{_listed(gone)} not kept"
    known = _all_of(before) | {part for figure in before for part in figure.parts}
    come = dict.fromkeys(number for figure in after for number in figure.plain if number not in known)
    return f"{_listed([*come])} instead of {_listed(gone)}" if come else None


def code_blocks(text: str) -> list[str]:
    """The contents of fenced code blocks, without white space at the ends of lines."""
    return [_trimmed(match["code"]) for match in _FENCED.finditer(text)]


def lost_code(original: str, rewrite: str) -> str | None:
    """The first code block of the original prompt that is not in a rewrite verbatim, in words; or None."""
    inside = _trimmed(rewrite)
    lost = [block for block in code_blocks(original) if block not in inside]
    return f"a block of {lost[0].count(chr(10)) + 1} lines not kept" if lost else None


def without_code(text: str) -> str:
    """The text without its fenced blocks."""
    return _FENCED.sub("", text)


class _Kept:
    """The numbers of a rewrite, in every interpretation and spelling."""

    def __init__(self, original: str, rewrite: str, after: Sequence[Figure]) -> None:
        spelt = {str(_SPELT.index(word)) for word in _WORD.findall(rewrite.lower()) if word in _SPELT}
        self._alone = _all_of(after) | spelt
        parts = {part for figure in after for part in figure.parts}
        self.all = self._alone | parts | worded_fractions(rewrite)
        self._signs = [
            (sign, says(original), says(rewrite))
            for sign, says in (("-", says_negative), ("%", says_percent))
        ]

    def has(self, figure: Figure) -> bool:
        """Whether a number of the original is kept in one of its interpretations.

        The parts of a fraction keep it where they are numbers of their own: "24/7" is "24 hours, 7 days".
        """
        if figure.parts and self._alone.issuperset(figure.parts):
            return True
        return any(
            all(self._has(number) for number in interpretation) for interpretation in figure.interpretations
        )

    def _has(self, number: str) -> bool:
        if number in self.all:
            return True
        for sign, in_original, in_rewrite in self._signs:
            bare = number.strip(sign)
            if in_rewrite and bare != number and bare in self.all:  # "-5" and "5 degrees below zero"
                return True
            signed = f"-{number}" if sign == "-" else f"{number}%"
            if in_original and bare == number and signed in self.all:
                return True
        return False


def _all_of(found: Sequence[Figure]) -> set[str]:
    """The numbers of all interpretations."""
    return {
        number for figure in found for interpretation in figure.interpretations for number in interpretation
    }


def _listed(values: Sequence[str]) -> str:
    more = f" and {len(values) - _SHOWN} more" if len(values) > _SHOWN else ""
    return ", ".join(values[:_SHOWN]) + more


def _trimmed(text: str) -> str:
    return "\n".join(line.rstrip() for line in text.strip("\n").splitlines())
