"""Which rows a control arm gives to the refiner, with which operations, and how many rewrites it keeps."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter

import pytest

from middo_jax.config import Control
from middo_jax.data.example import Example, Lineage, Message
from middo_jax.refinement.arms import LEFT_OUT, arm_tasks, limited
from middo_jax.refinement.tasks import Outcome, Task

EXAMPLES = [Example((Message("user", f"Why {i}?"), Message("assistant", "So."))) for i in range(8)]
IDS = [example.id for example in EXAMPLES]
ROWS = {
    id_: {
        "loss_post": math.nan if i == 7 else i,
        "ifd": -i,
        "n_target_tokens": i,
        "knn_ids": [IDS[i - 1], IDS[0]],
    }
    for i, id_ in enumerate(IDS)
}
AGAIN = Example((Message("user", "New?"), Message("assistant", "So.")), lineage=Lineage(root_id=IDS[2]))
LOOP = [
    Task("simplify", ("complexity",), EXAMPLES[2], scores={"loss_post": 2.0}),
    Task("synthesize", ("diversity",), EXAMPLES[5]),
    Task("rewrite", ("complexity", "quality"), AGAIN),
]


def chosen(arm: Control, seed: int = 0) -> list[str]:
    return [task.original.id for task in arm_tasks(arm, LOOP, EXAMPLES, ROWS, seed)]


def test_each_arm_ranks_rows_in_its_way() -> None:
    assert chosen("none") == []
    assert chosen("loss") == [IDS[6], IDS[5], IDS[4]]  # a missing loss is never chosen
    assert chosen("ifd") == [IDS[0], IDS[1], IDS[2]]
    assert chosen("length") == [IDS[0], IDS[1], IDS[2]]
    assert chosen("reanswer") == [IDS[2], IDS[5]]  # the user's row that was rewritten twice is asked once
    draws = [chosen("random", seed) for seed in range(4)]
    assert len({tuple(draw) for draw in draws}) > 1
    assert chosen("random", 3) == draws[3]


@pytest.mark.parametrize("arm", ["random", "loss", "ifd", "length"])
def test_an_arm_has_the_loops_operations_in_some_order(arm: Control) -> None:
    tasks = arm_tasks(arm, LOOP, EXAMPLES, ROWS, 0)
    assert Counter((t.op, t.axes) for t in tasks) == Counter((t.op, t.axes) for t in LOOP)
    assert len({t.original.id for t in tasks}) == len(LOOP)
    assert all(task.scores.keys() == {"loss_post"} for task in tasks)
    (addition,) = [task for task in tasks if task.op == "synthesize"]
    assert [hint.id for hint in addition.hints] == ROWS[addition.original.id]["knn_ids"]


def test_reanswer_changes_the_operation_and_keeps_the_axes() -> None:
    tasks = arm_tasks("reanswer", LOOP, EXAMPLES, ROWS, 0)
    assert [(task.op, task.axes) for task in tasks] == [
        ("reanswer", ("complexity",)),
        ("reanswer", ("diversity",)),
    ]


def test_the_first_rewrites_stay_up_to_the_loops_number() -> None:
    tasks = [Task("rewrite", ("quality",), example) for example in EXAMPLES[:4]]
    outcomes = [Outcome(task, None if i == 1 else AGAIN) for i, task in enumerate(tasks)]
    found = limited(outcomes, 2)
    assert [outcome.example is not None for outcome in found] == [True, False, True, False]
    assert found[3].verdict == LEFT_OUT
    assert found[:3] == outcomes[:3]
    assert limited(outcomes, 3) == outcomes
    assert dataclasses.replace(found[3], example=AGAIN, verdict=None) == outcomes[3]
