"""Reads the new prompt from a refiner's reply: JSON or tagged text, with any text around it.

Both forms are always accepted: a server that ignores a schema answers with tags, and a model that was
trained on many schemas may answer with JSON.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Mapping, Sequence

from middo_jax.data.reply import (
    CLOSED,
    OPENED,
    is_quoted,
    without_reasoning,
)
from middo_jax.refinement.escapes import object_at

FIELD = "prompt"  # the JSON field's name and the tag's

# White space is only skipped after a marker, so that a reply of white space alone does not take quadratic
# time.
_OPEN = re.compile(r"(?:(\*\*)\s*)?<\s*prompt\s*>(?(1)(?:\s*\*\*)?)", re.IGNORECASE)
_CLOSE = re.compile(r"\*\*\s*<\s*/\s*prompt\s*>\s*\*\*|<\s*/\s*prompt\s*>", re.IGNORECASE)
_FENCED = re.compile(
    r"```(?:text|plaintext|markdown|md|xml|json)?[ \t]*\n((?:(?!```).)*)\n[ \t]*```", re.DOTALL
)
_KEY = re.compile(r'"\s*prompt\s*"\s*:', re.IGNORECASE)
_KEYS_TRIED = 8  # from the last one back: a reply full of broken ones must not take quadratic time
_BRACES_TRIED = 4  # before a key: those of values that precede it, and its object's own
_WRAPPERS = (FIELD, "text", "content", "value")  # {"prompt": {"text": "Name a bird."}}
_QUOTES = {'"': '"', "“": "”", "«": "»", "„": "“", "'": "'"}
_WORD = re.compile(r"[^\W\d_]+")
_BETWEEN = {"and", "or", "und", "oder", "et", "ou", "y", "e", "o", "и", "или", "和", "与", "と", "en", "och"}
_PLACEHOLDER = {
    *("your", "the", "my", "a", "an", "new", "rewritten", "revised", "simplified", "improved", "actual"),
    *("insert", "put", "write", "text", "prompt", "content", "goes", "comes", "here", "is", "it", "tag"),
    *("tags", "in", "of", "be", "will", "would", "should"),
}
_PLACEHOLDER_WORDS = 8
_AROUND = 80  # characters of a line that are searched before and after a tag


def parse_prompt(reply: str) -> str | None:
    """The prompt in a reply, or None if the reply has no recognisable prompt.

    Reasoning is ignored, with any draft in it. The prompt is read, in this order, from a reply that is one
    JSON object, from the last `<prompt>`, which must be closed, or from the last JSON object with the field.
    Tags that a sentence only mentions do not count. A code fence, bold markers around tags, and quotation
    marks around the whole prompt are removed:

    "Sure! **<prompt>**\\nName a bird.\\n**</prompt>**"    ->  "Name a bird."
    "Here it is:\\n```json\\n{"prompt": "Name a bird."}\\n```"  ->  "Name a bird."
    "<prompt>Name a bird.</prompt>\\nIt is between <prompt> and </prompt>."  ->  "Name a bird."
    """
    whole = _whole_object(reply)
    if whole is not None:
        return _bare(whole)
    text = without_reasoning(reply, _marks_in_prompts(reply))
    if text is None:
        return None
    if text != reply and (whole := _whole_object(text)) is not None:
        return _bare(whole)
    text = _without_later_reasoning(text)
    objects = _objects(text)
    tags = [tag for tag in _tags(text) if not any(o.start < tag.start < o.end for o in objects)]
    deliveries, is_cut = _pairs(text, _used(tags))
    if is_cut:
        return None
    if not deliveries and not objects:
        deliveries, is_cut = _pairs(text, tags)
        deliveries = [] if is_cut else deliveries
    chosen = _chosen(text, deliveries) if deliveries else _chosen(text, objects)
    return None if chosen is None else _bare(chosen.text)


@dataclasses.dataclass(frozen=True)
class _Tag:
    """`<prompt>` or `</prompt>`.

    Attributes:
      opens: whether it is the opening one.
      is_quoted: whether it has quotation marks or backticks of its own.
      is_named: whether a sentence only mentions the tag, as one does that quotes it.
    """

    start: int
    end: int
    opens: bool
    is_quoted: bool
    is_named: bool


@dataclasses.dataclass(frozen=True)
class _Span:
    """A prompt in a reply. `start` and `end` include its tags or braces."""

    start: int
    end: int
    text: str


def _tags(text: str) -> list[_Tag]:
    found = [(match, True) for match in _OPEN.finditer(text)]
    found += [(match, False) for match in _CLOSE.finditer(text)]
    return [
        _Tag(match.start(), match.end(), opens, is_quoted(text, match), _is_named(text, match, opens))
        for match, opens in sorted(found, key=lambda pair: pair[0].start())
    ]


def _is_named(text: str, match: re.Match[str], opens: bool) -> bool:
    """Whether a sentence only mentions the tag: "the <prompt> tag", "`</prompt>`", "and </prompt>."."""
    if is_quoted(text, match):
        return True
    before = text[max(0, match.start() - _AROUND) : match.start()].rpartition("\n")[2]
    after = text[match.end() : match.end() + _AROUND].partition("\n")[0]
    goes_on = after[:1] in (" ", "\t") or (after[:1] in ".,;)" and after[1:2] in ("", " ")) or not after
    if opens:
        # Used: "Sure! <prompt> Name", "Here: <prompt>". Mentioned: "in <prompt> tags", "I used <prompt>."
        follows_word = bool(re.search(r"[\w,(][ \t]+\Z", before)) or before.endswith("(")
        named_at_end = not after and "\n" not in text[match.end() :].strip(" \t")[:1]
        return follows_word and goes_on and (bool(after.strip()) or named_at_end)
    return bool(re.search(r"[\w,>`][ \t]+\Z", before)) and bool(re.match(r"[ \t]+[^\W\d_]|[.,;)]", after))


def _used(tags: Sequence[_Tag]) -> list[_Tag]:
    """The tags that no sentence only mentions.

    A closing tag that reads like a mention closes the last opening one if no other does:
    "<prompt>Name a bird </prompt>."
    """
    used = [tag for tag in tags if not tag.is_named]
    if used and used[-1].opens:
        later = itertools.takewhile(lambda tag: not tag.opens, (t for t in tags if t.start > used[-1].start))
        used += [tag for tag in later if not tag.is_quoted][-1:]
    return used


def _pairs(text: str, tags: Sequence[_Tag]) -> tuple[list[_Span], bool]:
    """The prompts between tags, in order, and whether the last opening tag has no closing one."""
    spans, opened = list[_Span](), None
    for tag in tags:
        if tag.opens:
            opened = tag
        elif opened is not None:
            spans.append(_Span(opened.start, tag.end, text[opened.end : tag.start]))
            opened = None
    return spans, opened is not None


def _objects(text: str) -> list[_Span]:
    """The JSON objects with the field that are in no other one with it, in order."""
    keys = [*_KEY.finditer(text)][: -_KEYS_TRIED - 1 : -1]
    found = {span.start: span for key in keys if (span := _object_around(text, key.start())) is not None}
    return [
        span
        for _, span in sorted(found.items())
        if not any(other.start < span.start < other.end for other in found.values())
    ]


def _object_around(text: str, key: int) -> _Span | None:
    """The innermost JSON object around a key of that name."""
    brace = key
    for _ in range(_BRACES_TRIED):
        brace = text.rfind("{", 0, brace)
        if brace < 0:
            return None
        value = object_at(text, brace)
        if value is not None and value[1] > key:
            prompt = _field(value[0])
            return None if prompt is None else _Span(brace, value[1], prompt)
    return None


def _field(value: Mapping[str, object]) -> str | None:
    """The text of the field, whatever the case of its name, and of an object or list around it alone."""
    named = {key.strip().lower(): found for key, found in [*value.items()][::-1]} | {**value}
    found = named.get(FIELD)
    while isinstance(found, dict | list) and len(found) == 1:
        [found] = (
            found
            if isinstance(found, list)
            else [found.get(key) for key in found if key in _WRAPPERS] or [None]
        )
    return found if isinstance(found, str) else None


def _chosen(text: str, spans: Sequence[_Span]) -> _Span | None:
    """The last prompt that is not a placeholder.

    Prompts outside sentences take precedence over those inside.
    """
    real = [span for span in spans if not _is_placeholder(text, span, alone=len(spans) == 1)]
    separate = [span for span in real if not _is_within_sentence(text, span)]
    return next(reversed(separate or real), None)


def _is_placeholder(reply: str, span: _Span, alone: bool) -> bool:
    """Whether a form is shown but not filled in: "and", "your text goes here", "..."."""
    words = [word.lower() for word in _WORD.findall(span.text)]
    if not words:
        return not alone and span.text.strip() in {"...", "…", "[...]"}
    if len(words) == 1:
        links = words[0] in _BETWEEN and span.text[:1].isspace() and span.text[-1:].isspace()
        return (links and _is_within_sentence(reply, span)) or (not alone and words[0] in _PLACEHOLDER)
    return len(words) <= _PLACEHOLDER_WORDS and _PLACEHOLDER.issuperset(words)


def _is_within_sentence(text: str, span: _Span) -> bool:
    before = text[max(0, span.start - _AROUND) : span.start].rpartition("\n")[2]
    after = text[span.end : span.end + _AROUND].partition("\n")[0]
    return bool(re.search(r"[\w,:(][ \t]+\Z|\(\Z", before)) and bool(re.match(r"[ \t]+\w|[,;).]", after))


def _whole_object(reply: str) -> str | None:
    """The text of the field if the reply is one JSON object."""
    text = _unfenced(reply.strip())
    value = object_at(text, 0)
    if value is None or value[1] != len(text):
        return None
    return _field(value[0])


def _marks_in_prompts(reply: str) -> str:
    """The marks of the end of reasoning inside `<prompt>` tags: there they are part of the prompt's text."""
    marks, tags = [], [tag for tag in _tags(reply) if not tag.is_named]
    for opened, closed in itertools.pairwise(tags):
        if opened.opens and not closed.opens:
            marks += [match.group() for match in CLOSED.finditer(reply, opened.end, closed.start)]
    return " ".join(marks)


def _without_later_reasoning(text: str) -> str:
    """The reply without reasoning that begins within it. Marks inside a prompt are kept."""
    events = [(m.start(), m.end(), "think", m) for m in OPENED.finditer(text)]
    events += [(m.start(), m.end(), "end", m) for m in CLOSED.finditer(text)]
    events += [(t.start, t.end, "open" if t.opens else "close", None) for t in _tags(text) if not t.is_named]
    kept, at, in_prompt, thinks = [], 0, False, False
    for start, end, kind, mark in sorted(events, key=lambda event: event[0]):
        if thinks:
            if kind == "end":
                thinks, at = False, end
        elif kind in ("open", "close"):
            in_prompt = kind == "open"
        elif kind == "think" and not in_prompt and mark is not None and not is_quoted(text, mark):
            kept.append(text[at:start])
            thinks = True
    return "".join(kept) if thinks else "".join([*kept, text[at:]])


def _bare(text: str) -> str:
    """A prompt without the wrapping of some models: tags inside JSON, a code fence, quotation marks."""
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
