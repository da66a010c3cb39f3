"""What the table of gates says of a candidate that a test writes down.

PYTEST_DONT_REWRITE: there are no assertions in it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence

from middo_jax.config import RefineSettings
from middo_jax.data.example import Example
from middo_jax.refinement.acceptance.candidate import Candidate
from middo_jax.refinement.acceptance.repeats import KnownTexts
from middo_jax.refinement.acceptance.table import first_verdict
from middo_jax.refinement.tasks import Outcome, Task, Verdict


def prompt_verdict(
    task: Task, prompt: str, settings: RefineSettings, special_tokens: Collection[str] = ()
) -> Verdict | None:
    """Of a new prompt, before its answer is asked for."""
    return first_verdict(Candidate(task, special_tokens, prompt, prompt), "prompt", settings)


def text_verdict(
    task: Task,
    prompt: str,
    response: str,
    finish_reason: str = "stop",
    settings: RefineSettings | None = None,
    special_tokens: Collection[str] = (),
) -> Verdict | None:
    """Of a new prompt and its answer."""
    settings = settings or RefineSettings()
    candidate = Candidate(
        task, special_tokens, prompt, prompt, finish_reason=finish_reason, response=response
    )
    return prompt_verdict(task, prompt, settings, special_tokens) or first_verdict(
        candidate, "answer", settings
    )


def without_duplicates(
    training: Sequence[Example],
    outcomes: Sequence[Outcome],
    *,
    heldout: Sequence[Example] = (),
    threshold: float | None = None,
    known: KnownTexts | None = None,
) -> list[Outcome]:
    """The outcomes with those rejected that repeat something known or an earlier one; see `KnownTexts`."""
    known = known or KnownTexts(training, heldout, threshold)
    settings = RefineSettings()
    children = [(o.task, o.example) for o in outcomes if o.example is not None]
    near, decided = iter(known.near(children)), []
    for outcome in outcomes:
        if outcome.example is not None:
            repeats = known.repeated_by(outcome.example, next(near))
            candidate = dataclasses.replace(Candidate(outcome.task), repeats=repeats)
            if verdict := first_verdict(candidate, "accepted", settings):
                outcome = outcome.rejected(verdict)
            else:
                known.take_in(outcome.example)
        decided.append(outcome)
    return decided
