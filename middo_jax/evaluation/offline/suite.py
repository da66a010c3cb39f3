"""The offline tasks: what each asks, and how its answers are judged. Needs the extra `eval`.

Prompts, limits and metrics are those of lm-eval's tasks of the same names, so that scores can be compared;
what differs is in docs/evaluation.md.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
from lm_eval.api.task import ConfigurableTask

from middo_jax.config import ConfigError
from middo_jax.config.evaluation import EvaluateSettings
from middo_jax.evaluation.offline.execution import run_program
from middo_jax.evaluation.offline.instructions import CHECKS, follows

Row = dict[str, Any]
_ANSWER = re.compile(r"####\s*(-?[\d.,]+)")


def offline_task(name: str, settings: EvaluateSettings) -> ConfigurableTask:
    """A task of `OFFLINE`, with its rows read.

    Raises:
      ConfigError: `evaluate.local_data` is not set, has no file for the task, or a row of it is no such row.
    """
    if settings.local_data is None:
        raise ConfigError(
            f"evaluate.tasks: {name} needs evaluate.local_data, the folder that has its rows as JSON lines"
        )
    folder, stem = Path(settings.local_data).expanduser(), name.removesuffix("_local")
    check, columns, config = OFFLINE[name]
    rows = {"test": _read(_file(folder, (f"{stem}.jsonl", f"{stem}_test.jsonl"), name), columns, check)}
    train = folder / f"{stem}_train.jsonl"
    if train.exists():
        rows["train"] = _read(train, columns, check)
    splits = {split: datasets.Dataset.from_list(found) for split, found in rows.items()}
    examples = {"fewshot_split": "train" if "train" in rows else "test"} if config.get("num_fewshot") else {}

    def dataset(**_: Any) -> Mapping[str, datasets.Dataset]:
        return splits

    fixed = {"task": name, "custom_dataset": dataset, "test_split": "test", "output_type": "generate_until"}
    return ConfigurableTask(config={**fixed, **examples, **config})


def _file(folder: Path, names: Sequence[str], task: str) -> Path:
    for name in names:
        if (folder / name).exists():
            return folder / name
    raise ConfigError(f"evaluate.tasks: {task} needs one of {', '.join(names)} in {folder}")


def _read(path: Path, columns: Mapping[str, type], check: Callable[[Row], None]) -> list[Row]:
    """The rows of a file with the columns that the task uses; lists and objects as JSON text.

    So all rows have the same types, which Arrow asks for.
    """
    rows: list[Row] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            missing = [
                c for c, of in columns.items() if not isinstance(row, dict) or not isinstance(row.get(c), of)
            ]
            if missing:
                raise ValueError(f"{missing[0]} is missing, or is no {columns[missing[0]].__name__}")
            check(row)
        except ValueError as e:
            raise ConfigError(f"{path}:{number}: not a row of this task: {e}") from e
        rows.append({c: row[c] if of is str else json.dumps(row[c]) for c, of in columns.items()})
    if not rows:
        raise ConfigError(f"{path}: no rows")
    return rows


def _no_check(row: Row) -> None:
    """Its columns are all that a row needs."""


def _has_number(row: Row) -> None:
    if not _ANSWER.search(row["answer"]):
        raise ValueError("answer has no number after ####")


def _has_tests(row: Row) -> None:
    if not row["test_list"] or not all(isinstance(test, str) for test in row["test_list"]):
        raise ValueError("test_list must be texts, at least one")


def _knows_instructions(row: Row) -> None:
    if unknown := [i for i in row["instruction_id_list"] if i not in CHECKS]:
        raise ValueError(f"no instruction is called {unknown[0]!r}")
    if len(row["kwargs"]) != len(row["instruction_id_list"]):
        raise ValueError("kwargs and instruction_id_list differ in length")


def _passes(program: str) -> dict[str, float]:
    return {"pass@1": float(run_program(program).passed)}


def _humaneval_results(row: Row, results: Sequence[str]) -> dict[str, float]:
    """The prompt with its completion, then the row's tests."""
    return _passes(f"{row['prompt']}{results[0]}\n\n{row['test']}\n\ncheck({row['entry_point']})\n")


def _mbpp_text(row: Row) -> str:
    tests = "\n".join(json.loads(row["test_list"]))
    return (
        f"You are an expert Python programmer, and here is your task: {row['text']} "
        f"Your code should pass these tests:\n\n{tests}\n[BEGIN]\n"
    )


def _mbpp_target(row: Row) -> str:
    return f"{row['code']}\n[DONE]"


def _mbpp_results(row: Row, results: Sequence[str]) -> dict[str, float]:
    return _passes("\n".join([results[0], *json.loads(row["test_list"]), ""]))


def _ifeval_results(row: Row, results: Sequence[str]) -> dict[str, Any]:
    """Whether all instructions are followed, and which, strictly and loosely."""
    pairs = zip(json.loads(row["instruction_id_list"]), json.loads(row["kwargs"]), strict=True)
    found: dict[str, Any] = {}
    asked = [(name, _arguments(name, arguments, row["prompt"])) for name, arguments in pairs]
    for manner, loose in (("strict", False), ("loose", True)):
        followed = [follows(results[0], name, arguments, loose) for name, arguments in asked]
        found[f"prompt_level_{manner}_acc"] = float(all(followed))
        found[f"inst_level_{manner}_acc"] = followed
    return found


def _arguments(instruction: str, arguments: Row, prompt: str) -> Row:
    """The arguments that are set; the prompt to repeat is the row's own where it names none."""
    given = {name: value for name, value in arguments.items() if value is not None}
    if instruction == "combination:repeat_prompt":
        given.setdefault("prompt_to_repeat", prompt)
    return given


def share_followed(followed: Sequence[Sequence[bool]]) -> float:
    """The share of all instructions of all rows that is followed."""
    each = [one for row in followed for one in row]
    return sum(each) / len(each)


def _metrics(*names: str, aggregation: Any = "mean") -> list[dict[str, Any]]:
    return [{"metric": name, "aggregation": aggregation, "higher_is_better": True} for name in names]


_GSM8K: dict[str, Any] = {
    "doc_to_text": "Question: {{question}}\nAnswer:",
    "doc_to_target": "{{answer}}",
    "num_fewshot": 5,
    "generation_kwargs": {"until": ["Question:", "</s>", "<|im_end|>"], "do_sample": False},
    "metric_list": [
        {
            "metric": "exact_match",
            "aggregation": "mean",
            "higher_is_better": True,
            "ignore_case": True,
            "ignore_punctuation": False,
            "regexes_to_ignore": [",", r"\$", "(?s).*#### ", r"\.$"],
        }
    ],
    "filter_list": [
        {
            "name": "strict-match",
            "filter": [
                {"function": "regex", "regex_pattern": r"#### (\-?[0-9\.\,]+)"},
                {"function": "take_first"},
            ],
        },
        {
            "name": "flexible-extract",
            "filter": [
                {
                    "function": "regex",
                    "group_select": -1,
                    "regex_pattern": r"(-?[$0-9.,]{2,})|(-?[0-9]+)",
                },
                {"function": "take_first"},
            ],
        },
    ],
}
_IFEVAL: dict[str, Any] = {
    "doc_to_text": "{{prompt}}",
    "doc_to_target": "",
    "num_fewshot": 0,
    "generation_kwargs": {"until": [], "do_sample": False, "max_gen_toks": 1280},
    "process_results": _ifeval_results,
    "metric_list": [
        *_metrics("prompt_level_strict_acc", "prompt_level_loose_acc"),
        *_metrics("inst_level_strict_acc", "inst_level_loose_acc", aggregation=share_followed),
    ],
}
_HUMANEVAL: dict[str, Any] = {
    "doc_to_text": "{{prompt}}",
    "doc_to_target": "",
    "num_fewshot": 0,
    "generation_kwargs": {
        "until": ["\nclass", "\ndef", "\n#", "\nif", "\nprint"],
        "max_gen_toks": 1024,
        "do_sample": False,
    },
    "process_results": _humaneval_results,
    "metric_list": _metrics("pass@1"),
}
_MBPP: dict[str, Any] = {
    "doc_to_text": _mbpp_text,
    "doc_to_target": _mbpp_target,
    "target_delimiter": "",
    "num_fewshot": 3,
    "generation_kwargs": {"until": ["[DONE]"], "do_sample": False},
    "process_results": _mbpp_results,
    "metric_list": _metrics("pass@1"),
}
OFFLINE: Mapping[str, tuple[Callable[[Row], None], Mapping[str, type], dict[str, Any]]] = {
    "gsm8k_local": (_has_number, {"question": str, "answer": str}, _GSM8K),
    "ifeval_local": (
        _knows_instructions,
        {"prompt": str, "instruction_id_list": list, "kwargs": list},
        _IFEVAL,
    ),
    "humaneval_local": (_no_check, {"prompt": str, "test": str, "entry_point": str}, _HUMANEVAL),
    "mbpp_local": (_has_tests, {"text": str, "code": str, "test_list": list}, _MBPP),
}
CODE = frozenset(("humaneval_local", "mbpp_local"))
