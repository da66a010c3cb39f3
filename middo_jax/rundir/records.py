"""The records of finished stages, as manifest.json holds them: every key with its type and a description.

As in `rows`, writers build these values, and docs/files.md is generated from them.
"""

from typing import Annotated, Any, NotRequired, TypedDict

from middo_jax.rundir.rows import DuplicatesRow


class InputRecord(TypedDict):
    """A file or folder outside the run that a stage read."""

    path: Annotated[str, "its path"]
    hash: Annotated[str, "hash of its bytes"]
    stat: Annotated[str, "hash of sizes and mtimes"]


class StageRecord(TypedDict):
    """A finished stage."""

    finished: Annotated[str, "end time, UTC"]
    seconds: Annotated[float, "duration"]
    files: Annotated[dict[str, str], "SHA-256 of each file that it wrote, by name relative to the folder"]
    versions: NotRequired[Annotated[dict[str, int], "format version of each public file among them"]]
    reads: NotRequired[Annotated[dict[str, str], "hash of each file within the run that it read"]]
    inputs: NotRequired[Annotated[dict[str, InputRecord], "files outside the run that it read, by role"]]
    settings: NotRequired[Annotated[dict[str, Any], "the settings that it depends on, by dotted name"]]
    stats: Annotated[dict[str, list[int]], "size and mtime in ns of files and reads when they were hashed"]


class PrepareRecord(StageRecord):
    """The dataset was written."""

    n: Annotated[int, "number of samples"]
    format: NotRequired[Annotated[str, "format of the input's rows; of final, that of train.jsonl"]]
    columns: NotRequired[Annotated[list[str], "columns of the input's rows, in their order"]]
    id_columns: NotRequired[Annotated[list[str], "columns that name a row, which additions do not have"]]
    spelling: NotRequired[
        Annotated[
            dict[str, Any], "how the input writes its turns, where not as usual: roles, keys, text parts"
        ]
    ]
    shape: NotRequired[Annotated[dict[str, Any], "of final: format, columns and names that came in"]]
    repairs: NotRequired[Annotated[dict[str, int], "number of repaired input rows by kind of repair"]]


class PassRow(TypedDict):
    """Size and duration of a scoring pass."""

    real_tokens: Annotated[int, "number of computed positions without padding"]
    computed_tokens: Annotated[int, "number of computed positions, padding included"]
    shapes: Annotated[int, "number of compiled programs"]
    compile_seconds: Annotated[float, "time until all programs were compiled"]
    seconds: Annotated[float, "time after compilation"]


class ScoreRecord(StageRecord):
    """The dataset was scored."""

    n: Annotated[int, "number of samples"]
    axes: NotRequired[Annotated[list[str], "what was measured"]]
    columns: NotRequired[Annotated[list[str], "the user's columns beside the scores"]]
    model: Annotated[str, "the model in training"]
    embedder: Annotated[str, "the model that computed the embeddings"]
    n_searched: Annotated[int, "number of samples whose neighbours were searched"]
    duplicates: Annotated[DuplicatesRow, "exact duplicates"]
    pre_identity: NotRequired[Annotated[str, "hash of all that `loss_pre` depends on, except the samples"]]
    n_kept: NotRequired[Annotated[int, "number of samples with measurements reused from earlier scores"]]
    passes: Annotated[dict[str, PassRow], "passes by name"]


class SelectRecord(StageRecord):
    """The three sets were selected."""

    complexity: NotRequired[Annotated[int, "number of hard samples"]]
    diversity: NotRequired[Annotated[int, "number of sparse samples"]]
    quality: NotRequired[Annotated[int, "number of samples of low quality"]]


class UsageRow(TypedDict):
    """Requests, tokens and cost."""

    requests: Annotated[int, "HTTP requests, including retries"]
    retries: Annotated[int, "repeated HTTP requests after a failure"]
    answers: Annotated[int, "answers received"]
    failed: Annotated[int, "requests given up"]
    from_cache: Annotated[int, "answers found in the cache"]
    prompt_tokens: Annotated[int, "prompt tokens, counted by the server"]
    completion_tokens: Annotated[int, "completion tokens, counted by the server"]
    cached_tokens: Annotated[int, "prompt tokens from the server's cache"]
    aside_tokens: Annotated[int, "upper bound of the tokens of HTTP requests with unknown cost"]
    seconds: Annotated[float, "total duration of the HTTP requests"]
    usd: Annotated[float, "cost by `refine.prices`"]
    aside_usd: Annotated[float, "upper bound of the cost of HTTP requests with unknown cost"]


class LimitsRow(TypedDict):
    """Limits for candidates, computed from the dataset; null means no limit."""

    loss: Annotated[float | None, "a sample with a higher loss is hard"]
    context: Annotated[float | None, "similarity that few pairs of samples reach"]
    novelty: Annotated[float | None, "similarity that few samples have to their nearest neighbour"]
    prompt_chars: Annotated[list[float] | None, "minimum and maximum characters of a prompt"]
    response_chars: Annotated[list[float] | None, "minimum and maximum characters of a response"]
    end_nll: NotRequired[Annotated[float | None, "nats of the end of turn above which an answer is broken"]]
    floor: NotRequired[Annotated[float | None, "loss below which an answer is too easy"]]
    refines_itself: NotRequired[Annotated[bool, "whether the refiner is the model in training"]]


class RecordedRow(TypedDict):
    """Where the refiner's answers came from, if they were recorded (`refine.base_url: replay:FILE`)."""

    file: Annotated[str, "the recorded answers"]
    model: Annotated[str, "the model that wrote them"]
    embedded: Annotated[str, "the model that wrote the answers that the file lacks"]
    answers: Annotated[int, "number of answers that the tasks used"]
    misses: Annotated[int, "number of those that the file lacks"]


class RefineRecord(StageRecord):
    """The selected samples were refined."""

    n: Annotated[int, "number of tasks"]
    accepted: Annotated[int, "number of tasks with a new sample"]
    kept: NotRequired[Annotated[dict[str, int], "number of selected samples without a task, by reason"]]
    usage: Annotated[dict[str, UsageRow], "usage by axes"]
    limits: Annotated[LimitsRow, "limits for candidates"]
    recorded: NotRequired[Annotated[RecordedRow, "of recorded answers; absent if a server answered"]]


class TakeBackRecord(StageRecord):
    """The rewrites of the round before were compared with their originals (`refine.take_back`)."""

    n: Annotated[int, "number of those that are taken back"]
    accepted: Annotated[int, "number of those that were accepted"]


class EvaluateRecord(StageRecord):
    """The models were evaluated."""

    losses: Annotated[dict[str, float], "held-out loss by model, in nats per target token"]


class ControlRecord(EvaluateRecord):
    """A training of a control arm was measured; its model is not kept."""

    n_steps: Annotated[int, "steps of the training, as many as the loop's last one has with this seed"]


class BestRecord(StageRecord):
    """The best training was taken for `final` (`stop.patience`)."""

    n: Annotated[int, "number of samples of its dataset"]
    format: Annotated[str, "format of train.jsonl"]
    shape: Annotated[dict[str, Any], "format, columns and names that came in"]
    round: Annotated[str, "the folder of the best training"]
    why: Annotated[str, "why the rounds ended"]


class BenchmarkRecord(StageRecord):
    """The benchmarks of `evaluate.tasks` were run."""

    scores: Annotated[dict[str, dict[str, float]], "by model and task: the score that is shown first"]


class ExportRecord(StageRecord):
    """The final model was exported."""

    verified: Annotated[bool, "whether transformers computes the same logits"]
    reason: NotRequired[Annotated[str, "why that was not checked"]]
    max_difference: NotRequired[Annotated[float, "largest absolute difference of two logits"]]
    largest_logit: NotRequired[Annotated[float, "largest absolute logit"]]
    n_prompts: NotRequired[Annotated[int, "number of compared prompts"]]
    n_tokens: NotRequired[Annotated[int, "number of their tokens"]]


class Stages(TypedDict):
    """The finished stages; other stages are absent."""

    prepare: NotRequired[Annotated[PrepareRecord, "dataset.jsonl"]]
    train: NotRequired[Annotated[StageRecord, "checkpoint/, metrics.jsonl"]]
    score: NotRequired[Annotated[ScoreRecord, "scores.parquet, embeddings"]]
    select: NotRequired[Annotated[SelectRecord, "selection.parquet, selection.json"]]
    take_back: NotRequired[Annotated[TakeBackRecord, "taken_back.jsonl"]]
    refine: NotRequired[Annotated[RefineRecord, "requests.jsonl, refined.jsonl, candidates.jsonl"]]
    merge: NotRequired[Annotated[StageRecord, "dropped.jsonl"]]
    heldout: NotRequired[Annotated[EvaluateRecord, "the same files, of the round's model"]]
    best: NotRequired[Annotated[BestRecord, "of `final`: dataset.jsonl, train.jsonl, checkpoint/"]]
    control: NotRequired[Annotated[ControlRecord, "of an arm's seed: metrics.jsonl and the same files"]]
    evaluate: NotRequired[
        Annotated[EvaluateRecord, "heldout_losses.json, heldout_rows.parquet, contrast_rows.parquet"]
    ]
    benchmark: NotRequired[Annotated[BenchmarkRecord, "benchmarks.json"]]
    export: NotRequired[Annotated[ExportRecord, "huggingface/"]]


class ManifestFile(TypedDict):
    """The finished stages of a folder."""

    version: Annotated[int, "of this file's format"]
    checksum: NotRequired[Annotated[str, "SHA-256 of `stages`; absent in older files"]]
    stages: Annotated[Stages, "by name"]
