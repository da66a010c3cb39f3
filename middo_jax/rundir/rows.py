"""The rows of the public JSON files: every key with its type and one line about it.

Writers build these rows and docs/files.md is made from them; `schemas.SCHEMAS` says which file has which.
A change that an older program would misread needs the next version of its file in `schemas.SCHEMAS`.
"""

from typing import Annotated, Any, Literal, NotRequired, TypedDict

Scores = dict[str, float | None]


class TurnRow(TypedDict):
    """One turn of a conversation."""

    role: Annotated[Literal["system", "user", "assistant", "tool"], "who speaks"]
    content: Annotated[str, "the text of the turn"]
    tool_calls: NotRequired[Annotated[list[Any], "the tools that the assistant calls, as OpenAI has them"]]
    tool_call_id: NotRequired[Annotated[str, "the call whose result a tool's turn is"]]
    name: NotRequired[Annotated[str, "the tool whose result a tool's turn is"]]
    weight: NotRequired[Annotated[int, "0 where no token of an answer is a target; else the key is absent"]]


class LineageRow(TypedDict):
    """Where a sample comes from, and what was measured of it."""

    parent_ids: Annotated[list[str], "the samples that it was made of; empty for the user's own rows"]
    root_id: Annotated[str, "the user's own row at the start of the chain"]
    round: Annotated[int, "the round whose dataset it first is in, counted from 0"]
    op: Annotated[Literal["seed", "simplify", "rewrite", "synthesize"], "how it was made; `seed`: the user's"]
    axis: Annotated[str | None, "the axes that selected its parent, joined by `+`"]
    hint_ids: Annotated[list[str], "the neighbours that the refiner was shown"]
    refiner: Annotated[str | None, "the model that wrote it"]
    prompt_version: Annotated[str | None, "version of the prompts that the refiner was given"]
    scores_before: Annotated[Scores | None, "the parent's scores when it was selected"]
    scores_after: Annotated[Scores | None, "its own: as it was accepted, else in its first round"]


class ExampleRow(TypedDict):
    """A sample: a conversation that ends with an answer."""

    id: Annotated[str, "16 hexadecimal digits of the SHA-256 of the conversation"]
    user_id: NotRequired[Annotated[str | int, "the user's own id of the row; an addition has none"]]
    messages: Annotated[list[TurnRow], "the turns in order"]
    tools: NotRequired[Annotated[list[Any], "definitions of the tools that may be called; absent if none"]]
    prompt_columns: NotRequired[
        Annotated[
            dict[str, str], "columns of an Alpaca row that its prompt was joined of; absent if it was one"
        ]
    ]
    extra: NotRequired[Annotated[dict[str, Any], "the user's own columns, carried through; absent if none"]]
    lineage: Annotated[LineageRow, "where it comes from"]


class RejectedRow(TypedDict):
    """A row of the input that cannot be used."""

    where: Annotated[
        str, "`file:line` of a text file, else `row N`, counted from 1; then the user's id of the row, if any"
    ]
    reason: Annotated[str, "why it cannot be used"]
    row: Annotated[
        Any, "the row as read; the line's text where it is no JSON; null where it is nested too deeply"
    ]


class SpeedRow(TypedDict):
    """How fast a training step was."""

    seconds: Annotated[float, "since the step before was read, without compiling"]
    tokens_per_second: Annotated[float, "tokens of samples, without padding, all devices together"]
    tokens_per_second_device: Annotated[float, "the same per device"]
    mfu: Annotated[float | None, "share of the devices' published FLOP/s; null where that is not known"]
    waited_for_data: Annotated[float, "share of `seconds` in which the device may have waited for a batch"]
    memory_bytes: Annotated[
        int | None, "the most that the first device has held; null where it does not tell"
    ]
    memory_limit_bytes: Annotated[int | None, "what that device has"]
    seconds_left: Annotated[float, "of the training, at its mean speed so far"]


class MetricsRow(TypedDict):
    """One training step."""

    step: Annotated[int, "counted from 1"]
    epoch: Annotated[int, "counted from 0"]
    loss: Annotated[float | None, "mean nats per target token, before the update; null if not finite"]
    n_target_tokens: Annotated[int, "target tokens of the batch"]
    grad_norm: Annotated[float | None, "global norm before clipping; null if not finite"]
    learning_rate: Annotated[float, "of this step"]
    skipped: NotRequired[Annotated[list[str], "ids of the batch if the step was left out; else absent"]]
    speed: Annotated[SpeedRow, "what differs from machine to machine"]


class SourceLossRow(TypedDict):
    """Held-out loss on the samples of one source."""

    loss: Annotated[float, "nats per target token"]
    n_target_tokens: Annotated[int, "over how many"]


class EvaluationRow(TypedDict):
    """One held-out loss during training."""

    step: Annotated[int, "after which step"]
    loss: Annotated[float, "nats per target token"]
    n_target_tokens: Annotated[int, "over how many"]
    by_source: Annotated[dict[str, SourceLossRow], "the same by `data.source_column`; empty for one source"]


class DuplicatesRow(TypedDict):
    """Samples whose prompts the model cannot tell apart."""

    n_groups: Annotated[int, "prompts that several samples have"]
    n_samples: Annotated[int, "samples that have these prompts"]


class AxisStatistics(TypedDict):
    """How the scores of one axis are distributed, and from where on samples are selected."""

    n_scored: Annotated[int, "samples with a score"]
    n_null: Annotated[int, "samples without one"]
    m: Annotated[float | None, "standard deviations from the mean; null where all samples are selected"]
    fraction: Annotated[float | None, "the wanted share, if that was given in place of m"]
    mean: Annotated[dict[str, float | None], "by column"]
    std: Annotated[dict[str, float | None], "by column"]
    threshold: Annotated[dict[str, float | None], "by column: samples that are worse are selected"]
    n_selected: Annotated[int, "samples that are"]


class AxisFacts(AxisStatistics):
    """What one axis selects."""

    ids: Annotated[list[str], "which these are, in the order of the dataset"]


class SweepRow(TypedDict):
    """What another m would select."""

    m: Annotated[float, "standard deviations"]
    n: Annotated[int, "samples"]


class SelectionFile(TypedDict):
    """The three sets of a round."""

    n: Annotated[int, "samples of the dataset"]
    axes: Annotated[dict[str, AxisFacts], "by axis; one without scores is absent"]
    overlap: Annotated[dict[str, int], "samples in two sets (`hard&sparse`) and in all three (`all`)"]
    sweep: Annotated[dict[str, list[SweepRow]], "by axis: how many samples each m would select"]
    duplicates: Annotated[DuplicatesRow | None, "exact duplicates; null where not looked for"]


class RequestRow(TypedDict):
    """One request to the refiner and its answer."""

    task_id: Annotated[str, "the task that it belongs to"]
    attempt: Annotated[int, "counted from 0"]
    step: Annotated[Literal["prompt", "correction", "answer"], "what was asked for"]
    key: Annotated[str, "of the answer in llm_cache.sqlite"]
    model: Annotated[str, "the model that was asked"]
    messages: Annotated[list[dict[str, str]], "the conversation that was sent: `role` and `content` each"]
    answer: Annotated[str, "the reply as the server sent it"]
    finish_reason: Annotated[str, "the server's word for how it ended"]
    prompt_tokens: Annotated[int, "as the server counted"]
    completion_tokens: Annotated[int, "as the server counted"]


class TaskUsageRow(TypedDict):
    """What the answers of one task took."""

    requests: Annotated[int, "answers that it needed, cached ones among them"]
    prompt_tokens: Annotated[int, "of these"]
    completion_tokens: Annotated[int, "of these"]


class RefinedRow(TypedDict):
    """How one task of the refiner ended."""

    task_id: Annotated[str, "`op:source_id`, unique within a round"]
    op: Annotated[Literal["simplify", "rewrite", "synthesize"], "what was to be done"]
    axes: Annotated[list[str], "the axes that selected the sample"]
    source_id: Annotated[str, "the selected sample"]
    hint_ids: Annotated[list[str], "neighbours that the refiner was shown"]
    attempts: Annotated[int, "how many there were"]
    accepted: Annotated[bool, "whether there is a new sample"]
    gate: Annotated[str | None, "the gate that rejected the last candidate; null if none did"]
    detail: Annotated[str | None, "what that gate found, or how the request failed"]
    replaces: Annotated[str | None, "the sample that the new one replaces; null for an addition"]
    scores_before: Annotated[Scores, "the selected sample's scores"]
    example: Annotated[ExampleRow | None, "the new sample; null if none was accepted"]
    original: Annotated[ExampleRow, "the selected sample"]
    usage: Annotated[TaskUsageRow, "what the task's answers took"]


class MeasurementRow(TypedDict):
    """What the model under training measures of a candidate; null is a number that is not finite."""

    loss: Annotated[float | None, "mean nats per token of its response"]
    similarity: Annotated[float | None, "cosine of its prompt's embedding and its source's"]
    nearest: Annotated[float | None, "cosine to the nearest sample of the dataset, its source left out"]
    knn_similarity: Annotated[float | None, "mean cosine to the k nearest, likewise"]
    core_similarity: Annotated[float | None, "the mean cosine that a sparse source would have beside it"]
    truncated: Annotated[bool, "whether it is over `model.max_length`"]
    quality: Annotated[float | None, "the judge's rating; null where it was not asked for"]


class CandidateRow(TypedDict):
    """One attempt of the refiner at one task."""

    task_id: Annotated[str, "the task in refined.jsonl"]
    attempt: Annotated[int, "counted from 0"]
    op: Annotated[Literal["simplify", "rewrite", "synthesize"], "what was to be done"]
    axes: Annotated[list[str], "the axes that selected the sample"]
    source_id: Annotated[str, "the selected sample"]
    candidate_id: Annotated[str | None, "the candidate's id; null where there was no whole one"]
    accepted: Annotated[bool, "whether it passed all gates"]
    gate: Annotated[str | None, "the gate that rejected it; null if none did"]
    detail: Annotated[str | None, "what that gate found, or how the request failed"]
    before: Annotated[Scores, "the selected sample's scores"]
    measured: Annotated[MeasurementRow | None, "null where it was not measured"]
    measured_under: Annotated[str | None, "hash of what the dataset was scored with, if it was measured"]


class DroppedRow(TypedDict):
    """A sample that is not in the next dataset, and that no other one replaces."""

    id: Annotated[str, "of the sample"]
    reason: Annotated[str, "why it went, or did not come in"]
    nearest_id: Annotated[str | None, "the sample that it is redundant to"]
    similarity: Annotated[float | None, "cosine of the two"]
    example: Annotated[ExampleRow, "the sample itself"]


class ModelLossRow(TypedDict):
    """Held-out loss of one model."""

    name: Annotated[str, "`base`, `round_00`, ..., `final`"]
    loss: Annotated[float, "nats per target token"]
    n_target_tokens: Annotated[int, "over how many"]


class HeldoutLosses(TypedDict):
    """Held-out losses of all models of a run."""

    n: Annotated[int, "held-out samples"]
    models: Annotated[list[ModelLossRow], "in the order of training; empty without held-out samples"]


class EventRow(TypedDict):
    """One event of a run."""

    version: Annotated[int, "of this file's format; several programs may have appended to it"]
    time: Annotated[str, "UTC, such as `2026-01-31T12:00:00Z`"]
    event: Annotated[str, "`start` and `done` of a stage, `resume`, `report`"]
    round: NotRequired[Annotated[str, "the stage's folder, with `start` and `done`"]]
    stage: NotRequired[Annotated[str, "the stage, with `start` and `done`"]]


class InputRecord(TypedDict):
    """A file or folder outside of the run that a stage read."""

    path: Annotated[str, "where it was"]
    hash: Annotated[str, "of its bytes"]
    stat: Annotated[str, "hash of sizes and mtimes"]


class StageRecord(TypedDict):
    """A finished stage."""

    finished: Annotated[str, "when, UTC"]
    seconds: Annotated[float, "how long it took"]
    files: Annotated[dict[str, str], "SHA-256 of each file that it wrote, by name relative to the folder"]
    versions: NotRequired[Annotated[dict[str, int], "version of the format of each of them that has one"]]
    reads: NotRequired[Annotated[dict[str, str], "hash of each file within the run that it read"]]
    inputs: NotRequired[Annotated[dict[str, InputRecord], "what it read outside of the run, by role"]]
    settings: NotRequired[Annotated[dict[str, Any], "the settings that it depends on, by dotted name"]]
    stats: Annotated[dict[str, list[int]], "size and mtime in ns of files and reads when they were hashed"]


class PrepareRecord(StageRecord):
    """The dataset was written."""

    n: Annotated[int, "samples"]
    format: NotRequired[Annotated[str, "format of the input's rows"]]
    repairs: NotRequired[Annotated[dict[str, int], "rows of the input that were repaired, by what was"]]


class PassRow(TypedDict):
    """What a scoring pass took."""

    real_tokens: Annotated[int, "positions that some text needs"]
    computed_tokens: Annotated[int, "those and the padding"]
    shapes: Annotated[int, "programs that it needed"]
    compile_seconds: Annotated[float, "until these were compiled"]
    seconds: Annotated[float, "from then on"]


class ScoreRecord(StageRecord):
    """The dataset was scored."""

    n: Annotated[int, "samples"]
    model: Annotated[str, "the model under training"]
    embedder: Annotated[str, "the model that embedded"]
    n_searched: Annotated[int, "samples whose neighbours were searched"]
    duplicates: Annotated[DuplicatesRow, "exact duplicates"]
    pre_identity: NotRequired[Annotated[str, "hash of all but the samples that `loss_pre` depends on"]]
    n_kept: NotRequired[Annotated[int, "samples that the earlier round had measured"]]
    passes: Annotated[dict[str, PassRow], "by name of the pass"]


class SelectRecord(StageRecord):
    """The three sets were chosen."""

    complexity: NotRequired[Annotated[int, "hard samples"]]
    diversity: NotRequired[Annotated[int, "sparse samples"]]
    quality: NotRequired[Annotated[int, "samples of low quality"]]


class UsageRow(TypedDict):
    """What requests cost."""

    requests: Annotated[int, "tries"]
    retries: Annotated[int, "tries after a request's first"]
    answers: Annotated[int, "answers that came"]
    failed: Annotated[int, "requests that were given up"]
    from_cache: Annotated[int, "answers that were there already"]
    prompt_tokens: Annotated[int, "as the server counted"]
    completion_tokens: Annotated[int, "as the server counted"]
    cached_tokens: Annotated[int, "prompt tokens that the server had cached"]
    aside_tokens: Annotated[int, "upper bound of the tokens of tries whose cost is not known"]
    seconds: Annotated[float, "that the tries took, summed"]
    usd: Annotated[float, "by `refine.prices`"]
    aside_usd: Annotated[float, "upper bound of the cost of tries whose cost is not known"]


class LimitsRow(TypedDict):
    """Bars that the dataset sets for candidates; null is no bar."""

    loss: Annotated[float | None, "over it a sample is hard"]
    context: Annotated[float | None, "similarity that few pairs of samples reach"]
    novelty: Annotated[float | None, "similarity that few samples have to their nearest neighbour"]
    prompt_chars: Annotated[list[float] | None, "fewest and most characters of a prompt"]
    response_chars: Annotated[list[float] | None, "fewest and most characters of a response"]


class RefineRecord(StageRecord):
    """The selected samples were refined."""

    n: Annotated[int, "tasks"]
    accepted: Annotated[int, "tasks that ended with a new sample"]
    kept: NotRequired[Annotated[dict[str, int], "selected samples that get no task, by reason"]]
    usage: Annotated[dict[str, UsageRow], "by axes"]
    limits: Annotated[LimitsRow, "bars for candidates"]


class EvaluateRecord(StageRecord):
    """The models were evaluated."""

    losses: Annotated[dict[str, float], "held-out loss by model, in nats per target token"]


class ExportRecord(StageRecord):
    """The final model was exported."""

    verified: Annotated[bool, "whether transformers computes the same logits"]
    reason: NotRequired[Annotated[str, "why that was not checked"]]
    max_difference: NotRequired[Annotated[float, "largest absolute difference of two logits"]]
    largest_logit: NotRequired[Annotated[float, "largest absolute logit"]]
    n_prompts: NotRequired[Annotated[int, "prompts that were compared"]]
    n_tokens: NotRequired[Annotated[int, "tokens of these"]]


class Stages(TypedDict):
    """The finished stages; one that is not done is absent."""

    prepare: NotRequired[Annotated[PrepareRecord, "dataset.jsonl"]]
    train: NotRequired[Annotated[StageRecord, "checkpoint/, metrics.jsonl"]]
    score: NotRequired[Annotated[ScoreRecord, "scores.parquet, embeddings"]]
    select: NotRequired[Annotated[SelectRecord, "selection.parquet, selection.json"]]
    refine: NotRequired[Annotated[RefineRecord, "requests.jsonl, refined.jsonl, candidates.jsonl"]]
    merge: NotRequired[Annotated[StageRecord, "dropped.jsonl"]]
    evaluate: NotRequired[Annotated[EvaluateRecord, "heldout_losses.json, heldout_rows.parquet"]]
    export: NotRequired[Annotated[ExportRecord, "huggingface/"]]


class ManifestFile(TypedDict):
    """The finished stages of a folder."""

    version: Annotated[int, "of this file's format"]
    stages: Annotated[Stages, "by name"]
