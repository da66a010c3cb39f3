"""The offline tasks end to end in lm-eval, with a model whose answers are given."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from lm_eval.tasks import TaskManager
from support.tiny_model import tiny_tokenizer
from transformers import PreTrainedTokenizerFast

from middo_jax.config import ConfigError
from middo_jax.config.evaluation import EvaluateSettings
from middo_jax.evaluation import benchmarks
from middo_jax.evaluation.benchmarks import check_tasks, run_benchmarks
from middo_jax.evaluation.harness import HarnessModel, Prompt
from middo_jax.evaluation.pairs import Encoder, Pair
from middo_jax.rundir.rows import BenchmarkScoreRow
from middo_jax.rundir.schemas import faults

TOKENIZER = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer(), eos_token="<|im_end|>")
ROWS: dict[str, list[dict[str, Any]]] = {
    "gsm8k_test": [
        {"question": f"What is {i} + 1000?", "answer": f"It is.\n#### {i + 1000:,}"} for i in range(8)
    ],
    "ifeval": [
        {"prompt": "No comma.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}], "key": 1},
        {
            "prompt": "No comma, and repeat this.",
            "instruction_id_list": ["punctuation:no_comma", "combination:repeat_prompt"],
            "kwargs": [{"keywords": None}, {"prompt_to_repeat": "No comma, and repeat this."}],
            "key": 2,
        },
    ],
    "humaneval": [
        {
            "prompt": "def add(a, b):\n",
            "test": "def check(f):\n    assert f(1, 2) == 3",
            "entry_point": "add",
            "canonical_solution": "    return a + b\n",
        }
    ]
    * 2,
    "mbpp": [
        {"text": f"Return {i}.", "code": f"def f():\n    return {i}", "test_list": [f"assert f() == {i}"]}
        for i in range(4)
    ],
}


class Answering:
    """Answers each prompt by a function of its text."""

    def __init__(self, answers: Sequence[str]) -> None:
        self.given, self.prompts = list(answers), list[str]()

    def log_likelihoods(self, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
        return [(-float(sum(pair.continuation)) / 100, False) for pair in pairs]

    def answers(self, prompts: Sequence[Prompt]) -> list[str]:
        self.prompts += [str(TOKENIZER.decode(prompt.tokens)) for prompt in prompts]
        return self.given[: len(prompts)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for name, rows in ROWS.items():
        (folder / f"{name}.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"
        )
    return folder


def run(
    data: Path, task: str, answers: Sequence[str], **settings: Any
) -> tuple[list[BenchmarkScoreRow], list[str]]:
    backend = Answering(answers)
    lm = HarnessModel(Encoder(TOKENIZER), backend, 4096, lambda text: None)
    rows = run_benchmarks(lm, EvaluateSettings(tasks=(task,), local_data=str(data), **settings))
    assert [fault for row in rows for fault in faults(row, BenchmarkScoreRow)] == []
    return rows, backend.prompts


def values(rows: Sequence[BenchmarkScoreRow]) -> dict[str, float]:
    return {f"{row['metric']},{row['filter']}": row["value"] for row in rows}


def test_gsm8k_finds_the_number(data: Path) -> None:
    answers = ["#### 1000", "It is 1,001.", "#### $1,002", "no", "#### 1,004", "1005 or 7", "", "#### 1007."]
    rows, prompts = run(data, "gsm8k_local", answers)
    assert values(rows) == {"exact_match,strict-match": 3 / 8, "exact_match,flexible-extract": 5 / 8}
    assert rows[0]["stderr"] == pytest.approx((3 / 8 * 5 / 8 / 7) ** 0.5)
    assert (rows[0]["n"], rows[0]["num_fewshot"], rows[0]["kind"]) == (8, 5, "generative")
    assert all(prompt.count("Question:") == 6 for prompt in prompts)
    assert all(prompt.count(f"What is {i} + 1000?") == 1 for i, prompt in enumerate(prompts))
    assert prompts == run(data, "gsm8k_local", answers)[1]


def test_ifeval_counts_prompts_and_instructions(data: Path) -> None:
    rows, prompts = run(data, "ifeval_local", ["Here, a line.\nNo comma", "No comma, and repeat this. Yes."])
    assert prompts == [row["prompt"] for row in ROWS["ifeval"]]
    assert values(rows) == {
        "prompt_level_strict_acc,none": 0.0,
        "prompt_level_loose_acc,none": 0.5,
        "inst_level_strict_acc,none": 1 / 3,
        "inst_level_loose_acc,none": 2 / 3,
    }


def test_code_is_run_against_its_tests(data: Path) -> None:
    rows, _ = run(data, "humaneval_local", ["    return a + b\n", "    return a - b\n"], allow_code=True)
    assert values(rows) == {"pass@1,none": 0.5}
    answers = ["def f():\n    return 0", "import sys; sys.exit(0)", "def f():\n    return 2", "def f(:"]
    rows, prompts = run(data, "mbpp_local", answers, allow_code=True, num_fewshot=1)
    assert values(rows) == {"pass@1,none": 0.5}
    assert prompts[0].count("[BEGIN]") == 2
    assert prompts[0].count("[DONE]") == 1
    assert prompts[0].endswith("assert f() == 0\n[BEGIN]\n")


@pytest.mark.parametrize("task", ["humaneval_local", "mbpp_local"])
def test_no_code_is_run_unless_allowed(data: Path, task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "middo_jax.evaluation.offline.suite.run_program", lambda program: pytest.fail(program)
    )
    with pytest.raises(ConfigError, match=r"evaluate\.allow_code=true"):
        run(data, task, [""] * 4)


def test_what_is_missing_or_wrong_is_said_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # lm-eval's own index takes seconds to read.
    monkeypatch.setattr(benchmarks, "_with_defaults", lambda folder: TaskManager(include_defaults=False))

    def message(task: str, **settings: Any) -> str:
        with pytest.raises(ConfigError) as error:
            check_tasks(EvaluateSettings(tasks=(task,), **settings))
        return str(error.value)

    assert "lm-eval has no task, group or tag 'gsm9k'" in message("gsm9k")
    assert "needs evaluate.local_data" in message("gsm8k_local")
    assert "needs one of gsm8k.jsonl, gsm8k_test.jsonl in" in message("gsm8k_local", local_data=str(tmp_path))
    assert "is not a folder" in message("arc_easy", include_path=str(tmp_path / "none"))
    bad = {
        "gsm8k": (
            '{"question": "a", "answer": "5"}',
            "gsm8k.jsonl:1: not a row of this task: answer has no number",
        ),
        "mbpp": ('{"text": "a", "code": "b", "test_list": []}', "mbpp.jsonl:1: .* at least one"),
        "ifeval": (
            '{"prompt": "a", "instruction_id_list": ["x:y"], "kwargs": [{}]}',
            "ifeval.jsonl:1: .* no instruction is called 'x:y'",
        ),
        "humaneval": ('{"prompt": "a"}', "humaneval.jsonl:1: .* test is missing"),
    }
    for stem, (line, expected) in bad.items():
        (tmp_path / f"{stem}.jsonl").write_text(line, encoding="utf-8")
        with pytest.raises(ConfigError, match=expected):
            check_tasks(EvaluateSettings(tasks=(f"{stem}_local",), local_data=str(tmp_path)))
    (tmp_path / "gsm8k.jsonl").write_text("\n", encoding="utf-8")
    assert "no rows" in message("gsm8k_local", local_data=str(tmp_path))


MULTIPLE_CHOICE = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


def test_local_tasks_and_groups_work_without_a_hub(tmp_path: Path) -> None:
    rng = random.Random(0)
    choices = [[f" {rng.randint(0, 99)}" for _ in range(3)] for _ in range(6)]
    data = tmp_path / "mc.jsonl"
    data.write_text(
        "".join(
            json.dumps({"question": f"Q{i}", "choices": c, "answer": i % 3}) + "\n"
            for i, c in enumerate(choices)
        )
    )
    for name in ("mc_a", "mc_b"):
        (tmp_path / f"{name}.yaml").write_text(MULTIPLE_CHOICE.format(name=name, data=data))
    (tmp_path / "both.yaml").write_text(
        "group: both\ntask: [mc_a, mc_b]\naggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"
    )
    lm = HarnessModel(Encoder(TOKENIZER), Answering([]), 512, lambda text: None)
    rows = run_benchmarks(lm, EvaluateSettings(tasks=("both",), include_path=str(tmp_path)))
    by_task = {task: [row for row in rows if row["task"] == task] for task in ("both", "mc_a", "mc_b")}
    assert [row["metric"] for row in by_task["both"]] == ["answer_p", "acc"]
    assert {row["group"] for row in by_task["mc_a"]} == {"both"}
    assert (by_task["both"][0]["n"], by_task["mc_a"][0]["n"]) == (12, 6)
    assert by_task["both"][0]["value"] == pytest.approx(by_task["mc_a"][0]["value"])
    assert 0 < by_task["both"][0]["value"] < 1
    assert {row["kind"] for row in rows} == {"log-likelihood"}
