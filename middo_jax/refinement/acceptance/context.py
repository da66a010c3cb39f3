"""Whether a rewritten prompt keeps the numbers and the code blocks of its original. Pure functions."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

from middo_jax.refinement.acceptance.figures import Figure, decimal_mark, figures

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

    A rewrite may spell numbers up to twelve as English words: "three" keeps 3.

    Args:
      original: the sample's prompt.
      rewrite: the candidate's prompt.
      exchanged_only: for a task that makes a prompt easier. Numbers may be dropped together with the steps
        that need them, and numbers may be added, but dropped numbers may not be replaced by other ones.
    """
    mark = decimal_mark(f"{original}\n{rewrite}")
    before, after = figures(original, mark), figures(rewrite, mark)
    kept = {
        *_all_of(after),
        *(str(_SPELT.index(word)) for word in _WORD.findall(rewrite.lower()) if word in _SPELT),
    }
    lost = [figure.plain for figure in before if not any(kept.issuperset(r) for r in figure.readings)]
    gone = [number for number in dict.fromkeys(itertools.chain(*lost)) if number not in kept]
    if not gone:
        return None
    if not exchanged_only:
        return f"{_listed(gone)} not kept"
    known = _all_of(before)
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


def _all_of(found: Sequence[Figure]) -> set[str]:
    """The numbers of all readings."""
    return {number for figure in found for reading in figure.readings for number in reading}


def _listed(values: Sequence[str]) -> str:
    more = f" and {len(values) - _SHOWN} more" if len(values) > _SHOWN else ""
    return ", ".join(values[:_SHOWN]) + more


def _trimmed(text: str) -> str:
    return "\n".join(line.rstrip() for line in text.strip("\n").splitlines())
