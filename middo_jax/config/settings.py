"""The tree of all settings, its groups in the order in which a round uses them."""

from __future__ import annotations

import datetime
import re
from typing import Annotated, ClassVar, Literal

import pydantic
import yaml
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from middo_jax.config.axes import (
    ComplexitySettings,
    ConsistencySettings,
    DiversitySettings,
    QualitySettings,
)
from middo_jax.config.base import BUCKET, URL, Affects, Excludes, Settings
from middo_jax.config.evaluation import EvaluateSettings
from middo_jax.config.refine import RefineSettings
from middo_jax.config.stopping import Control, StopSettings
from middo_jax.config.training import LoraSettings, TrainSettings

IF_SAMPLED = ("quality.method", "sample")
IF_EMBEDDED = ("refine.base_url", None)  # without $OPENAI_BASE_URL, which is no setting


class ModelSettings(Settings):
    """The model to fine-tune, and how text is rendered for it."""

    path: Annotated[str, Affects("model")] = Field(
        description="A Hugging Face directory or a .gguf file, also in a bucket (gs://, s3://), or a hub "
        "repo id."
    )
    dtype: Annotated[Literal["bfloat16", "float32"], Affects("model")] = Field(
        default="bfloat16", description="Compute dtype of forward passes. On a CPU float32 is faster."
    )
    attention: Annotated[Literal["auto", "xla", "tiled", "splash", "triton"], Affects("speed")] = Field(
        default="auto",
        description="Attention kernel. auto: splash on TPUs, triton on GPUs, tiled on CPUs, and xla if these "
        "do not support a case. A named kernel is used, or raises an error.",
    )
    template: Annotated[str | None, Affects("text")] = Field(
        default=None,
        description="chatml, llama3, mistral, gemma, default (Human/Assistant) or a Jinja file. None: the "
        "tokenizer's own, default if it has none.",
    )
    template_date: Annotated[datetime.date | None, Affects("text")] = Field(
        default=None,
        description="The date that chat templates print as today's, such as 2026-11-27. None: the date of "
        "the first start, which is recorded in the run's config.yaml.",
    )
    max_length: Annotated[PositiveInt, Affects("text")] = Field(
        default=2048, description="Maximum tokens of a rendered conversation; longer ones are truncated."
    )


def _each_once(columns: dict[str, str]) -> dict[str, str]:
    """Requires that no column of the rows is read as two."""
    theirs = list(columns.values())
    if twice := [name for name in theirs if theirs.count(name) > 1]:
        raise ValueError(f"the column {twice[0]!r} can be read as one column only")
    return columns


class Source(Settings):
    """One of several datasets."""

    affects: ClassVar[Affects | None] = Affects("data")

    path: str = Field(description="As data.path.")
    format: str = Field(default="auto", description="As data.format.")
    columns: dict[str, str] | None = Field(
        default=None, description="As data.columns, for this source; None: data.columns."
    )
    weight: PositiveFloat | None = Field(
        default=None, description="Its share of the mix, relative to the weights of the other sources."
    )
    count: PositiveInt | None = Field(default=None, description="Number of rows, in place of a weight.")

    @pydantic.field_validator("columns")
    @classmethod
    def _each_once(cls, columns: dict[str, str] | None) -> dict[str, str] | None:
        return None if columns is None else _each_once(columns)

    @pydantic.model_validator(mode="after")
    def _weight_or_count(self) -> Source:
        if self.weight is not None and self.count is not None:
            raise ValueError("give a weight or a count, not both")
        return self


class DataSettings(Settings):
    """The user's dataset, D_0."""

    path: Annotated[str, Affects("data"), Excludes("sources")] = Field(
        default="",
        description="A .json, .jsonl, .csv, .tsv (also .gz, .zst) or .parquet file, a pattern, a folder, "
        "each also in a bucket (gs://, s3://), tfds:NAME:SPLIT or hf:NAME:SPLIT.",
    )
    sources: Annotated[tuple[Source, ...], Affects("data"), Excludes("path")] = Field(
        default=(),
        description="Several datasets: `[{path: a.jsonl, weight: 2}, {path: b.csv, "
        "weight: 1}]`, or with `count: 500`; each may have its own `format` and `columns`.",
    )
    eval_path: Annotated[str | None, Affects("data")] = Field(
        default=None, description="Your own held-out dataset, in place of a share of the rows."
    )
    id_column: Annotated[str | None, Affects("data")] = Field(
        default=None,
        description="Column with your own ids, which results carry. None: `id`, if its values are unique.",
    )
    if_changed: Annotated[Literal["stop", "redo"], Affects("place")] = Field(
        default="stop",
        description="Action if the data of a run was edited. stop: an error, and nothing changes; redo: what "
        "depends on the data is made again.",
    )
    format: Annotated[
        Literal["auto", "alpaca", "messages", "sharegpt", "prompt_completion"], Affects("data")
    ] = Field(default="auto", description="Format of the rows. auto: detected from the columns.")
    columns: Annotated[dict[str, str], Affects("data")] = Field(
        default={},
        description="Names of columns that differ: `{instruction: question, output: answer}` reads the "
        "column `question` as `instruction`.",
    )
    roles: Annotated[dict[str, Literal["system", "user", "assistant", "tool"]], Affects("data")] = Field(
        default={}, description="Roles that are not known by their names: `{narrator: user}`."
    )
    strict: Annotated[bool, Affects("data")] = Field(
        default=False,
        description="true: refuse a row whose turns do not alternate, that ends with the user, or that has "
        "an empty turn. false: repair it, and count what was repaired.",
    )
    limit: Annotated[PositiveInt | None, Affects("data")] = Field(
        default=None, description="Number of first rows to use, of each of several sources. None: all."
    )
    eval_fraction: Annotated[float, Affects("data")] = Field(
        default=0.1,
        ge=0,
        lt=1,
        description="Share of the rows to hold out: never trained on, never rewritten.",
    )
    source_column: Annotated[str, Affects("data")] = Field(
        default="source", description="Column by which the held-out split is stratified, if present."
    )

    @pydantic.field_validator("columns")
    @classmethod
    def _each_once(cls, columns: dict[str, str]) -> dict[str, str]:
        return _each_once(columns)

    @pydantic.model_validator(mode="after")
    def _path_or_sources(self) -> DataSettings:
        if not self.path and not self.sources:
            raise ValueError("data.path is missing (or data.sources, for several datasets)")
        if self.path and self.sources:
            raise ValueError("give data.path or data.sources, not both")
        return self

    @property
    def name(self) -> str:
        """The dataset for messages: its path, or the paths of its sources."""
        return self.path or " + ".join(source.path for source in self.sources)

    @property
    def paths(self) -> tuple[str, ...]:
        """The paths of all datasets to train on."""
        return (self.path,) if self.path else tuple(source.path for source in self.sources)


class MeshSettings(Settings):
    """Devices along each mesh axis, -1: all that remain. `data` spans slices, the others stay inside one."""

    affects: ClassVar[Affects | None] = Affects("place")

    data: int = Field(default=1, ge=-1, description="Data parallel, parameters replicated.")
    fsdp: int = Field(default=-1, ge=-1, description="Data parallel, parameters sharded.")
    tensor: int | Literal["auto"] = Field(
        default=1,
        description="Tensor parallel: heads, MLP and vocabulary sharded. auto: the least with which the mesh "
        "divides train.batch_size and training fits.",
    )

    @pydantic.field_validator("tensor")
    @classmethod
    def _size(cls, tensor: int | str) -> int | str:
        if isinstance(tensor, int) and tensor < -1:
            raise ValueError("must be auto, a number of devices, or -1")
        return tensor


class HostsSettings(Settings):
    """Jobs of several processes; each process finds the others through its cluster's environment."""

    affects: ClassVar[Affects | None] = Affects("place")

    start_timeout: float = Field(
        default=1800, gt=0, description="Seconds to wait for all processes at the start. Pods start slowly."
    )
    stall_timeout: float = Field(
        default=1800, gt=0, description="Seconds without progress of any process, after which all are ended."
    )


Reading = Literal["prompt_nll", "ifd", "pmi", "reverse_ifd", "consistency"]


class ScoringSettings(Settings):
    """The forward passes that score: their speed and memory, and the readings beside the axes' columns."""

    batch_tokens: Annotated[PositiveInt | Literal["auto"], Affects("speed")] = Field(
        default="auto",
        description="Tokens per packed batch, all devices together. auto: up to 16384 per device, as many as "
        "fit its memory, which is found by compiling; 2048 on CPUs.",
    )
    unembed_chunk: Annotated[PositiveInt, Affects("speed")] = Field(
        default=512, description="Target positions per device whose logits exist at one time."
    )
    readings: Annotated[tuple[Reading, ...], Affects("scores")] = Field(
        default=(),
        description="Further columns of scores.parquet; end_nll and worst_decile_nll are always there. "
        "prompt_nll: the head is applied to the prompts too; ifd, pmi: one more pass, over the responses "
        "alone; "
        "reverse_ifd: one more pass, over the prompts behind their responses; consistency: the optional "
        "axis, with the pass of ifd.",
    )


class ServeSettings(Settings):
    """The embedded endpoint, and the engine of quality.method: sample."""

    max_batch: Annotated[PositiveInt, Affects("speed")] = Field(
        default=8, description="Maximum number of requests decoded together."
    )
    max_context: Annotated[PositiveInt, Affects(rewrites=IF_EMBEDDED, scores=IF_SAMPLED)] = Field(
        default=2048, description="Maximum tokens of prompt and answer together."
    )


class Config(Settings):
    """A run. Groups are in the order in which a round uses them."""

    name: Annotated[str, Affects("place")] = Field(
        default="run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="The run's folder under runs_dir."
    )
    runs_dir: Annotated[str, Affects("place")] = Field(
        default="runs",
        description="Folder that contains the runs, on this machine or in a bucket: gs://BUCKET/FOLDER, "
        "s3://BUCKET/FOLDER.",
    )
    compilation_cache: Annotated[str | None, Affects("place")] = Field(
        default=None,
        description="Folder for compiled programs, which later starts read instead of compiling: on this "
        "machine or in a bucket (gs://, s3://). None: $XDG_CACHE_HOME/middo-jax/jax. "
        "$JAX_COMPILATION_CACHE_DIR takes precedence.",
    )
    seed: Annotated[NonNegativeInt, Affects("data", "training", "rewrites", scores=IF_SAMPLED)] = Field(
        default=0, description="Seed of the held-out split, the order of training and sampling."
    )
    rounds: Annotated[PositiveInt, Affects("rounds")] = Field(
        default=1, description="Number of rounds of diagnosing and improving the dataset."
    )
    controls: Annotated[tuple[Control, ...], Affects("rounds")] = Field(
        default=(),
        description="Arms beside the loop with the same budget for rewrites and the same training: none, "
        "random rows, reanswer (the loop's rows, only their answers anew), rows by loss, ifd or length; see "
        "docs/experiments.md.",
    )
    seeds: Annotated[PositiveInt, Affects("rounds")] = Field(
        default=1,
        description="Number of trainings of each arm, with seed, seed + 1, ...; only with controls.",
    )
    model: ModelSettings
    data: DataSettings
    mesh: MeshSettings = MeshSettings()
    hosts: HostsSettings = HostsSettings()
    train: TrainSettings = TrainSettings()
    lora: LoraSettings = LoraSettings()
    scoring: ScoringSettings = ScoringSettings()
    complexity: ComplexitySettings = ComplexitySettings()
    diversity: DiversitySettings = DiversitySettings()
    quality: QualitySettings = QualitySettings()
    consistency: ConsistencySettings = ConsistencySettings()
    refine: RefineSettings = RefineSettings()
    serve: ServeSettings = ServeSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    stop: StopSettings = StopSettings()

    @pydantic.field_validator("runs_dir", "compilation_cache")
    @classmethod
    def _folder_or_bucket(cls, path: str | None) -> str | None:
        if path is not None and re.match(URL, path) and not re.match(BUCKET, path):
            raise ValueError(
                f"{path}: give a folder on this machine, gs://BUCKET/FOLDER or s3://BUCKET/FOLDER"
            )
        return path

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> Config:
        parts = self.train.gradient_accumulation
        if parts != "auto" and self.train.batch_size % parts:
            raise ValueError("train.gradient_accumulation must divide train.batch_size")
        if self.train.keep_best and self.train.eval_every is None:
            raise ValueError("train.keep_best needs train.eval_every, to find the best state")
        if self.stop.patience is not None and self.stop.metric == "task" and not self.evaluate.tasks:
            raise ValueError("stop.metric=task needs evaluate.tasks, to measure them")
        if len(set(self.controls)) < len(self.controls):
            raise ValueError("controls names an arm twice")
        if self.controls and self.train.start_from != "base":
            raise ValueError("controls need train.start_from=base: all arms are trained from the base model")
        if "ifd" in self.controls and not {"ifd", "consistency"} & set(self.scoring.readings):
            raise ValueError("controls: the arm ifd needs scoring.readings: [ifd]")
        if self.seeds > 1 and not self.controls:
            raise ValueError("seeds repeats the trainings of controls; set controls, such as [none, random]")
        return self

    @property
    def place(self) -> str:
        """The run's folder, or its URL."""
        return f"{self.runs_dir.rstrip('/') or '/'}/{self.name}"

    def to_yaml(self) -> str:
        """Returns all resolved settings as YAML, which `load` reads back to an equal tree."""
        return yaml.dump(self.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


class _Dumper(yaml.SafeDumper):
    """Quotes text with Unicode line ends, at which YAML would otherwise break it into lines."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = '"' if any(end in text for end in "\x85\u2028\u2029") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)
