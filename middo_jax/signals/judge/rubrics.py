"""The judge's questions: three dimensions, each for prompt and response.

The sample comes first and the question last, for two reasons. The three questions about one text share that
text's keys and values. And a question right before the answer is not forgotten after a long sample.
"""

from __future__ import annotations

import re
from typing import Literal

import numpy as np

from middo_jax.config.own_texts import OwnTexts, Text, read_texts

Dimension = Literal["clarity", "completeness", "factuality"]
Part = Literal["prompt", "response"]

DIMENSIONS: tuple[Dimension, ...] = ("clarity", "completeness", "factuality")
PARTS: tuple[Part, ...] = ("prompt", "response")
COLUMNS = tuple(f"{dimension}_{part}" for dimension in DIMENSIONS for part in PARTS)

_TEXT: dict[Part, str] = {
    "prompt": "### Instruction\n{prompt}\n\n",
    "response": "### Instruction\n{prompt}\n\n### Response\n{response}\n\n",
}

SETTING = "quality.rubric"


class Questions(OwnTexts):
    """The questions of one dimension, about the prompt and about the response."""

    prompt: Text
    response: Text


class Rubric(OwnTexts):
    """What the judge is told before a sample, and asked behind it.

    The columns of scores.parquet keep their names, whatever is asked.
    """

    opening: Text
    clarity: Questions
    completeness: Questions
    factuality: Questions


SHIPPED = Rubric(
    opening="You rate training data for a language model. Below is a sample and a question about it. "
    "Answer with one whole number from 0 (worst) to 10 (best) and nothing else.",
    clarity=Questions(
        prompt="How clearly does the instruction say what is wanted?",
        response="How clear, well ordered and to the point is the response?",
    ),
    completeness=Questions(
        prompt="Does the instruction give all the detail that is needed to answer it well?",
        response="Does the response do everything that the instruction asks?",
    ),
    factuality=Questions(
        prompt="Is everything that the instruction states or assumes true?",
        response="Is every statement, number and step of the response correct?",
    ),
)


def read_rubric(path: str | None) -> Rubric:
    """The shipped rubric, with the texts of a file in their place.

    Raises:
      ConfigError: see `read_texts`.
    """
    return SHIPPED if path is None else read_texts(SETTING, path, SHIPPED)


# The first words of the model's answer are given, so that the next token is the number.
ANSWER_STEM = "Rating: "


def judge_message(
    dimension: Dimension, part: Part, prompt: str, response: str, asked: Rubric = SHIPPED
) -> str:
    """The user message that asks for one rating; the sample's text is inserted, never interpreted."""
    values = {"{prompt}": prompt, "{response}": response}
    # Split once, at our own marks, so that "{response}" in a prompt is not replaced.
    pieces = re.split(r"(\{prompt\}|\{response\})", _TEXT[part])
    sample = "".join(values.get(piece, piece) for piece in pieces)
    question = getattr(getattr(asked, dimension), part)
    return f"{asked.opening}\n\n{sample}### Question\n{question}"


def quality(ratings_n6: np.ndarray) -> np.ndarray:
    """q [n]: the mean over the dimensions of (prompt + response) / 2, which is the mean of all six."""
    return ratings_n6.mean(axis=1)
