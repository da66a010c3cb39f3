"""What refining would ask for and cost, before anything is sent."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from middo_jax.config import RefineSettings
from middo_jax.refinement.endpoint.usage import CHARACTERS_A_TOKEN, cost_usd, estimated_tokens
from middo_jax.refinement.prompts import PROBE, PROBE_TOKENS, Form
from middo_jax.refinement.rewrite import first_request
from middo_jax.refinement.tasks import Task


@dataclasses.dataclass(frozen=True)
class DryRun:
    """What the first attempt of a stage would ask for, if the cache knew nothing.

    `requests` are two a task and the `probes`: one where `refine.response_format=auto` has to be found out.

    Estimates take a token for four characters, the new prompt to be as long as the original and its answer as
    long as the original's. At most: every completion at its limit. Corrections, retries and further attempts
    come on top of both.
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
    """The first request of every task, and what all of them may need; nothing is sent."""
    probes = int(settings.response_format == "auto" and bool(tasks))
    rows, prompt_tokens, completion_tokens = [], probes * estimated_tokens(PROBE), probes * PROBE_TOKENS
    for task in tasks:
        messages = first_request(task, settings, form)
        asking, prompt, response = (
            estimated_tokens(messages),
            _tokens(task.source.prompt),
            _tokens(task.source.response),
        )
        prompt_tokens += asking + prompt
        completion_tokens += min(prompt, settings.max_tokens) + min(response, settings.max_tokens)
        rows.append({"task_id": task.task_id, "messages": messages, "prompt_tokens_estimate": asking})
    most = 2 * len(tasks) * settings.max_tokens + probes * PROBE_TOKENS
    return DryRun(
        rows=tuple(rows),
        requests=2 * len(tasks) + probes,
        probes=probes,
        prompt_tokens_estimate=prompt_tokens,
        completion_tokens_estimate=completion_tokens,
        usd_estimate=cost_usd(settings.prices, prompt_tokens, completion_tokens),
        completion_tokens_at_most=most,
        usd_at_most=cost_usd(settings.prices, prompt_tokens, most),
    )


def _tokens(text: str) -> int:
    return math.ceil(len(text) / CHARACTERS_A_TOKEN)
