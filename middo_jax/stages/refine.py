"""The refining stage: a round's selected samples -> requests, refined and rejected ones, the next dataset."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from middo_jax.data.example import Example
from middo_jax.data.tokenize import steering_tokens
from middo_jax.run_dir import RoundDir, RunError, read_jsonl, write_jsonl
from middo_jax.stages.score import AXES
from middo_jax.workshop import Workshop, endpoint, read_dataset

if TYPE_CHECKING:
    from middo_jax.refine import AnswerCache, Outcome, Task, Usage

LINEAGE_SCORES = ("loss_pre", "loss_post", "knn_mean_sim", "quality")  # what a sample's lineage keeps


def plan_refinement(directory: RoundDir) -> list[Task]:
    """What the refiner would be asked to do, from the folder's dataset, scores and selection."""
    from middo_jax.diagnose.table import read_scores
    from middo_jax.refine import plan_tasks

    if not directory.is_done("select"):
        raise RunError(f"{directory.path}: no selection from its scores there; run `middo select` first")
    axes = json.loads(directory.selection.read_text(encoding="utf-8"))["axes"]
    rows = read_scores(directory.scores).to_pylist()
    return plan_tasks(
        read_dataset(directory),
        *(axes.get(axis, {}).get("ids", ()) for axis in AXES),
        knn_ids={row["id"]: row["knn_ids"] or () for row in rows},
        scores={row["id"]: {name: row[name] for name in LINEAGE_SCORES} for row in rows},
    )


def refine_stage(
    workshop: Workshop,
    directory: RoundDir,
    round_index: int,
    cache: AnswerCache,
    heldout: Sequence[Example] = (),
) -> Usage:
    """Has the selected samples rewritten: requests.jsonl, refined.jsonl, rejected.jsonl. Returns the cost.

    Every answer is in the cache as soon as it comes, so that a second start pays for nothing twice.
    """
    from middo_jax.refine import ChatClient, reject_duplicates, run
    from middo_jax.refine.cache import Usage

    config, began = workshop.config, time.monotonic()
    tasks = plan_refinement(directory)
    outcomes: list[Outcome] = []
    usage = Usage()
    if tasks:
        with endpoint(workshop) as (url, model), workshop.progress.task("rewrites") as advance:
            client = ChatClient(config.refine, url, model, cache, seed=config.seed, usage=usage)

            def on_done(outcome: Outcome) -> None:
                outcomes.append(outcome)
                accepted = sum(o.example is not None for o in outcomes)
                tokens = usage.prompt_tokens + usage.completion_tokens
                note = f"{accepted} accepted, {tokens:,} tokens, {usage.cache_hits} answers from the cache"
                advance(len(outcomes), len(tasks), note)

            steering = steering_tokens(workshop.tokenizer)
            done = run(tasks, client, config.refine, round_index, on_done, special_tokens=steering)
        outcomes = reject_duplicates([*read_dataset(directory), *heldout], done)
    write_jsonl(directory.requests, (row for o in outcomes for row in o.request_rows()))
    write_jsonl(directory.refined, (o.to_json() for o in outcomes))
    refused = read_jsonl(directory.rejected) if directory.rejected.exists() else []
    refused = [row for row in refused if "where" in row]  # `middo score` keeps unusable input rows here
    refused += [o.rejected_row() for o in outcomes if o.example is None]
    write_jsonl(directory.rejected, refused)
    files = [directory.requests, directory.refined, directory.rejected]
    accepted = sum(o.example is not None for o in outcomes)
    directory.finish(
        "refine", files, time.monotonic() - began, n=len(outcomes), accepted=accepted, usage=usage.to_json()
    )
    return usage


def merged_dataset(directory: RoundDir) -> list[Example]:
    """D_{t+1}: the folder's dataset with its accepted rewrites, each survivor told what it now scores."""
    from middo_jax.diagnose.table import read_scores
    from middo_jax.refine import Outcome, merge

    examples = read_dataset(directory)
    rows = read_scores(directory.scores).to_pylist()
    scores = {row["id"]: {name: row[name] for name in LINEAGE_SCORES} for row in rows}

    def with_scores(example: Example) -> Example:
        # Once: the first round after a rewrite says what it was good for.
        if example.lineage.op == "seed" or example.lineage.scores_after is not None:
            return example
        lineage = dataclasses.replace(example.lineage, scores_after=scores[example.id])
        return dataclasses.replace(example, lineage=lineage)

    by_id = {e.id: e for e in examples}
    outcomes = [Outcome.from_json(row, by_id) for row in read_jsonl(directory.refined)]
    return merge([with_scores(e) for e in examples], outcomes)
