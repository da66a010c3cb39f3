"""Candidate against original: the gates that its text alone must pass. Pure functions.

A gate answers with a reason or None. What a reason begins with, up to a colon, is its kind; `gates.GATE_OF`
knows them all.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import TYPE_CHECKING

from middo_jax.config import GateSettings, RefineSettings
from middo_jax.refine.context import changed_numbers, lost_code
from middo_jax.refine.language import changed_language, languages
from middo_jax.refine.prompts import EXAMPLES, MATERIAL

if TYPE_CHECKING:
    from middo_jax.refine.rewrite import Task

# Texts of our own requests that mark a candidate as an echo of them, or as reasoning that was left in.
LEFTOVERS = ("<prompt>", "</prompt>", *EXAMPLES, MATERIAL, "<think>", "</think>")

# Openings only, and with the verb of a refusal where the start alone would also open an honest letter or
# story: "I cannot attend the meeting" is an answer, "I cannot assist with that" is not.
_CANNOT = (
    r"i(?: (?:can't|cannot|can not|won't|will not)|(?:'m| am) (?:unable|not able) to|(?:'m| am) not going to)"
)
_TO_SERVE = (
    r"(?: (?:help|assist|comply|fulfil|fulfill|proceed)\b"
    r"| (?:answer|complete|do|process|provide|respond to|support|write|generate|create) "
    r"(?:that|this|your|such|any|the (?:requested|request|task|prompt))\b)"
)
_REFUSALS = re.compile(
    r"(?:"
    rf"(?:(?:i'm|i am)(?: (?:very|really|so|truly))? )?sorry,?(?: but)? {_CANNOT}\b"
    rf"|(?:i apologi[sz]e|my apologies|apologies|unfortunately),?(?: but)?,? {_CANNOT}{_TO_SERVE}"
    rf"|as an (?:ai|artificial intelligence)(?: (?:language )?(?:model|assistant))?,? "
    rf"(?:{_CANNOT}\b|i (?:do not|don't) have\b)"
    rf"|{_CANNOT}{_TO_SERVE}"
    # "I'm sorry for the confusion, but as a chatbot made for recipes, I don't have ..."
    r"|(?:i'm sorry|i am sorry|sorry|i apologi[sz]e|my apologies)\b[^.!?]{0,80}"
    r"\bas an? (?:[\w-]+ ){0,2}(?:ai|chatbot|language model|virtual assistant)\b[^.!?]{0,120}"
    r"\bi(?:'m not| am not|'m unable| am unable| don't| do not| can't| cannot)\b"
    r")",
    re.IGNORECASE,
)

# "I'm sorry, but I cannot" in German, French, Spanish, Portuguese, Italian, Chinese, Japanese and Korean.
_REFUSALS_ELSEWHERE = re.compile(
    r"(?:"
    r"(?:es )?tut mir (?:sehr )?leid,? (?:aber )?(?:ich kann\b[^.!?]{0,60}\bnicht\b|das kann ich nicht\b)"
    r"|(?:je suis |je )?(?:désolée?|regrette),? (?:mais )?je ne (?:peux|suis pas en mesure)\b"
    r"|lo siento,? (?:pero )?no (?:puedo|me es posible)\b"
    r"|(?:sinto muito|desculpe|lamento),? (?:mas )?não (?:posso|consigo)\b"
    r"|mi dispiace,? (?:ma )?non (?:posso|sono in grado)\b"
    r"|(?:很?抱歉|对不起)[,, ]*(?:但是?)?我(?:无法|不能|没有?办法)"
    r"|(?:申し訳(?:ありません|ございません)|すみません)[^。]{0,40}(?:できません|できかねます)"
    r"|죄송(?:합니다|하지만)[^.]{0,40}(?:수 없|없습니다)"
    r")",
    re.IGNORECASE,
)


def check(
    task: Task,
    prompt: str,
    response: str,
    finish_reason: str,
    settings: RefineSettings,
    special_tokens: Collection[str] = (),
) -> str | None:
    """Why a candidate is rejected, or None.

    Args:
      task: what was to be done with which sample.
      prompt: the new prompt.
      response: its answer.
      finish_reason: the endpoint's, of the answer; `length` and `content_filter` mean that it is not whole.
      settings: `accept` and `gates`; with `accept: none` a candidate only has to be one to be trained on.
      special_tokens: the tokenizer's control tokens, which as text would end a turn or start another.
    """
    if reason := check_prompt(task, prompt, settings, special_tokens):
        return reason
    if not response.strip():
        return "empty answer"
    if token := _first_in(response, special_tokens):
        return f"control token: {token} in the answer"
    if settings.accept == "none":
        return None
    if finish_reason == "length":
        return "truncated answer"
    if finish_reason == "content_filter" or is_refusal(response):
        return "refused"
    if left := _leftover(task, response):
        return f"echo: {left} in the answer"
    if _same(prompt, response):
        return "answer repeats the prompt"
    if _replaces(task) and _same(prompt, task.source.prompt) and _same(response, task.source.response):
        return "unchanged"
    # A new sample may well ask for another language than its core does: to translate into, say.
    told = settings.gates.language and _replaces(task) and languages(task.source.response)
    if told and (fault := changed_language(response, [task.source.response, prompt])):
        return f"language: answer in {fault}"
    return None


def check_prompt(
    task: Task, prompt: str, settings: RefineSettings, special_tokens: Collection[str] = ()
) -> str | None:
    """The gates that need no answer yet, so that none is paid for in vain."""
    if not any(c.isalnum() for c in prompt):
        return "empty prompt"
    if token := _first_in(prompt, special_tokens):
        return f"control token: {token} in the prompt"
    if settings.accept == "none":
        return None
    if is_refusal(prompt):
        return "refused"
    if left := _leftover(task, prompt):
        return f"echo: {left} in the prompt"
    # To rewrite for quality may be to answer better. But what was to become easier and did not has only got a
    # model's own words for an answer, whose loss is low whether it is right or not.
    if task.axes != ("quality",) and any(_same(prompt, e.prompt) for e in (task.source, *task.hints)):
        return "unchanged"
    return _out_of_context(task, prompt, settings.gates)


def is_refusal(text: str) -> bool:
    """Whether a text opens as a model does that will not do what it was asked; best told in English."""
    opening = " ".join(text.replace("’", "'").split())
    return bool(_REFUSALS.match(opening) or _REFUSALS_ELSEWHERE.match(opening))


def _out_of_context(task: Task, prompt: str, gates: GateSettings) -> str | None:
    """Whether a prompt has lost what its original, or the core and its neighbours, tell to keep."""
    original = task.source.prompt
    if _replaces(task):
        simpler = "complexity" in task.axes
        if gates.numbers and (fault := changed_numbers(original, prompt, exchanged_only=simpler)):
            return f"numbers: {fault}"
        if gates.code and (fault := lost_code(original, prompt)):
            return f"code: {fault}"
    known = [original, *(hint.prompt for hint in task.hints)]
    if gates.language and (fault := changed_language(prompt, known)):
        return f"language: prompt in {fault}"
    return None


def _replaces(task: Task) -> bool:
    return task.op != "synthesize"


def _leftover(task: Task, text: str) -> str | None:
    """A piece of our own request in a candidate, unless the samples themselves speak of such things."""
    lowered = text.lower()
    given = " ".join(f"{e.prompt} {e.response}" for e in (task.source, *task.hints)).lower()
    return next(
        (piece for piece in LEFTOVERS if piece.lower() in lowered and piece.lower() not in given), None
    )


def _first_in(text: str, tokens: Collection[str]) -> str | None:
    return min((token for token in tokens if token and token in text), default=None)


def _same(one: str, other: str) -> bool:
    return " ".join(one.split()).casefold() == " ".join(other.split()).casefold()
