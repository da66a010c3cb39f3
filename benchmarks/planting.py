"""Known faults for clean rows: planted by a seed, on disjoint rows, remembered by id. Pure functions only.

    swapped response   it has the response of another row of this fault
    shuffled prompt    its words in another order
    cut response       its first half, without an end
    wrong numbers      every number of the response is another; only rows that hold one (list marks are none)
    foreign topic      a row of another domain in its place
    exact duplicate    a copy of a clean row in its place
    near duplicate     such a copy with one word of the prompt changed, two where it has ten or more

A row that is none of these stays what it was, bit for bit. "Clean" says that nothing was planted: the rows
come from the user, and whatever they lack already they go on lacking.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Collection, Sequence

import numpy as np

from middo_jax.data.example import Example, Message
from middo_jax.evaluation.contrast import MIN_WORDS, cut, has_numbers, with_other_numbers

FAULTS = (
    "swapped response",
    "shuffled prompt",
    "cut response",
    "wrong numbers",
    "foreign topic",
    "exact duplicate",
    "near duplicate",
)
SHARE = 0.05
MIN_PROMPT_WORDS = 5  # of a prompt that is shuffled, or of which a word is changed
_CALCULATION = re.compile(r"<<[^>]*>>")  # the calculator's notes in GSM8K's answers


@dataclasses.dataclass(frozen=True)
class Planted:
    """A dataset with faults.

    Attributes:
      examples: as many as there were clean ones, in their order.
      fault: by id, of the rows that carry one.
      twin: by the id of a duplicate, the id of the clean row that it repeats.
    """

    examples: tuple[Example, ...]
    fault: dict[str, str]
    twin: dict[str, str]


def plant(
    clean: Sequence[Example],
    foreign: Sequence[Example],
    seed: int,
    share: float = SHARE,
    faults: Collection[str] = FAULTS,
) -> Planted:
    """Plants each fault into round(share * n) rows, at most one per row; equal seeds give equal datasets.

    Args:
      clean: single-turn rows with different prompts.
      foreign: rows of another domain.
      seed: determines the rows and what is done to them.
      share: the share of the rows that get each fault.
      faults: the faults that are planted.

    Raises:
      ValueError: too few rows can carry a fault.
    """
    planter = _Planter(clean, np.random.default_rng(seed), round(share * len(clean)), faults)
    # The faults that fewest rows can carry choose first.
    planter.alter_texts()
    planter.swap_responses()
    planter.put_strangers(foreign)
    planter.duplicate()
    return Planted(tuple(planter.examples), planter.fault, planter.twin)


class _Planter:
    """Plants faults of one kind after another; no row gets two."""

    def __init__(
        self, clean: Sequence[Example], rng: np.random.Generator, count: int, faults: Collection[str]
    ) -> None:
        self._clean, self._rng, self._count, self._faults = clean, rng, count, faults
        self._free = [int(i) for i in rng.permutation(len(clean))]
        self.examples, self.fault, self.twin = list(clean), dict[str, str](), dict[str, str]()

    def alter_texts(self) -> None:
        """Wrong numbers, cut responses and shuffled prompts."""
        clean, rng = self._clean, self._rng
        for i in self._take("wrong numbers", lambda e: has_numbers(e.response)):
            self._put(i, "wrong numbers", clean[i].prompt, with_other_numbers(clean[i].response, rng))
        for i in self._take("cut response", lambda e: len(e.response.split()) >= MIN_WORDS):
            self._put(i, "cut response", clean[i].prompt, cut(clean[i].response))
        for i in self._take("shuffled prompt", lambda e: len(set(e.prompt.split())) >= MIN_PROMPT_WORDS):
            self._put(i, "shuffled prompt", shuffled(clean[i].prompt, rng), clean[i].response)

    def swap_responses(self) -> None:
        """Each row gets the response of another one. All differ, or a row could get its own."""
        answers: set[str] = set()

        def is_new(example: Example) -> bool:
            new = example.response not in answers
            answers.add(example.response)
            return new

        swapped = self._take("swapped response", is_new)
        for i, giver in zip(swapped, swapped[1:] + swapped[:1], strict=True):
            self._put(i, "swapped response", self._clean[i].prompt, self._clean[giver].response)

    def put_strangers(self, foreign: Sequence[Example]) -> None:
        """Rows of another domain take the places of clean ones."""
        places = self._take("foreign topic")
        strangers = self._rng.permutation(len(foreign))[: self._count]
        if len(strangers) < len(places):
            raise ValueError(f"foreign topic: there are only {len(foreign)} foreign rows, not {self._count}")
        for i, j in zip(places, strangers, strict=False):
            self._put(i, "foreign topic", foreign[j].prompt, foreign[j].response)

    def duplicate(self) -> None:
        """Copies of clean rows take the places of others; a near one has other words in its prompt."""
        clean = self._clean
        words = sorted({word for example in clean for word in example.prompt.split() if word.isalpha()})
        for name in ("exact duplicate", "near duplicate"):
            places = self._take(name)
            originals = self._take(
                name, lambda e: len(e.prompt.split()) >= MIN_PROMPT_WORDS, f"the original of an {name}"
            )
            for i, original in zip(places, originals, strict=True):
                prompt = clean[original].prompt
                prompt = prompt if name == "exact duplicate" else with_other_words(prompt, words, self._rng)
                copy = self._put(i, name, prompt, clean[original].response)
                self.twin[copy.id] = clean[original].id

    def _take(
        self, kind: str, can: Callable[[Example], bool] = lambda example: True, what: str = ""
    ) -> list[int]:
        """The rows that get a fault; they are free no more."""
        clean, wanted = self._clean, self._count if kind in self._faults else 0
        chosen = [i for i in self._free if can(clean[i])][:wanted]
        if len(chosen) < wanted:
            raise ValueError(
                f"{what or kind}: only {len(chosen)} of {len(clean)} rows can carry it, not {self._count}"
            )
        self._free = [i for i in self._free if i not in set(chosen)]
        return chosen

    def _put(self, i: int, name: str, prompt: str, response: str) -> Example:
        # An id of its own: a duplicate has the content of its twin.
        id_ = f"{self._clean[i].id}-{name.replace(' ', '-')}"
        self.examples[i] = Example((Message("user", prompt), Message("assistant", response)), id=id_)
        self.fault[id_] = name
        return self.examples[i]


def from_gsm8k(row: dict[str, str]) -> Example:
    """A row of GSM8K as a conversation, without the calculator's notes.

    answer "3 * 2 = <<3*2=6>>6 eggs.\\n#### 6"  ->  "3 * 2 = 6 eggs.\\nThe answer is 6."
    """
    answer = re.sub(r"####\s*(.+)", r"The answer is \1.", _CALCULATION.sub("", row["answer"]))
    return Example((Message("user", row["question"]), Message("assistant", answer)))


def shuffled(text: str, rng: np.random.Generator) -> str:
    """The words of a text in another order, with single spaces; needs two different ones."""
    words = text.split()
    while (mixed := [words[i] for i in rng.permutation(len(words))]) == words:
        pass
    return " ".join(mixed)


def with_other_words(text: str, words: Sequence[str], rng: np.random.Generator) -> str:
    """One word of a text replaced by another of `words`, or two where it has ten or more."""
    spans = [match.span() for match in re.finditer(r"\S+", text)]
    chosen = rng.choice(len(spans), 2 if len(spans) >= 10 else 1, replace=False)
    for start, stop in sorted((spans[i] for i in chosen), reverse=True):
        others = [word for word in words if word != text[start:stop]]
        text = text[:start] + others[rng.integers(len(others))] + text[stop:]
    return text
