"""Common parts of a stage's passes: the tokenized samples, and the facts of each pass.

Axes: docs/contributing.md#axes.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from middo_jax.data.example import Example
from middo_jax.data.long_texts import is_long, last_tokens
from middo_jax.data.tokenize import TokenizedExample, response_header
from middo_jax.models.model import Model
from middo_jax.parallel.hosts import gather_rows
from middo_jax.passes.losses import ExampleScores, LossPass
from middo_jax.passes.parts import Parts
from middo_jax.passes.runner import PassFacts
from middo_jax.session import Session
from middo_jax.signals.duplicates import prompt_hash
from middo_jax.signals.ifd import mean_by_example, responses_alone
from middo_jax.signals.readings import last_target, prompts_behind_responses
from middo_jax.stages.shared_tokens import SharedTokens
from middo_jax.training.identity import of_model


class Texts(NamedTuple):
    """Tokenized samples.

    Attributes:
      examples: the samples.
      tokenized: their tokenized conversations, of which each process of a job has only a part.
      raw: their tokenized prompts without the template, shared as well, if `diversity.text` is `raw`; else
        None.
      hashes: hashes of the prompts in the form that is embedded.
      truncated_n: bool, whether the conversation was cut.
      last_target_n: int32, see `signals.readings.last_target`.
    """

    examples: Sequence[Example]
    tokenized: SharedTokens
    raw: SharedTokens | None
    hashes: Sequence[str]
    truncated_n: np.ndarray
    last_target_n: np.ndarray

    @classmethod
    def of(cls, session: Session, examples: Sequence[Example]) -> Texts:
        """Tokenizes samples by the settings, in a job each process its share. All processes must call it."""
        tokenized = SharedTokens.of(session, examples)
        facts_nk = tokenized.of_all("tokens", 4, _facts)
        raw, halves_n2 = None, facts_nk[:, 2:]
        if session.config.diversity.text == "raw":
            raw = SharedTokens(tokenized.ids, lambda some: raw_prompts(session, [examples[i] for i in some]))
            halves_n2 = raw.of_all("raw prompts", 2, _halves)
        hashes = [row.tobytes().hex() for row in halves_n2.astype(">i4")]
        return cls(examples, tokenized, raw, hashes, facts_nk[:, 0] > 0, facts_nk[:, 1])

    @property
    def ids(self) -> list[str]:
        """IDs of the samples."""
        return [example.id for example in self.examples]


def _facts(example: TokenizedExample) -> list[int]:
    """Whether it is cut, its last target, and the two halves of its prompt's hash."""
    return [example.truncated, last_target(example), *_halves(example)]


def _halves(example: TokenizedExample) -> list[int]:
    """The two halves of a prompt's hash."""
    return np.frombuffer(bytes.fromhex(prompt_hash(example)), ">i4").tolist()


class Passes:
    """Runs scoring passes by the settings, and keeps the facts of each pass (`facts`, by name)."""

    def __init__(self, session: Session, parts: Path | None = None) -> None:
        """Passes whose results are kept in a folder, so that they go on after a stop; None keeps nothing."""
        self._session, self._parts = session, parts
        self.facts: dict[str, PassFacts] = {}

    def parts(self, name: str, model: Model) -> Parts | None:
        """The results that earlier starts of a pass have left."""
        if self._parts is None:
            return None
        folder = self._parts / name.replace(" ", "_")
        return Parts(folder, of_model(model), self._session.progress, name)

    def __call__(
        self, name: str, model: Model, of: Sequence[TokenizedExample], *, prompts: bool = False
    ) -> ExampleScores:
        """One pass of a model over some examples; `name` is shown to the user.

        With `prompts`, the losses of the prompts are computed too.
        """
        tokens, chunk = self._session.batch_tokens, self._session.config.scoring.unembed_chunk
        outline = of.outline(prompts=prompts) if isinstance(of, SharedTokens) else None
        planned = LossPass(of, model, tokens, chunk, prompts=prompts, outline=outline)
        parts = self.parts(name, model)
        scores, self.facts[name] = planned(model, self._session.progress, name, parts)
        return scores


class Conditioned(NamedTuple):
    """Losses of the same texts under one model in another context, in nats per token.

    Attributes:
      response_alone_n: of the responses without their prompts; None if not asked for.
      prompt_behind_response_n: of the prompts behind their responses; None if not asked for. NaN where
        `prompts_behind_responses` has no conversation.
    """

    response_alone_n: np.ndarray | None
    prompt_behind_response_n: np.ndarray | None


def conditioned(
    session: Session,
    passes: Passes,
    model: Model,
    examples: Sequence[Example],
    tokenized: Sequence[TokenizedExample],
    readings: Collection[str],
) -> Conditioned:
    """The further losses that readings need: one pass for `ifd` and `pmi` together, one for `reverse_ifd`.

    All processes must call it, with the same samples.
    """
    alone_n, behind_n = None, None
    if not isinstance(tokenized, SharedTokens):
        everywhere = tokenized
        ids = [example.id for example in everywhere]
        tokenized = SharedTokens(ids, lambda some: [everywhere[i] for i in some])
    if "ifd" in readings or "pmi" in readings:
        alone, counts = _responses(tokenized, response_header(session.tokenizer))
        scores = passes("loss of responses alone", model, alone)
        alone_n = mean_by_example(counts, scores.loss_n, scores.n_targets_n)
    if "reverse_ifd" in readings:
        turned, known = _turned(session, examples, tokenized)
        scores = passes("loss of prompts behind responses", model, turned)
        behind_n = np.full(len(examples), np.nan, np.float32)
        behind_n[known] = scores.loss_n
    return Conditioned(alone_n, behind_n)


def _responses(tokenized: SharedTokens, header_n: np.ndarray) -> tuple[SharedTokens, list[int]]:
    """The responses of all samples, see `responses_alone`, and their number per sample."""
    counts = tokenized.of_all("responses", 1, lambda e: [len(responses_alone(e, header_n))])[:, 0].tolist()
    place = [(i, at) for i, count in enumerate(counts) for at in range(count)]

    def make(some: Sequence[int]) -> list[TokenizedExample]:
        return [responses_alone(tokenized[place[r][0]], header_n)[place[r][1]] for r in some]

    return tokenized.derived([i for i, _ in place], make), counts


def _turned(
    session: Session, examples: Sequence[Example], tokenized: SharedTokens
) -> tuple[SharedTokens, list[int]]:
    """The samples that `prompts_behind_responses` can turn round, so turned, and their indices."""

    def turn(some: Sequence[int]) -> list[TokenizedExample | None]:
        of = [examples[i] for i in some], [tokenized[i] for i in some]
        return prompts_behind_responses(*of, session.tokenizer, session.config.model.max_length)

    own = dict(zip(tokenized.own, turn(tokenized.own), strict=True))
    is_known = np.array([[one is not None] for one in own.values()], np.int32).reshape(len(own), 1)
    known = np.flatnonzero(gather_rows("turned round", tokenized.own, is_known, len(examples))).tolist()

    def make(some: Sequence[int]) -> list[TokenizedExample]:
        others = [known[j] for j in some if known[j] not in own]
        found = own | dict(zip(others, turn(others), strict=True))
        return [one for j in some if (one := found[known[j]]) is not None]

    return tokenized.derived(known, make), known


def describe(name: str, facts: PassFacts) -> str:
    """Returns one line about a pass: speed, share of padding, number of compiled shapes."""
    per_second = facts.real_tokens / max(facts.seconds, 1e-9)
    shapes = "1 shape" if facts.shapes == 1 else f"{facts.shapes} shapes"
    return (
        f"{name}: {per_second:,.0f} real tokens/s, {facts.fill:.1%} of the computed positions real, "
        f"{shapes} compiled in {facts.compile_seconds:.1f} s"
    )


def raw_prompts(session: Session, examples: Sequence[Example]) -> list[TokenizedExample]:
    """Tokenizes the prompts alone, without the template. All tokens are prompt tokens, none a target."""
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
