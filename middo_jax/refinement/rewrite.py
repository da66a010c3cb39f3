"""Selected sample -> candidate: requests a new prompt and its answer, and applies the gates on texts.

Every task ends in exactly one Outcome: with a child, or with a verdict.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from typing import Any, Protocol

from middo_jax.config import RefineSettings
from middo_jax.data.example import Example, Lineage, Message
from middo_jax.data.reply import answer_text, plain_lines, without_end_tokens, without_reasoning
from middo_jax.refinement import prompts
from middo_jax.refinement.acceptance.candidate import Candidate
from middo_jax.refinement.acceptance.table import asked, first_verdict
from middo_jax.refinement.endpoint.ending import ending
from middo_jax.refinement.endpoint.faults import EndpointFailed, NotAnswered, RefinerError, RequestRefused
from middo_jax.refinement.endpoint.probe import Probe
from middo_jax.refinement.endpoint.request import Answer, Messages
from middo_jax.refinement.parse import parse_prompt
from middo_jax.refinement.prompts import Form
from middo_jax.refinement.tasks import Exchange, Outcome, Step, Task, Verdict

_log = logging.getLogger(__name__)

ASKS_PROMPT: frozenset[Step] = frozenset(("prompt", "correction"))  # the steps whose replies are prompts
AGAIN = 1 << 20  # added to the attempt of the step `again`, so that it is another request than `answer`


class Refiner(Protocol):
    """Answers requests: a client of a served model, or of the results of a batch."""

    model: str

    async def complete(
        self,
        messages: Messages,
        *,
        attempt: int = 0,
        account: str = "all",
        response_format: Mapping[str, Any] | None = None,
        max_tokens: int | None = None,
    ) -> Answer:
        """The answer to a conversation; raises RefinerError if there is none."""
        ...

    async def honours(self, probe: Probe) -> bool:
        """Whether the server enforces schemas."""
        ...

    async def refuse_schema(self, reason: str) -> None:
        """Records that the server refuses requests with a schema; they are refused here from then on."""
        ...

    async def close(self) -> None:
        """Closes the connections."""
        ...


async def find_form(client: Refiner, settings: RefineSettings) -> Form:
    """The form of new prompts: `refine.response_format`, or with `auto` JSON if the server enforces schemas.

    Raises:
      RefinerError: the server does not answer.
    """
    if settings.response_format != "auto":
        return settings.response_format
    probe = Probe(prompts.PROBE, prompts.RESPONSE_FORMAT, prompts.PROBE_TOKENS, _is_json_prompt)
    return "json" if await client.honours(probe) else "text"


def _is_json_prompt(text: str) -> bool:
    said = without_reasoning(text)
    return said is not None and said.lstrip().startswith("{") and parse_prompt(said) is not None


def answer_request(task: Task, prompt: str, context: Sequence[Message]) -> Messages:
    """The request for the last answer, to a prompt after the turns before it."""
    if task.op == "complete":
        return prompts.completion(prompt, task.original.response, context, task.words)
    return prompts.answer(prompt, context)


def first_request(task: Task, settings: RefineSettings, form: Form = "text") -> Messages:
    """The request for a new prompt, with the reasons why earlier candidates were not accepted.

    Where the prompt stays, it is the request for its answer, which later attempts repeat.
    """
    if task.keeps_prompt:
        return answer_request(task, task.prompt, task.original.context)
    return prompts.again(_first_request(task, settings, form), task.feedback)


def _first_request(task: Task, settings: RefineSettings, form: Form) -> Messages:
    if task.op == "synthesize":
        several = any(example.n_user_turns > 1 for example in (task.original, *task.hints))
        hints = [prompts.questions(hint) for hint in task.hints]
        return prompts.synthesize(prompts.questions(task.original), hints, form, several, task.words)
    response = task.original.response if settings.show_response else None
    how = task.words.simplify if task.op == "simplify" else task.words.rewrite
    if task.op == "rewrite" and "complexity" in task.axes:
        how = task.words.both
    context = prompts.conversation(task.original.context)
    return prompts.revise(how, (task.prompt, response), form, context, task.words.in_context)


async def refine_tasks(
    tasks: Sequence[Task],
    client: Refiner,
    settings: RefineSettings,
    round_index: int,
    on_done: Callable[[Outcome], None] | None = None,
    special_tokens: Collection[str] = (),
) -> list[Outcome]:
    """One outcome per task, in the order of the tasks. `on_done` is called with each outcome as it ends.

    A task is finished before another one starts in its place, so that a stage that stops early has paid for
    as few unfinished tasks as possible.

    Raises:
      NotAnswered: requests wait for a batch. All tasks have advanced as far as possible.
      RefinerError: the endpoint fails for all requests. Requests in flight are finished first, and every
        answer is in the cache.
    """
    outcomes: dict[int, Outcome] = {}
    failures: list[RefinerError] = []
    unanswered: list[NotAnswered] = []
    form = await find_form(client, settings) if tasks else "text"
    schema = _Schema(client)
    waiting = iter(enumerate(tasks))

    async def work() -> None:
        for index, task in waiting:
            if failures:
                return
            try:
                outcomes[index] = await _refine(
                    _Dialogue(task, client, form, schema, settings), round_index, special_tokens
                )
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
    """`refine_tasks` for code that is not asynchronous. Closes the client at the end.

    Raises:
      RefinerError: see `refine_tasks`.
      KeyboardInterrupt: requests in flight were cancelled and connections closed; answers are in the cache.
    """

    async def stage() -> list[Outcome]:
        try:
            return await refine_tasks(tasks, client, settings, round_index, on_done, special_tokens)
        finally:
            await client.close()

    return asyncio.run(stage())


class _Schema:
    """Whether requests with a schema are answered. Some servers accept the probe's schema but no later one.

    Until one request was answered, requests are sent one by one, so that a refusal costs one request.
    """

    def __init__(self, client: Refiner) -> None:
        self.was_answered = False
        self._client = client
        self._one_by_one = asyncio.Lock()
        self._is_refused = False

    @property
    def _is_known(self) -> bool:
        return self.was_answered or self._is_refused

    @contextlib.asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """The context of one request with a schema; waits while another one is undecided."""
        async with contextlib.AsyncExitStack() as stack:
            if not self._is_known:
                await stack.enter_async_context(self._one_by_one)
                if self._is_known:  # an earlier request has decided: later ones need not wait
                    await stack.aclose()
            yield

    async def was_refused(self, error: RefinerError) -> None:
        """Records that a request was refused with the schema and answered without it."""
        if self._is_known:
            return
        self._is_refused = True
        await self._client.refuse_schema(error.reason)
        _log.warning(
            "the refiner refuses the schema of new prompts (%s): from now on they are asked for between tags",
            error.reason,
        )


@dataclasses.dataclass
class _Dialogue:
    """The requests and answers of one task."""

    task: Task
    client: Refiner
    form: Form
    schema: _Schema
    settings: RefineSettings
    exchanges: list[Exchange] = dataclasses.field(default_factory=list)

    async def new_prompt(self) -> Answer:
        """The reply with the new prompt. Unreadable replies are corrected `refine.max_corrections` times."""
        messages, reply = await self._first_reply()
        for _ in range(self.settings.max_corrections):
            if parse_prompt(reply.text) is not None:
                break
            said = without_reasoning(reply.text) or ""
            messages = prompts.correction(messages, said, self.form)
            reply = await self._ask("correction", messages)
        return reply

    async def _first_reply(self) -> tuple[Messages, Answer]:
        """The first request and its reply; if the schema is refused, the reply to the request without it."""

        async def asked() -> tuple[Messages, Answer]:
            messages = first_request(self.task, self.settings, self.form)
            return messages, await self._ask("prompt", messages)

        if self.form == "text":
            return await asked()
        async with self.schema.turn():
            try:
                replied = await asked()
                self.schema.was_answered = True
                return replied
            except (RequestRefused, EndpointFailed) as error:
                if error.stops_stage:
                    raise
                refused = error
            self.form = "text"
            try:
                replied = await asked()
            except (RequestRefused, EndpointFailed) as error:
                if error.stops_stage:
                    raise
                raise refused from None  # the schema was not the reason
            await self.schema.was_refused(refused)
            return replied

    async def answer(self, messages: Messages) -> Answer:
        """The reply to a prompt."""
        return await self._ask("answer", messages)

    async def again(self) -> Answer:
        """Another answer to the old prompt: another sample, also where the prompt stays."""
        original = self.task.original
        return await self._ask("again", prompts.answer(original.question, original.context))

    async def _ask(self, step: Step, messages: Messages) -> Answer:
        answer = await self._complete(step, messages)
        is_whole = step in ASKS_PROMPT and parse_prompt(answer.text) is not None
        if ending(answer.finish_reason) == "cut" and not is_whole:
            try:
                return await self._complete(step, messages, 2 * self.settings.max_tokens)
            except RequestRefused as error:  # the model's context may be too small for more tokens
                if error.stops_stage:
                    raise
        return answer

    async def _complete(self, step: Step, messages: Messages, max_tokens: int | None = None) -> Answer:
        answer = await self.client.complete(
            messages,
            attempt=self.task.attempt + (AGAIN if step == "again" else 0),
            account="+".join(self.task.axes),
            response_format=prompts.RESPONSE_FORMAT if self.form == "json" and step in ASKS_PROMPT else None,
            max_tokens=max_tokens,
        )
        self.exchanges.append(Exchange(step, self.client.model, messages, answer, self.task.attempt))
        return answer


async def _refine(dialogue: _Dialogue, round_index: int, special_tokens: Collection[str]) -> Outcome:
    task, settings = dialogue.task, dialogue.settings

    def rejected(verdict: Verdict) -> Outcome:
        return Outcome(task, None, verdict, tuple(dialogue.exchanges))

    try:
        candidate = await _prompted(dialogue, special_tokens)
        if not task.keeps_prompt and (verdict := first_verdict(candidate, "prompt", settings)):
            return rejected(verdict)
        prompt = candidate.prompt
        assert prompt is not None  # otherwise `readable`, which is always applied, has rejected it
        context = await _context(dialogue, special_tokens)
        if isinstance(context, Verdict):
            return rejected(context)
        reply = await dialogue.answer(answer_request(task, prompt, context))
        response = _answer_text(reply.text, task, prompt, special_tokens)
        candidate = dataclasses.replace(candidate, response=response, finish_reason=reply.finish_reason)
        if verdict := first_verdict(candidate, "answer", settings):
            return rejected(verdict)
        if asked("again", task.axes, settings):
            reply = await dialogue.again()
            again = _answer_text(reply.text, task, task.original.question, special_tokens)
            is_whole = ending(reply.finish_reason) == "whole"
            candidate = dataclasses.replace(candidate, again=again if is_whole else None)
            if verdict := first_verdict(candidate, "again", settings):
                return rejected(verdict)
    except RefinerError as error:
        if error.stops_stage:
            raise
        return rejected(Verdict(None, error.reason))
    lineage = _lineage(task, dialogue.client.model, round_index)
    child = task.original.replace_text(prompt, response, lineage, context, task.id_columns)
    return Outcome(task, child, None, tuple(dialogue.exchanges))


async def _prompted(dialogue: _Dialogue, special_tokens: Collection[str]) -> Candidate:
    """A candidate with its prompt: the refiner's new one, or the original's where that stays."""
    task = dialogue.task
    if task.keeps_prompt:
        return Candidate(task, special_tokens, prompt=task.prompt)
    reply = await dialogue.new_prompt()
    prompt = parse_prompt(reply.text)
    if prompt is not None:
        prompt = without_end_tokens(plain_lines(prompt), special_tokens)
    said = without_reasoning(reply.text) or ""
    return Candidate(task, special_tokens, said, prompt, reply.finish_reason)


async def _context(dialogue: _Dialogue, special_tokens: Collection[str]) -> tuple[Message, ...] | Verdict:
    """The turns before the new prompt; with `refine.turns=all` each learnt answer among them is a new one.

    An answer that a gate rejects ends the task: its verdict names the turn. The new prompt was written before
    these answers, since most candidates fail there, at the price of one request.
    """
    task, settings = dialogue.task, dialogue.settings
    if task.op == "synthesize":
        return tuple(m for m in task.original.messages if m.role == "system")
    turns: list[Message] = []
    for n, message in enumerate(task.original.context, 1):
        if settings.turns == "all" and message.role == "assistant" and message.learnt:
            *before, question = turns
            reply = await dialogue.answer(prompts.answer(question.content, before))
            here = dataclasses.replace(task, original=Example(task.original.messages[:n]))
            text = _answer_text(reply.text, task, question.content, special_tokens)
            candidate = Candidate(
                here,
                special_tokens,
                prompt=question.content,
                finish_reason=reply.finish_reason,
                response=text,
            )
            if text != message.content and (verdict := first_verdict(candidate, "answer", settings)):
                return dataclasses.replace(verdict, detail=f"turn {n}: {verdict.detail}")
            if text != message.content:  # a field such as `reasoning_content` belongs to the answer that goes
                message = Message(message.role, text)
        turns.append(message)
    return tuple(turns)


def _answer_text(reply: str, task: Task, prompt: str, special_tokens: Collection[str]) -> str:
    return answer_text(reply, f"{task.given} {prompt}", special_tokens)


def _lineage(task: Task, refiner: str, round_index: int) -> Lineage:
    return Lineage(
        parent_ids=(task.original.id,),
        root_id=task.original.root_id,
        round=round_index + 1,
        op=task.op,
        axis="+".join(task.axes),
        hint_ids=tuple(hint.id for hint in task.hints),
        refiner=refiner,
        prompt_version=task.words.version,
        scores_before=dict(task.scores),
    )
