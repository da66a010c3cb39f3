"""The rows of the public JSON files: every key with its type and a description.

Writers build these rows, and docs/files.md is generated from them. `schemas.SCHEMAS` maps files to rows. A
change that an older program would misread needs the next version of its file in `schemas.SCHEMAS`.
"""

from typing import Annotated, Any, Literal, NotRequired, TypedDict

Scores = dict[str, float | None]


class TurnRow(TypedDict):
    """One turn of a conversation."""

    role: Annotated[Literal["system", "user", "assistant", "tool"], "the speaker"]
    content: Annotated[str, "the text of the turn"]
    tool_calls: NotRequired[Annotated[list[Any], "the tools that the assistant calls, as OpenAI has them"]]
    tool_call_id: NotRequired[Annotated[str, "the call whose result a tool's turn is"]]
    name: NotRequired[Annotated[str, "the tool whose result a tool's turn is"]]
    weight: NotRequired[Annotated[int, "0 if no token of an answer is a target; else the key is absent"]]
    fields: NotRequired[Annotated[dict[str, Any], "the user's other fields of the turn; absent if none"]]


class LineageRow(TypedDict):
    """The origin of a sample, and its scores."""

    parent_ids: Annotated[list[str], "the samples that it was made from; empty for the user's own rows"]
    root_id: Annotated[str, "the user's own row at the start of the chain"]
    round: Annotated[int, "the round whose dataset it first is in, counted from 0"]
    op: Annotated[
        Literal["seed", "simplify", "rewrite", "synthesize", "reanswer", "complete"],
        "how it was made; `seed`: the user's",
    ]
    axis: Annotated[str | None, "the axes that selected its parent, joined by `+`"]
    hint_ids: Annotated[list[str], "neighbours in the refiner's prompt"]
    refiner: Annotated[str | None, "the model that wrote it"]
    prompt_version: Annotated[str | None, "version of the refiner's prompts"]
    scores_before: Annotated[Scores | None, "the parent's scores when it was selected"]
    scores_after: Annotated[Scores | None, "its own scores: at its acceptance, else in its first round"]


class ExampleRow(TypedDict):
    """A sample: a conversation that ends with an answer."""

    id: Annotated[str, "16 hexadecimal digits of the SHA-256 of the conversation"]
    user_id: NotRequired[Annotated[str | int, "the user's own id of the row; an addition has none"]]
    messages: Annotated[list[TurnRow], "the turns in order"]
    tools: NotRequired[Annotated[list[Any], "definitions of the tools that may be called; absent if none"]]
    prompt_columns: NotRequired[
        Annotated[
            dict[str, str],
            "columns that the prompt was joined of: of Alpaca, or prompt and context; absent if it was one",
        ]
    ]
    behind: NotRequired[
        Annotated[list[TurnRow], "turns behind the last answer that is learnt, which no model sees"]
    ]
    extra: NotRequired[Annotated[dict[str, Any], "the user's own columns, carried through; absent if none"]]
    lineage: Annotated[LineageRow, "its origin and scores"]


class RejectedRow(TypedDict):
    """A row of the input that cannot be used."""

    where: Annotated[
        str, "`file:line` of a text file, else `row N`, counted from 1; then the user's id of the row, if any"
    ]
    reason: Annotated[str, "why it cannot be used"]
    row: Annotated[Any, "the row as read; the line's text if it is not JSON; null if it is nested too deeply"]


class SpeedRow(TypedDict):
    """The speed of a training step."""

    seconds: Annotated[float, "time since the previous step was read, without compilation"]
    tokens_per_second: Annotated[float, "tokens of samples, without padding, all devices together"]
    tokens_per_second_device: Annotated[float, "`tokens_per_second` per device"]
    mfu: Annotated[float | None, "share of the devices' published FLOP/s; null for an unknown device"]
    waited_for_data: Annotated[float, "share of `seconds` in which the device may have waited for a batch"]
    memory_bytes: Annotated[int | None, "peak memory of the first device; null if it does not report it"]
    memory_limit_bytes: Annotated[int | None, "memory limit of that device; null if it does not report it"]
    seconds_left: Annotated[float, "estimated time to the end of the training, at its mean speed so far"]


class MetricsRow(TypedDict):
    """One training step."""

    step: Annotated[int, "counted from 1"]
    epoch: Annotated[int, "counted from 0"]
    loss: Annotated[float | None, "mean nats per target token, before the update; null if not finite"]
    n_target_tokens: Annotated[int, "number of target tokens in the batch"]
    grad_norm: Annotated[float | None, "global norm of the gradient before clipping; null if not finite"]
    learning_rate: Annotated[float, "learning rate of this step"]
    skipped: NotRequired[Annotated[list[str], "ids of the batch if the step was skipped; else absent"]]
    speed: Annotated[SpeedRow, "speed, which differs between machines"]


class SourceLossRow(TypedDict):
    """Held-out loss on the samples of one source."""

    loss: Annotated[float, "nats per target token"]
    n_target_tokens: Annotated[int, "number of target tokens"]


class EvaluationRow(TypedDict):
    """One held-out loss during training."""

    step: Annotated[int, "the step after which it was measured"]
    loss: Annotated[float, "nats per target token"]
    n_target_tokens: Annotated[int, "number of target tokens"]
    by_source: Annotated[dict[str, SourceLossRow], "loss by `data.source_column`; empty for one source"]


class BenchmarkScoreRow(TypedDict):
    """One metric of one task under one model."""

    task: Annotated[str, "lm-eval's name of a task or group"]
    group: Annotated[str | None, "the group that was asked for and contains the task; null if none does"]
    metric: Annotated[str, "lm-eval's name, or `answer_p`: the mean probability of the right answer"]
    filter: Annotated[str, "how answers were extracted; `none` if as they are"]
    value: Annotated[float, "the score"]
    stderr: Annotated[float | None, "its standard error over the task's rows; null where lm-eval has none"]
    n: Annotated[int, "rows"]
    higher_is_better: Annotated[bool | None, "null where lm-eval does not say"]
    kind: Annotated[
        Literal["log-likelihood", "generative", "mixed"],
        "how answers are found; scores of different kinds cannot be compared",
    ]
    num_fewshot: Annotated[int | None, "examples before each question; null where a group's tasks differ"]
    version: Annotated[str | None, "of the task, as lm-eval numbers them"]


class BenchmarkModelRow(TypedDict):
    """The scores of one model."""

    name: Annotated[str, "`base`, `round_00`, ..., `final`"]
    scores: Annotated[
        list[BenchmarkScoreRow], "as lm-eval orders tasks; a task's first metric is shown first"
    ]


class BenchmarksFile(TypedDict):
    """The scores of the models that were evaluated together."""

    lm_eval: Annotated[str, "version of lm-eval"]
    chat_template: Annotated[bool, "whether the questions were chat turns"]
    limit: Annotated[int | None, "first rows of each task that were taken; null: all"]
    models: Annotated[list[BenchmarkModelRow], "`base` before the first round's model, else one model"]


class DuplicatesRow(TypedDict):
    """Samples with equal prompts."""

    n_groups: Annotated[int, "number of prompts that several samples have"]
    n_samples: Annotated[int, "number of samples with these prompts"]


class AxisStatistics(TypedDict):
    """The distribution of the scores of one axis, and the threshold of the selection."""

    n_scored: Annotated[int, "number of samples with a score"]
    n_null: Annotated[int, "number of samples without a score"]
    m: Annotated[float | None, "standard deviations from the mean; null if all samples are selected"]
    fraction: Annotated[float | None, "the share to select, if the settings have it instead of m"]
    mean: Annotated[dict[str, float | None], "mean by column"]
    std: Annotated[dict[str, float | None], "standard deviation by column"]
    threshold: Annotated[dict[str, float | None], "threshold by column; samples that are worse are selected"]
    n_selected: Annotated[int, "number of selected samples"]


class AxisFacts(AxisStatistics):
    """The selection by one axis."""

    ids: Annotated[list[str], "ids of the selected samples, in the order of the dataset"]


class SweepRow(TypedDict):
    """The size of the selection with another m."""

    m: Annotated[float, "standard deviations from the mean"]
    n: Annotated[int, "number of samples"]


class SelectionFile(TypedDict):
    """The three sets of a round."""

    n: Annotated[int, "number of samples in the dataset"]
    axes: Annotated[dict[str, AxisFacts], "selection by axis; an axis without scores is absent"]
    overlap: Annotated[dict[str, int], "number of samples in two sets (`hard&sparse`) and in all (`all`)"]
    sweep: Annotated[dict[str, list[SweepRow]], "by axis: number of samples that each m would select"]
    duplicates: Annotated[DuplicatesRow | None, "exact duplicates; null if not searched for"]


class RequestRow(TypedDict):
    """One request to the refiner and its answer."""

    task_id: Annotated[str, "the task that it belongs to"]
    attempt: Annotated[int, "counted from 0"]
    step: Annotated[Literal["prompt", "correction", "answer", "again"], "what was asked for"]
    key: Annotated[str, "of the answer in llm_cache.sqlite"]
    model: Annotated[str, "the model that was asked"]
    messages: Annotated[list[dict[str, str]], "the conversation that was sent: `role` and `content` each"]
    answer: Annotated[str, "the reply as the server sent it"]
    finish_reason: Annotated[str, "finish reason from the server"]
    prompt_tokens: Annotated[int, "tokens of the prompt, counted by the server"]
    completion_tokens: Annotated[int, "tokens of the answer, counted by the server"]


class TaskUsageRow(TypedDict):
    """Answers and tokens of one task."""

    requests: Annotated[int, "answers that it needed, including cached ones"]
    prompt_tokens: Annotated[int, "prompt tokens of these answers"]
    completion_tokens: Annotated[int, "completion tokens of these answers"]


class RefinedRow(TypedDict):
    """The result of one task of the refiner."""

    task_id: Annotated[str, "`op:source_id`, unique within a round"]
    op: Annotated[Literal["simplify", "rewrite", "synthesize", "reanswer", "complete"], "what was to be done"]
    axes: Annotated[list[str], "the axes that selected the sample"]
    source_id: Annotated[str, "id of the selected sample"]
    hint_ids: Annotated[list[str], "neighbours in the refiner's prompt"]
    attempts: Annotated[int, "number of attempts"]
    accepted: Annotated[bool, "whether there is a new sample"]
    gate: Annotated[str | None, "the gate that rejected the last candidate; null if none did"]
    detail: Annotated[str | None, "what that gate found, or how the request failed"]
    replaces: Annotated[str | None, "id of the sample that the new one replaces; null for an addition"]
    scores_before: Annotated[Scores, "the selected sample's scores"]
    example: Annotated[ExampleRow | None, "the new sample; null if none was accepted"]
    original: Annotated[ExampleRow, "the selected sample"]
    usage: Annotated[TaskUsageRow, "answers and tokens of the task"]


class VerdictRow(TypedDict):
    """People's verdict on an accepted rewrite."""

    id: Annotated[str, "`task_id@candidate`, the id of the rewrite's sample behind the sign"]
    verdict: Annotated[
        Literal["accept", "reject", "edit", "none"], "`none`: nobody judged it, and it stays accepted"
    ]
    example: Annotated[ExampleRow | None, "the sample with edited texts; null if none was edited"]
    comment: Annotated[str | None, "their comments"]
    by: Annotated[list[str], "who judged it, as the program names them"]


class MeasurementRow(TypedDict):
    """Measurements of a candidate under the model in training; null if a number is not finite."""

    loss: Annotated[float | None, "mean nats per token of its response"]
    similarity: Annotated[float | None, "cosine of its prompt's embedding and its source's"]
    nearest: Annotated[float | None, "cosine to the nearest sample of the dataset, except a replaced source"]
    knn_similarity: Annotated[float | None, "mean cosine to the k nearest, except a replaced source"]
    core_similarity: Annotated[float | None, "mean cosine of a sparse source to its k nearest, with it"]
    truncated: Annotated[bool, "whether it is over `model.max_length`"]
    quality: Annotated[float | None, "the judge's rating; null where it was not asked for"]
    end_nll: NotRequired[Annotated[float | None, "nats of the token that ends the answer"]]
    pmi: NotRequired[
        Annotated[float | None, "nats by which the prompt raises the response's log-probability"]
    ]
    reverse_ifd: NotRequired[
        Annotated[float | None, "loss of the prompt behind its response, over that without"]
    ]
    original_pmi: NotRequired[Annotated[float | None, "the same of its original"]]
    original_reverse_ifd: NotRequired[Annotated[float | None, "the same of its original"]]


class CandidateRow(TypedDict):
    """One attempt of the refiner at one task."""

    task_id: Annotated[str, "the task in refined.jsonl"]
    attempt: Annotated[int, "counted from 0"]
    op: Annotated[Literal["simplify", "rewrite", "synthesize", "reanswer", "complete"], "what was to be done"]
    axes: Annotated[list[str], "the axes that selected the sample"]
    source_id: Annotated[str, "id of the selected sample"]
    candidate_id: Annotated[str | None, "the candidate's id; null if the attempt produced none"]
    accepted: Annotated[bool, "whether it passed all gates"]
    gate: Annotated[str | None, "the gate that rejected it; null if none did"]
    detail: Annotated[str | None, "what that gate found, or how the request failed"]
    before: Annotated[Scores, "the selected sample's scores"]
    measured: Annotated[MeasurementRow | None, "its measurements; null if it was not measured"]
    measured_under: Annotated[str | None, "hash of the dataset's scores, if it was measured"]


class DroppedRow(TypedDict):
    """A sample that the next dataset does not contain, and that no other one replaces."""

    id: Annotated[str, "id of the sample"]
    reason: Annotated[str, "why it was dropped or not added"]
    nearest_id: Annotated[str | None, "id of the sample that makes it redundant"]
    similarity: Annotated[float | None, "cosine of the two"]
    example: Annotated[ExampleRow, "the sample"]


class TakenBackRow(TypedDict):
    """A rewrite or an addition that is taken back, because its sample became worse."""

    round: Annotated[int, "the round that takes it back; the next round's dataset is without it"]
    op: Annotated[str, "the kind of task that made it"]
    axes: Annotated[list[str], "the axes that selected its original"]
    id: Annotated[str, "id of the rewrite or the addition"]
    source_id: Annotated[str, "id of the original, or of the sparse sample that the addition was made for"]
    badness_before: Annotated[
        dict[str, float],
        "by axis: standard deviations of its round by which the original was worse than the mean",
    ]
    badness_after: Annotated[
        dict[str, float], "the same of the rewrite, or of the sparse sample, in the next round"
    ]
    original: Annotated[ExampleRow | None, "the sample that comes back; null for an addition"]


class ModelLossRow(TypedDict):
    """Held-out loss of one model."""

    name: Annotated[str, "`base`, `round_00`, ..., `final`"]
    loss: Annotated[float, "nats per target token"]
    n_target_tokens: Annotated[int, "number of target tokens"]


class HeldoutLosses(TypedDict):
    """Held-out losses of all models of a run."""

    n: Annotated[int, "number of held-out samples"]
    models: Annotated[list[ModelLossRow], "losses in the order of training; empty without held-out samples"]


class IntervalRow(TypedDict):
    """A figure with its 95 % interval: a bootstrap over seeds, and over held-out rows within each."""

    value: Annotated[float, "the figure"]
    low: Annotated[float, "2.5th percentile"]
    high: Annotated[float, "97.5th percentile"]


class ArmRow(TypedDict):
    """A control arm, or the loop."""

    name: Annotated[str, "`loop`, or a name of `controls`"]
    losses: Annotated[list[float], "held-out loss per seed, in nats per target token"]
    mean: Annotated[float, "their mean"]
    gain: Annotated[IntervalRow | None, "loss of `none` minus this; null without `none`, and for it"]
    loop_better_by: Annotated[IntervalRow | None, "this loss minus the loop's; null for the loop"]
    tasks: Annotated[int, "samples that the refiner was asked about"]
    accepted: Annotated[int, "rewrites and additions in the dataset"]
    tokens: Annotated[int, "of the refiner, prompts and completions, also of answers from the cache"]
    gain_per_1000_tokens: Annotated[float | None, "gain per thousand of these tokens; null without either"]
    choosing_flops: Annotated[
        float, "FLOPs of the layers' matrices for choosing: scoring, and trainings for it"
    ]


class ControlsFile(TypedDict):
    """The control arms of a run."""

    seeds: Annotated[int, "trainings per arm"]
    heldout_rows: Annotated[int, "held-out samples with a target"]
    resamples: Annotated[int, "of the bootstrap"]
    arms: Annotated[list[ArmRow], "the loop first, the others as in `controls`"]


class EventRow(TypedDict):
    """One event of a run."""

    version: Annotated[int, "version of this file's format; several program versions may append to it"]
    time: Annotated[str, "UTC, such as `2026-01-31T12:00:00Z`"]
    event: Annotated[str, "`start` and `done` of a stage, `resume`, `report`, `rollback`"]
    round: NotRequired[Annotated[str, "the stage's folder, with `start` and `done`"]]
    stage: NotRequired[Annotated[str, "the stage, with `start` and `done`"]]
