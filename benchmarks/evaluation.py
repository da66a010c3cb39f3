"""lm-eval on our passes and engine beside lm-eval's own Hugging Face model: equal numbers, and the speed.

    python -m benchmarks evaluation --model models/SmolLM2-135M-Instruct --data gsm8k_test.jsonl

Four local tasks are made of GSM8K's rows: multiple choice without examples (the answers of a question share
the question) and with two (questions share the examples), generation with GSM8K's filters, and the
log-likelihood of whole texts in windows. Both sides run them in one process, one after the other, in float32.
Ours runs each twice; the first run compiles, or finds compiled programs in JAX's cache.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from lm_eval.api.model import LM
from lm_eval.models.huggingface import HFLM

from middo_jax.config.evaluation import EvaluateSettings
from middo_jax.evaluation.benchmarks import run_tasks
from middo_jax.evaluation.harness import HarnessModel
from middo_jax.evaluation.pairs import Encoder
from middo_jax.session import session_for
from middo_jax.stages.benchmark import SessionBackend

METHODS = ("loglikelihood", "loglikelihood_rolling", "generate_until")
QUESTION = "Question: {{question}}\nAnswer:"


class Measured(NamedTuple):
    """What one side found on one task, and how many seconds its requests took."""

    results: Mapping[str, Any]
    resps: list[Any]
    seconds: float


def write_tasks(folder: Path, data: Path, args: argparse.Namespace) -> dict[str, int]:
    """Writes the tasks and their rows; returns the number of rows of each."""
    lines = data.read_text(encoding="utf-8").splitlines()
    gsm8k = [json.loads(line) for line in lines]
    answers = [row["answer"].rpartition("#### ")[2] for row in gsm8k]
    rng = np.random.default_rng(0)

    def choice_row(i: int) -> dict[str, Any]:
        others = [a for a in rng.permutation(answers).tolist() if a != answers[i]][:3]
        place = int(rng.integers(4))
        offered = [*others[:place], answers[i], *others[place:]]
        texts = [f"The answer is {answer} in all." for answer in offered]
        return {"question": gsm8k[i]["question"], "choices": texts, "answer": place}

    rows = {
        "choice": [choice_row(i) for i in range(args.choice)],
        "choice_shots": [choice_row(i) for i in range(args.choice_shots)],
        "rolling": [{"text": row["question"] + "\n" + row["answer"]} for row in gsm8k[: args.rolling]],
        "generation": gsm8k[: args.generation],
    }
    choice = {
        "output_type": "multiple_choice",
        "doc_to_text": QUESTION,
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    shots = {"num_fewshot": 2, "fewshot_split": "test", "fewshot_config": {"sampler": "first_n"}}
    regex = {"function": "regex", "group_select": -1, "regex_pattern": "(-?[$0-9.,]{2,})|(-?[0-9]+)"}
    generation = {
        "output_type": "generate_until",
        "doc_to_text": QUESTION,
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["Question:"], "do_sample": False, "max_gen_toks": args.answer_tokens},
        "filter_list": [{"name": "flexible", "filter": [regex, {"function": "take_first"}]}],
        "metric_list": [
            {
                "metric": "exact_match",
                "aggregation": "mean",
                "higher_is_better": True,
                "regexes_to_ignore": [",", "(?s).*#### "],
            }
        ],
    }
    rolling = {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [
            {"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False}
        ],
    }
    forms = {"choice": choice, "choice_shots": choice | shots, "rolling": rolling, "generation": generation}
    for name, form in forms.items():
        file = folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows[name]), encoding="utf-8")
        data_files = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(file)}}}
        config = {"task": name, **data_files, "test_split": "test", **form}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    return {name: len(of) for name, of in rows.items()}


def timed(lm: LM, settings: EvaluateSettings) -> Measured:
    """Runs one task; only the model's methods are timed."""
    seconds = 0.0

    def wrap(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            nonlocal seconds
            began = time.monotonic()
            try:
                return method(*given, **named)
            finally:
                seconds += time.monotonic() - began

        return call

    before = {name: getattr(lm, name) for name in METHODS}
    for name, method in before.items():
        setattr(lm, name, wrap(method))
    try:
        found, _ = run_tasks(lm, settings)
    finally:
        for name in METHODS:
            delattr(lm, name)
    (task,) = settings.tasks
    resps = [resp[0] for sample in found["samples"][task] for resp in sample["resps"]]
    return Measured(found["results"][task], resps, seconds)


def compared(ours: Measured, theirs: Measured) -> dict[str, Any]:
    """How the numbers of both sides differ."""
    metrics = {
        key: [ours.results[key], value]
        for key, value in theirs.results.items()
        if isinstance(value, float) and "_stderr" not in key
    }
    if isinstance(theirs.resps[0], str):
        equal = sum(a == b for a, b in zip(ours.resps, theirs.resps, strict=True))
        return {"equal_answers": f"{equal} of {len(theirs.resps)}", "metrics": metrics}
    ours_n, theirs_n = log_likelihoods(ours), log_likelihoods(theirs)
    found = {
        "largest_difference": float(np.abs(ours_n - theirs_n).max()),
        "largest_relative_difference": float((np.abs(ours_n - theirs_n) / np.abs(theirs_n)).max()),
        "metrics": metrics,
    }
    if isinstance(theirs.resps[0], tuple):
        equal = (a[1] == b[1] for a, b in zip(ours.resps, theirs.resps, strict=True))
        found["equal_greedy"] = all(equal)
    return found


def distances(args: argparse.Namespace, settings: EvaluateSettings, *sides: Measured) -> list[float]:
    """How far each side is from lm-eval's own model in float64, on the first rows: the largest difference.

    So a difference between two sides in float32 can be told from an error of one of them.
    """
    few = settings.model_copy(update={"limit": args.reference})
    exact = log_likelihoods(timed(hf_model(args, "float64", settings.max_length), few))
    return [float(np.abs(log_likelihoods(side)[: len(exact)] - exact).max()) for side in sides]


def log_likelihoods(of: Measured) -> np.ndarray:
    """[n] float64, without whether they are greedy."""
    return np.asarray(of.resps, np.float64).reshape(len(of.resps), -1)[:, 0]


def hf_model(args: argparse.Namespace, dtype: str, max_length: int) -> HFLM:
    """lm-eval's own model on the CPU."""
    # Its metaclass hides the signature from type checkers.
    settings: dict[str, Any] = {
        "pretrained": str(args.model),
        "dtype": dtype,
        "softmax_dtype": dtype,
        "device": "cpu",
        "batch_size": args.batch_size,
        "max_length": max_length,
    }
    return HFLM(**settings)


def main() -> None:
    """Runs both sides and prints one object of JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="GSM8K's test rows as JSON lines")
    parser.add_argument("--choice", type=int, default=32, help="questions without examples")
    parser.add_argument("--choice-shots", type=int, default=16, help="questions with two examples")
    parser.add_argument("--generation", type=int, default=8, help="questions to answer")
    parser.add_argument("--answer-tokens", type=int, default=64)
    parser.add_argument("--rolling", type=int, default=8, help="texts")
    parser.add_argument("--window", type=int, default=128, help="tokens of a window of a text")
    parser.add_argument("--reference", type=int, default=2, help="rows that are also computed in float64")
    parser.add_argument("--batch-size", type=int, default=8, help="of lm-eval's own model")
    args = parser.parse_args()
    versions = {
        name: importlib.metadata.version(name) for name in ("lm_eval", "jax", "torch", "transformers")
    }
    report: dict[str, Any] = {"machine": platform.processor() or platform.machine(), **versions, "tasks": {}}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = write_tasks(folder, args.data, args)
        for task, count in rows.items():
            length = args.window if task == "rolling" else 2048
            settings = EvaluateSettings(tasks=(task,), include_path=str(folder), max_length=length)
            named = {"serve.max_batch": args.batch_size, "evaluate.max_length": length}
            session = session_for(args.model, None, named)
            backend = SessionBackend(session, args.model, session.load_model(args.model))
            lm = HarnessModel(Encoder(session.tokenizer), backend, length, session.progress.say)
            first, again = timed(lm, settings), timed(lm, settings)
            theirs = timed(hf_model(args, "float32", length), settings)
            report["tasks"][task] = {
                "rows": count,
                "seconds": {"ours": again.seconds, "ours_compiling": first.seconds, "theirs": theirs.seconds},
                "times_as_fast": theirs.seconds / again.seconds,
                "times_as_fast_compiling": theirs.seconds / first.seconds,
                "repeats_itself": first.resps == again.resps,
                **compared(again, theirs),
            }
            if task != "generation" and args.reference:
                from_float64 = distances(args, settings, again, theirs)
                report["tasks"][task]["from_float64"] = dict(
                    zip(("ours", "theirs"), from_float64, strict=True)
                )
            session.progress.say(json.dumps({task: report["tasks"][task]}))
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
