"""The settings that end the rounds early, and the names of the control arms."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, NonNegativeFloat, PositiveInt

from middo_jax.config.base import Affects, Settings

Control = Literal["none", "random", "reanswer", "loss", "ifd", "length"]


class StopSettings(Settings):
    """When the rounds end. With `patience`, `final` is the best training's dataset and model."""

    # The chain of stages follows from them: those that they add or take away are done, and no others.
    affects: ClassVar[Affects | None] = Affects("rounds")

    patience: PositiveInt | None = Field(
        default=None,
        description="Trainings in a row without a gain, after which the rounds end. None: all rounds are "
        "run, and `final` is trained on the last dataset.",
    )
    min_gain: NonNegativeFloat = Field(
        default=0.0,
        description="The smallest improvement that counts as a gain: nats per token, or the unit of "
        "the task's score.",
    )
    metric: Literal["heldout_loss", "task"] = Field(
        default="heldout_loss",
        description="heldout_loss; or task: the mean of the first metrics of evaluate.tasks.",
    )
