"""Quality by generation, as published: the model writes its rating, and the number is read from the text.

This costs more than the expected rating, by all the decoded tokens. A rating that is not readable is missing,
never 0.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from middo_jax.data.example import Example, Message
from middo_jax.data.long_texts import both_ends
from middo_jax.data.tokenize import tokenize_prompt
from middo_jax.signals.judge.rubrics import ANSWER_STEM, DIMENSIONS, PARTS, SHIPPED, Rubric, judge_message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Not part of another number, not the end of a range such as "0-10", not out of any number but 10.
_SCALE = r"(?:/|out of|of|von|sur|de|su|из)"
_NUMBER = (
    r"(?<![\d.,−-])(10(?:[.,]0+)?|[0-9](?:[.,][0-9]+)?)"
    r"(?![\d%½¼¾]|[.,]\d|\s*(?:-|–|to)\s*\d|\s*(?:percent|per cent)\b"
    rf"|\s*(?:stars?|points?)?\s*{_SCALE}\s*(?!(?:10|ten)\b)(?:\d|one\b|two\b|three\b|four\b|five\b|six\b|seven\b"
    r"|twenty\b|hundred\b))"
)
_LABELLED = re.compile(rf"(?:rating|score)\W{{0,5}}(?:is|of|:|=)?\W{{0,5}}{_NUMBER}", re.IGNORECASE)
_OUT_OF = re.compile(rf"{_NUMBER}\s*(?:stars?|points?)?\s*{_SCALE}\s*(?:10|ten)\b", re.IGNORECASE)
_FIRST = re.compile(rf"\W{{0,5}}{_NUMBER}", re.IGNORECASE)
_STARTS = re.compile(r"[^\w−-]{0,5}[−-]?\d")


def parse_rating(text: str) -> float | None:
    """The rating in an answer, or None.

    The question ends in "Rating:", so a number at the very start is the rating, unless it is not in 0..10.
    Otherwise a labelled number counts first, then a number "out of 10"; of several, the last one. "On a scale
    of 0 to 10 I give it a 9" has neither: None.
    """
    text = "".join(str(unicodedata.decimal(c)) if c.isdecimal() else c for c in text)
    if _STARTS.match(text):
        first = _FIRST.match(text)
        return _value(first.group(1)) if first else None
    for pattern in (_LABELLED, _OUT_OF):
        if found := pattern.findall(text):
            return _value(found[-1])
    return None


def _value(number: str) -> float:
    return float(number.replace(",", "."))


def rating_prompts(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    context: int,
    rubric: Rubric = SHIPPED,
) -> list[np.ndarray]:
    """The tokens of the questions about each example, in the order of `rubrics.COLUMNS`.

    Each ends with the first words of the answer, so that the model writes the rating next. Texts that are far
    longer than `context` tokens lose their middle; their questions are still longer than that.
    """
    questions = [
        judge_message(
            dimension,
            part,
            both_ends(example.prompt, context),
            both_ends(example.response, context),
            rubric,
        )
        for example in examples
        for dimension in DIMENSIONS
        for part in PARTS
    ]
    return [
        tokenize_prompt([Message("user", text)], tokenizer, continue_with=ANSWER_STEM.rstrip())
        for text in questions
    ]
