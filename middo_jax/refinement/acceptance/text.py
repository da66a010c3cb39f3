"""The gates that look at a candidate's text alone, beside its original's. Pure functions."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from middo_jax.refinement.acceptance.candidate import Candidate, Finding
from middo_jax.refinement.acceptance.context import changed_numbers, lost_code
from middo_jax.refinement.acceptance.language import changed_language, languages
from middo_jax.refinement.acceptance.refusal import is_refusal
from middo_jax.refinement.endpoint.ending import ending
from middo_jax.refinement.prompts import EXAMPLES, MATERIAL
from middo_jax.refinement.reply import control_character, control_token, reasoning_mark
from middo_jax.refinement.tasks import Task

# Texts of our own requests that mark a candidate as an echo of them.
LEFTOVERS = ("<prompt>", "</prompt>", *EXAMPLES, MATERIAL)


def readable(candidate: Candidate, _: Any) -> Finding | None:
    """Whether the reply contains a prompt that can be trained on."""
    prompt = candidate.prompt
    if prompt is None:
        how = ending(candidate.finish_reason)
        if how == "filtered" or is_refusal(candidate.reply):
            return Finding("refused", "refused")
        fault = "truncated prompt" if how == "cut" else "unparsable"
        return Finding(fault, fault)
    if not any(c.isalnum() for c in prompt):
        return Finding("empty prompt", "empty prompt")
    return _control(candidate, prompt, "prompt")


def sane(candidate: Candidate, _: Any) -> Finding | None:
    """Whether the prompt is no refusal, no echo and no copy."""
    task, prompt = candidate.task, candidate.prompt or ""
    if is_refusal(prompt):
        return Finding("refused", "refused")
    if left := _leftover(task, prompt):
        return Finding(f"echo of {left} in the prompt", "echo")
    # To rewrite for quality may be to answer better. But what was to become easier and did not has only got a
    # model's own words for an answer, whose loss is low whether it is right or not.
    if task.axes != ("quality",) and any(_same(prompt, e.prompt) for e in (task.source, *task.hints)):
        return Finding("unchanged", "unchanged")
    return None


def numbers(candidate: Candidate, _: Any) -> Finding | None:
    """Whether a rewritten prompt has its original's numbers."""
    simpler = "complexity" in candidate.task.axes
    return _found(
        changed_numbers(candidate.task.source.prompt, candidate.prompt or "", exchanged_only=simpler)
    )


def code(candidate: Candidate, _: Any) -> Finding | None:
    """Whether a rewritten prompt has its original's code blocks."""
    return _found(lost_code(candidate.task.source.prompt, candidate.prompt or ""))


def language(candidate: Candidate, _: Any) -> Finding | None:
    """Whether a prompt is in a language of its original, or of the core and its neighbours."""
    task = candidate.task
    known = [task.source.prompt, *(hint.prompt for hint in task.hints)]
    fault = changed_language(candidate.prompt or "", known)
    return Finding(f"prompt in {fault}") if fault else None


def answer_readable(candidate: Candidate, _: Any) -> Finding | None:
    """Whether the answer is whole and can be trained on."""
    how = ending(candidate.finish_reason)
    if how == "cut":
        return Finding("truncated answer", "truncated answer")
    if how == "filtered":
        return Finding("refused", "refused")
    if how == "broken":
        return Finding(f"answer broken off ({candidate.finish_reason})", "broken off")
    if not candidate.response.strip():
        return Finding("empty answer", "empty answer")
    return _control(candidate, candidate.response, "answer")


def answer_sane(candidate: Candidate, _: Any) -> Finding | None:
    """Whether the answer is no refusal, no echo, and something changed."""
    task, prompt, response = candidate.task, candidate.prompt or "", candidate.response
    if is_refusal(response):
        return Finding("refused", "refused")
    if left := _leftover(task, response):
        return Finding(f"echo of {left} in the answer", "echo")
    if _same(prompt, response):
        return Finding("answer repeats the prompt", "answer repeats the prompt")
    replaces = task.op != "synthesize"
    if replaces and _same(prompt, task.source.prompt) and _same(response, task.source.response):
        return Finding("unchanged", "unchanged")
    return None


def answer_language(candidate: Candidate, _: Any) -> Finding | None:
    """Whether the answer is in a language of its original or of the prompt.

    A new sample may ask for another language than its core does, such as for a translation.
    """
    original = candidate.task.source.response
    if not languages(original):
        return None
    fault = changed_language(candidate.response, [original, candidate.prompt or ""])
    return Finding(f"answer in {fault}") if fault else None


def _found(fault: str | None) -> Finding | None:
    return Finding(fault) if fault else None


def _leftover(task: Task, text: str) -> str | None:
    """A piece of our own request or a mark of reasoning, unless the samples contain it."""
    lowered, given = text.lower(), task.given.lower()
    pieces = (piece for piece in LEFTOVERS if piece.lower() in lowered and piece.lower() not in given)
    return next(pieces, None) or reasoning_mark(text, given)


def _control(candidate: Candidate, text: str, name: str) -> Finding | None:
    """What no text of a dataset contains: control tokens, of any model, and control characters."""
    own = _first_in(text, candidate.special_tokens)
    if token := own or control_token(text, candidate.task.given):
        return Finding(f"control token {token} in the {name}", "control token")
    if character := control_character(text):
        return Finding(f"control character {character} in the {name}", "control character")
    return None


def _first_in(text: str, tokens: Collection[str]) -> str | None:
    return min((token for token in tokens if token and token in text), default=None)


def _same(one: str, other: str) -> bool:
    return " ".join(one.split()).casefold() == " ".join(other.split()).casefold()
