"""The settings of the axes: where each selects, and how its scores are made."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from middo_jax.config.base import Affects
from middo_jax.config.unions import Alternative, Inlining, OneOf


class Deviations(Alternative):
    """An axis selects beyond so many population standard deviations from the mean."""

    affects: ClassVar[Affects | None] = Affects("selection")

    m: float = Field(
        default=1.0, description="Standard deviations from the mean beyond which a sample is selected."
    )


class Fraction(Alternative):
    """An axis selects a share of the samples; the threshold follows."""

    affects: ClassVar[Affects | None] = Affects("selection")

    fraction: float = Field(
        gt=0, lt=1, description="Wanted share of samples, in place of `m`; the threshold follows."
    )


Threshold = Deviations | Fraction


class AxisSettings(Inlining):
    """What all axes share. `m` and `fraction` exclude each other."""

    threshold: Annotated[Deviations | Fraction, OneOf(inline=True)] = Deviations()


class ComplexitySettings(AxisSettings):
    """Hard samples: high loss both before and after training.

    Before training: under the model that train.start_from names.
    """

    normalise: Annotated[Literal["none", "length"], Affects("selection")] = Field(
        default="none",
        description="none: the losses as they are, as published; length: less what their dependence on log "
        "answer length explains, so that short answers are not hard for being short.",
    )


class DiversitySettings(AxisSettings):
    """Sparse samples: far from their nearest neighbours."""

    k: Annotated[PositiveInt, Affects("scores")] = Field(default=2, description="Nearest neighbours.")
    text: Annotated[Literal["templated", "raw"], Affects("scores")] = Field(
        default="templated",
        description="templated: the prompt's span of the rendered conversation; raw: the prompt alone.",
    )
    embedder: Annotated[Literal["post", "pre"], Affects("scores")] = Field(
        default="post",
        description="Whose embeddings. post: of the model under training, as published; pre: of the model "
        "that train.start_from names. base is frozen, so that a later round compares only what changed.",
    )
    ignore_duplicates: Annotated[bool, Affects("scores")] = Field(
        default=False,
        description="Samples with exactly the same prompt are not each other's neighbours. They are reported "
        "either way.",
    )


class ExpectedRating(Alternative):
    """The mean rating under the model's own probabilities, from one prefill."""

    affects: ClassVar[Affects | None] = Affects("scores")

    method: Literal["expected"] = Field(
        default="expected",
        description="expected: mean rating under the model's own probabilities; sample: generate and parse, "
        "with the published top_p of 0.7 and top_k of 50.",
    )
    score: Literal["expected", "log_odds"] = Field(
        default="expected",
        description="expected: the mean of the eleven ratings, 0 to 10; log_odds: of a rating above 5 "
        "against one below, in nats.",
    )
    score_temperature: PositiveFloat = Field(
        default=1.0,
        description="Divides the ratings' log-probabilities before `score` is taken of them; under 1 the "
        "likeliest rating counts for more.",
    )


class SampledRating(Alternative):
    """The rating that the model writes."""

    affects: ClassVar[Affects | None] = Affects("scores")

    method: Literal["sample"] = "sample"
    max_new_tokens: PositiveInt = Field(default=1024, description="Tokens of a rating and its explanation.")
    temperature: PositiveFloat = Field(default=0.1, description="As published.")


class QualitySettings(AxisSettings):
    """Low-quality samples: rated low by the model itself."""

    rating: Annotated[ExpectedRating | SampledRating, OneOf(by="method", inline=True)] = ExpectedRating()


class ConsistencySettings(AxisSettings):
    """Samples in which one reading sees a fault: a cut answer, strangers, odd tokens.

    An axis that is scored only where scoring.readings names it. It is not published.
    """
