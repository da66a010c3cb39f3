"""Ratings of examples by the model: expected values from one prefill, or sampled and parsed.

Axes: docs/contributing.md#axes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from middo_jax.config import SampledRating
from middo_jax.data.example import Example
from middo_jax.data.lazy import Lazy
from middo_jax.data.reply import without_reasoning
from middo_jax.data.tokenize import eos_token_ids
from middo_jax.inference.engine import Engine
from middo_jax.inference.sampling import Request
from middo_jax.models.model import Model
from middo_jax.parallel.hosts import share_of
from middo_jax.passes.parts import Parts
from middo_jax.passes.ratings import RatingScale, rate
from middo_jax.passes.runner import PassFacts
from middo_jax.progress import Progress
from middo_jax.session import Session
from middo_jax.signals.judge.questions import RatingTokens, RatingTree, rating_tree
from middo_jax.signals.judge.readout import EXPECTED, Readout
from middo_jax.signals.judge.rubrics import COLUMNS, SHIPPED, Rubric, read_rubric
from middo_jax.signals.judge.sampled import parse_rating, rating_prompts

TOP_P, TOP_K = 0.7, 50  # of sampled ratings, as published


def ratings(
    session: Session, model: Model, examples: Sequence[Example], parts: Parts | None = None
) -> tuple[np.ndarray, PassFacts | None]:
    """Returns six ratings per example, [n, 6] in the order of `rubrics.COLUMNS`, by `quality.method`.

    Also returns the facts of the pass; None for the sampled method, which decodes instead. `parts` has
    results of an earlier start. All processes must call it.
    """
    config = session.config
    rating = config.quality.rating
    if isinstance(rating, SampledRating):
        return sampled_ratings(session, model, examples, rating), None
    asked = Asked.shared(
        examples, session.tokenizer, config.model.max_length, read_rubric(config.quality.rubric)
    )
    return rate(
        model,
        asked.trees,
        RatingScale(asked.spelling, Readout(rating.score, rating.score_temperature), len(COLUMNS)),
        batch_tokens=session.batch_tokens,
        progress=session.progress,
        parts=parts,
    )


class Asked(NamedTuple):
    """The judge's questions: one tree per example, and the spelling of ratings."""

    trees: Sequence[RatingTree]
    spelling: RatingTokens

    @classmethod
    def of(
        cls,
        examples: Sequence[Example],
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        rubric: Rubric = SHIPPED,
    ) -> Asked:
        """Tokenizes the questions.

        Raises:
          JudgeError: the tokenizer spells the ratings in a way that one prefill cannot score, or a question
            alone is longer than `max_length`.
        """
        asked = cls.shared(examples, tokenizer, max_length, rubric)
        return asked._replace(trees=asked.trees[:])

    @classmethod
    def shared(
        cls,
        examples: Sequence[Example],
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        rubric: Rubric = SHIPPED,
    ) -> Asked:
        """Tokenizes the questions when they are read, in a job each process those that it reads.

        Raises:
          JudgeError: as `of`; for a question when it is read.
        """
        spelling = RatingTokens.of(tokenizer)

        def make(some: Sequence[int]) -> list[RatingTree]:
            return [rating_tree(examples[i], tokenizer, spelling, max_length, rubric) for i in some]

        ids = [example.id for example in examples]
        return cls(Lazy(ids, make, share_of(len(ids))), spelling)


def judge(
    model: Model,
    asked: Asked,
    *,
    batch_tokens: int,
    readout: Readout | None = None,
    progress: Progress | None = None,
) -> tuple[np.ndarray, PassFacts]:
    """Returns six ratings per example from the probabilities of all answers, and the facts of the pass.

    The ratings are [n, 6] float32, in the order of `rubrics.COLUMNS`.
    """
    scale = RatingScale(asked.spelling, readout or EXPECTED, len(COLUMNS))
    return rate(model, asked.trees, scale, batch_tokens=batch_tokens, progress=progress)


def sampled_ratings(
    session: Session, model: Model, examples: Sequence[Example], settings: SampledRating
) -> np.ndarray:
    """Samples six ratings per example, [n, 6] float32; NaN where an answer contains no rating.

    A prompt that leaves no room for an answer in `serve.max_context` also gets NaN.
    """

    config, tokenizer = session.config, session.tokenizer
    context = config.serve.max_context
    stop_ids = eos_token_ids(session.base, tokenizer)
    prompts = rating_prompts(examples, tokenizer, context, read_rubric(config.quality.rubric))
    rating_q = np.full(len(prompts), np.nan, np.float32)
    with (
        session.progress.task("ratings") as advance,
        Engine(model.graphdef, model.params, config.serve.max_batch, context) as engine,
    ):
        futures = {
            q: engine.submit(
                Request(
                    tokens_n.tolist(),
                    settings.max_new_tokens,
                    settings.temperature,
                    TOP_P,
                    TOP_K,
                    seed=config.seed + q,
                    stop_ids=stop_ids,
                )
            )
            for q, tokens_n in enumerate(prompts)
            if len(tokens_n) < context
        }
        for q, future in futures.items():
            rating = read_rating(str(tokenizer.decode(future.result().tokens)))
            rating_q[q] = np.nan if rating is None else rating
            advance((q + 1) // len(COLUMNS), len(examples))
    return rating_q.reshape(len(examples), len(COLUMNS))


def read_rating(answer: str) -> float | None:
    """The rating in a judge's answer, see `parse_rating`. One in its reasoning does not count.

    "<think>A score of 3? No.</think>\\n8" -> 8; None if the reasoning never ends.
    """
    text = without_reasoning(answer)
    return None if text is None else parse_rating(text)
