"""The public files of a run: their contents and the versions of their formats.

    faults(row, schema("refined.jsonl").row)  ->  ["gate is missing"]

Versions are stored in the metadata of a Parquet file; in manifest.json, for itself and for all files that its
stages wrote; and in each line of events.jsonl, since several program versions may append to it. A file
without a version was written before there were versions, and can be read.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, NamedTuple, NotRequired, Union

from middo_jax.rundir import plan_rows, records, rows

Form = Literal["JSON", "JSON lines", "Parquet"]
ArrowType = Literal[
    "string",
    "bool",
    "int32",
    "int64",
    "float32",
    "float64",
    "list<string>",
    "list<float32>",
    "vector<float32>",
]


class Column(NamedTuple):
    """A column of a Parquet file. `type` is pyarrow's name, or a vector: a list of fixed size."""

    name: str
    type: ArrowType
    text: str


@dataclasses.dataclass(frozen=True)
class Schema:
    """The declaration of one public file.

    Attributes:
      name: name of the file.
      form: encoding.
      where: folders that contain it.
      text: description, one sentence.
      version: version of the format; it grows with a change that an older program would misread.
      row: the type of a row, or of the whole value of a JSON file; None for Parquet.
      columns: columns of a Parquet file, in order.
    """

    name: str
    form: Form
    where: str
    text: str
    version: int
    row: type | None = None
    columns: tuple[Column, ...] = ()


_RATINGS = tuple(
    Column(f"{dimension}_{part}", "float32", f"the judge's rating of the {part}'s {dimension}, 1 to 10")
    for dimension in ("clarity", "completeness", "factuality")
    for part in ("prompt", "response")
)
SCORES = Schema(
    "scores.parquet",
    "Parquet",
    "a round",
    "The measurements of each sample. Null if a column was not computed or a number is not finite. "
    "`middo score` writes the user's own columns after these.",
    1,
    columns=(
        Column("id", "string", "the sample"),
        Column("loss_pre", "float32", "mean nats per target token under the model before this training"),
        Column("loss_post", "float32", "mean nats per target token under the model in training"),
        Column("n_target_tokens", "int32", "number of target tokens, over which the losses are means"),
        Column("truncated", "bool", "whether `model.max_length` cut any token"),
        Column("knn_mean_sim", "float32", "mean cosine similarity to the k nearest other samples"),
        Column("knn_ids", "list<string>", "ids of these samples, the nearest first"),
        Column("knn_sims", "list<float32>", "their cosine similarities"),
        Column("prompt_hash", "string", "hash of the embedded text; equal in exact duplicates"),
        Column("loss_unconditional", "float32", "mean nats per token of the responses without their prompts"),
        Column("ifd", "float32", "`loss_post / loss_unconditional`"),
        Column("pmi", "float32", "nats by which the prompt raises the log-probability of the response"),
        Column("end_nll", "float32", "nats of the token that ends the last answer; null if that was cut"),
        Column("worst_decile_nll", "float32", "mean nats of the worst tenth of the target tokens"),
        Column("prompt_nll", "float32", "mean nats per token of the prompt"),
        Column("reverse_ifd", "float32", "the same behind the response, over `prompt_nll`; of single turns"),
        Column(
            "consistency", "float32", "percentile rank of the worst reading, 0 to 1, of the axis of that name"
        ),
        Column("fault", "string", "the fault that this reading indicates: `cut`, `strange` or `odd`"),
        *_RATINGS,
        Column("quality", "float32", "mean of the six ratings"),
        Column("error", "string", "which of the numbers are not finite"),
    ),
)
SELECTED = Schema(
    "selection.parquet",
    "Parquet",
    "a round",
    "The sets that each sample is in. Null if an axis has no scores.",
    1,
    columns=(
        Column("id", "string", "the sample"),
        Column("hard", "bool", "selected by complexity"),
        Column("sparse", "bool", "selected by diversity"),
        Column("low_quality", "bool", "selected by quality"),
        Column("inconsistent", "bool", "selected by consistency"),
        Column("complexity_z", "float32", "how much worse than the mean, in standard deviations"),
        Column("diversity_z", "float32", "as `complexity_z`"),
        Column("quality_z", "float32", "as `complexity_z`"),
        Column("consistency_z", "float32", "as `complexity_z`"),
    ),
)
EMBEDDINGS = Schema(
    "embeddings.parquet",
    "Parquet",
    "a round",
    "The embedding of each sample: the mean of the last hidden state over its prompt, after the final norm.",
    1,
    columns=(
        Column("id", "string", "the sample"),
        Column("embedding", "vector<float32>", "d numbers, d: the model's width"),
    ),
)
HELDOUT_ROWS = Schema(
    "heldout_rows.parquet",
    "Parquet",
    "the run; a round, with `stop.patience`; a seed of `controls`",
    "The loss of each held-out sample under each model, models in the order of training.",
    1,
    columns=(
        Column("model", "string", "`base`, `round_00`, ..., `final`"),
        Column("id", "string", "the held-out sample"),
        Column("nll", "float64", "negative log-likelihood, summed over its target tokens, in nats"),
        Column("n_target_tokens", "int64", "number of its target tokens"),
    ),
)
CONTRAST_ROWS = Schema(
    "contrast_rows.parquet",
    "Parquet",
    "the run, with `evaluate.contrast`",
    "The contrast margin of each held-out sample and kind of fault under each model.",
    1,
    columns=(
        Column("model", "string", "`base`, `round_00`, ..., `final`"),
        Column("id", "string", "the held-out sample"),
        Column("fault", "string", "`cut`, `numbers` or `swapped`"),
        Column("margin", "float64", "loss of the faulty answer minus that of the right one, nats per token"),
    ),
)
MANIFEST = Schema(
    "manifest.json",
    "JSON",
    "a round or `final`",
    "The finished stages, with the hashes of their inputs and outputs.",
    1,
    records.ManifestFile,
)
EVENTS = Schema("events.jsonl", "JSON lines", "the run", "One row per event.", 1, rows.EventRow)
PLAN = Schema(
    "plan.json", "JSON", "the run", "What `middo plan --save` predicted for the run.", 1, plan_rows.PlanFile
)
SCHEMAS: tuple[Schema, ...] = (
    Schema(
        "dataset.jsonl",
        "JSON lines",
        "a round or `final`",
        "One row per training sample.",
        1,
        rows.ExampleRow,
    ),
    Schema(
        "merged.jsonl",
        "JSON lines",
        "the folder of `middo refine`, or a control arm",
        "The dataset with its accepted rewrites, the next round's dataset.",
        1,
        rows.ExampleRow,
    ),
    Schema("heldout.jsonl", "JSON lines", "the run", "Samples never trained on.", 1, rows.ExampleRow),
    Schema(
        "rejected.jsonl",
        "JSON lines",
        "the run, or the folder of a command that reads data",
        "Rows of the input that cannot be used.",
        1,
        rows.RejectedRow,
    ),
    Schema(
        "metrics.jsonl", "JSON lines", "a round or `final`", "One row per training step.", 1, rows.MetricsRow
    ),
    Schema(
        "evaluations.jsonl",
        "JSON lines",
        "a round or `final`",
        "One row per held-out loss during training (`train.eval_every`).",
        1,
        rows.EvaluationRow,
    ),
    SCORES,
    EMBEDDINGS,
    SELECTED,
    Schema("selection.json", "JSON", "a round", "Thresholds, sets, their overlap.", 1, rows.SelectionFile),
    Schema(
        "requests.jsonl",
        "JSON lines",
        "a round or a control arm",
        "Requests to the refiner, and its answers.",
        1,
        rows.RequestRow,
    ),
    Schema(
        "refined.jsonl",
        "JSON lines",
        "a round or a control arm",
        "One row per task of the refiner.",
        1,
        rows.RefinedRow,
    ),
    Schema(
        "verdicts.jsonl",
        "JSON lines",
        "a round",
        "One row per accepted rewrite, if `middo refine --read-review` has read verdicts on them.",
        1,
        rows.VerdictRow,
    ),
    Schema(
        "candidates.jsonl",
        "JSON lines",
        "a round or a control arm",
        "One row per attempt of the refiner.",
        1,
        rows.CandidateRow,
    ),
    Schema(
        "taken_back.jsonl",
        "JSON lines",
        "a round",
        "One row per rewrite that is taken back in this round or was in an earlier one (`refine.take_back`).",
        1,
        rows.TakenBackRow,
    ),
    Schema(
        "dropped.jsonl",
        "JSON lines",
        "a round",
        "Samples that made room for additions, and additions that found none.",
        1,
        rows.DroppedRow,
    ),
    Schema(
        "heldout_losses.json",
        "JSON",
        "the run; a round, with `stop.patience`; a seed of `controls`",
        "The held-out loss of every model, or of the round's.",
        1,
        rows.HeldoutLosses,
    ),
    HELDOUT_ROWS,
    CONTRAST_ROWS,
    Schema(
        "benchmarks.json",
        "JSON",
        "a round or `final`",
        "The scores of the round's model on `evaluate.tasks`; in the first round also the base model's.",
        1,
        rows.BenchmarksFile,
    ),
    PLAN,
    Schema(
        "controls.json",
        "JSON",
        "the run",
        "The control arms beside the loop (`controls`).",
        1,
        rows.ControlsFile,
    ),
    EVENTS,
    MANIFEST,
)
_BY_NAME = {schema.name: schema for schema in SCHEMAS}


def schema(name: str) -> Schema | None:
    """Returns the schema of a public file by its name; None for any other file."""
    return _BY_NAME.get(name)


def versions_of(names: Iterable[str]) -> dict[str, int]:
    """Returns the versions in which this program writes the public files among `names`, by relative path."""
    known = ((name, schema(name.rpartition("/")[2])) for name in names)
    return {name: found.version for name, found in known if found is not None}


def newer(name: str, version: int, where: object) -> str | None:
    """Returns why a file is too new for this program; None if it can be read.

    Args:
      name: name of the file.
      version: version in which the file was written.
      where: the file that contains this version.
    """
    found = schema(name.rpartition("/")[2])
    if found is None or version <= found.version:
        return None
    return (
        f"{where}: {name} has format version {version}, this middo-jax reads up to {found.version}. A newer "
        "middo-jax wrote it: update this one"
    )


def faults(value: Any, expected: Any, where: str = "") -> list[str]:
    """Returns missing, undeclared and wrongly typed keys of a value of a JSON file.

    faults({"n": "3"}, SweepRow) = ["m is missing", "n is a str, not int"]

    Args:
      value: return value of `json.loads`.
      expected: a type of rows.py, or of one of its keys.
      where: the value's key, for the messages.
    """
    origin, arguments = typing.get_origin(expected), typing.get_args(expected)
    if expected is Any:
        return []
    if origin in (Annotated, NotRequired):
        return faults(value, arguments[0], where)
    if origin in (Union, types.UnionType):
        if value is None and types.NoneType in arguments:
            return []
        choices = [choice for choice in arguments if choice is not types.NoneType]
        return min((faults(value, choice, where) for choice in choices), key=len)
    if origin is Literal:
        return (
            []
            if value in arguments
            else [f"{where} is {value!r}, not one of {', '.join(map(repr, arguments))}"]
        )
    if typing.is_typeddict(expected):
        return _row_faults(value, expected, where)
    if origin is list and isinstance(value, list):
        return [f for i, item in enumerate(value) for f in faults(item, arguments[0], f"{where}[{i}]")]
    if origin is dict and isinstance(value, dict):
        return [f for key, item in value.items() for f in faults(item, arguments[1], f"{where}.{key}")]
    plain = origin or expected
    fits = type(value) is plain or (plain is float and type(value) is int)
    return [] if fits else [f"{where} is a {type(value).__name__}, not {plain.__name__}"]


def _row_faults(value: Any, expected: Any, where: str) -> list[str]:
    if not isinstance(value, Mapping):
        return [f"{where or 'the row'} is a {type(value).__name__}, not an object"]
    declared = keys(expected)
    prefix = f"{where}." if where else ""
    found = [
        f"{prefix}{name} is missing"
        for name, type_ in declared.items()
        if name not in value and not is_optional(type_)
    ]
    found += [f"{prefix}{name} is not declared" for name in value if name not in declared]
    for name in value:
        if name in declared:
            found += faults(value[name], declared[name], f"{prefix}{name}")
    return found


def faults_of(row: Any, declared: Any, names: Iterable[str]) -> list[str]:
    """Returns what is missing or wrongly typed among some keys of a row.

    Other keys are not looked at: they may be missing, or be those of a later program.
    """
    if not isinstance(row, Mapping):
        return [f"it is a {type(row).__name__}, not an object"]
    types, found = keys(declared), list[str]()
    for name in names:
        found += faults(row[name], types[name], name) if name in row else [f"{name} is missing"]
    return found


def keys(row: Any) -> dict[str, Any]:
    """Returns the keys of a row with their annotated types, in the declared order."""
    return typing.get_type_hints(row, include_extras=True)


def is_optional(annotated: Any) -> bool:
    """Whether a key may be absent."""
    return typing.get_origin(annotated) is NotRequired
