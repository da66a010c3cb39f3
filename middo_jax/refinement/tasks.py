"""Tasks of the refiner and their outcomes. Pure values and functions.

Rows for files do not depend on when or how often a stage was started, so a resumed run writes the same bytes
as an uninterrupted one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Literal

from middo_jax.config.axis_table import TaskOp, axes, axis_names
from middo_jax.config.gates import gate
from middo_jax.config.refine import Turns
from middo_jax.data.example import Example
from middo_jax.refinement.endpoint.request import Answer, Messages
from middo_jax.refinement.words import SHIPPED, Words
from middo_jax.rundir.rows import RefinedRow, RequestRow

Scores = Mapping[str, float | None]
Step = Literal["prompt", "correction", "answer", "again"]


@dataclasses.dataclass(frozen=True)
class Task:
    """The rewrite or the addition to be made from one sample.

    Attributes:
      op: the kind of task.
      axes: the axes that selected the sample.
      original: the sample.
      hints: the neighbours of a sparse sample.
      scores: the scores for which the sample was selected.
      attempt: counted from 0.
      feedback: why the candidates of earlier attempts were not accepted.
      words: the refiner's instructions.
      id_columns: columns that name a row, which an addition does not have.
    """

    op: TaskOp
    axes: tuple[str, ...]
    original: Example
    hints: tuple[Example, ...] = ()
    scores: Scores = dataclasses.field(default_factory=dict)
    attempt: int = 0
    feedback: tuple[str, ...] = ()
    words: Words = dataclasses.field(default=SHIPPED, repr=False)
    id_columns: tuple[str, ...] = ()

    @property
    def prompt(self) -> str:
        """The text that the new prompt replaces or extends: of a rewrite, the last user turn."""
        return self.original.prompt if self.op == "synthesize" else self.original.question

    def n_answers(self, turns: Turns) -> int:
        """How many answers the refiner writes for one candidate."""
        if turns != "all" or self.op == "synthesize":
            return 1
        return 1 + sum(m.role == "assistant" and m.learnt for m in self.original.context)

    @property
    def given(self) -> str:
        """The texts that the refiner gets of the dataset: those of the sample and of its hints."""
        return " ".join(message.content for e in (self.original, *self.hints) for message in e.messages)

    @property
    def keeps_prompt(self) -> bool:
        """Whether only the answer is asked for anew."""
        return self.op in ("reanswer", "complete")

    @property
    def task_id(self) -> str:
        """Unique within a round: a sample has at most one replacement and at most one addition."""
        return f"{self.op}:{self.original.id}"


@dataclasses.dataclass(frozen=True)
class Exchange:
    """One request and its answer."""

    step: Step
    model: str
    messages: Messages
    answer: Answer
    attempt: int = 0


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Why a task has no child.

    Attributes:
      gate: the gate that rejected the candidate; None if no gate did, for example because a request failed.
      detail: the finding, for people.
      fault: which of the gate's faults it is; "" for a gate with one fault.
    """

    gate: str | None
    detail: str
    fault: str = dataclasses.field(default="", compare=False)

    @property
    def feedback(self) -> str | None:
        """The advice to the refiner for the next attempt; None if no gate rejected the candidate."""
        return None if self.gate is None else gate(self.gate).feedback[self.fault]

    def __str__(self) -> str:
        return self.detail if self.gate is None else f"{self.gate}: {self.detail}"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a task ended: with the child `example`, or with the verdict why there is none."""

    task: Task
    example: Example | None
    verdict: Verdict | None = None
    exchanges: tuple[Exchange, ...] = ()

    def rejected(self, verdict: Verdict) -> Outcome:
        """The same outcome without its child."""
        return dataclasses.replace(self, example=None, verdict=verdict)

    def next_attempt(self) -> Task | None:
        """The task for another attempt, with the reason why this candidate was not accepted.

        None if the candidate was accepted, or if no gate rejected it, so that there is no advice.
        """
        told = None if self.verdict is None else self.verdict.feedback
        if self.example is not None or told is None:
            return None
        feedback = tuple(dict.fromkeys([*self.task.feedback, told]))
        return dataclasses.replace(self.task, attempt=self.task.attempt + 1, feedback=feedback)

    def after(self, earlier: Outcome) -> Outcome:
        """The same outcome as the last of several attempts, with the exchanges of all of them."""
        return dataclasses.replace(self, exchanges=earlier.exchanges + self.exchanges)

    def to_json(self) -> RefinedRow:
        """A row of refined.jsonl."""
        answers = [exchange.answer for exchange in self.exchanges]
        return {
            "task_id": self.task.task_id,
            "op": self.task.op,
            "axes": list(self.task.axes),
            "source_id": self.task.original.id,
            "hint_ids": [hint.id for hint in self.task.hints],
            "attempts": self.task.attempt + 1,
            "accepted": self.example is not None,
            "gate": None if self.verdict is None else self.verdict.gate,
            "detail": None if self.verdict is None else self.verdict.detail,
            "replaces": None if self.task.op == "synthesize" else self.task.original.id,
            "scores_before": dict(self.task.scores),
            "example": None if self.example is None else self.example.to_json(),
            "original": self.task.original.to_json(),
            "usage": {
                "requests": len(answers),
                "prompt_tokens": sum(answer.prompt_tokens for answer in answers),
                "completion_tokens": sum(answer.completion_tokens for answer in answers),
            },
        }

    @classmethod
    def from_json(cls, row: Mapping[str, Any], examples: Mapping[str, Example]) -> Outcome:
        """Reads a row of refined.jsonl; exchanges and fault are not in it. `examples`: the round's, by id."""
        task = Task(
            row["op"],
            tuple(row["axes"]),
            Example.from_json(row["original"]),
            tuple(examples[hint] for hint in row["hint_ids"]),
            row["scores_before"],
            row["attempts"] - 1,
        )
        example = None if row["example"] is None else Example.from_json(row["example"])
        # Version 0.1 wrote no gate, and `reject_reason` for `detail`.
        verdict = Verdict(row.get("gate"), row.get("detail") or row.get("reject_reason", ""))
        return cls(task, example, None if row["accepted"] else verdict)

    def request_rows(self) -> Iterator[RequestRow]:
        """Rows of requests.jsonl, in the order of asking."""
        for exchange in self.exchanges:
            yield {
                "task_id": self.task.task_id,
                "attempt": exchange.attempt,
                "step": exchange.step,
                "key": exchange.answer.key,
                "model": exchange.model,
                "messages": exchange.messages,
                "answer": exchange.answer.text,
                "finish_reason": exchange.answer.finish_reason,
                "prompt_tokens": exchange.answer.prompt_tokens,
                "completion_tokens": exchange.answer.completion_tokens,
            }


def why_kept(example: Example, turns: Turns) -> str | None:
    """Why a sample is never refined with this setting of `refine.turns`; None if it is."""
    if example.has_tools:
        return "tools are used, and a refiner has none"
    if turns == "skip" and example.n_user_turns > 1:
        return "several turns (refine.turns=skip)"
    return None


def plan_tasks(
    examples: Sequence[Example],
    selected: Mapping[str, Collection[str]],
    knn_ids: Mapping[str, Sequence[str]],
    scores: Mapping[str, Scores],
    faults: Mapping[str, str | None] | None = None,
    turns: Turns = "last",
) -> list[Task]:
    """The tasks for the selected samples, in dataset order; a sample's replacement comes before its addition.

    A sample that several replacing axes selected gets one rewrite for all of them. One that `why_kept` names
    gets no task.

    Args:
      examples: the round's dataset.
      selected: ids by axis; an axis without an operation makes no task.
      knn_ids: for every sparse sample the ids of its nearest neighbours, nearest first.
      scores: the scores by id, which the child's lineage records.
      faults: by id, the fault that the axis `consistency` found; an answer that was `cut` is completed.
      turns: `refine.turns`.

    Raises:
      ValueError: an id is not in the dataset, or a sparse sample has no neighbours, so that the selection
        belongs to another dataset; or an axis has no row in the table.
    """
    by_id = {example.id: example for example in examples}
    if strange := sorted(selected.keys() - set(axis_names())):
        raise ValueError(
            f"the selection has the axis {strange[0]!r}, which is not registered: register it first"
        )
    sets = {name: frozenset(ids) for name, ids in selected.items()}
    sparse = frozenset[str]().union(*(sets.get(row.name, ()) for row in axes() if row.op == "synthesize"))
    hint_ids = {hint for core in sparse for hint in knn_ids.get(core, ())}
    if unknown := sorted(frozenset(hint_ids).union(*sets.values()) - by_id.keys()):
        raise ValueError(
            f"{len(unknown)} selected or neighbouring ids are not in the dataset, the first is {unknown[0]}: "
            "score and select this dataset again"
        )
    if lonely := sorted(core for core in sparse if not knn_ids.get(core)):
        raise ValueError(
            f"sparse sample {lonely[0]} has no neighbours in the scores: score the dataset again"
        )
    tasks = []
    for example in examples:
        if why_kept(example, turns) is not None:
            continue
        known = scores.get(example.id, {})
        wanting = [row for row in axes() if row.op and example.id in sets.get(row.name, ())]
        replacing = [row for row in wanting if row.op != "synthesize"]
        if replacing:
            op = _op_of([row.op for row in replacing], (faults or {}).get(example.id))
            tasks.append(Task(op, tuple(row.name for row in replacing), example, scores=known))
        if len(wanting) > len(replacing):
            hints = tuple(by_id[hint] for hint in knn_ids[example.id])
            tasks.append(Task("synthesize", ("diversity",), example, hints, known))
    return tasks


def _op_of(ops: Sequence[TaskOp | None], fault: str | None) -> TaskOp:
    """One operation for all axes that selected a sample; only what they agree on is not a rewrite."""
    if all(op == "simplify" for op in ops):
        return "simplify"
    if all(op == "reanswer" for op in ops):
        return "complete" if fault == "cut" else "reanswer"
    return "rewrite"
