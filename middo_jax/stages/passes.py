"""What the passes of a stage have in common: the samples as they are read, and how each pass went."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from middo_jax.data.example import Example
from middo_jax.data.long_texts import is_long, last_tokens
from middo_jax.data.tokenize import TokenizedExample
from middo_jax.models.model import Model
from middo_jax.passes.losses import ExampleScores, score_examples
from middo_jax.passes.runner import PassFacts
from middo_jax.session import Session
from middo_jax.signals.duplicates import prompt_hash


class Texts(NamedTuple):
    """N samples as the passes read them.

    Attributes:
      examples: the samples.
      tokenized: their conversations.
      raw: their prompts alone, if these are embedded without the conversation.
      hashes: of the prompts as they are embedded.
    """

    examples: Sequence[Example]
    tokenized: Sequence[TokenizedExample]
    raw: Sequence[TokenizedExample] | None
    hashes: Sequence[str]

    @classmethod
    def of(cls, session: Session, examples: Sequence[Example]) -> Texts:
        """Tokenizes samples as the settings say."""
        tokenized = session.tokenize(examples)
        raw = raw_prompts(session, examples) if session.config.diversity.text == "raw" else None
        embedded = tokenized if raw is None else raw
        return cls(examples, tokenized, raw, [prompt_hash(e) for e in embedded])

    @property
    def ids(self) -> list[str]:
        """Of the samples."""
        return [example.id for example in self.examples]


class Passes:
    """Scores examples as the settings say, and keeps what each pass took."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self.facts: dict[str, PassFacts] = {}

    def __call__(self, name: str, model: Model, of: Sequence[TokenizedExample]) -> ExampleScores:
        """One pass of a model over some examples; `name` is what the user sees."""
        scoring = self._session.config.scoring
        scores, self.facts[name] = score_examples(
            model,
            of,
            batch_tokens=scoring.batch_tokens,
            chunk=scoring.unembed_chunk,
            progress=self._session.progress,
            name=name,
        )
        return scores


def describe(name: str, facts: PassFacts) -> str:
    """One line about a pass: how fast, how much of it was padding, how many shapes."""
    per_second = facts.real_tokens / max(facts.seconds, 1e-9)
    shapes = "1 shape" if facts.shapes == 1 else f"{facts.shapes} shapes"
    return (
        f"{name}: {per_second:,.0f} real tokens/s, {facts.fill:.1%} of the computed positions real, "
        f"{shapes} compiled in {facts.compile_seconds:.1f} s"
    )


def raw_prompts(session: Session, examples: Sequence[Example]) -> list[TokenizedExample]:
    """The prompts alone, without the template, all of each a prompt."""
    if not examples:
        return []
    longest = session.config.model.max_length
    texts = [example.prompt for example in examples]
    short = [text for text in texts if not is_long(text, longest)]
    encoded = iter(
        session.tokenizer(short, add_special_tokens=False, verbose=False)["input_ids"] if short else []
    )
    tokenized = []
    for example, text in zip(examples, texts, strict=True):
        if is_long(text, longest):
            ids, is_cut = last_tokens(session.tokenizer, text, longest)
        else:
            ids = next(encoded)
            is_cut = len(ids) > longest
        tokens_n = np.asarray(ids[-longest:], np.int32)
        nothing, everything = np.zeros(len(tokens_n), bool), np.ones(len(tokens_n), bool)
        tokenized.append(TokenizedExample(example.id, tokens_n, nothing, everything, is_cut))
    return tokenized
