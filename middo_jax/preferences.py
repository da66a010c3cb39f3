"""Preference pairs of a run, in TRL's format with an explicit prompt: the accepted answer, and one that lost.

    {"prompt": [turns], "chosen": [answer], "rejected": [answer], "rejected_from": "original", ...}

An original or a losing candidate may have answered another prompt than the accepted one; `same_prompt` says
so, since most trainings want pairs of one prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from middo_jax.data.example import Example
from middo_jax.data.reply import answer_text, control_token
from middo_jax.report.status import judged_tasks, takes_back
from middo_jax.rundir import RoundDir, RunDir, read_jsonl

SCORES = ("loss_post", "quality")


def preference_pairs(run: RunDir) -> list[dict[str, Any]]:
    """The pairs of all rounds: each accepted rewrite against its original, and against earlier candidates.

    Additions have no original, so that only their losing candidates make pairs. Left out are pairs of equal
    answers, rewrites that were taken back, and candidates with a control token, which a trainer's tokenizer
    would read as one.
    """
    folders = [folder for folder in run.rounds() if folder.refined.exists()]
    back = [folder for folder in folders if takes_back(run) and folder.taken_back.exists()]
    worse = {row["id"] for folder in back for row in read_jsonl(folder.taken_back)}
    pairs = [pair for folder in folders for pair in _of_round(folder)]
    return [pair for pair in pairs if pair["middo_id"] not in worse]


def _of_round(folder: RoundDir) -> Iterator[dict[str, Any]]:
    measured: dict[tuple[str, int], Mapping[str, Any]] = {}
    if folder.candidates.exists():
        measured = {(row["task_id"], row["attempt"]): row for row in read_jsonl(folder.candidates)}
    answers: dict[str, dict[int, dict[str, Any]]] = {}
    if folder.requests.exists():
        for row in read_jsonl(folder.requests):
            if row.get("step") == "answer":  # of several answers of an attempt, the last one counts
                answers.setdefault(row["task_id"], {})[row["attempt"]] = row
    for task in judged_tasks(folder) or ():
        if not task["accepted"]:
            continue
        child, original = Example.from_json(task["example"]), Example.from_json(task["original"])
        after = child.lineage.scores_after or {}
        if task["replaces"]:
            same = _same(child.question, original.question) and child.context == original.context
            before = task.get("scores_before") or child.lineage.scores_before or {}
            yield from _pair(child, original.response, "original", same, after, before)
        for attempt, row in sorted(answers.get(task["task_id"], {}).items()):
            if attempt >= task.get("attempts", 1) - 1:
                continue
            asked, prompt = [t["content"] for t in row["messages"]], [m.content for m in child.messages[:-1]]
            if len(asked) != len(prompt):
                continue  # with `refine.turns: all`: the attempt ended at an earlier turn
            given = " ".join(asked)
            text = answer_text(row["answer"], given)
            if control_token(text, given) is not None:
                continue
            found = (measured.get((task["task_id"], attempt)) or {}).get("measured") or {}
            scores = {"loss_post": found.get("loss"), "quality": found.get("quality")}
            yield from _pair(child, text, "candidate", asked == prompt, after, scores)


def _pair(
    child: Example,
    rejected: str,
    origin: str,
    same_prompt: bool,
    after: Mapping[str, float | None],
    before: Mapping[str, float | None],
) -> Iterator[dict[str, Any]]:
    if not rejected.strip() or _same(rejected, child.response):
        return
    *prompt, answer = child.messages
    yield {
        "prompt": [{"role": m.role, "content": m.content} for m in prompt],
        "chosen": [{"role": "assistant", "content": answer.content}],
        "rejected": [{"role": "assistant", "content": rejected.strip()}],
        "rejected_from": origin,
        "same_prompt": same_prompt,
        "middo_id": child.id,
        "id_user": child.user_id,
        "middo_axis": child.lineage.axis,
        **{f"chosen_{name}": after.get(name) for name in SCORES},
        **{f"rejected_{name}": before.get(name) for name in SCORES},
    }


def _same(one: str, other: str) -> bool:
    return " ".join(one.split()) == " ".join(other.split())
