"""Every setting with one other valid value, and the stages that the change makes stale by itself.

A test compares the list with the settings of the program, so that none is missed. The stages are those of any
round; whatever follows from them is redone where what it reads came out otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Change(NamedTuple):
    """A change of one setting.

    Attributes:
      value: the other value. `{root}`, `{url}`: of the world.
      stages: which are stale by themselves; None: the settings name another run.
      more: what has to be changed with it.
      base: settings of the run before the change, if the setting needs them to have an effect.
      adds: whether the run has more files afterwards, though nothing is stale.
      keeps: files of measurements that the new settings do not make, and manifests with their records; they
        stay, and nothing reads them.
    """

    value: Any
    stages: tuple[str, ...] | None = ()
    more: Mapping[str, Any] = {}
    base: Mapping[str, Any] = {}
    adds: bool = False
    keeps: tuple[str, ...] = ()


PREPARE, TRAIN, SCORE, SELECT = ("prepare",), ("train",), ("score",), ("select",)
REFINE, MERGE = ("refine",), ("merge", "follow")
READS_BASE = ("train", "score", "evaluate")  # the weights; the tokenizer's files are the same
COMPUTES = ("train", "score", "refine", "evaluate")
TEXT = ("prepare", *COMPUTES)
BENCHMARK = ("benchmark",)
SAMPLED = {"quality.method": "sample", "quality.max_new_tokens": 16}
WITH_LORA = {"lora.rank": 2}
MEASURED = tuple(
    f"round_0{t}/{name}"
    for t in (0, 1)
    for name in ("heldout_losses.json", "heldout_rows.parquet", "manifest.json")
)
WITH_TASKS = {"evaluate.tasks": "[capitals]", "evaluate.include_path": "{root}/tasks"}

CHANGES: dict[str, Change] = {
    "name": Change("another", None),
    "runs_dir": Change("{root}/others", None),
    "compilation_cache": Change("{root}/compiled"),
    "seed": Change(9, ("prepare", "train", "refine")),
    "rounds": Change(2, ("follow", "evaluate")),
    "controls": Change("[random]", adds=True),
    "seeds": Change(2, base={"controls": "[random]"}, adds=True),
    "stop.patience": Change(1, adds=True),
    "stop.min_gain": Change(100.0, base={"stop.patience": 2}, adds=True),
    "stop.metric": Change("task", base={"stop.patience": 1, **WITH_TASKS}, adds=True, keeps=MEASURED),
    "refine.take_back": Change(True, adds=True),
    "model.path": Change("{root}/other_model", READS_BASE),
    "model.dtype": Change("bfloat16", (*COMPUTES, "export")),
    "model.attention": Change("xla"),
    "model.template": Change("default", TEXT),
    "model.template_date": Change("2020-02-02", TEXT),
    "model.max_length": Change(300, TEXT),
    "data.path": Change("{root}/other.json", PREPARE),
    "data.format": Change("alpaca", PREPARE),
    "data.limit": Change(14, PREPARE),
    "data.columns": Change("{input: source}", PREPARE),
    "data.eval_path": Change("{root}/own_heldout.json", PREPARE),
    "data.id_column": Change("number", PREPARE, more={"data.path": "{root}/numbered.json"}),
    "data.if_changed": Change("stop"),
    "data.roles": Change("{narrator: user}", PREPARE),
    "data.sources": Change("[{path: '{root}/other.json'}]", PREPARE, more={"data.path": "''"}),
    "data.strict": Change(True, PREPARE),
    "data.eval_fraction": Change(0.3, PREPARE),
    "data.source_column": Change("instruction", PREPARE),
    "mesh.data": Change(-1, more={"mesh.fsdp": 1}),
    "mesh.fsdp": Change(1),
    "mesh.tensor": Change(-1, more={"mesh.fsdp": 1}),
    "hosts.start_timeout": Change(60),
    "hosts.stall_timeout": Change(60),
    "train.learning_rate": Change(0.003, TRAIN),
    "train.num_epochs": Change(3, TRAIN),
    "train.batch_size": Change(1, TRAIN),
    "train.examples_per_step": Change(5, TRAIN),
    "train.gradient_accumulation": Change(2),
    "train.warmup_ratio": Change(0.5, TRAIN),
    "train.schedule": Change("constant", TRAIN),
    "train.optimizer.name": Change("adafactor", TRAIN),
    "train.optimizer.weight_decay": Change(0.5, TRAIN),
    "train.optimizer.betas": Change("[0.8, 0.99]", TRAIN),
    "train.param_dtype": Change("bfloat16", TRAIN),
    "train.max_grad_norm": Change(0.1, TRAIN),
    "train.remat": Change("none"),
    "train.start_from": Change("previous", TRAIN),
    "train.save_every": Change(7),
    "train.eval_every": Change(2),
    "train.keep_best": Change(True),
    "train.on_bad_step": Change("skip", TRAIN),
    "train.trackers": Change("[tensorboard]"),
    "lora.rank": Change(2, TRAIN),
    "lora.alpha": Change(8.0, TRAIN, base=WITH_LORA),
    "lora.target_modules": Change("[q_proj]", TRAIN, base=WITH_LORA),
    "scoring.batch_tokens": Change(4096),
    "scoring.unembed_chunk": Change(64),
    "scoring.readings": Change("[ifd]", SCORE),
    "complexity.m": Change(0.5, SELECT, more={"complexity.fraction": "null"}),
    "complexity.fraction": Change(0.4, SELECT),
    "complexity.normalise": Change("length", SELECT),
    "diversity.m": Change(0.5, SELECT, more={"diversity.fraction": "null"}),
    "diversity.fraction": Change(0.4, SELECT),
    "diversity.k": Change(3, SCORE),
    "diversity.text": Change("raw", SCORE),
    "diversity.embedder": Change("pre", SCORE),
    "diversity.ignore_duplicates": Change(True, SCORE),
    "consistency.m": Change(0.5),  # nothing is selected by an axis that is not scored
    "consistency.fraction": Change(0.4),
    "quality.m": Change(0.5, SELECT, more={"quality.fraction": "null"}),
    "quality.fraction": Change(0.4, SELECT),
    "quality.method": Change("sample", SCORE, more={"quality.max_new_tokens": 16}),
    "quality.score": Change("log_odds", SCORE),
    "quality.score_temperature": Change(2.0, SCORE),
    "quality.rubric": Change("{root}/rubric.yaml", SCORE),
    "quality.max_new_tokens": Change(32, SCORE, base=SAMPLED),
    "quality.temperature": Change(0.5, SCORE, base=SAMPLED),
    "refine.base_url": Change("[{url}, {url}]"),
    "refine.model": Change("fake2", REFINE),
    "refine.model_revision": Change("second", REFINE),
    "refine.api_key_env": Change("OTHER_KEY"),
    "refine.temperature": Change(0.5, REFINE),
    "refine.max_tokens": Change(32, REFINE),
    "refine.response_format": Change("text", REFINE),
    "refine.concurrency": Change(2),
    "refine.per_minute.requests": Change(6000),
    "refine.per_minute.tokens": Change(6_000_000),
    "refine.max_retries": Change(1),
    "refine.timeout": Change(60.0),
    "refine.max_corrections": Change(1, REFINE),
    "refine.budget.usd": Change(3.0),
    "refine.budget.tokens": Change(9_000_000),
    "refine.cache": Change("{root}/shared.sqlite"),
    "refine.show_response": Change(False, REFINE),
    "refine.turns": Change("all", REFINE),
    "refine.prompts": Change("{root}/words.yaml", REFINE),
    "refine.preflight": Change(True),
    "refine.wait_for_review": Change(True),
    "refine.accept": Change("none", REFINE),
    "refine.max_attempts": Change(3, REFINE),
    "refine.growth": Change("keep", MERGE),
    "refine.prices.prompt": Change(1.0),
    "refine.prices.cached": Change(1.0),
    "refine.prices.completion": Change(1.0),
    "refine.gates.open": Change("[numbers, code]", REFINE),
    "refine.gates.agreement": Change(0.5),
    "refine.gates.length": Change(3.0, REFINE),
    "refine.gates.context": Change(0.5),
    "refine.gates.novelty": Change(0.5),
    "refine.gates.duplicate": Change(0.7, REFINE),
    "evaluate.contrast": Change(True, ("evaluate",)),
    "evaluate.tasks": Change("[capitals]", BENCHMARK, more={"evaluate.include_path": "{root}/tasks"}),
    "evaluate.allow_code": Change(True, BENCHMARK, base=WITH_TASKS),
    "evaluate.chat_template": Change(True, BENCHMARK, base=WITH_TASKS),
    "evaluate.include_path": Change("{root}/other_tasks", BENCHMARK, base=WITH_TASKS),
    "evaluate.limit": Change(3, BENCHMARK, base=WITH_TASKS),
    "evaluate.local_data": Change("{root}/tasks", BENCHMARK, base=WITH_TASKS),
    "evaluate.max_length": Change(64, BENCHMARK, base=WITH_TASKS),
    "evaluate.num_fewshot": Change(1, BENCHMARK, base=WITH_TASKS),
    "serve.max_batch": Change(2),
    "serve.max_context": Change(777, SCORE, base=SAMPLED),
}


# Stages that the run did not have before. With `stop.patience` the last training is a round's, too.
ADDED: dict[str, set[str]] = {
    "controls": {"random refine", "seed_0 control"},
    "seeds": {"seed_1 control"},
    "stop.metric": {"final best"},
    "rounds": {f"round_01 {s}" for s in ("prepare", "train", "score", "select", "refine", "merge")},
    "stop.patience": {
        *("round_00 heldout", "round_01 prepare", "round_01 train", "round_01 heldout"),
        *("final best", "final evaluate"),
    },
}


def override(name: str, change: Change, root: str, url: str) -> dict[str, Any]:
    """The change as overrides of a run in a world, `__` for the dot."""
    return _filled({**change.more, name: change.value}, root, url)


def base_of(change: Change, root: str, url: str) -> dict[str, Any]:
    """The settings of the run before the change, likewise."""
    return _filled(change.base, root, url)


def _filled(given: Mapping[str, Any], root: str, url: str) -> dict[str, Any]:
    def filled(value: Any) -> Any:
        return value.replace("{root}", root).replace("{url}", url) if isinstance(value, str) else value

    return {key.replace(".", "__"): filled(value) for key, value in given.items()}
