"""The table of gates: the checks that a rewrite must pass before it enters the dataset, in order.

A row declares everything about a gate: its setting, its place in the order, the feedback to the next attempt,
and its texts in the report and the docs. Only the check itself is in `refinement.acceptance.table`, because
it needs packages that neither settings nor reports may import.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Collection, Mapping
from typing import Any, Literal

Accept = Literal["none", "sane", "measured"]  # the values of refine.accept, the laxest first
LEVELS: tuple[Accept, ...] = typing.get_args(Accept)
Needs = Literal["prompt", "answer", "again", "dataset", "measurement", "rating", "accepted"]
# What a gate looks at, in the order in which it becomes known:
#   prompt       the refiner's reply and the new prompt in it; the answer is not paid for yet
#   answer       the answer to the new prompt
#   again        the refiner's answer to the old prompt, one more request
#   dataset      the dataset's lengths, and the tokenizer
#   measurement  the candidate's measurements under the model in training
#   rating       the judge's rating of the candidate
#   accepted     every known conversation, and the rewrites accepted so far
PHASES: tuple[Needs, ...] = typing.get_args(Needs)
Of = Literal["all", "replacements", "hard", "low quality", "additions", "none"]


@dataclasses.dataclass(frozen=True)
class Switch:
    """A gate's setting: a bar (threshold), `refine.gates.NAME`, within bounds or null.

    A gate without a bar is opened (disabled) by its name in `refine.gates.open`.

    Attributes:
      default: a number is a bar; None: a bar, and the gate is open; True: there is none.
      gt, ge, lt, le: bounds of a bar, named as by pydantic.
      opens: whether a bar of null opens the gate; otherwise it makes the gate ask less.
      accept: the most lenient `refine.accept` under which the bar counts; None: that of the gate.
    """

    default: bool | float | None
    gt: float | None = None
    ge: float | None = None
    lt: float | None = None
    le: float | None = None
    opens: bool = True
    accept: Accept | None = None

    @property
    def has_bar(self) -> bool:
        """Whether the setting is a number."""
        return not isinstance(self.default, bool)


@dataclasses.dataclass(frozen=True)
class Gate:
    """One row of the table.

    Attributes:
      name: name in candidates.jsonl.
      needs: the input of its check; gates run in the order of PHASES.
      accept: the most lenient `refine.accept` under which it runs.
      of: the rewrites that it checks.
      title: the report's text for rewrites that pass.
      rule: a sentence for the settings and the docs: what passes.
      feedback: fault -> text for the next attempt; "" is the key if the gate has only one fault. It contains
        no numbers: the last digits of measurements depend on the machine, and equal requests are answered
        from the cache.
      switch: its setting; or the name of the gate whose setting it shares; or None: it cannot be opened.
      of_own: the rewrites that it checks if the refiner is the model in training; None: the same ones. It
        counts from the phase `dataset` on.
    """

    name: str
    needs: Needs
    accept: Accept
    of: Of
    title: str
    rule: str
    feedback: Mapping[str, str]
    switch: Switch | str | None = None
    of_own: Of | None = None

    @property
    def setting(self) -> str | None:
        """The name of the gate that has its setting: itself, another gate, or None."""
        if self.switch is None:
            return None
        return self.switch if isinstance(self.switch, str) else self.name

    def concerns(self, axes: Collection[str], *, refines_itself: bool = False) -> bool:
        """Whether it checks rewrites of samples that these axes selected.

        Args:
          axes: that selected the sample.
          refines_itself: whether the refiner is the model in training.
        """
        of = self.of_own if refines_itself and self.of_own is not None else self.of
        return {
            "all": True,
            "replacements": "diversity" not in axes,
            "hard": "complexity" in axes,
            "low quality": "quality" in axes,
            "additions": "diversity" in axes,
            "none": False,
        }[of]

    def is_shut(self, accept: str, gates: Mapping[str, Any]) -> bool:
        """Whether the gate runs.

        Args:
          accept: `refine.accept`.
          gates: `refine.gates` as a mapping, or `GateSettings.values()`; missing gates have their default. In
            folders of an earlier version every gate has a setting of its own.
        """
        if accept not in levels_from(self.accept):
            return False
        if self.setting is None or (isinstance(self.switch, Switch) and not self.switch.opens):
            return True
        if self.setting in (gates.get("open") or ()):
            return False
        switch = gate(self.setting).switch
        return gates.get(self.setting, getattr(switch, "default", True)) not in (False, None)


_CONTROL = "It held a control token. Write plain text."
_CHARACTER = "It held a control character. Write plain text, and write each backslash of JSON twice."
_INVISIBLE = "It held an invisible character. Write plain text."
_REFUSED = "It was declined. Ask for something that can be answered."
_ECHO = "It repeated the instructions. Write only a new prompt."
_UNCHANGED = "It changed nothing. Make a real change."
_LANGUAGE = "It changed the language. Stay in the language of the original."

_TABLE = [
    Gate(
        "readable",
        needs="prompt",
        accept="none",
        of="all",
        title="its prompt can be read and trained on",
        rule="The new prompt can be read from the reply, is not empty, and contains no control token of any "
        "model, no control character and no invisible character that its script does not need.",
        feedback={
            "unparsable": "It could not be read. Keep to the form that is asked for at the end.",
            "truncated prompt": "It was too long. Write a short prompt.",
            "empty prompt": "It was empty.",
            "control token": _CONTROL,
            "control character": _CHARACTER,
            "invisible character": _INVISIBLE,
            "refused": _REFUSED,
        },
    ),
    Gate(
        "sane",
        needs="prompt",
        accept="sane",
        of="all",
        title="prompt: no refusal, echo or copy",
        rule="The new prompt is no refusal and no echo of the request. A sample that was to become easier "
        "gets another prompt.",
        feedback={"refused": _REFUSED, "echo": _ECHO, "unchanged": _UNCHANGED},
    ),
    Gate(
        "numbers",
        needs="prompt",
        accept="sane",
        of="replacements",
        title="numbers kept",
        rule="A rewritten prompt keeps its original's numbers; a simplified one may lose or gain some, but "
        "exchanges none.",
        feedback={"": "It lost or exchanged numbers of the original. Keep them as they are."},
        switch=Switch(True),
    ),
    Gate(
        "code",
        needs="prompt",
        accept="sane",
        of="replacements",
        title="code blocks kept",
        rule="A rewritten prompt keeps its original's code blocks, word for word.",
        feedback={"": "It lost code of the original. Keep code blocks word for word."},
        switch=Switch(True),
    ),
    Gate(
        "language",
        needs="prompt",
        accept="sane",
        of="all",
        title="prompt: language kept",
        rule="Prompt and response stay in their language, where it can be told (py3langid, offline).",
        feedback={"": _LANGUAGE},
        switch=Switch(True),
    ),
    Gate(
        "answer_readable",
        needs="answer",
        accept="none",
        of="all",
        title="its answer is whole and can be trained on",
        rule="The answer is whole, is not empty, and contains no control token of any model, no control "
        "character and no invisible character that its script does not need.",
        feedback={
            "truncated answer": "The answer to its prompt was too long. Ask for a shorter one.",
            "broken off": "Its prompt got no whole answer. Ask for something that can be answered in words.",
            "refused": _REFUSED,
            "empty answer": "Its prompt got no answer. Ask for something that can be answered in words.",
            "control token": _CONTROL,
            "control character": _CHARACTER,
            "invisible character": _INVISIBLE,
        },
    ),
    Gate(
        "answer_sane",
        needs="answer",
        accept="sane",
        of="all",
        title="answer: no refusal, echo or copy",
        rule="The answer is no refusal, no echo of the request and no copy of the prompt. "
        "Prompt or answer differ from the original's.",
        feedback={
            "refused": _REFUSED,
            "echo": _ECHO,
            "answer repeats the prompt": "Its prompt asked for nothing. Ask a question or set a task.",
            "unchanged": _UNCHANGED,
        },
    ),
    Gate(
        "answer_language",
        needs="answer",
        accept="sane",
        of="replacements",
        title="answer: language kept",
        rule="The answer is in the language of the original's answer or of the new prompt.",
        feedback={"": _LANGUAGE},
        switch="language",
    ),
    Gate(
        "agreement",
        needs="again",
        accept="measured",
        of="replacements",
        title="agrees with the answer to the old prompt",
        rule="The refiner's answer to the old prompt, asked once more, agrees this far: short ones in "
        "numbers or words, others by word F1, 0 to 1. It costs one answer per candidate. Where the prompt "
        "stays, refine.temperature must not be 0.",
        feedback={"": "Its answer was not certain. Ask for something that has one answer."},
        switch=Switch(None, gt=0, le=1),
    ),
    Gate(
        "length",
        needs="dataset",
        accept="sane",
        of="all",
        title="about as long as the dataset's",
        rule="Allowed length in characters, of prompt and of response: from p1 / factor to p99 x factor of "
        "the dataset. Both together fit into model.max_length.",
        feedback={
            "": "It or its answer was far longer or shorter than usual. Ask for something of usual length."
        },
        switch=Switch(2.0, ge=1),
    ),
    Gate(
        "context",
        needs="measurement",
        accept="measured",
        of="replacements",
        title="still about its original's task",
        rule="A rewritten prompt is nearer to its original than this share of pairs of samples are to each "
        "other.",
        feedback={"": "It set another task than the original. Keep the subject and the kind of task."},
        switch=Switch(0.95, gt=0, lt=1),
    ),
    Gate(
        "information",
        needs="measurement",
        accept="measured",
        of="replacements",
        title="prompt and answer belong together",
        rule="The prompt raises the answer's log-probability by at least 90 % of the original's nats (PMI), "
        "or reverse IFD, how badly the answer predicts its prompt, rises by 2 % at most. An original of "
        "several turns is not compared.",
        feedback={
            "": "Its answer had little to do with it. Ask for something whose answer depends on every detail."
        },
        switch=Switch(True),
    ),
    Gate(
        "ending",
        needs="measurement",
        accept="measured",
        of="replacements",
        title="answer ends where an end is due",
        rule="The end of the answer's turn has a loss no higher than that of 95 % of the samples.",
        feedback={"": "The answer to it broke off. Ask for something with a short and complete answer."},
        switch=Switch(True),
    ),
    Gate(
        "floor",
        needs="measurement",
        accept="measured",
        of="hard",
        of_own="replacements",
        title="loss above the floor",
        rule="The answer's loss is no lower than that of 10 % of the samples: the text that the model finds "
        "easiest is its own.",
        feedback={"": "Its answer was too general. Ask for something that needs particular facts or words."},
        switch=Switch(True),
    ),
    Gate(
        "loss",
        needs="measurement",
        accept="measured",
        of="hard",
        of_own="none",  # a model finds its own answers easy, good or bad
        title="loss below the hard ones'",
        rule="A hard sample's loss falls, to at most the threshold that made it hard.",
        feedback={
            "": "It was still too hard to learn from. Make it easier, with plainer words and fewer steps."
        },
        switch=Switch(True),
    ),
    Gate(
        "coverage",
        needs="measurement",
        accept="measured",
        of="additions",
        title="nearer to its core than neighbours are",
        rule="A new sample is nearer to its sparse core than the k-th neighbour was, so that the core's mean "
        "similarity rises.",
        feedback={
            "": "It was too far from the core prompt. Stay closer to its subject and its kind of task."
        },
        switch=Switch(True),
    ),
    Gate(
        "novelty",
        needs="measurement",
        accept="measured",
        of="additions",
        title="no paraphrase of a sample",
        rule="A new sample is no nearer to any other than this share of samples are to their nearest.",
        feedback={"": "It asked nearly the same as a known prompt. Ask for something new."},
        switch=Switch(0.95, gt=0, lt=1),
    ),
    Gate(
        "distribution",
        needs="measurement",
        accept="measured",
        of="additions",
        title="not farther out, not hard",
        rule="A new sample is no farther out than its core, and not itself hard.",
        feedback={"": "It was too unusual or too hard. Write a plain prompt that is closer to the core."},
        switch=Switch(True),
    ),
    Gate(
        "quality",
        needs="rating",
        accept="measured",
        of="low quality",
        title="rating rises",
        rule="A low-quality sample's rating rises.",
        feedback={"": "It was not rated better than the original. Make it clearer, complete and factual."},
        switch=Switch(True),
    ),
    Gate(
        "duplicate",
        needs="accepted",
        accept="none",
        of="all",
        title="no duplicate",
        rule="No rewrite equals a known conversation. With refine.accept sane or measured, its prompt "
        "shares less than this part of its word triples with any training, held-out or accepted prompt; "
        "null: equality alone counts. 0.6: none of Alpaca's own pairs reach it by chance.",
        feedback={"": "It was nearly the same as another prompt. Ask for something else, in other words."},
        switch=Switch(0.6, gt=0, le=1, opens=False, accept="sane"),
    ),
]


def levels_from(accept: Accept) -> tuple[Accept, ...]:
    """The values of `refine.accept` that are at least this strict."""
    return LEVELS[LEVELS.index(accept) :]


def gates() -> tuple[Gate, ...]:
    """Returns all gates, in the order in which they run."""
    return tuple(_TABLE)


def gate(name: str) -> Gate:
    """Returns the row of a gate.

    Raises:
      KeyError: there is no gate of that name.
    """
    for row in _TABLE:
        if row.name == name:
            return row
    raise KeyError(name)


def enter(row: Gate) -> None:
    """Adds a row after all gates of its phase and of earlier phases.

    Raises:
      ValueError: the name is taken, or the gate whose setting it shares does not exist.
    """
    if any(known.name == row.name for known in _TABLE):
        raise ValueError(f"there is a gate called {row.name!r} already")
    if isinstance(row.switch, str) and not any(known.name == row.switch for known in _TABLE):
        raise ValueError(
            f"gate {row.name!r}: no gate is called {row.switch!r}, so it cannot share its setting"
        )
    behind = [known for known in _TABLE if PHASES.index(known.needs) <= PHASES.index(row.needs)]
    _TABLE.insert(len(behind), row)


def strike(name: str) -> None:
    """Removes a row.

    Raises:
      KeyError: there is no gate of that name.
    """
    _TABLE.remove(gate(name))
