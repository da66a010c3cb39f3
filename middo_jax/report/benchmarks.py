"""The scores on `evaluate.tasks`, of all models of a run, for the terminal and for the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from middo_jax.rundir.rows import BenchmarkScoreRow, BenchmarksFile


def benchmark_table(files: Sequence[BenchmarksFile]) -> dict[str, Any]:
    """One row per metric of each task or group that was asked for, and the score of every model.

    Args:
      files: of the rounds and of `final`, in order.

    Returns:
      {"models": names, "rows": [{task, metric, filter, kind, n, num_fewshot, first: whether it is the task's
      first metric, scores: [{value, stderr} | None per model]}], "lm_eval", "chat_template", "limit"}; rows
      is empty where nothing was measured.
    """
    models = [model for file in files for model in file["models"]]
    columns = [{_key(row): row for row in model["scores"] if row["group"] is None} for model in models]
    keys = dict.fromkeys(key for column in columns for key in column)
    seen: set[str] = set()
    rows = []
    for key in keys:
        found = [column.get(key) for column in columns]
        some = next(row for row in found if row is not None)
        rows.append(
            {name: some[name] for name in ("task", "metric", "filter", "kind", "n", "num_fewshot")}
            | {
                "first": some["task"] not in seen,
                "scores": [row and {"value": row["value"], "stderr": row["stderr"]} for row in found],
            }
        )
        seen.add(some["task"])
    about = {name: files[-1][name] if files else None for name in ("lm_eval", "chat_template", "limit")}
    return {"models": [model["name"] for model in models], "rows": rows, **about}


def _key(row: BenchmarkScoreRow) -> tuple[str, str, str]:
    return row["task"], row["metric"], row["filter"]


def score_text(score: Mapping[str, float | None] | None) -> str:
    """0.4123 +- 0.0101; - where there is none."""
    if score is None:
        return "-"
    stderr = score["stderr"]
    return f"{score['value']:.4f}" if stderr is None else f"{score['value']:.4f} +- {stderr:.4f}"


def render_benchmarks(files: Sequence[BenchmarksFile]) -> str:
    """All metrics of what was asked for, as a table of text."""
    return "\n".join(_aligned(benchmark_table(files), first_only=False))


def benchmark_lines(table: Mapping[str, Any]) -> list[str]:
    """The first metric of each task, of a result of `benchmark_table`; no line where nothing was measured."""
    return (
        ["benchmarks:", *(f"  {line}" for line in _aligned(table, first_only=True))] if table["rows"] else []
    )


def _aligned(table: Mapping[str, Any], first_only: bool) -> list[str]:
    head = ["task", "metric", "kind", "rows", *table["models"]]
    rows = [
        [row["task"], metric_text(row), row["kind"], f"{row['n']:,}", *map(score_text, row["scores"])]
        for row in table["rows"]
        if row["first"] or not first_only
    ]
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in [head, *rows]
    ]


def metric_text(row: Mapping[str, Any]) -> str:
    """The metric, and how answers were extracted if there are several ways."""
    return row["metric"] if row["filter"] == "none" else f"{row['metric']}, {row['filter']}"
