"""What refining did to a dataset, as Markdown: ends by reason, tokens and time, ten pairs before and after.

    middo score --data alpaca.json --model TUNED --pre-model BASE --out scored data.limit=200
    middo select scored {complexity,diversity,quality}.m=null {complexity,diversity,quality}.fraction=0.4
    middo refine scored refine.base_url=http://127.0.0.1:8000/v1 refine.model=NAME
    python -m benchmarks refine_examples scored

With these fractions nearly every row is worked on. The ten pairs are chosen by a rule that nobody can bend:
the accepted rewrites whose ids, the SHA-256 of their text, are smallest. Reads the folder only. The seconds
are those of the last start: where it found answers in the cache, they say little.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from middo_jax.config.gates import gate
from middo_jax.data.example import Example
from middo_jax.rundir import RoundDir, read_jsonl

PAIRS = 10
SHOWN = 700  # characters of a text
VERBS = {"simplify": "simplified", "rewrite": "rewritten", "synthesize": "new, beside its sparse core"}


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table; all but the first column to the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def ends(candidates: Sequence[dict[str, Any]]) -> str:
    """How many candidates ended how, by the axes that asked for them."""
    groups = sorted({tuple(row["axes"]) for row in candidates})
    kinds = Counter(_end(row) for row in candidates)
    found = Counter((_end(row), tuple(row["axes"])) for row in candidates)
    rows = [
        [kind, *(found[kind, group] for group in groups), n, f"{n / len(candidates):.1%}"]
        for kind, n in kinds.most_common()
    ]
    return table(["end", *(" + ".join(group) for group in groups), "all", "share"], rows)


def _end(row: dict[str, Any]) -> str:
    """What a candidate is counted by: its gate, or what that found where it has several faults."""
    if row["accepted"]:
        return "accepted"
    name: str | None = row["gate"]
    has_one_fault = name is not None and len(gate(name).feedback) == 1
    return name if name is not None and has_one_fault else row["detail"].partition(":")[0]


def costs(directory: RoundDir, tasks: Sequence[dict[str, Any]]) -> str:
    """Tokens, requests and seconds for a thousand samples worked on."""
    record = directory.stages()["refine"]
    used: Counter[str] = Counter()
    for task in tasks:
        used.update(task["usage"])
    per_thousand = 1000 / len(tasks)
    rows = [[name.replace("_", " "), f"{n:,}", f"{n * per_thousand:,.0f}"] for name, n in used.items()]
    rows.append(
        ["seconds of the stage", f"{record['seconds']:,.0f}", f"{record['seconds'] * per_thousand:,.0f}"]
    )
    return table(["", "in all", "for a thousand samples"], rows)


def pair(task: dict[str, Any], measured: dict[str, Any] | None) -> str:
    """One accepted rewrite: both prompts, both responses, and what was measured of them."""
    original, child = Example.from_json(task["original"]), Example.from_json(task["example"])
    texts = (
        ("Prompt before", original.prompt),
        ("Prompt after", child.prompt),
        ("Response before", original.response),
        ("Response after", child.response),
    )
    parts = [f"### `{child.id}`: {' + '.join(task['axes'])}, {VERBS[task['op']]}"]
    parts += [f"{title}:\n\n{fenced(text)}" for title, text in texts]
    if measured is not None:
        before = task["scores_before"]
        changes = [("loss", before["loss_post"], measured["loss"])]
        if task["op"] == "synthesize":
            changes.append(("core's similarity", before["knn_mean_sim"], measured["core_similarity"]))
        if measured["quality"] is not None:
            changes.append(("rating", before["quality"], measured["quality"]))
        parts.append(", ".join(f"{name} {old:.3f} → {new:.3f}" for name, old, new in changes) + ".")
    return "\n\n".join(parts)


def fenced(text: str) -> str:
    """The text's beginning in a fence that it cannot close."""
    text = text if len(text) <= SHOWN else text[:SHOWN].rstrip() + " [...]"
    fence = "~" * 3
    while fence in text:
        fence += "~"
    return f"{fence}text\n{text}\n{fence}"


def main() -> None:
    """Reads the folder and prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "directory", type=Path, help="a folder that `middo refine` has finished, or a round's"
    )
    directory = RoundDir(parser.parse_args().directory)
    if not directory.is_done("refine"):
        raise SystemExit(f"{directory.path}: nothing refined there yet; run `middo refine {directory.path}`")
    candidates, tasks = read_jsonl(directory.candidates), read_jsonl(directory.refined)
    if not tasks:
        raise SystemExit(f"{directory.path}: no sample was selected, so none was refined")
    accepted = sorted((task for task in tasks if task["accepted"]), key=lambda task: task["example"]["id"])
    measured = {row["candidate_id"]: row["measured"] for row in candidates if row["accepted"]}
    refiners = {task["example"]["lineage"]["refiner"] for task in accepted}
    attempts = max(task["attempts"] for task in tasks)
    print(f"## {len(accepted)} of {len(tasks)} samples accepted")
    print(f"\nRefiner: {', '.join(sorted(refiners)) or 'unknown'}; at most {attempts} attempts a sample.\n")
    print(ends(candidates), costs(directory, tasks), sep="\n\n")
    print(f"\n## {min(PAIRS, len(accepted))} pairs")
    for task in accepted[:PAIRS]:
        print(f"\n{pair(task, measured[task['example']['id']])}")


if __name__ == "__main__":
    main()
