"""A selected sample -> a candidate: ask for a new prompt, read it, have it answered, and pass the gates.

Every task ends in exactly one Outcome, accepted or rejected with a reason. Rows for files hold nothing that
depends on when or how often the stage was started, so that a resumed run writes the bytes of an unbroken one.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, Literal

from middo_jax.config import RefineSettings
from middo_jax.data.example import Example, Lineage
from middo_jax.refine import accept, prompts
from middo_jax.refine.cache import Answer
from middo_jax.refine.faults import NotAnswered, RefinerError, RequestRefused
from middo_jax.refine.parse import parse_prompt
from middo_jax.refine.prompts import Form, Messages
from middo_jax.refine.request import Refiner

Scores = Mapping[str, float | None]


@dataclasses.dataclass(frozen=True)
class Task:
    """What is to be done with one sample, and which axes asked for it.

    `hints` are the neighbours of a sparse sample; `scores` those of the source that was found wanting.
    `attempt` counts from 0; `feedback` says why the candidates of earlier ones were not accepted.
    """

    op: Literal["simplify", "rewrite", "synthesize"]
    axes: tuple[str, ...]
    source: Example
    hints: tuple[Example, ...] = ()
    scores: Scores = dataclasses.field(default_factory=dict)
    attempt: int = 0
    feedback: tuple[str, ...] = ()

    @property
    def task_id(self) -> str:
        """Unique within a round: a sample is replaced at most once and extended at most once."""
        return f"{self.op}:{self.source.id}"


@dataclasses.dataclass(frozen=True)
class Exchange:
    """One request and its answer."""

    step: Literal["prompt", "correction", "answer"]
    model: str
    messages: Messages
    answer: Answer
    attempt: int = 0


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a task ended: with the child `example`, or with a reason why there is none."""

    task: Task
    example: Example | None
    reject_reason: str | None = None
    exchanges: tuple[Exchange, ...] = ()

    def rejected(self, reason: str) -> Outcome:
        """The same outcome without its child."""
        return dataclasses.replace(self, example=None, reject_reason=reason)

    def next_attempt(self) -> Task | None:
        """The task once more, told why this candidate was not accepted.

        None if it was, or if nothing is known to be done better: no gate rejected it, a request failed.
        """
        told = prompts.FEEDBACK.get((self.reject_reason or "").partition(":")[0])
        if self.example is not None or told is None:
            return None
        feedback = tuple(dict.fromkeys([*self.task.feedback, told]))
        return dataclasses.replace(self.task, attempt=self.task.attempt + 1, feedback=feedback)

    def after(self, earlier: Outcome) -> Outcome:
        """The same outcome as the last of several attempts, with what was asked in all of them."""
        return dataclasses.replace(self, exchanges=earlier.exchanges + self.exchanges)

    def to_json(self) -> dict[str, Any]:
        """A row of refined.jsonl."""
        answers = [exchange.answer for exchange in self.exchanges]
        return {
            "task_id": self.task.task_id,
            "op": self.task.op,
            "axes": list(self.task.axes),
            "source_id": self.task.source.id,
            "hint_ids": [hint.id for hint in self.task.hints],
            "attempts": self.task.attempt + 1,
            "accepted": self.example is not None,
            "reject_reason": self.reject_reason,
            "replaces": None if self.task.op == "synthesize" else self.task.source.id,
            "scores_before": dict(self.task.scores),
            "example": None if self.example is None else self.example.to_json(),
            "original": self.task.source.to_json(),
            "usage": {
                "requests": len(answers),
                "prompt_tokens": sum(answer.prompt_tokens for answer in answers),
                "completion_tokens": sum(answer.completion_tokens for answer in answers),
            },
        }

    @classmethod
    def from_json(cls, row: Mapping[str, Any], examples: Mapping[str, Example]) -> Outcome:
        """Reads a row of refined.jsonl, less its exchanges; `examples` are the round's, by id."""
        task = Task(
            row["op"],
            tuple(row["axes"]),
            Example.from_json(row["original"]),
            tuple(examples[hint] for hint in row["hint_ids"]),
            row["scores_before"],
            row["attempts"] - 1,
        )
        example = None if row["example"] is None else Example.from_json(row["example"])
        return cls(task, example, row["reject_reason"])

    def rejected_row(self) -> dict[str, Any]:
        """A row of rejected.jsonl, with everything that the refiner said."""
        return {
            "source_id": self.task.source.id,
            "op": self.task.op,
            "axes": list(self.task.axes),
            "reason": self.reject_reason,
            "answers": [exchange.answer.text for exchange in self.exchanges],
        }

    def request_rows(self) -> Iterator[dict[str, Any]]:
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


def plan_tasks(
    examples: Sequence[Example],
    hard: Collection[str],
    sparse: Collection[str],
    low_quality: Collection[str],
    knn_ids: Mapping[str, Sequence[str]],
    scores: Mapping[str, Scores],
) -> list[Task]:
    """The three sets as tasks, in dataset order; of one sample the replacing task first, then the addition.

    A sample in both replacing sets is rewritten once, told about both faults.

    Args:
      examples: the round's dataset.
      hard: ids selected by complexity; `sparse` by diversity; `low_quality` by quality.
      knn_ids: ids of the nearest neighbours, nearest first, of every sparse sample.
      scores: what was measured, by id; kept in the child's lineage.

    Raises:
      ValueError: an id is not in the dataset, or a sparse sample has no neighbours: the selection belongs to
        another dataset.
    """
    by_id = {example.id: example for example in examples}
    hard, sparse, low_quality = set(hard), set(sparse), set(low_quality)
    hint_ids = {hint for core in sparse for hint in knn_ids.get(core, ())}
    if unknown := sorted((hard | sparse | low_quality | hint_ids) - by_id.keys()):
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
        known = scores.get(example.id, {})
        if example.id in low_quality:
            axes = ("complexity", "quality") if example.id in hard else ("quality",)
            tasks.append(Task("rewrite", axes, example, scores=known))
        elif example.id in hard:
            tasks.append(Task("simplify", ("complexity",), example, scores=known))
        if example.id in sparse:
            hints = tuple(by_id[hint] for hint in knn_ids[example.id])
            tasks.append(Task("synthesize", ("diversity",), example, hints, known))
    return tasks


def first_request(task: Task, settings: RefineSettings, form: Form = "text") -> Messages:
    """The request that asks for the new prompt, and says what was wrong with the last one."""
    return prompts.again(_first_request(task, settings, form), task.feedback)


def _first_request(task: Task, settings: RefineSettings, form: Form) -> Messages:
    if task.op == "synthesize":
        return prompts.synthesize(task.source.prompt, [hint.prompt for hint in task.hints], form)
    response = task.source.response if settings.show_response else None
    if len(task.axes) > 1:
        return prompts.both(task.source.prompt, response, form)
    revise = prompts.simplify if task.op == "simplify" else prompts.rewrite
    return revise(task.source.prompt, response, form)


async def refine_tasks(
    tasks: Sequence[Task],
    client: Refiner,
    settings: RefineSettings,
    round_index: int,
    on_done: Callable[[Outcome], None] | None = None,
    special_tokens: Collection[str] = (),
) -> list[Outcome]:
    """One outcome a task, in the order of the tasks; `on_done` hears of each as it ends.

    A task is carried to its end before another is begun in its place, so that what was paid for stopping
    early is as little as can be.

    Raises:
      NotAnswered: requests wait for a batch. All tasks have been taken as far as they go.
      RefinerError: the endpoint fails for all alike. What was in flight is finished first, and every answer
        is in the cache.
    """
    outcomes: dict[int, Outcome] = {}
    failures: list[RefinerError] = []
    unanswered: list[NotAnswered] = []
    form = await client.form() if tasks else "text"
    waiting = iter(enumerate(tasks))

    async def work() -> None:
        for index, task in waiting:
            if failures:
                return
            try:
                outcomes[index] = await _refine(task, client, form, settings, round_index, special_tokens)
            except NotAnswered as error:
                unanswered.append(error)
                continue
            except RefinerError as error:
                failures.append(error)
                return
            if on_done:
                on_done(outcomes[index])

    await asyncio.gather(*(work() for _ in range(min(settings.concurrency, len(tasks)))))
    if failures or unanswered:
        raise [*failures, *unanswered][0]
    return [outcomes[index] for index in range(len(tasks))]


def run(
    tasks: Sequence[Task],
    client: Refiner,
    settings: RefineSettings,
    round_index: int,
    on_done: Callable[[Outcome], None] | None = None,
    special_tokens: Collection[str] = (),
) -> list[Outcome]:
    """`refine_tasks` from code that is not asynchronous; closes the client at its end.

    Raises:
      RefinerError: as `refine_tasks`.
      KeyboardInterrupt: requests in flight were cancelled and connections closed; answers are in the cache.
    """

    async def stage() -> list[Outcome]:
        try:
            return await refine_tasks(tasks, client, settings, round_index, on_done, special_tokens)
        finally:
            await client.close()

    return asyncio.run(stage())


async def _refine(
    task: Task,
    client: Refiner,
    form: Form,
    settings: RefineSettings,
    round_index: int,
    special_tokens: Collection[str],
) -> Outcome:
    exchanges: list[Exchange] = []

    async def ask(step: Literal["prompt", "correction", "answer"], messages: Messages) -> Answer:
        async def reply(max_tokens: int | None = None) -> Answer:
            answer = await client.complete(
                messages,
                attempt=task.attempt,
                axis="+".join(task.axes),
                form=None if step == "answer" else form,
                max_tokens=max_tokens,
            )
            exchanges.append(Exchange(step, client.model, messages, answer, task.attempt))
            return answer

        answer = await reply()
        is_whole = step != "answer" and parse_prompt(answer.text) is not None
        if answer.finish_reason == "length" and not is_whole:
            try:
                return await reply(2 * settings.max_tokens)
            except RequestRefused as error:  # its context may have no more room
                if error.stops_stage:
                    raise
        return answer

    def rejected(reason: str) -> Outcome:
        return Outcome(task, None, reason, tuple(exchanges))

    try:
        messages = first_request(task, settings, form)
        reply = await ask("prompt", messages)
        for _ in range(settings.max_corrections):
            if parse_prompt(reply.text) is not None:
                break
            messages = prompts.correction(messages, reply.text, form)
            reply = await ask("correction", messages)
        prompt = parse_prompt(reply.text)
        if prompt is None:
            return rejected(_unreadable(reply))
        if reason := accept.check_prompt(task, prompt, settings, special_tokens):
            return rejected(reason)
        system = [message.content for message in task.source.messages if message.role == "system"]
        reply = await ask("answer", prompts.answer(prompt, system))
    except RefinerError as error:
        if error.stops_stage:
            raise
        return rejected(error.reason)
    response = reply.text.strip()
    if reason := accept.check(task, prompt, response, reply.finish_reason, settings, special_tokens):
        return rejected(reason)
    lineage = Lineage(
        parent_ids=(task.source.id,),
        root_id=task.source.lineage.root_id,
        round=round_index + 1,
        op=task.op,
        axis="+".join(task.axes),
        hint_ids=tuple(hint.id for hint in task.hints),
        refiner=client.model,
        prompt_version=prompts.PROMPT_VERSION,
        scores_before=dict(task.scores),
    )
    return Outcome(task, task.source.replace_text(prompt, response, lineage), None, tuple(exchanges))


def _unreadable(reply: Answer) -> str:
    if reply.finish_reason == "content_filter" or accept.is_refusal(reply.text):
        return "refused"
    return "truncated prompt" if reply.finish_reason == "length" else "unparsable"
