"""Texts that decline what they were asked. A pure function; its words are in `refusal_phrases`.

An apology alone is no refusal, and neither is "I cannot": "I'm sorry, I cannot come on Friday" answers. A
sentence declines if it says that its writer cannot, and one of three things besides: that it cannot serve
("help with that"), that it cannot do a deed to what was asked for ("write this text"), or that it speaks as a
model ("as an AI", "against my guidelines").
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from typing import NamedTuple

from middo_jax.refinement.acceptance.refusal_phrases import PHRASES, Phrases

_OPENING = 240  # characters that are looked at
_SENTENCES = 2  # "Thank you for asking. I cannot help with that."
_SENTENCE_END = re.compile(r"(?<=[.!?؟])\s+|(?<=[。।])\s*")
_NO_WORD = re.compile(r"^[^\w\"“„«‹「『'‘—–―]+")  # list marks, headings, block quotes, emoji
_QUOTED = re.compile(r"\"[^\"]+\"|“[^“”]+”|„[^„“”]+[“”]|«[^«»]+»|‹[^‹›]+›|「[^「」]+」|『[^『』]+』")
_SINGLE_QUOTED = re.compile(r"^['‘].+?[,.!?]['’](?=\s)")  # only in front: elsewhere it may be an apostrophe
_DIALOGUE = re.compile(r"^[—–―]\s*.+?\s*[—–―]")  # —No puedo ayudarte —dijo ella.
_REPORTED = re.compile(r"(?<!\bi )\b(?:said|says|replied|answered|wrote):\s[^.!?]*", re.IGNORECASE)
_APOSTROPHES = str.maketrans("’´`ʼ", "''''")


def is_refusal(text: str) -> bool:
    """Whether a text opens as a model does that will not do what it was asked.

    The first two sentences are read. A partial refusal is one, whatever it offers instead. Words in quotation
    marks count only where they are the whole text, and words after "she said:" do not count: a story or a
    translation may quote a refusal.
    """
    sentences = [*_sentences(_unquoted(text[: 4 * _OPENING]))][:_SENTENCES]
    return any(_declines(sentence, rule) for sentence in sentences for rule in _RULES)


class _Rule(NamedTuple):
    cannot: re.Pattern[str]
    serve: re.Pattern[str]
    deed: re.Pattern[str]
    thing: re.Pattern[str]
    model: re.Pattern[str]


def _rule(phrases: Phrases) -> _Rule:
    def compiled(alternatives: str) -> re.Pattern[str]:
        start = r"\b" if phrases.has_word_starts else ""
        return re.compile(f"{start}(?:{unicodedata.normalize('NFKC', alternatives)})", re.IGNORECASE)

    return _Rule(*(compiled(getattr(phrases, field)) for field in _Rule._fields))


_RULES = [_rule(phrases) for phrases in PHRASES.values()]


def _declines(sentence: str, rule: _Rule) -> bool:
    if rule.cannot.search(sentence) is None:
        return False
    if rule.serve.search(sentence) or rule.model.search(sentence):
        return True
    return bool(rule.deed.search(sentence) and rule.thing.search(sentence))


def _unquoted(text: str) -> str:
    """An opening in one line without its decoration; of a text that is one quotation, what it quotes."""
    plain = unicodedata.normalize("NFKC", text.translate(_APOSTROPHES)).replace("**", "").replace("__", "")
    line = _NO_WORD.sub("", " ".join(plain.split()))
    whole = _QUOTED.match(line)
    if whole and not any(c.isalnum() for c in line[whole.end() :]):
        return line[1:]
    for spoken in (_DIALOGUE, _SINGLE_QUOTED, _QUOTED, _REPORTED):
        line = spoken.sub(" … ", line)
    return line


def _sentences(line: str) -> Iterator[str]:
    for sentence in _SENTENCE_END.split(line[:_OPENING]):
        if any(c.isalnum() for c in sentence):
            yield sentence
