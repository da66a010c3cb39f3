"""Every setting of the program: one frozen tree of small classes, validated when it is read.

A setting's unit and reason stand in its description. `load()` reads YAML, applies `a.b=c` overrides and
answers an unknown key with the nearest valid name.
"""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import pydantic
import yaml
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt


class ConfigError(ValueError):
    """A setting is unknown, malformed or out of range; the message names it and what to do."""


class Settings(pydantic.BaseModel):
    """Base of all groups: frozen; an unknown key is an error, and so is a number that is not finite."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class _Dumper(yaml.SafeDumper):
    """Quotes text that YAML would otherwise break into lines where Unicode has a line end."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = '"' if any(end in text for end in "\x85\u2028\u2029") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)


class ModelSettings(Settings):
    """Which model is fine-tuned and how its text is rendered."""

    path: str = Field(description="A Hugging Face directory, a .gguf file, or a hub repo id.")
    dtype: Literal["bfloat16", "float32"] = Field(
        default="bfloat16", description="Compute dtype of forward passes. float32 is the fast one on a CPU."
    )
    template: str | None = Field(
        default=None, description="A Jinja chat template file, or 'default'. None: the tokenizer's own."
    )
    max_length: PositiveInt = Field(
        default=2048, description="Tokens of a rendered conversation; longer ones are cut."
    )


class DataSettings(Settings):
    """The user's dataset, D_0."""

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

    data: int = Field(default=1, ge=-1, description="Data parallel, parameters replicated.")
    fsdp: int = Field(default=-1, ge=-1, description="Data parallel, parameters split.")
    tensor: int = Field(default=1, ge=-1, description="Heads, MLP and vocabulary split.")


class TrainSettings(Settings):
    """Supervised fine-tuning."""

    learning_rate: PositiveFloat = Field(default=2e-5, description="Peak of the schedule.")
    num_epochs: PositiveInt = Field(default=1, description="Passes over the dataset.")
    batch_size: PositiveInt = Field(default=32, description="Packed sequences an optimizer step.")
    gradient_accumulation: PositiveInt = Field(
        default=1,
        description="Micro-batches a step; each holds batch_size / gradient_accumulation sequences.",
    )
    pack_length: PositiveInt | None = Field(
        default=None, description="Tokens of a packed sequence. None: model.max_length."
    )
    warmup_ratio: float = Field(
        default=0.03, ge=0, lt=1, description="Share of all steps with rising learning rate."
    )
    schedule: Literal["cosine", "linear", "constant"] = Field(
        default="cosine", description="Of the learning rate after warm-up; cosine and linear end at 0."
    )
    weight_decay: NonNegativeFloat = Field(default=0.0, description="AdamW's, on matrices only.")
    max_grad_norm: PositiveFloat = Field(default=1.0, description="Global-norm clipping.")
    beta1: float = Field(default=0.9, ge=0, lt=1, description="AdamW's.")
    beta2: float = Field(default=0.999, ge=0, lt=1, description="AdamW's.")
    remat: Literal["none", "layer"] = Field(
        default="layer",
        description="layer: keep only each layer's input and recompute the rest in the backward pass.",
    )
    start_from: Literal["base", "previous"] = Field(
        default="base", description="What every round fine-tunes from."
    )
    save_every: PositiveInt = Field(default=50, description="Steps between checkpoints within a training.")


class ScoringSettings(Settings):
    """The forward passes that score; changes speed and memory, never a result."""

    batch_tokens: PositiveInt = Field(
        default=2048, description="Tokens of a packed batch, all devices together."
    )
    unembed_chunk: PositiveInt = Field(
        default=512, description="Target positions whose logits exist at one time."
    )


class Threshold(Settings):
    """Where an axis selects: m population standard deviations from the mean, or a wanted fraction."""

    m: float | None = Field(default=None, description="Standard deviations from the mean.")
    fraction: float | None = Field(
        default=None, gt=0, lt=1, description="Wanted share of samples; the threshold follows."
    )

    @pydantic.model_validator(mode="after")
    def _one_of(self) -> Threshold:
        if self.m is not None and self.fraction is not None:
            raise ValueError("give either m or fraction, not both")
        return self


class ComplexitySettings(Threshold):
    """Hard samples: high loss both before and after training."""

    pre_model: Literal["base", "previous"] = Field(default="base", description="Whose loss is loss_pre.")


class DiversitySettings(Threshold):
    """Sparse samples: far from their nearest neighbours."""

    k: PositiveInt = Field(default=2, description="Nearest neighbours.")
    text: Literal["templated", "raw"] = Field(
        default="templated",
        description="templated: the prompt's span of the rendered conversation; raw: the prompt alone.",
    )


class QualitySettings(Threshold):
    """Low-quality samples: rated low by the model itself."""

    method: Literal["expected", "sample"] = Field(
        default="expected",
        description="expected: mean score under the model's own probabilities; sample: generate and parse.",
    )
    max_new_tokens: PositiveInt = Field(default=1024, description="method: sample only.")
    temperature: PositiveFloat = Field(default=0.1, description="method: sample only.")
    top_p: float = Field(default=0.7, gt=0, le=1, description="method: sample only.")
    top_k: PositiveInt = Field(default=50, description="method: sample only.")


class Prices(Settings):
    """What the endpoint charges, in US dollars a million tokens."""

    prompt: NonNegativeFloat = Field(default=0.0, description="US dollars a million tokens.")
    cached: NonNegativeFloat | None = Field(
        default=None, description="Of prompt tokens that the server had cached. None: as `prompt`."
    )
    completion: NonNegativeFloat = Field(default=0.0, description="US dollars a million tokens.")


class RefineSettings(Settings):
    """The refiner: a chat model behind an OpenAI-compatible endpoint."""

    base_url: str | None = Field(
        default=None, description="None: $OPENAI_BASE_URL, else the embedded endpoint is started."
    )
    model: str | None = Field(
        default=None,
        description="Model to ask for, or to serve with the embedded endpoint. None: the base model.",
    )
    api_key_env: str = Field(
        default="OPENAI_API_KEY", description="NAME of the environment variable that holds the key."
    )
    temperature: NonNegativeFloat = Field(default=1.0, description="0: greedy, hence repeatable.")
    top_p: float = Field(default=1.0, gt=0, le=1, description="Sample from this share of the probability.")
    max_tokens: PositiveInt = Field(default=1024, description="Completion tokens a request.")
    concurrency: PositiveInt = Field(default=16, description="Requests in flight.")
    max_retries: NonNegativeInt = Field(
        default=5, description="Tries after the first, of what can succeed only."
    )
    timeout: PositiveFloat = Field(default=300.0, description="Seconds a request.")
    max_corrections: NonNegativeInt = Field(
        default=1, description="Turns that ask again when an answer cannot be read."
    )
    budget_usd: PositiveFloat | None = Field(
        default=None, description="Stop a round's refining before it passes this."
    )
    show_response: bool = Field(
        default=True, description="Whether the refiner also sees the original response."
    )
    accept: Literal["sane", "none"] = Field(
        default="sane",
        description="sane: reject empty, refused, truncated, unchanged rewrites; none: readable is enough.",
    )
    prices: Prices = Prices()

    @pydantic.field_validator("base_url")
    @classmethod
    def _http(cls, url: str | None) -> str | None:
        if url is not None and not url.startswith(("http://", "https://")):
            raise ValueError("must start with http:// or https://")
        return url


class ServeSettings(Settings):
    """The embedded endpoint."""

    host: str = Field(default="127.0.0.1", description="Loopback unless told otherwise.")
    port: NonNegativeInt = Field(default=0, description="0: a free one.")
    max_batch: PositiveInt = Field(default=8, description="Requests decoded together.")
    max_context: PositiveInt = Field(default=2048, description="Tokens of prompt and answer together.")


class Config(Settings):
    """A run. Groups are in the order in which a round uses them."""

    name: str = Field(
        default="run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="The run's folder under runs_dir."
    )
    runs_dir: str = Field(default="runs", description="Where runs lie.")
    seed: NonNegativeInt = Field(
        default=0, description="Of the held-out split, the order of training, sampling."
    )
    rounds: PositiveInt = Field(default=1, description="Times that the dataset is diagnosed and improved.")
    model: ModelSettings
    data: DataSettings
    mesh: MeshSettings = MeshSettings()
    train: TrainSettings = TrainSettings()
    scoring: ScoringSettings = ScoringSettings()
    complexity: ComplexitySettings = ComplexitySettings(m=1.0)
    diversity: DiversitySettings = DiversitySettings(m=1.0)
    quality: QualitySettings = QualitySettings(m=1.0)
    refine: RefineSettings = RefineSettings()
    serve: ServeSettings = ServeSettings()

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> Config:
        for axis in ("complexity", "diversity", "quality"):
            group: Threshold = getattr(self, axis)
            if group.m is None and group.fraction is None:
                raise ValueError(f"{axis}: give {axis}.m or {axis}.fraction")
        if self.train.batch_size % self.train.gradient_accumulation:
            raise ValueError("train.gradient_accumulation must divide train.batch_size")
        if self.train.pack_length is not None and self.train.pack_length < self.model.max_length:
            raise ValueError(
                "train.pack_length must be at least model.max_length, or the longest rows fit nowhere"
            )
        return self

    def to_yaml(self) -> str:
        """The resolved settings, all of them, as YAML that `load` reads back to an equal tree."""
        return yaml.dump(self.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def setting_names(settings: type[pydantic.BaseModel] = Config, prefix: str = "") -> Iterator[str]:
    """Dotted names of all settings below a group: `train.learning_rate`, ..."""
    for name, field in settings.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, pydantic.BaseModel):
            yield from setting_names(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name


def load(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """Reads a YAML file and applies `a.b=c` overrides, the last one winning.

    Args:
      path: the YAML file; None starts from the defaults alone.
      overrides: `train.learning_rate=1e-4`; values are read as YAML.

    Raises:
      ConfigError: the file is missing or no mapping, a key is unknown (with the nearest valid one), a value
        has the wrong type or range.
    """
    tree: Any = {}
    if path is not None:
        try:
            tree = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
        except OSError as e:
            raise ConfigError(f"config: cannot read {path}: {e.strerror}") from e
        except yaml.YAMLError as e:
            raise ConfigError(f"config: {path} is not valid YAML: {e}") from e
        if not isinstance(tree, dict):
            raise ConfigError(
                f"config: {path} must hold settings as `name: value`, not a {type(tree).__name__}"
            )
    for override in overrides:
        _override(tree, override)
    try:
        return Config.model_validate(tree)
    except pydantic.ValidationError as e:
        raise ConfigError("\n".join(_explain(error) for error in e.errors())) from e


def _override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"config: {override!r} is not of the form a.b=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as e:
        raise ConfigError(f"config: the value of {override!r} is not valid YAML: {e}") from e
    if isinstance(value, str):  # YAML 1.1 reads 1e-4 as text.
        with contextlib.suppress(ValueError):
            value = float(value)
    *groups, last = key.split(".")
    for group in groups:
        tree = tree.setdefault(group, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"config: {key} is not a setting: {group} holds no settings of its own")
    tree[last] = value


def _explain(error: Any) -> str:
    name = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(
            name, list(setting_names()) + list(Config.model_fields), n=1, cutoff=0.5
        )
        hint = f" Did you mean {near[0]}?" if near else ""
        return f"config: {name} is not a setting.{hint}"
    if error["type"] == "missing":
        return f"config: {name} is missing; set it in the file or as {name}=... on the command line"
    message = error["msg"].removeprefix("Value error, ")
    return f"config: {name}: {message}" if name else f"config: {message}"
