"""The requests and the cost of refining, estimated before anything is sent."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
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
      requests: two per task, one where the prompt stays, and the probes.
      probes: 1 if `refine.response_format=auto` has to be found out.
      prompt_tokens_estimate, completion_tokens_estimate, usd_estimate: estimates.
      completion_tokens_at_most, usd_at_most: upper bounds.
    """

    rows: tuple[dict[str, Any], ...]
    requests: int
    probes: int
    prompt_tokens_estimate: int
    completion_tokens_estimate: int
    usd_estimate: float
    completion_tokens_at_most: int
    usd_at_most: float


def dry_run(tasks: Sequence[Task], settings: RefineSettings, form: Form = "text") -> DryRun:
    """The first request of every task, and the estimates for all requests; sends nothing."""
    probes = int(settings.response_format == "auto" and bool(tasks))
    rows, prompt_tokens, completion_tokens = [], probes * estimated_tokens(PROBE), probes * PROBE_TOKENS
    for task in tasks:
        messages = first_request(task, settings, form)
        asking, prompt, response = (
            estimated_tokens(messages),
            tokens_of_text(task.original.prompt),
            tokens_of_text(task.original.response),
        )
        prompt_tokens += asking
        completion_tokens += min(response, settings.max_tokens)
        if not task.keeps_prompt:
            prompt_tokens += prompt
            completion_tokens += min(prompt, settings.max_tokens)
        rows.append({"task_id": task.task_id, "messages": messages, "prompt_tokens_estimate": asking})
    requests = sum(1 if task.keeps_prompt else 2 for task in tasks)
    most = requests * settings.max_tokens + probes * PROBE_TOKENS
    return DryRun(
        rows=tuple(rows),
        requests=requests + probes,
        probes=probes,
        prompt_tokens_estimate=prompt_tokens,
        completion_tokens_estimate=completion_tokens,
        usd_estimate=cost_usd(settings.prices, prompt_tokens, completion_tokens),
        completion_tokens_at_most=most,
        usd_at_most=cost_usd(settings.prices, prompt_tokens, most),
    )
