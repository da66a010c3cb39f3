"""Removes reasoning in front of a reply and end tokens after it. Pure functions."""

from __future__ import annotations

import bisect
import re
from collections.abc import Collection

_NAMES = (
    r"(?:(?:ant_?)?think(?:ing)?(?:_process)?|thoughts?(?:_process)?|reasoning|reflection|scratchpad|cot"
    r"|chain[_-]of[_-]thought|in(?:ner|ternal)_monologue)"
)
_OPENED = (
    rf"<\s*(?:\w+:)?(?P<tag>{_NAMES})\s*>"
    r"|\[(?P<bracket>think|thinking|reasoning)\]"
    r"|◁(?P<triangle>think(?:ing)?)▷"
    r"|<\|\s*(?P<bar>think|thinking|begin_of_thought|begin_of_thinking|start_thinking|inner_prefix)\s*\|>"
    r"|<(?P<details>details)\s+type\s*=\s*[\"']reasoning[\"'][^<>]*>"
    r"|(?P<channel><\|channel>)\s*(?:thought|thinking|analysis)\b"
)
_CLOSED = (
    rf"<\s*/\s*(?:\w+:)?{_NAMES}\s*>"
    r"|\[/(?:think|thinking|reasoning)\]"
    r"|◁/think(?:ing)?▷"
    r"|<\|\s*(?:/think|/thinking|end_of_thought|end_of_thinking|end_thinking|inner_suffix)\s*\|>"
)
OPENED, CLOSED = re.compile(_OPENED, re.IGNORECASE), re.compile(_CLOSED, re.IGNORECASE)
_CLOSED_BY = {"details": re.compile(r"</details\s*>", re.IGNORECASE), "channel": re.compile(r"<channel\|>")}

# Harmony: <|channel|>analysis<|message|>...<|end|><|start|>assistant<|channel|>final<|message|>...<|return|>
_HARMONY = re.compile(r"\s*(?:<\|start\|>\s*assistant\s*)?<\|channel\|>")
_FINAL = re.compile(r"<\|channel\|>\s*final\b[^<]*(?:<\|constrain\|>[^<]*)?<\|message\|>")
_MESSAGE_END = re.compile(r"<\|(?:return|end|call|start)\|>")
# The same from a server that dropped the tokens but kept their words.
_BARE_HARMONY = re.compile(r"\s*(?:assistant\s?)?analysis(?=[A-Z\"'“]|\s*\n)")
_BARE_FINAL = re.compile(r"assistant\s?final(?=\S|\s)")
_GRANITE = re.compile(r"\s*here(?: is|'s) my thought process:", re.IGNORECASE)
_GRANITE_ANSWER = re.compile(r"here(?: is|'s) my response:", re.IGNORECASE)
# Tags that some reasoning models put around the answer after the reasoning.
_ANSWER = re.compile(
    r"<(answer|response|output|solution)>(.*)</\1>|<\|(?:begin_of_solution|start_response)\|>(.*?)"
    r"(?:<\|(?:end_of_solution|end_response)\|>)?",
    re.DOTALL | re.IGNORECASE,
)
_FENCE = re.compile(r"^[ \t]*(?:```|~~~)", re.MULTILINE)

_BAR_TOKEN = r"<[|｜](?![|｜>\s])[\w▁./ -]{1,40}[|｜]>"
_NAMED_TOKEN = (
    r"<(?:end_of_turn|start_of_turn|end_of_utterance|end_of_text|end_of_sentence|turn\||\|turn)>"
    r"|\[\|(?:endofturn|user|assistant|system)\|\]|\[/?INST\]|<</?SYS>>|\[EOS\]"
)
CONTROL_TOKEN = re.compile(f"{_BAR_TOKEN}|{_NAMED_TOKEN}")
_AT_END = re.compile(rf"(?:{_BAR_TOKEN}|{_NAMED_TOKEN}|</s>|<eos>|<pad>|<unk>|<EOT>|<eot>)\Z")
_PIECES_CUT = 64  # maximum number of end tokens after a reply, which padding may repeat


def without_reasoning(text: str, spoken_of: str = "") -> str | None:
    """A reply without the reasoning in front of it; None if the reasoning never ends.

    "<think>A fact.</think>\\n\\nIt rains."  ->  "It rains."
    "A fact.\\n</think>\\n\\nIt rains."      ->  "It rains.": some templates write the opening mark themselves

    Args:
      text: the reply.
      spoken_of: texts that the reply is about. A closing mark that occurs in them ends no reasoning, unless
        the reply begins with the opening mark.
    """
    rest, was_cut = text, False
    for cut in (_after_harmony, _after_granite):
        shorter = cut(rest)
        if shorter is None:
            return None
        was_cut, rest = was_cut or shorter != rest, shorter
    start = 0  # no slices, so that a reply of marks alone does not take quadratic time
    while opened := OPENED.match(rest, _skip_space(rest, start)):
        end = _end_of(opened, rest)
        if end is None:
            return None
        start, was_cut = end, True
    fences = [fence.start() for fence in _FENCE.finditer(rest)]
    for closed in CLOSED.finditer(rest, start):
        before = OPENED.search(rest, start, closed.start())
        mentioned = closed.group().lower() in spoken_of.lower() or is_quoted(rest, closed)
        if before is not None or mentioned or bisect.bisect(fences, closed.start()) % 2:
            break
        start, was_cut = closed.end(), True
    if not was_cut:
        return text
    rest = rest[start:].strip()
    wrapped = _ANSWER.fullmatch(rest)
    return (wrapped[2] or wrapped[3] or "").strip() if wrapped else rest


def reasoning_mark(text: str, given: str = "") -> str | None:
    """The first mark of reasoning in a text that does not occur in `given`, or None."""
    known = given.lower()
    found = (match for marks in (OPENED, CLOSED) for match in marks.finditer(text))
    left = [match for match in found if match.group().lower() not in known]
    return min(left, key=lambda match: match.start()).group() if left else None


def without_end_tokens(text: str, kept: Collection[str] = ()) -> str:
    """A text without end tokens of any chat template after it and without a BOS token before it.

    "It rains.<|eot_id|></s>" -> "It rains.". Tokens in `kept` and an `</s>` that closes HTML's `<s>` stay.
    """
    text = text.strip()
    if text.startswith("<s>") and text.count("<s>") == 1 and re.match(r"<s>\s", text):
        text = text.removeprefix("<s>").lstrip()
    for _ in range(_PIECES_CUT):
        found = _AT_END.search(text, max(0, len(text) - 50))
        token = found.group() if found else ""
        closes_html = token == "</s>" and text.count("<s>") >= text.count("</s>")
        if not token or token in kept or closes_html:
            break
        text = text[: -len(token)].rstrip()
    return text


def control_token(text: str, given: str = "") -> str | None:
    """The first token of any model's chat template in a text that does not occur in `given`; or None."""
    found = next((m.group() for m in CONTROL_TOKEN.finditer(text) if m.group() not in given), None)
    if found is None and "</s>" not in given and text.count("</s>") > text.count("<s>"):
        return "</s>"
    return found


def plain_lines(text: str) -> str:
    """A text with a line feed alone at the end of each line."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def answer_text(reply: str, given: str = "", kept: Collection[str] = ()) -> str:
    """The answer in a reply, without reasoning and end tokens; "" if the reasoning never ends.

    Args:
      reply: what the model said.
      given: the texts that it was given, whose marks of reasoning are spoken of.
      kept: control tokens that stay, so that a gate finds them.
    """
    return without_end_tokens(plain_lines(without_reasoning(reply, given) or ""), kept)


def is_quoted(text: str, match: re.Match[str]) -> bool:
    """Whether a match is in quotation marks or backticks of its own, so that it is mentioned and not used."""
    left, right = text[: match.start()][-1:], text[match.end() : match.end() + 1]
    return bool(left) and (left + right) in {"``", '""', "''", "“”", "„“", "«»", "()"}


def _skip_space(text: str, start: int) -> int:
    while start < len(text) and text[start].isspace():
        start += 1
    return start


def _end_of(opened: re.Match[str], text: str) -> int | None:
    """The end of the reasoning that begins with `opened`, or None."""
    kind = opened.lastgroup or ""
    own = _CLOSED_BY.get(kind)
    if own is None and kind == "tag":
        own = re.compile(rf"<\s*/\s*(?:\w+:)?{opened['tag']}\s*>", re.IGNORECASE)
    closed = (own and own.search(text, opened.end())) or CLOSED.search(text, opened.end())
    return closed.end() if closed else None


def _after_harmony(text: str) -> str | None:
    if _HARMONY.match(text):
        final = [*_FINAL.finditer(text)]
        if not final:
            return None
        rest = text[final[-1].end() :]
        ended = _MESSAGE_END.search(rest)
        return rest[: ended.start()] if ended else rest
    if opened := _BARE_HARMONY.match(text):
        final = _BARE_FINAL.search(text, opened.end())
        if final is not None:
            return text[final.end() :]
        return None if text[opened.end() : opened.end() + 1].isupper() else text
    return text


def _after_granite(text: str) -> str | None:
    if not (opened := _GRANITE.match(text)):
        return text
    answered = _GRANITE_ANSWER.search(text, opened.end())
    return None if answered is None else text[answered.end() :]
