"""The requests and the cost of refining, estimated before anything is sent."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from middo_jax.config import RefineSettings
from middo_jax.refinement.endpoint.usage import cost_usd, estimated_tokens, tokens_of_text
from middo_jax.refinement.prompts import PROBE, PROBE_TOKENS, Form
from middo_jax.refinement.rewrite import first_request
from middo_jax.refinement.tasks import Task


@dataclasses.dataclass(frozen=True)
class DryRun:
    """The requests of a stage's first attempt, if the cache has no answer to any of them.

    Estimates assume one token per four characters, and that the new prompt and its answer are as long as the
    original ones. Upper bounds assume completions of maximum length. Neither includes corrections, retries
    and further attempts.

    Attributes:
      rows: the first request of every task.
      requests: a new prompt, unless it stays, and its answer per task (with `refine.turns=all` an answer per
        learnt turn), and the probes.
      conversations: tasks that rewrite a conversation of several turns.
      turns_changed, turns: how many turns of these conversations are written anew, and how many they have.
      kept: selected samples without a task, by reason.
      probes: 1 if `refine.response_format=auto` has to be found out.
      prompt_tokens_estimate, completion_tokens_estimate, usd_estimate: estimates.
      completion_tokens_at_most, usd_at_most: upper bounds.
    """

    rows: tuple[dict[str, Any], ...]
    requests: int
    probes: int
    conversations: int
    turns_changed: int
    turns: int
    kept: dict[str, int]
    prompt_tokens_estimate: int
    completion_tokens_estimate: int
    usd_estimate: float
    completion_tokens_at_most: int
    usd_at_most: float


def dry_run(
    tasks: Sequence[Task],
    settings: RefineSettings,
    form: Form = "text",
    kept: Mapping[str, int] | None = None,
) -> DryRun:
    """The first request of every task, and the estimates for all requests; sends nothing.

    Args:
      tasks: all tasks of the stage.
      settings: the refiner's.
      form: of new prompts.
      kept: selected samples without a task, by reason.
    """
    probes = int(settings.response_format == "auto" and bool(tasks))
    rows, prompt_tokens, completion_tokens = [], probes * estimated_tokens(PROBE), probes * PROBE_TOKENS
    for task in tasks:
        messages = first_request(task, settings, form)
        asking, prompt = estimated_tokens(messages), tokens_of_text(task.prompt)
        prompt_tokens += asking
        *earlier, (before_last, last) = _answers(task, settings)
        if not task.keeps_prompt:  # else the first request is already the one for the last answer
            completion_tokens += min(prompt, settings.max_tokens)
            prompt_tokens += before_last
        completion_tokens += min(last, settings.max_tokens)
        for before, response in earlier:
            prompt_tokens += before
            completion_tokens += min(response, settings.max_tokens)
        rows.append({"task_id": task.task_id, "messages": messages, "prompt_tokens_estimate": asking})
    requests = sum(task.n_answers(settings.turns) + (not task.keeps_prompt) for task in tasks)
    most = requests * settings.max_tokens + probes * PROBE_TOKENS
    long = [task for task in tasks if task.op != "synthesize" and task.original.n_user_turns > 1]
    return DryRun(
        rows=tuple(rows),
        requests=requests + probes,
        probes=probes,
        conversations=len(long),
        turns_changed=sum(task.n_answers(settings.turns) + (not task.keeps_prompt) for task in long),
        turns=sum(len(task.original.messages) for task in long),
        kept=dict(kept or {}),
        prompt_tokens_estimate=prompt_tokens,
        completion_tokens_estimate=completion_tokens,
        usd_estimate=cost_usd(settings.prices, prompt_tokens, completion_tokens),
        completion_tokens_at_most=most,
        usd_at_most=cost_usd(settings.prices, prompt_tokens, most),
    )


def _answers(task: Task, settings: RefineSettings) -> Iterator[tuple[int, int]]:
    """(tokens of the request, tokens of the answer) of each answer to be written, as long as the original."""
    every = settings.turns == "all" and task.op != "synthesize"
    *earlier, last = task.original.messages
    read = 0
    for message in earlier:
        tokens = tokens_of_text(message.content)
        if every and message.role == "assistant" and message.learnt:
            yield read, tokens
        read += tokens
    yield tokens_of_text(task.prompt) if task.op == "synthesize" else read, tokens_of_text(last.content)
