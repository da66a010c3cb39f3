"""Why a rewrite was not accepted, from the rows of refined.jsonl and candidates.jsonl."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple


class Verdict(NamedTuple):
    """The gate that rejected a rewrite, and its finding; `gate` is None if, for example, a request failed."""

    gate: str | None
    detail: str | None

    @property
    def kind(self) -> str:
        """The kind by which rejected rewrites are counted."""
        return self.gate or str(self.detail).partition(":")[0]

    def __str__(self) -> str:
        return f"{self.gate}: {self.detail}" if self.gate else str(self.detail)


def verdict(row: Mapping[str, Any]) -> Verdict:
    """The verdict in a row. Version 0.1 wrote it as one text, and the gate in candidates.jsonl only."""
    if "detail" in row:
        return Verdict(row["gate"], row["detail"])
    return Verdict(None, row.get("reason", row.get("reject_reason")))


def refusals(
    tasks: Sequence[Mapping[str, Any]], requests: Iterable[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """The rows of refined.jsonl that were not accepted, with their verdicts and all answers of the refiner.

    Args:
      tasks: rows of refined.jsonl.
      requests: rows of requests.jsonl.
    """
    answers: defaultdict[str, list[str]] = defaultdict(list)
    for request in requests:
        answers[request["task_id"]].append(request["answer"])
    return [
        {**task, "verdict": verdict(task), "answers": answers[task["task_id"]]}
        for task in tasks
        if not task["accepted"]
    ]
