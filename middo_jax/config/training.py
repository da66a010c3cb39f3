"""The settings of training: optimizer, checkpoints, evaluation, trackers, bad steps and adapters."""

from __future__ import annotations

import typing
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import pydantic
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from middo_jax.config.base import GIVEN, Affects, ConfigError, Settings
from middo_jax.config.unions import Alternative, OneOf

# The matrices of a layer; PEFT uses the same names.
AdaptedMatrix = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
_OF_ADAPTERS = Affects(training=("lora.rank", GIVEN))
_WEIGHT_DECAY = "Weight decay of matrices, multiplied by the learning rate."


class AdamW(Alternative):
    """Two moments per parameter (arXiv 1711.05101)."""

    affects: ClassVar[Affects | None] = Affects("training")

    name: Literal["adamw"] = Field(
        default="adamw",
        description="adamw; adafactor: a factored second moment and no first, hence almost no state. Short "
        "form: `train.optimizer: adafactor`.",
    )
    weight_decay: NonNegativeFloat = Field(default=0.0, description=_WEIGHT_DECAY)
    betas: tuple[float, float] = Field(default=(0.9, 0.999), description="Decay rates of the two moments.")

    @pydantic.field_validator("betas")
    @classmethod
    def _rates(cls, betas: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError("must be two numbers from 0 to below 1")
        return betas


class Adafactor(Alternative):
    """A factored second moment and no first (arXiv 1804.04235)."""

    affects: ClassVar[Affects | None] = Affects("training")

    name: Literal["adafactor"] = "adafactor"
    weight_decay: NonNegativeFloat = Field(default=0.0, description=_WEIGHT_DECAY)


class BadSteps(pydantic.BaseModel):
    """What a bad step does: `stop`, `skip`, or with a spike factor `{skip: 3}`.

    Attributes:
      action: stop with an error, or leave the update out and go on.
      spike_factor: a loss over so many times the median of the last 64 steps' makes a bad step too, and a
        training that ends far above its start is an error. None: only what is not finite is bad.
    """

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    action: Literal["stop", "skip"] = "stop"
    spike_factor: float | None = Field(default=None, gt=1)

    @pydantic.model_serializer
    def _shortened(self) -> str | dict[str, float]:
        return self.action if self.spike_factor is None else {self.action: self.spike_factor}


class WandB(pydantic.BaseModel):
    """The Weights & Biases project that shows a training: `{wandb: PROJECT}`."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")

    wandb: str = Field(min_length=1)


class TrainSettings(Settings):
    """Supervised fine-tuning."""

    learning_rate: Annotated[PositiveFloat, Affects("training")] = Field(
        default=2e-5, description="Peak learning rate of the schedule."
    )
    num_epochs: Annotated[PositiveInt, Affects("training")] = Field(
        default=1, description="Number of passes over the dataset."
    )
    batch_size: Annotated[PositiveInt, Affects("training")] = Field(
        default=32, description="Packed sequences per optimizer step."
    )
    examples_per_step: Annotated[PositiveInt | None, Affects("training")] = Field(
        default=None,
        description="Examples per optimizer step, if they fit into batch_size sequences: the global batch "
        "size of a trainer that does not pack. None: as many as fit.",
    )
    gradient_accumulation: Annotated[PositiveInt | Literal["auto"], Affects("speed")] = Field(
        default=1,
        description="Micro-batches per step; each has batch_size / gradient_accumulation sequences. auto: as "
        "few as fit the memory, together with remat; found by compiling.",
    )
    warmup_ratio: Annotated[float, Affects("training")] = Field(
        default=0.03, ge=0, lt=1, description="Share of all steps in which the learning rate rises."
    )
    schedule: Annotated[Literal["cosine", "linear", "constant"], Affects("training")] = Field(
        default="cosine", description="Learning rate after warm-up; cosine and linear end at 0."
    )
    optimizer: Annotated[AdamW | Adafactor, OneOf(by="name")] = AdamW()
    param_dtype: Annotated[Literal["float32", "bfloat16"], Affects("training")] = Field(
        default="float32",
        description="Dtype of the trained weights, independent of model.dtype; adapters are always float32. "
        "bfloat16: updated weights are rounded stochastically, so that small updates are not lost.",
    )
    max_grad_norm: Annotated[PositiveFloat, Affects("training")] = Field(
        default=1.0, description="Maximum global norm of the gradient; larger gradients are scaled down."
    )
    remat: Annotated[Literal["none", "dots", "layer", "auto"], Affects("speed")] = Field(
        default="layer",
        description="What each layer saves for the backward pass; the rest is recomputed. none: everything; "
        "dots: its input, its products with weights and attention's output; layer: its input only, which "
        "needs the least memory and the most time; auto: the fastest that fits, found by compiling.",
    )
    start_from: Annotated[Literal["base", "previous"], Affects("training")] = Field(
        default="base",
        description="The model that every round fine-tunes: the base model, or the previous round's model. "
        "loss_pre is the loss under this model.",
    )
    save_every: Annotated[PositiveInt, Affects("speed")] = Field(
        default=50, description="Steps between checkpoints within a training."
    )
    eval_every: Annotated[PositiveInt | None, Affects("shown")] = Field(
        default=None,
        description="Steps between measurements of the held-out loss, also by data.source_column; one more "
        "after the last step. None: no measurement during training.",
    )
    keep_best: Annotated[bool, Affects("shown")] = Field(
        default=False,
        description="Whether to keep the state with the lowest held-out loss too, as checkpoint/best.",
    )
    on_bad_step: Annotated[BadSteps, Affects("training")] = Field(
        default=BadSteps(spike_factor=3.0),
        description="What to do if the loss or gradient is not finite. stop: stop with an error; skip: leave "
        "that update out and go on. {stop: 3} or {skip: 3}: also where the loss is over 3 times the median "
        "of the "
        "last 64 steps', and a nat above it; and a training whose last losses are far above its first one "
        "ends with an error, so that nothing is scored or paid for with a wrecked model.",
    )
    trackers: Annotated[tuple[Literal["tensorboard"] | WandB, ...], Affects("shown")] = Field(
        default=(),
        description="Trackers that show the training, such as [tensorboard, {wandb: PROJECT}]; each needs "
        "the extra of its name.",
    )

    @property
    def micro_batches(self) -> int:
        """`gradient_accumulation` as a number.

        Raises:
          ConfigError: it is still `auto`.
        """
        if self.gradient_accumulation == "auto":
            raise ConfigError("config: train.gradient_accumulation=auto was not replaced by a number")
        return self.gradient_accumulation

    @property
    def recomputed(self) -> Literal["none", "dots", "layer"]:
        """`remat` without `auto`.

        Raises:
          ConfigError: it is still `auto`.
        """
        if self.remat == "auto":
            raise ConfigError("config: train.remat=auto was not replaced by a value")
        return self.remat

    @pydantic.field_validator("on_bad_step", mode="before")
    @classmethod
    def _short_form(cls, value: Any) -> Any:
        if isinstance(value, BadSteps):
            return value
        short = {value: None} if isinstance(value, str) else value
        if not isinstance(short, Mapping) or [*short] not in (["stop"], ["skip"]):
            raise ValueError("must be stop or skip, or with a spike factor {stop: 3} or {skip: 3}")
        [(action, factor)] = short.items()
        return {"action": action, "spike_factor": factor}

    @pydantic.field_validator("trackers", mode="before")
    @classmethod
    def _known_trackers(cls, trackers: Any) -> Any:
        entries = trackers if isinstance(trackers, list | tuple) else [None]
        for entry in entries:
            project = entry["wandb"] if isinstance(entry, Mapping) and [*entry] == ["wandb"] else None
            is_wandb = isinstance(entry, WandB) or (isinstance(project, str) and project)
            if entry != "tensorboard" and not is_wandb:
                raise ValueError("must be a list such as [tensorboard, {wandb: PROJECT}]")
        if len({entry if isinstance(entry, str) else "wandb" for entry in entries}) < len(entries):
            raise ValueError("names a tracker twice")
        return trackers


class LoraSettings(Settings):
    """Low-rank adapters of frozen matrices (LoRA), trained instead of the model's own weights.

    They need about ten times the learning rate of full fine-tuning, such as train.learning_rate=2e-4.
    """

    rank: Annotated[PositiveInt | None, Affects("training")] = Field(
        default=None, description="Inner width of an adapter. None: no adapters, all weights are trained."
    )
    alpha: Annotated[PositiveFloat, _OF_ADAPTERS] = Field(
        default=16.0, description="An adapter's output is weighed alpha / rank."
    )
    target_modules: Annotated[tuple[AdaptedMatrix, ...], _OF_ADAPTERS] = Field(
        default=typing.get_args(AdaptedMatrix),
        min_length=1,
        description="Matrices with an adapter. Default: all, because adapting only attention learns less.",
    )

    @pydantic.field_validator("target_modules")
    @classmethod
    def _in_order(cls, names: tuple[AdaptedMatrix, ...]) -> tuple[AdaptedMatrix, ...]:
        return tuple(name for name in typing.get_args(AdaptedMatrix) if name in names)
