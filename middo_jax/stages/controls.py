"""The refinement stage of a control arm: round_00's rows that the arm chooses -> rewrites and its dataset."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence

import pyarrow as pa

from middo_jax.config import Config
from middo_jax.data.example import Example
from middo_jax.parallel.coordination import is_first
from middo_jax.refinement import Ledger, Outcome, merge
from middo_jax.refinement.arms import arm_tasks, limited
from middo_jax.refinement.growth import fit, max_size
from middo_jax.refinement.words import read_words
from middo_jax.rundir import RunDir, write_jsonl
from middo_jax.rundir.arms import ArmDir, loop_rounds
from middo_jax.rundir.link import Link
from middo_jax.session import Session, read_dataset
from middo_jax.signals.table import read_scores
from middo_jax.stages.merge import neighbours_of
from middo_jax.stages.refine import Around, ask_refiner, follow_refinement, write_outcomes
from middo_jax.stages.review import outcomes_of
from middo_jax.stages.surroundings import answer_cache, model_of


def refine_arm(session: Session, run: RunDir, link: Link, heldout: Sequence[Example]) -> None:
    """Asks the refiner about the rows that an arm chooses, and writes the arm's dataset to merged.jsonl.

    An arm has as many tasks as the loop had in all rounds, at most as many rewrites, the same gates with
    round_00's model, the same cache, and a budget of its own, as large as the loop's.
    """
    here = link.folder
    assert isinstance(here, ArmDir)
    if not is_first():
        follow_refinement(session, here)
        return
    config, began, begun = session.config, time.monotonic(), link.begin()
    of_loop = loop_outcomes(run, config)
    examples, table = read_dataset(here), read_scores(here.scores)
    planned = arm_tasks(
        here.arm,
        [o.task for o in of_loop],
        examples,
        {row["id"]: row for row in table.to_pylist()},
        config.seed,
        config.refine.turns,
    )
    words = read_words(config.refine.prompts)
    tasks = [dataclasses.replace(task, words=words) for task in planned]
    with answer_cache(session, here) as cache:
        ledger = Ledger(cache, f"{config.name}, control {here.arm}", 0)
        around = Around(0, cache, ledger, heldout, model_of(here))
        outcomes, facts = ask_refiner(session, here, tasks, around)
    most = sum(outcome.example is not None for outcome in of_loop)
    outcomes = limited(outcomes, most)
    write_outcomes(here, outcomes)
    write_jsonl(
        here.merged, (example.to_json() for example in _merged(here, config, table, examples, outcomes))
    )
    facts["accepted"] = sum(outcome.example is not None for outcome in outcomes)
    begun.finish(config, time.monotonic() - began, **facts)


def loop_outcomes(run: RunDir, config: Config) -> list[Outcome]:
    """The outcomes of the loop's tasks in all rounds, in order."""
    return [o for folder in loop_rounds(run, config) for o in outcomes_of(folder, read_dataset(folder))]


def _merged(
    here: ArmDir, config: Config, table: pa.Table, examples: Sequence[Example], outcomes: Sequence[Outcome]
) -> list[Example]:
    """The arm's dataset, limited by `refine.growth` like the loop's."""
    together, room = merge(examples, outcomes), max_size(len(examples), config.refine.growth)
    drops = room is not None and room < len(together)
    neighbours = neighbours_of(here, table, config.refine.growth) if drops else {}
    chosen = {outcome.task.original.id for outcome in outcomes}
    return fit(examples, together, room, chosen, neighbours)[0]
