"""The contrast margin: how much less likely a model finds a faulty answer than the right one.

    margin = NLL(faulty answer) - NLL(answer), each the mean over the answer's tokens, in nats per token

Faults are planted into the last answer of held-out conversations; earlier answers are not counted. Unlike the
held-out loss, it tells whether a model knows a right answer from a wrong one, by kind of fault. The functions
that plant are pure.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from middo_jax.data.example import Example
from middo_jax.evaluation.heldout import RowLosses

MIN_WORDS = 10  # of an answer that is cut
# A mark of a numbered list is matched first, so that it is left alone.
_NUMBER = re.compile(r"\b\d{1,2}[.)]\s|(?<![A-Za-z\d])\d+")


class Faulty(NamedTuple):
    """A conversation with a planted fault.

    Attributes:
      fault: `cut`, `numbers` or `swapped`.
      place: place of the right conversation in the given sequence.
      example: the conversation; only its last answer is learnt.
    """

    fault: str
    place: int
    example: Example


class Margin(NamedTuple):
    """The contrast margin of one held-out conversation and kind of fault, in nats per token."""

    id: str
    fault: str
    margin: float


def last_answer(example: Example) -> Example:
    """The conversation with its last answer as the only learnt one."""
    *before, last = example.messages
    turns = (*(dataclasses.replace(turn, learnt=False) for turn in before), last)
    return dataclasses.replace(example, messages=turns)


def faulty(examples: Sequence[Example]) -> list[Faulty]:
    """Plants every fault that a conversation can carry into its last answer.

      cut       the first half of an answer of ten words or more
      numbers   every number is another of as many digits, list marks aside; only where there is one
      swapped   the answer of the next conversation, in the order of ids

    What is planted into a conversation depends on its content, and for `swapped` on the next one's; not on
    the order of `examples`. Conversations that do not end with a learnt answer carry none.
    """
    able = [place for place, example in enumerate(examples) if _ends_with_answer(example)]
    order = sorted(able, key=lambda place: examples[place].id)
    following = dict(zip(order, [*order[1:], *order[:1]], strict=True))
    found = []
    for place in able:
        answer, other = examples[place].response, examples[following[place]].response
        seed = int.from_bytes(hashlib.sha256(examples[place].id.encode()).digest()[:8], "big")
        planted = {"swapped": other}
        if len(answer.split()) >= MIN_WORDS:
            planted["cut"] = cut(answer)
        if has_numbers(answer):
            planted["numbers"] = with_other_numbers(answer, np.random.default_rng(seed))
        for fault, text in sorted(planted.items()):
            if text.strip() and text != answer:
                found.append(Faulty(fault, place, _answered(examples[place], text)))
    return found


def margins(right: RowLosses, wrong: RowLosses, planted: Sequence[Faulty]) -> list[Margin]:
    """The margin of each faulty conversation; left out where no token of one of the two answers is learnt.

    Args:
      right: losses of the conversations with only the last answer learnt.
      wrong: losses of the faulty ones, in their order.
      planted: the faulty ones.
    """
    found = []
    for i, one in enumerate(planted):
        n_right, n_wrong = right.n_targets_n[one.place], wrong.n_targets_n[i]
        if n_right and n_wrong:
            margin = wrong.nll_n[i] / n_wrong - right.nll_n[one.place] / n_right
            found.append(Margin(right.ids[one.place], one.fault, float(margin)))
    return found


def cut(text: str) -> str:
    """The first half of a text's words, without the sign that might end it.

    "One two three, four. Five six"  ->  "One two three"
    """
    ends = [match.end() for match in re.finditer(r"\S+", text)]
    return text[: ends[len(ends) // 2 - 1]].rstrip(".,;:!?\"')")


def has_numbers(text: str) -> bool:
    """Whether `with_other_numbers` would find one."""
    return any(number.isdigit() for number in _NUMBER.findall(text))


def with_other_numbers(text: str, rng: np.random.Generator) -> str:
    """Every run of digits as another of the same length; digits within a word and list marks are left.

    "1. It has 12 legs"  ->  "1. It has 75 legs"
    """

    def other(match: re.Match[str]) -> str:
        number = match[0]
        if not number.isdigit():
            return number
        while True:
            new = "".join(map(str, rng.integers(10, size=len(number))))
            if new != number and (new[0] != "0" or len(new) == 1):
                return new

    return _NUMBER.sub(other, text)


def _ends_with_answer(example: Example) -> bool:
    last = example.messages[-1] if example.messages else None
    return last is not None and last.role == "assistant" and last.learnt and not last.tool


def _answered(example: Example, text: str) -> Example:
    alone = last_answer(example)
    last = dataclasses.replace(alone.messages[-1], content=text)
    return dataclasses.replace(alone, messages=(*alone.messages[:-1], last))
