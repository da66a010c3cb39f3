"""Which rewrites are taken back, and what the dataset and the next tasks are then."""

from __future__ import annotations

import dataclasses

import pytest

from middo_jax.data.example import Example, Lineage, Message
from middo_jax.refinement.taking_back import made_worse, restored, still_asked
from middo_jax.refinement.tasks import Outcome, Task


def example(text: str, **lineage: object) -> Example:
    return Example((Message("user", text), Message("assistant", "So.")), lineage=Lineage(**lineage))  # type: ignore[arg-type]


OLD, NEW, CORE, MORE = example("old"), example("new"), example("core"), example("more")
REWRITE = Outcome(Task("rewrite", ("complexity", "quality"), OLD, scores={"quality": 3.0}), NEW)
ADDITION = Outcome(Task("synthesize", ("diversity",), CORE), MORE)
HERE = {NEW.id, CORE.id, MORE.id}


@pytest.mark.parametrize(
    ("then", "now", "is_worse"),
    [
        ((2.0, 1.0), (2.5, 1.0), True),
        ((2.0, 1.0), (2.0, 1.0), False),
        ((2.0, 1.0), (2.5, 0.9), False),  # better on one axis
        ((2.0, None), (2.5, 0.9), True),  # only one axis can be compared
        ((2.0, 1.0), (None, None), False),
        ((2.0, 1.0), (1.0, 0.5), False),
    ],
)
def test_a_rewrite_is_taken_back_if_an_axis_is_worse_and_none_is_better(
    then: tuple[float, float | None], now: tuple[float | None, float | None], is_worse: bool
) -> None:
    before = {OLD.id: {"complexity": then[0], "quality": then[1]}}
    after = {NEW.id: {"complexity": now[0], "quality": now[1]}}
    found = made_worse([REWRITE], before, after, HERE, 1)
    assert [row["id"] for row in found] == ([NEW.id] if is_worse else [])


def test_originals_come_back_additions_go_and_neither_is_asked_for_again() -> None:
    before = {OLD.id: {"complexity": 1.0}, CORE.id: {"diversity": 1.5}}
    after = {NEW.id: {"complexity": 2.0}, CORE.id: {"diversity": 1.6}}
    rows = made_worse([REWRITE, ADDITION], before, after, HERE, 1)
    assert [(row["id"], row["source_id"]) for row in rows] == [(NEW.id, OLD.id), (MORE.id, CORE.id)]
    assert rows[0]["badness_before"] == {"complexity": 1.0}
    assert restored([NEW, CORE, MORE], rows, 1) == [OLD, CORE]
    assert restored([NEW, CORE, MORE], rows, 2) == [NEW, CORE, MORE]  # of an earlier round
    tasks = [Task("rewrite", ("quality",), e) for e in (NEW, OLD, CORE)]
    tasks.append(Task("synthesize", ("diversity",), CORE))
    assert still_asked(tasks, rows, 1) == [tasks[2]]
    assert still_asked(tasks, rows, 2) == [tasks[0], tasks[2]]
    assert still_asked(tasks, [], 1) == tasks


def test_what_would_be_there_twice_or_is_gone_is_not_taken_back() -> None:
    before, after = {OLD.id: {"complexity": 1.0}}, {NEW.id: {"complexity": 2.0}}
    assert not made_worse([REWRITE], before, after, {*HERE, OLD.id}, 1)
    assert not made_worse([REWRITE], before, after, {CORE.id}, 1)
    assert not made_worse([dataclasses.replace(REWRITE, example=None)], before, after, HERE, 1)


def test_an_original_that_was_written_itself_keeps_its_last_scores() -> None:
    written = example("old", op="rewrite")
    outcome = Outcome(dataclasses.replace(REWRITE.task, original=written), NEW)
    after = {NEW.id: {"complexity": 2.0}}
    rows = made_worse([outcome], {written.id: {"complexity": 1.0}}, after, HERE, 1)
    (back,) = restored([NEW], rows, 1)
    assert back.lineage.scores_after == {"quality": 3.0}
