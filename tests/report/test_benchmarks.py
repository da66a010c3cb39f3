"""The scores on benchmarks, as a reader of the report and of `middo status` sees them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from support.synthetic_run import write_run

from middo_jax.report.benchmarks import benchmark_table, render_benchmarks
from middo_jax.report.build import page
from middo_jax.report.status import render_status, status
from middo_jax.rundir import RoundDir, write_json
from middo_jax.rundir.rows import BenchmarksFile
from middo_jax.rundir.schemas import faults


def score(task: str, metric: str, value: float, **more: Any) -> Any:
    row = {"task": task, "group": None, "metric": metric, "filter": "none", "value": value, "stderr": 0.01}
    row |= {"n": 1234, "higher_is_better": True, "kind": "log-likelihood", "num_fewshot": 0, "version": "1"}
    return row | more


def scores_file(*models: tuple[str, list[Any]]) -> BenchmarksFile:
    found: BenchmarksFile = {
        "lm_eval": "0.4.13",
        "chat_template": False,
        "limit": 50,
        "models": [{"name": name, "scores": scores} for name, scores in models],
    }
    assert faults(found, BenchmarksFile) == []
    return found


FIRST = scores_file(
    ("base", [score("arc_easy", "answer_p", 0.25), score("arc_easy", "acc", 0.3, stderr=None)]),
    ("round_00", [score("arc_easy", "answer_p", 0.26), score("arc_stem", "acc", 0.1, group="arc_easy")]),
)
LAST = scores_file(("final", [score("gsm8k", "exact_match", 0.5, filter="strict-match", kind="generative")]))


def test_the_table_has_a_column_per_model_and_a_row_per_metric_asked_for() -> None:
    table = benchmark_table([FIRST, LAST])
    assert table["models"] == ["base", "round_00", "final"]
    assert [(row["task"], row["metric"], row["first"]) for row in table["rows"]] == [
        ("arc_easy", "answer_p", True),
        ("arc_easy", "acc", False),
        ("gsm8k", "exact_match", True),
    ]
    assert render_benchmarks([FIRST, LAST]).splitlines()[1:] == [
        "arc_easy  answer_p                   log-likelihood  1,234  0.2500 +- 0.0100  0.2600 +- 0.0100  -",
        "arc_easy  acc                        log-likelihood  1,234  0.3000            -                 -",
        "gsm8k     exact_match, strict-match  generative      1,234  -                 -                 "
        "0.5000 +- 0.0100",
    ]
    assert benchmark_table([])["rows"] == []


def test_status_and_report_show_them_and_only_where_there_are_any(tmp_path: Path) -> None:
    run = write_run(tmp_path / "demo")
    assert status(run)["benchmarks"]["rows"] == []
    assert "benchmark" not in render_status(status(run))
    assert "Benchmarks" not in page(run)
    settings = yaml.safe_load(run.config.read_text(encoding="utf-8"))
    settings["evaluate"] = {"tasks": ["arc_easy"]}
    run.config.write_text(yaml.safe_dump(settings), encoding="utf-8")
    for folder, found in ((run.round(0), FIRST), (run.final, LAST)):
        write_json(folder.benchmarks, found)
        RoundDir(folder.path).finish("benchmark", [folder.benchmarks], 3.0)
    text = render_status(status(run))
    assert "benchmarks:" in text
    assert "arc_easy  answer_p                   log-likelihood  1,234  0.2500 +- 0.0100" in text
    shown = page(run)
    assert "Scores by lm-eval 0.4.13, without the chat template, on the first 50 rows of each task." in shown
    assert "<td>0.2500 ± 0.0100</td>" in shown
    run.round(0).benchmarks.write_text("{}", encoding="utf-8")  # damaged: stale, and not shown
    assert status(run)["benchmarks"]["models"] == ["final"]
