"""What refining would ask for and cost, before anything is sent."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from middo_jax.config import RefineSettings
from middo_jax.refine.prompts import Form
from middo_jax.refine.rewrite import Task, first_request
from middo_jax.refine.usage import CHARACTERS_A_TOKEN, cost_usd, estimated_tokens


@dataclasses.dataclass(frozen=True)
class DryRun:
    """What the first attempt of a stage would ask for.

    Estimates take a token for four characters, the new prompt to be as long as the original and its answer as
    long as the original's. At most: every completion at its limit. Corrections, retries and further attempts
    come on top of both.
    """

    rows: tuple[dict[str, Any], ...]
    requests: int
    prompt_tokens_estimate: int
    completion_tokens_estimate: int
    usd_estimate: float
    completion_tokens_at_most: int
    usd_at_most: float


def dry_run(tasks: Sequence[Task], settings: RefineSettings, form: Form = "text") -> DryRun:
    """The first request of every task, and what all of them may need; nothing is sent."""
    rows, prompt_tokens, completion_tokens = [], 0, 0
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
    requests = 2 * len(tasks)
    most = requests * settings.max_tokens
    return DryRun(
        rows=tuple(rows),
        requests=requests,
        prompt_tokens_estimate=prompt_tokens,
        completion_tokens_estimate=completion_tokens,
        usd_estimate=cost_usd(settings.prices, prompt_tokens, completion_tokens),
        completion_tokens_at_most=most,
        usd_at_most=cost_usd(settings.prices, prompt_tokens, most),
    )


def _tokens(text: str) -> int:
    return math.ceil(len(text) / CHARACTERS_A_TOKEN)
