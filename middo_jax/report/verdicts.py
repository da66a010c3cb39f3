"""Why a rewrite was not accepted: a gate's verdict or a person's, from the files of a round."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

BY_A_PERSON = "rejected by a person"


class RecordedVerdict(NamedTuple):
    """The gate that rejected a rewrite, and its finding; `gate` is None if, for example, a request failed."""

    gate: str | None
    detail: str | None

    @property
    def kind(self) -> str:
        """The kind by which rejected rewrites are counted."""
        return self.gate or str(self.detail).partition(":")[0]

    def __str__(self) -> str:
        return f"{self.gate}: {self.detail}" if self.gate else str(self.detail)


def verdict(row: Mapping[str, Any]) -> RecordedVerdict:
    """The verdict in a row. Version 0.1 wrote it as one text, and the gate in candidates.jsonl only."""
    if "detail" in row:
        return RecordedVerdict(row["gate"], row["detail"])
    return RecordedVerdict(None, row.get("reason", row.get("reject_reason")))


def after_people(
    tasks: Sequence[Mapping[str, Any]], verdicts: Sequence[Mapping[str, Any]] | None
) -> list[dict[str, Any]]:
    """Rows of refined.jsonl after people's verdicts, as merging reads them.

    A rewrite that a person rejected is not accepted, and one that was edited has the edited conversation.
    `person` is the verdict on an accepted rewrite: accept, edit, reject, or none; None without verdicts.

    Args:
      tasks: rows of refined.jsonl.
      verdicts: rows of verdicts.jsonl; None if nobody judged the round.
    """
    said = {row["id"]: row for row in verdicts or ()}
    found = []
    for task in tasks:
        row: dict[str, Any] = {**task, "person": None}
        if verdicts is not None and task["accepted"]:
            of = said.get(f"{task['task_id']}@{task['example']['id']}", {"verdict": "none"})
            row["person"] = of["verdict"]
            if of["verdict"] == "reject":
                why = f": {of['comment']}" if of["comment"] else ""
                row |= {"accepted": False, "gate": None, "detail": f"{BY_A_PERSON}{why}"}
            elif of["verdict"] == "edit":
                row["example"] = of["example"]
        found.append(row)
    return found


def people(tasks: Sequence[Mapping[str, Any]]) -> Counter[str] | None:
    """How many rewrites got each verdict of a person, see `after_people`; None if nobody judged them."""
    counts = Counter(task["person"] for task in tasks if task["person"] is not None)
    return counts or None


def describe(found: Mapping[str, int]) -> str:
    """The counts of a review in words."""
    named = {
        "accept": "accepted",
        "edit": "accepted with other words",
        "reject": "rejected",
        "none": "not judged, which stay accepted",
        "strangers": "verdicts on other rewrites, which are left out",
    }
    return ", ".join(f"{found[name]:,} {words}" for name, words in named.items() if found.get(name))


def refusals(
    tasks: Sequence[Mapping[str, Any]], requests: Iterable[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """The rows of refined.jsonl that were not accepted, with their verdicts and all answers of the refiner.

    Args:
      tasks: rows of refined.jsonl, see `after_people`.
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
