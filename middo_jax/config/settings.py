"""The tree of all settings, its groups in the order in which a round uses them."""

from __future__ import annotations

import datetime
import re
import typing
from typing import Annotated, ClassVar, Literal

import pydantic
import yaml
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from middo_jax.config.base import URL, Affects, Settings
from middo_jax.config.refine import RefineSettings

# The matrices of a layer, by the names that PEFT knows them by too.
AdaptedMatrix = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class ModelSettings(Settings):
    """Which model is fine-tuned and how its text is rendered."""

    path: Annotated[str, Affects("model")] = Field(
        description="A Hugging Face directory, a .gguf file, or a hub repo id."
    )
    dtype: Annotated[Literal["bfloat16", "float32"], Affects("model")] = Field(
        default="bfloat16", description="Compute dtype of forward passes. float32 is the fast one on a CPU."
    )
    attention: Annotated[Literal["auto", "xla", "tiled", "splash", "triton"], Affects("speed")] = Field(
        default="auto",
        description="auto: splash on TPUs, triton on GPUs, tiled on CPUs, and xla where these cannot do what "
        "is asked. By name: that one, or an error.",
    )
    template: Annotated[str | None, Affects("text")] = Field(
        default=None,
        description="chatml, llama3, mistral, gemma, default (Human/Assistant) or a Jinja file. None: the "
        "tokenizer's own, default if it has none.",
    )
    template_date: Annotated[datetime.date | None, Affects("text")] = Field(
        default=None,
        description="The day that templates print which print today's, as 2026-11-27. None: the day of the "
        "first start, which is recorded in the run's config.yaml.",
    )
    max_length: Annotated[PositiveInt, Affects("text")] = Field(
        default=2048, description="Tokens of a rendered conversation; longer ones are cut."
    )


class DataSettings(Settings):
    """The user's dataset, D_0."""

    affects: ClassVar[Affects | None] = Affects("data")

    path: str = Field(
        description="A .json/.jsonl/.parquet file, a dataset directory, tfds:NAME:SPLIT or hf:NAME:SPLIT."
    )
    format: Literal["auto", "alpaca", "messages", "sharegpt", "prompt_completion"] = Field(
        default="auto", description="Shape of a row. auto: told by its columns."
    )
    limit: PositiveInt | None = Field(default=None, description="Take only the first rows.")
    eval_fraction: float = Field(
        default=0.1,
        ge=0,
        lt=1,
        description="Share of the rows that is held out: never trained on, never rewritten.",
    )
    source_column: str = Field(
        default="source", description="Column by which the held-out split is stratified, if present."
    )


class MeshSettings(Settings):
    """Devices along each mesh axis, -1: what is left. `data` spans slices, the others stay inside one."""

    affects: ClassVar[Affects | None] = Affects("place")

    data: int = Field(default=1, ge=-1, description="Data parallel, parameters replicated.")
    fsdp: int = Field(default=-1, ge=-1, description="Data parallel, parameters split.")
    tensor: int = Field(default=1, ge=-1, description="Heads, MLP and vocabulary split.")


class TrainSettings(Settings):
    """Supervised fine-tuning."""

    learning_rate: Annotated[PositiveFloat, Affects("training")] = Field(
        default=2e-5, description="Peak of the schedule."
    )
    num_epochs: Annotated[PositiveInt, Affects("training")] = Field(
        default=1, description="Passes over the dataset."
    )
    batch_size: Annotated[PositiveInt, Affects("training")] = Field(
        default=32, description="Packed sequences an optimizer step."
    )
    examples_per_step: Annotated[PositiveInt | None, Affects("training")] = Field(
        default=None,
        description="Examples an optimizer step, as far as batch_size sequences hold them: the global batch "
        "size of a trainer that does not pack. None: as many as they hold.",
    )
    gradient_accumulation: Annotated[PositiveInt, Affects("speed")] = Field(
        default=1,
        description="Micro-batches a step; each holds batch_size / gradient_accumulation sequences.",
    )
    pack_length: Annotated[PositiveInt | None, Affects("training")] = Field(
        default=None, description="Tokens of a packed sequence. None: model.max_length."
    )
    warmup_ratio: Annotated[float, Affects("training")] = Field(
        default=0.03, ge=0, lt=1, description="Share of all steps with rising learning rate."
    )
    schedule: Annotated[Literal["cosine", "linear", "constant"], Affects("training")] = Field(
        default="cosine", description="Of the learning rate after warm-up; cosine and linear end at 0."
    )
    optimizer: Annotated[Literal["adamw", "adafactor"], Affects("training")] = Field(
        default="adamw",
        description="adafactor: a factored second moment and no first, hence next to no state.",
    )
    param_dtype: Annotated[Literal["float32", "bfloat16"], Affects("training")] = Field(
        default="float32",
        description="What trained weights are kept in, whatever model.dtype computes in; adapters are "
        "float32 in any case.",
    )
    stochastic_rounding: Annotated[bool, Affects("training")] = Field(
        default=True,
        description="param_dtype: bfloat16 only. Round updated weights by chance, so that small updates add "
        "up instead of being lost.",
    )
    weight_decay: Annotated[NonNegativeFloat, Affects("training")] = Field(
        default=0.0, description="On matrices only, times the rate."
    )
    max_grad_norm: Annotated[PositiveFloat, Affects("training")] = Field(
        default=1.0, description="Global-norm clipping."
    )
    beta1: Annotated[float, Affects("training")] = Field(default=0.9, ge=0, lt=1, description="AdamW's.")
    beta2: Annotated[float, Affects("training")] = Field(default=0.999, ge=0, lt=1, description="AdamW's.")
    remat: Annotated[Literal["none", "dots", "layer"], Affects("speed")] = Field(
        default="layer",
        description="What the backward pass finds of a layer: all; its input, its products with weights and "
        "what attention gave (dots); its input alone (layer). It computes the rest again: less memory, more "
        "time.",
    )
    start_from: Annotated[Literal["base", "previous"], Affects("training")] = Field(
        default="base", description="What every round fine-tunes from."
    )
    save_every: Annotated[PositiveInt, Affects("speed")] = Field(
        default=50, description="Steps between checkpoints within a training."
    )
    keep: Annotated[PositiveInt, Affects("speed")] = Field(
        default=1, description="Newest checkpoints that are kept while training."
    )
    eval_every: Annotated[PositiveInt | None, Affects("shown")] = Field(
        default=None,
        description="Steps between held-out losses, also by data.source_column; once more after the last. "
        "None: none while training.",
    )
    keep_best: Annotated[bool, Affects("shown")] = Field(
        default=False,
        description="Keep the state with the lowest held-out loss too, as checkpoint/best.",
    )
    on_bad_step: Annotated[Literal["stop", "skip"], Affects("training")] = Field(
        default="stop",
        description="When loss or gradient is no finite number, or spikes: stop with an error, or skip that "
        "update and go on.",
    )
    spike_factor: Annotated[float | None, Affects("training")] = Field(
        default=None,
        gt=1,
        description="A loss over this many times the median of the last 64 steps' makes a bad step. None: "
        "none does.",
    )
    tensorboard: Annotated[bool, Affects("shown")] = Field(
        default=False, description="Write TensorBoard events too; needs the extra `tensorboard`."
    )
    wandb_project: Annotated[str | None, Affects("shown")] = Field(
        default=None,
        description="Show the training in this Weights & Biases project; needs the extra `wandb`.",
    )


class LoraSettings(Settings):
    """Low-rank adapters beside frozen matrices (LoRA), trained instead of the model's own weights.

    They want about ten times the learning rate of full fine-tuning, such as train.learning_rate=2e-4.
    """

    affects: ClassVar[Affects | None] = Affects("training")

    rank: PositiveInt | None = Field(
        default=None, description="Inner width of an adapter. None: no adapters, all weights are trained."
    )
    alpha: PositiveFloat = Field(default=16.0, description="An adapter's output is weighed alpha / rank.")
    target_modules: tuple[AdaptedMatrix, ...] = Field(
        default=typing.get_args(AdaptedMatrix),
        min_length=1,
        description="Matrices that get an adapter. All of them by default: attention's alone learn less.",
    )

    @pydantic.field_validator("target_modules")
    @classmethod
    def _in_order(cls, names: tuple[AdaptedMatrix, ...]) -> tuple[AdaptedMatrix, ...]:
        return tuple(name for name in typing.get_args(AdaptedMatrix) if name in names)


class ScoringSettings(Settings):
    """The forward passes that score: their speed and memory, and one more column. No selection changes."""

    batch_tokens: Annotated[PositiveInt, Affects("speed")] = Field(
        default=2048, description="Tokens of a packed batch, all devices together."
    )
    unembed_chunk: Annotated[PositiveInt, Affects("speed")] = Field(
        default=512, description="Target positions of a device whose logits exist at one time."
    )
    ifd: Annotated[bool, Affects("scores")] = Field(
        default=False,
        description="Also score each response without its prompt, for the column `ifd`. Takes one more pass.",
    )


class Threshold(Settings):
    """Where an axis selects: m population standard deviations from the mean, or a wanted fraction."""

    m: Annotated[float | None, Affects("selection")] = Field(
        default=None, description="Standard deviations from the mean; 1 if no fraction is given either."
    )
    fraction: Annotated[float | None, Affects("selection")] = Field(
        default=None, gt=0, lt=1, description="Wanted share of samples; the threshold follows."
    )

    @pydantic.model_validator(mode="before")
    @classmethod
    def _one_of_them(cls, data: typing.Any) -> typing.Any:
        if isinstance(data, dict) and data.get("m") is None and data.get("fraction") is None:
            return data | {"m": 1.0}
        return data

    @pydantic.model_validator(mode="after")
    def _not_both(self) -> Threshold:
        if self.m is not None and self.fraction is not None:
            raise ValueError("give either m or fraction, not both")
        return self


class ComplexitySettings(Threshold):
    """Hard samples: high loss both before and after training."""

    pre_model: Annotated[Literal["base", "previous"], Affects("scores")] = Field(
        default="base", description="Whose loss is loss_pre."
    )
    normalise: Annotated[Literal["none", "length"], Affects("selection")] = Field(
        default="none",
        description="none: the losses as they are, as published; length: less what their dependence on log "
        "answer length explains, so that short answers are not hard for being short.",
    )


class DiversitySettings(Threshold):
    """Sparse samples: far from their nearest neighbours."""

    k: Annotated[PositiveInt, Affects("scores")] = Field(default=2, description="Nearest neighbours.")
    text: Annotated[Literal["templated", "raw"], Affects("scores")] = Field(
        default="templated",
        description="templated: the prompt's span of the rendered conversation; raw: the prompt alone.",
    )
    embedder: Annotated[Literal["post", "pre"], Affects("scores")] = Field(
        default="post",
        description="Whose embeddings. post: of the model under training, as published; pre: of "
        "complexity.pre_model. base is frozen, so that a later round compares only what changed.",
    )
    ignore_duplicates: Annotated[bool, Affects("scores")] = Field(
        default=False,
        description="Samples with exactly the same prompt are not each other's neighbours. They are reported "
        "either way.",
    )


_IF_EXPECTED = Affects("scores", only_if=("quality.method", "expected"))
_IF_SAMPLED = Affects("scores", only_if=("quality.method", "sample"))


class QualitySettings(Threshold):
    """Low-quality samples: rated low by the model itself."""

    method: Annotated[Literal["expected", "sample"], Affects("scores")] = Field(
        default="expected",
        description="expected: mean score under the model's own probabilities; sample: generate and parse.",
    )
    score: Annotated[Literal["expected", "log_odds"], _IF_EXPECTED] = Field(
        default="expected",
        description="method: expected only. expected: the mean of the eleven ratings, 0 to 10; log_odds: of "
        "a rating above 5 against one below, in nats.",
    )
    score_temperature: Annotated[PositiveFloat, _IF_EXPECTED] = Field(
        default=1.0,
        description="method: expected only. Divides the ratings' log-probabilities before `score` is taken "
        "of them; under 1 the likeliest rating counts for more.",
    )
    max_new_tokens: Annotated[PositiveInt, _IF_SAMPLED] = Field(
        default=1024, description="method: sample only."
    )
    temperature: Annotated[PositiveFloat, _IF_SAMPLED] = Field(
        default=0.1, description="method: sample only."
    )
    top_p: Annotated[float, _IF_SAMPLED] = Field(default=0.7, gt=0, le=1, description="method: sample only.")
    top_k: Annotated[PositiveInt, _IF_SAMPLED] = Field(default=50, description="method: sample only.")


class ServeSettings(Settings):
    """The embedded endpoint."""

    host: Annotated[str, Affects("place")] = Field(
        default="127.0.0.1", description="Loopback unless told otherwise."
    )
    port: Annotated[NonNegativeInt, Affects("place")] = Field(default=0, description="0: a free one.")
    max_batch: Annotated[PositiveInt, Affects("speed")] = Field(
        default=8, description="Requests decoded together."
    )
    max_context: Annotated[PositiveInt, Affects("scores", "rewrites")] = Field(
        default=2048, description="Tokens of prompt and answer together."
    )


class Config(Settings):
    """A run. Groups are in the order in which a round uses them."""

    name: Annotated[str, Affects("place")] = Field(
        default="run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="The run's folder under runs_dir."
    )
    runs_dir: Annotated[str, Affects("place")] = Field(
        default="runs", description="Folder on this machine that holds the runs."
    )
    seed: Annotated[NonNegativeInt, Affects("data", "training", "scores", "rewrites")] = Field(
        default=0, description="Of the held-out split, the order of training, sampling."
    )
    rounds: Annotated[PositiveInt, Affects("rounds")] = Field(
        default=1, description="Times that the dataset is diagnosed and improved."
    )
    model: ModelSettings
    data: DataSettings
    mesh: MeshSettings = MeshSettings()
    train: TrainSettings = TrainSettings()
    lora: LoraSettings = LoraSettings()
    scoring: ScoringSettings = ScoringSettings()
    complexity: ComplexitySettings = ComplexitySettings()
    diversity: DiversitySettings = DiversitySettings()
    quality: QualitySettings = QualitySettings()
    refine: RefineSettings = RefineSettings()
    serve: ServeSettings = ServeSettings()

    @pydantic.field_validator("runs_dir")
    @classmethod
    def _on_this_machine(cls, path: str) -> str:
        if re.match(URL, path):
            raise ValueError(f"{path} is a URL; buckets are not supported yet, give a folder on this machine")
        return path

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> Config:
        if self.train.batch_size % self.train.gradient_accumulation:
            raise ValueError("train.gradient_accumulation must divide train.batch_size")
        if self.train.keep_best and self.train.eval_every is None:
            raise ValueError("train.keep_best needs train.eval_every, to know which state is the best")
        if self.train.pack_length is not None and self.train.pack_length < self.model.max_length:
            raise ValueError(
                "train.pack_length must be at least model.max_length, or the longest rows fit nowhere"
            )
        return self

    def to_yaml(self) -> str:
        """The resolved settings, all of them, as YAML that `load` reads back to an equal tree."""
        return yaml.dump(self.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


class _Dumper(yaml.SafeDumper):
    """Quotes text that YAML would otherwise break into lines where Unicode has a line end."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = '"' if any(end in text for end in "\x85\u2028\u2029") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)
