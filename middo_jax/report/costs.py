"""The cost of a round's refining by axes, from the ledger in the manifest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

_SUMMED = (
    "requests",
    "retries",
    "failed",
    "from_cache",
    "prompt_tokens",
    "cached_tokens",
    "completion_tokens",
    "seconds",
    "usd",
    "aside_usd",
)


def costs(usage: Mapping[str, Mapping[str, float]] | None, tasks: Sequence[Mapping[str, Any]]) -> Any:
    """Costs per combination of axes and in all, also per 1,000 accepted samples; None without usage.

    Args:
      usage: counters by axes, from the manifest of the stage.
      tasks: rows of refined.jsonl.
    """
    if not usage:
        return None
    accepted = Counter("+".join(task["axes"]) for task in tasks if task["accepted"])
    rows = [_row(axis, counters, accepted[axis]) for axis, counters in sorted(usage.items())]
    total = {name: sum(counters[name] for counters in usage.values()) for name in _SUMMED}
    return {"rows": rows, "total": _row("all", total, accepted.total())}


def _row(axis: str, counters: Mapping[str, float], accepted: int) -> dict[str, Any]:
    tokens = counters["prompt_tokens"] + counters["completion_tokens"]

    def per_thousand(amount: float) -> float | None:
        return 1000 * amount / accepted if accepted else None

    return {
        "axis": axis,
        "accepted": accepted,
        **{name: counters[name] for name in _SUMMED},
        "tokens_per_thousand": per_thousand(tokens),
        "usd_per_thousand": per_thousand(counters["usd"]),
        "seconds_per_thousand": per_thousand(counters["seconds"]),
    }
