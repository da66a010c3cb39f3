"""The new prompt out of a refiner's reply: JSON or tagged text, and what chat models put around either.

Which of both was asked for makes no difference here: a server that ignores a schema answers with tags, and a
model that has seen many schemas answers with JSON.
"""

from __future__ import annotations

import json
import re

FIELD = "prompt"  # the JSON field's name and the tag's

# White space is only skipped after a marker: a degenerate reply of nothing else must not take quadratic time.
_OPEN = re.compile(r"(?:(\*\*)\s*)?<\s*prompt\s*>(?(1)(?:\s*\*\*)?)", re.IGNORECASE)
_CLOSE = re.compile(r"\*\*\s*<\s*/\s*prompt\s*>\s*\*\*|<\s*/\s*prompt\s*>", re.IGNORECASE)
_FENCED = re.compile(
    r"```(?:text|plaintext|markdown|md|xml|json)?[ \t]*\n((?:(?!```).)*)\n[ \t]*```", re.DOTALL
)
_OBJECT = re.compile(r'\{\s*"prompt"\s*:')
_OBJECTS_TRIED = 8  # from the last one back: a reply full of broken ones must not take quadratic time
_QUOTES = {'"': '"', "“": "”", "«": "»", "„": "“", "'": "'"}
_DECODER = json.JSONDecoder(strict=False)  # a line break inside a string is no reason to ask again


def parse_prompt(reply: str) -> str | None:
    """The prompt that a reply holds, or None where there is none that can be told from the rest.

    A reply that is one JSON object is read as such; else the last `<prompt>` counts, unless it was never
    closed; else the last JSON object with the field, whatever precedes it. A code fence, bold markers around
    tags, and quotation marks around the whole prompt are no part of it:

    "Sure! **<prompt>**\\nName a bird.\\n**</prompt>**"    ->  "Name a bird."
    "Here it is:\\n```json\\n{"prompt": "Name a bird."}\\n```"  ->  "Name a bird."
    """
    text = _unfenced(reply.strip())
    whole = _object_at(text, 0)
    if whole is not None and whole[1] == len(text):
        return _bare(whole[0])
    starts = [opened.end() for opened in _OPEN.finditer(reply)]
    if starts:
        closed = _CLOSE.search(reply, starts[-1])
        return None if closed is None else _bare(reply[starts[-1] : closed.start()])
    for found in [*_OBJECT.finditer(reply)][: -_OBJECTS_TRIED - 1 : -1]:
        if embedded := _object_at(reply, found.start()):
            return _bare(embedded[0])
    return None


def _object_at(text: str, start: int) -> tuple[str, int] | None:
    """(the field of the JSON object that begins at `start`, where the object ends)."""
    if not text.startswith("{", start):
        return None
    try:
        value, end = _DECODER.raw_decode(text, start)
    except (ValueError, RecursionError):
        return None
    prompt = value.get(FIELD)
    return (prompt, end) if isinstance(prompt, str) else None


def _bare(text: str) -> str:
    """Less what a model wraps around a prompt: tags inside JSON, a code fence, quotation marks."""
    text = text.strip()
    opened, closed = _OPEN.match(text), _CLOSE.search(text)
    if opened and closed and closed.end() == len(text):
        text = text[opened.end() : closed.start()].strip()
    text = _unfenced(text)
    for left, right in _QUOTES.items():
        inner = text[1:-1]
        if len(text) > 1 and text[0] == left and text[-1] == right and not {left, right} & {*inner}:
            return inner.strip()
    return text


def _unfenced(text: str) -> str:
    fenced = _FENCED.fullmatch(text)
    return fenced.group(1).strip() if fenced else text
