"""The gates that compare a candidate's text with its original's. Pure functions."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from middo_jax.data.reply import control_token, reasoning_mark
from middo_jax.refinement.acceptance.candidate import Candidate, Finding
from middo_jax.refinement.acceptance.context import changed_numbers, lost_code
from middo_jax.refinement.acceptance.hidden import hidden_character
from middo_jax.refinement.acceptance.language import changed_language, languages
from middo_jax.refinement.acceptance.refusal import is_refusal
from middo_jax.refinement.endpoint.ending import ending
from middo_jax.refinement.prompts import MATERIAL
from middo_jax.refinement.tasks import Task

# Texts of our own requests, besides the examples: a candidate that contains one is an echo.
LEFTOVERS = ("<prompt>", "</prompt>", MATERIAL)


def readable(candidate: Candidate, _: Any) -> Finding | None:
    """Whether the reply contains a prompt that is fit for training."""
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
    """Whether the prompt is neither a refusal nor an echo nor a copy."""
    task, prompt = candidate.task, candidate.prompt or ""
    if is_refusal(prompt):
        return Finding("refused", "refused")
    if left := _leftover(task, prompt):
        return Finding(f"echo of {left} in the prompt", "echo")
    # A rewrite for quality may keep the prompt and improve the answer. But an unchanged prompt that should
    # have become easier only gets an answer in the model's own words, whose loss is low even if the answer is
    # wrong.
    known = (task.prompt, *(hint.prompt for hint in task.hints))
    if task.axes != ("quality",) and any(_same(prompt, text) for text in known):
        return Finding("unchanged", "unchanged")
    return None


def numbers(candidate: Candidate, _: Any) -> Finding | None:
    """Whether a rewritten prompt keeps its original's numbers."""
    simpler = "complexity" in candidate.task.axes
    return _found(changed_numbers(candidate.task.prompt, candidate.prompt or "", exchanged_only=simpler))


def code(candidate: Candidate, _: Any) -> Finding | None:
    """Whether a rewritten prompt keeps its original's code blocks."""
    return _found(lost_code(candidate.task.prompt, candidate.prompt or ""))


def language(candidate: Candidate, _: Any) -> Finding | None:
    """Whether a prompt has a language of its original; for an addition, of the core or a neighbour."""
    task = candidate.task
    known = [task.original.prompt, *(hint.prompt for hint in task.hints)]
    fault = changed_language(candidate.prompt or "", known)
    return Finding(f"prompt in {fault}") if fault else None


def answer_readable(candidate: Candidate, _: Any) -> Finding | None:
    """Whether the answer is whole and fit for training."""
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
    """Whether the answer is neither a refusal nor an echo, and prompt or answer changed."""
    task, prompt, response = candidate.task, candidate.prompt or "", candidate.response
    if is_refusal(response):
        return Finding("refused", "refused")
    if left := _leftover(task, response):
        return Finding(f"echo of {left} in the answer", "echo")
    if _same(prompt, response):
        return Finding("answer repeats the prompt", "answer repeats the prompt")
    replaces = task.op != "synthesize"
    if replaces and _same(prompt, task.prompt) and _same(response, task.original.response):
        return Finding("unchanged", "unchanged")
    return None


def answer_language(candidate: Candidate, _: Any) -> Finding | None:
    """Whether the answer has a language of the original's answer or of the prompt."""
    original = candidate.task.original.response
    if not languages(original):
        return None
    fault = changed_language(candidate.response, [original, candidate.prompt or ""])
    return Finding(f"answer in {fault}") if fault else None


def _found(fault: str | None) -> Finding | None:
    return Finding(fault) if fault else None


def _leftover(task: Task, text: str) -> str | None:
    """The first piece of our own request or mark of reasoning that the samples do not contain; or None."""
    lowered, given = text.lower(), task.given.lower()
    pieces = (*LEFTOVERS, *task.words.written)
    left = (piece for piece in pieces if piece.lower() in lowered and piece.lower() not in given)
    return next(left, None) or reasoning_mark(text, given)


def _control(candidate: Candidate, text: str, name: str) -> Finding | None:
    """A finding if a text contains a control token of any model, or a character that nobody sees."""
    own = _first_in(text, candidate.special_tokens)
    if token := own or control_token(text, candidate.task.given):
        return Finding(f"control token {token} in the {name}", "control token")
    if found := hidden_character(text, candidate.task.given):
        return Finding(f"{found.kind} {found.code} in the {name}", found.kind)
    return None


def _first_in(text: str, tokens: Collection[str]) -> str | None:
    return min((token for token in tokens if token and token in text), default=None)


def _same(one: str, other: str) -> bool:
    return " ".join(one.split()).casefold() == " ".join(other.split()).casefold()
