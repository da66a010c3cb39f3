"""Runs lm-eval's tasks on a model, and makes rows of what it finds. Needs the extra `eval`.

Axes: docs/contributing.md#axes; c choice of a question.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
from lm_eval.api.model import LM
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager

from middo_jax.config import ConfigError
from middo_jax.config.evaluation import EvaluateSettings
from middo_jax.evaluation.offline.suite import CODE, OFFLINE, offline_task
from middo_jax.rundir.rows import BenchmarkScoreRow

ANSWER_P = "answer_p"
BOOTSTRAP_ITERS = 1000  # for the standard errors of metrics that are no means, such as perplexity
_NOT_METRICS = {"name", "alias", "sample_len", "sample_count"}
# lm-eval's own tasks that run a model's code in this process's rights, without our limits.
_THEIR_CODE = "HF_ALLOW_CODE_EVAL"

Kind = Literal["log-likelihood", "generative", "mixed"]


def check_tasks(settings: EvaluateSettings) -> None:
    """Checks what can be known of the tasks before a model is there.

    Raises:
      ConfigError: a task is not known, needs data that is not there, or runs code that is not allowed.
    """
    manager = _manager(settings)
    for name in settings.tasks:
        if name in OFFLINE:
            offline_task(name, settings)
        elif name not in manager.task_index:
            raise ConfigError(
                f"evaluate.tasks: lm-eval has no task, group or tag {name!r}; `lm-eval ls tasks` lists what "
                f"it has, the offline ones are {', '.join(OFFLINE)}, evaluate.include_path adds yours"
            )
    if (of_code := CODE.intersection(settings.tasks)) and not settings.allow_code:
        raise ConfigError(
            f"evaluate.tasks: {', '.join(sorted(of_code))} runs code that the model wrote; "
            "evaluate.allow_code=true allows it (docs/evaluation.md says what protects this machine)"
        )


def run_benchmarks(lm: LM, settings: EvaluateSettings) -> list[BenchmarkScoreRow]:
    """The scores of a model on `evaluate.tasks`; raises what `run_tasks` raises."""
    return score_rows(*run_tasks(lm, settings))


def run_tasks(lm: LM, settings: EvaluateSettings) -> tuple[Mapping[str, Any], dict[str, str]]:
    """What lm-eval returns, samples included, and the output type of each task that is no group.

    Raises:
      ConfigError: see `check_tasks`.
      ValueError: a task runs code and `evaluate.allow_code` is false; or see `HarnessModel`.
      OSError: a task's dataset is neither here nor within reach.
    """
    check_tasks(settings)
    with _surroundings(settings.allow_code):
        # Some tasks shuffle the answers when they are loaded, with these generators.
        random.seed(DEFAULT_RANDOM_SEED)
        np.random.seed(DEFAULT_OTHER_SEED)
        loaded = _manager(settings).load(
            [offline_task(name, settings) if name in OFFLINE else name for name in settings.tasks]
        )
        for name, task in loaded["tasks"].items():
            if getattr(task, "UNSAFE_CODE", False) and not settings.allow_code:
                raise ConfigError(
                    f"evaluate.tasks: {name} runs code that the model wrote, in lm-eval's own way; "
                    "evaluate.allow_code=true allows it (docs/evaluation.md: the offline tasks limit it)"
                )
            _set_fewshot(task, settings.num_fewshot)
        found = evaluate(
            lm,
            loaded,
            limit=settings.limit,
            bootstrap_iters=BOOTSTRAP_ITERS,
            apply_chat_template=settings.chat_template,
            fewshot_as_multiturn=settings.chat_template,
            confirm_run_unsafe_code=settings.allow_code,
        )
    assert found is not None  # this is the only rank
    return found, {name: str(task.OUTPUT_TYPE) for name, task in loaded["tasks"].items()}


def _manager(settings: EvaluateSettings) -> TaskManager:
    """lm-eval's index of tasks: of the user's alone where these are all that is asked for.

    lm-eval reads thousands of files for its own tasks, which takes several seconds.
    """
    folder = None if settings.include_path is None else Path(settings.include_path).expanduser()
    if folder is not None and not folder.is_dir():
        raise ConfigError(f"evaluate.include_path: {folder} is not a folder")
    own = TaskManager(include_path=None if folder is None else str(folder), include_defaults=False)
    if all(name in OFFLINE or name in own.task_index for name in settings.tasks):
        return own
    return _with_defaults(None if folder is None else str(folder))


@functools.lru_cache(maxsize=1)
def _with_defaults(folder: str | None) -> TaskManager:
    return TaskManager(include_path=folder)


def _set_fewshot(task: Any, num_fewshot: int | None) -> None:
    """As `lm_eval.simple_evaluate` does: a task that says 0 keeps it, one that says nothing has 0."""
    own = task.get_config("num_fewshot")
    if num_fewshot is not None and own != 0:
        task.set_config(key="num_fewshot", value=num_fewshot)
    elif own is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)


@contextlib.contextmanager
def _surroundings(allow_code: bool) -> Iterator[None]:
    """lm-eval without its warnings, and without the processes that it would fork for bootstrapping."""
    # A process with JAX's threads must not be forked.
    wanted = {"DISABLE_MULTIPROC": "1"} | ({_THEIR_CODE: "1"} if allow_code else {})
    before = {name: os.environ.get(name) for name in wanted}
    logger = logging.getLogger("lm_eval")
    level = logger.level
    os.environ.update(wanted)
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def score_rows(found: Mapping[str, Any], output_types: Mapping[str, str]) -> list[BenchmarkScoreRow]:
    """The rows of one evaluation: groups and tasks in lm-eval's order, `answer_p` first where there is one.

    Args:
      found: what lm-eval returns, with samples.
      output_types: of each task that is no group.
    """
    below: Mapping[str, Sequence[str]] = found.get("group_subtasks") or {}
    group_of = {child: group for group, children in below.items() for child in children}
    answer_p = {name: _answer_p(samples) for name, samples in found["samples"].items()}
    rows: list[BenchmarkScoreRow] = []
    for name, metrics in {**found["results"], **(found.get("groups") or {})}.items():
        leaves = _leaves(name, below)
        common: Any = {
            "task": name,
            "group": group_of.get(name),
            "kind": _kind({output_types[leaf] for leaf in leaves if leaf in output_types}),
            "num_fewshot": found["n-shot"].get(name),
            "version": None if (version := found["versions"].get(name)) is None else str(version),
        }
        p_n = [p for leaf in leaves for p in answer_p.get(leaf, ())]
        if p_n:
            rows.append(cast(BenchmarkScoreRow, {**common, **_answer_p_row(p_n)}))
        directions = found["higher_is_better"].get(name, {})
        n = int(metrics.get("sample_len") or sum(len(found["samples"].get(leaf, ())) for leaf in leaves))
        for key, value in metrics.items():
            metric, _, filter_ = key.partition(",")
            if key in _NOT_METRICS or metric.endswith("_stderr") or not _is_number(value):
                continue
            stderr = metrics.get(f"{metric}_stderr,{filter_}")
            row = {
                **common,
                "metric": metric,
                "filter": filter_,
                "value": float(value),
                "stderr": float(stderr) if _is_number(stderr) else None,
                "n": n,
                "higher_is_better": directions.get(metric),
            }
            rows.append(cast(BenchmarkScoreRow, row))
    return rows


def _leaves(name: str, below: Mapping[str, Sequence[str]]) -> list[str]:
    children = below.get(name)
    if not children:
        return [name]
    return [leaf for child in children for leaf in _leaves(child, below)]


def _kind(output_types: set[str]) -> Kind:
    generative = {output_type == "generate_until" for output_type in output_types}
    if len(generative) > 1:
        return "mixed"
    return "generative" if True in generative else "log-likelihood"


def _is_number(value: Any) -> bool:
    is_real = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    return is_real and math.isfinite(value)


def _answer_p_row(p_n: Sequence[float]) -> Any:
    n = len(p_n)
    return {
        "metric": ANSWER_P,
        "filter": "none",
        "value": float(np.mean(p_n)),
        "stderr": float(np.std(p_n, ddof=1) / math.sqrt(n)) if n > 1 else None,
        "n": n,
        "higher_is_better": True,
    }


def _answer_p(samples: Sequence[Mapping[str, Any]]) -> list[float]:
    """The probability of the right answer among the offered ones, for each row of a multiple-choice task.

    Empty for other tasks, and where the offered texts have no context in common, since their probabilities
    are then not of one distribution.
    """
    found = []
    for sample in samples:
        target = sample["target"]
        scores = [response[0] for response in sample["resps"]]
        contexts = {arguments[0] for arguments in sample["arguments"]}
        if not isinstance(target, int) or isinstance(target, bool) or len(contexts) != 1:
            return []
        if not all(isinstance(score, tuple | list) and len(score) == 2 for score in scores):
            return []
        if not 0 <= target < len(scores):
            return []
        log_p_c = np.array([score[0] for score in scores], np.float64)
        p_c = np.exp(log_p_c - log_p_c.max())
        found.append(float(p_c[target] / p_c.sum()))
    return found
