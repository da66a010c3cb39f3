"""The settings of the axes: where each selects, and how its scores are made."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from middo_jax.config.base import Affects, Condition, Contains
from middo_jax.config.unions import Alternative, Inlining, OneOf


class Deviations(Alternative):
    """Selects the samples beyond m population standard deviations from the mean."""

    affects: ClassVar[Affects | None] = Affects("selection")

    m: float = Field(
        default=1.0, description="Standard deviations from the mean beyond which a sample is selected."
    )


class Fraction(Alternative):
    """Selects a share of the samples; the threshold follows from it."""

    affects: ClassVar[Affects | None] = Affects("selection")

    fraction: float = Field(
        gt=0, lt=1, description="Share of samples to select, instead of `m`; the threshold follows from it."
    )


Threshold = Deviations | Fraction


class AxisSettings(Inlining):
    """Settings of every axis. `m` and `fraction` exclude each other."""

    threshold: Annotated[Deviations | Fraction, OneOf(inline=True)] = Deviations()


class ComplexitySettings(AxisSettings):
    """Hard samples: high loss both before and after training.

    The loss before training is the loss under the model of train.start_from.
    """

    normalise: Annotated[Literal["none", "length"], Affects("selection")] = Field(
        default="none",
        description="none: the losses unchanged, as published; length: the losses minus the part that a "
        "regression on log answer length explains, so that short answers are not hard for being short.",
    )


class DiversitySettings(AxisSettings):
    """Sparse samples: far from their nearest neighbours."""

    k: Annotated[PositiveInt, Affects("scores")] = Field(
        default=2, description="Number of nearest neighbours."
    )
    text: Annotated[Literal["templated", "raw"], Affects("scores")] = Field(
        default="templated",
        description="Embedded text. templated: the prompt's part of the rendered conversation; raw: the "
        "prompt alone.",
    )
    embedder: Annotated[Literal["post", "pre"], Affects("scores")] = Field(
        default="post",
        description="Model that computes the embeddings. post: the model in training, as published; pre: the "
        "model of train.start_from. With `base` that model never changes, so later rounds compare only "
        "changed samples.",
    )
    ignore_duplicates: Annotated[bool, Affects("scores")] = Field(
        default=False,
        description="Whether samples with equal prompts are excluded from each other's neighbours. They are "
        "reported in both cases.",
    )


class ExpectedRating(Alternative):
    """The mean rating under the model's own probabilities, from one prefill."""

    affects: ClassVar[Affects | None] = Affects("scores")

    method: Literal["expected"] = Field(
        default="expected",
        description="expected: mean rating under the model's own probabilities; sample: a generated and "
        "parsed rating, with the published top_p of 0.7 and top_k of 50.",
    )
    score: Literal["expected", "log_odds"] = Field(
        default="expected",
        description="expected: the mean of the eleven ratings, 0 to 10; log_odds: the log-odds of a rating "
        "above 5 against one below 5, in nats.",
    )
    score_temperature: PositiveFloat = Field(
        default=1.0,
        description="Divides the ratings' log-probabilities before `score` is computed; below 1 the "
        "likeliest rating gets more weight.",
    )


class SampledRating(Alternative):
    """The rating that the model generates."""

    affects: ClassVar[Affects | None] = Affects("scores")

    method: Literal["sample"] = "sample"
    max_new_tokens: PositiveInt = Field(
        default=1024, description="Maximum tokens of a rating and its explanation."
    )
    temperature: PositiveFloat = Field(default=0.1, description="Sampling temperature, as published.")


class QualitySettings(AxisSettings):
    """Low-quality samples: rated low by the model itself."""

    rating: Annotated[ExpectedRating | SampledRating, OneOf(by="method", inline=True)] = ExpectedRating()
    rubric: Annotated[str | None, Affects("scores")] = Field(
        default=None,
        description="YAML file with your own questions to the judge, see docs/scoring.md. None: those of the "
        "package.",
    )


class ConsistencySettings(AxisSettings):
    """Samples in which one reading sees a fault: a cut answer, strangers, odd tokens.

    An axis that is scored only if scoring.readings names it. It is not published.
    """

    only_if: ClassVar[Condition | None] = ("scoring.readings", Contains("consistency"))
