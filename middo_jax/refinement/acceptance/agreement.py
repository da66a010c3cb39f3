"""How far two answers to one task agree: short ones and numbers by equality, long ones by word F1.

A model that does not have the answer gives another one when it is asked again. Pure functions.
"""

from __future__ import annotations

import re
from collections import Counter

from middo_jax.refinement.acceptance.candidate import Candidate, Finding
from middo_jax.refinement.acceptance.figures import figures

SHORT = 5  # words that an answer has at most which must agree as a whole
_WORD = re.compile(r"\w+")


def agreement(one: str, other: str) -> float:
    """0 to 1. If both answers are short: whether their numbers are equal, or without numbers their words.

    "It is 12." and "12"                       ->  1
    "Paris." and "paris"                       ->  1
    "Lyon" and "Paris"                         ->  0
    "The sky is blue on clear days" and
    "On clear days the sky looks blue to us"   ->  12/15, of 7 and 8 words, 6 in common, without order
    """
    words = [Counter(_WORD.findall(text.casefold())) for text in (one, other)]
    sizes = [count.total() for count in words]
    if max(sizes) <= SHORT:
        numbers = [{figure.plain for figure in figures(text)} for text in (one, other)]
        return float(numbers[0] == numbers[1] if any(numbers) else words[0] == words[1])
    return 2 * (words[0] & words[1]).total() / sum(sizes)


def agrees(candidate: Candidate, bar: float) -> Finding | None:
    """Whether the answer agrees with the refiner's answer to the old prompt."""
    if candidate.again is None:
        return Finding("the old prompt got no whole answer")
    found = agreement(candidate.response, candidate.again)
    return None if found >= bar else Finding(f"agreement {found:.2f} with its answer to the old prompt")
