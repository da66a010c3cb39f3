"""What the axis `consistency` has done: the unchanged prompt answered anew, or a cut answer given whole."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from support.scripted_refiner import Scripted, refine, sample

from middo_jax.config import GateSettings, RefineSettings
from middo_jax.refinement.endpoint.request import Answer, Messages, Requests
from middo_jax.refinement.estimate import dry_run
from middo_jax.refinement.merge import merge
from middo_jax.refinement.rewrite import refine_tasks
from middo_jax.refinement.tasks import Outcome, Task, Verdict, plan_tasks

ORIGINAL = sample("Name 3 birds.", "A wren, a", system="Be brief.", source="mine")
ANEW, WHOLE = (Task(op, ("consistency",), ORIGINAL) for op in ("reanswer", "complete"))


def test_the_fault_decides_what_is_done() -> None:
    cut, strange, hard, low = (sample(name) for name in ("cut", "strange", "hard", "low"))
    tasks = plan_tasks(
        [cut, strange, hard, low],
        {
            "consistency": {cut.id, strange.id, hard.id, low.id},
            "complexity": {hard.id},
            "quality": {low.id},
        },
        knn_ids={},
        scores={},
        faults={cut.id: "cut", strange.id: "strange", hard.id: "cut", low.id: None},
    )
    assert [(task.op, task.axes) for task in tasks] == [
        ("complete", ("consistency",)),
        ("reanswer", ("consistency",)),
        ("rewrite", ("complexity", "consistency")),  # a new prompt has a new answer in any case
        ("rewrite", ("quality", "consistency")),
    ]


@pytest.mark.parametrize("task", [ANEW, WHOLE], ids=["reanswer", "complete"])
def test_one_request_is_sent_and_the_prompt_stays(task: Task) -> None:
    outcome, client = refine(task, " A wren, a robin and a crow. \n")
    child = outcome.example
    assert child is not None
    assert child.messages[:-1] == ORIGINAL.messages[:-1]
    assert child.response == "A wren, a robin and a crow."
    assert (child.extra, child.lineage.op, child.lineage.axis) == ({"source": "mine"}, task.op, "consistency")
    assert [exchange.step for exchange in outcome.exchanges] == ["answer"]
    asked = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Name 3 birds."}]
    [messages] = client.asked
    assert messages[:2] == asked
    if task is WHOLE:
        assert messages[2] == {"role": "assistant", "content": "A wren, a"}
        assert messages[3]["role"] == "user"
    assert len(messages) == (4 if task is WHOLE else 2)
    again = Outcome.from_json(outcome.to_json(), {})
    assert (again.task.op, again.example) == (task.op, child)
    assert merge([ORIGINAL], [outcome]) == [child]


def test_the_same_answer_is_no_change() -> None:
    outcome, _ = refine(ANEW, " a  wren, a")
    assert outcome.verdict == Verdict("answer_sane", "unchanged")
    again = outcome.next_attempt()
    assert again is not None
    assert refine(again, "A wren, a robin and a crow.")[0].example is not None


def test_an_estimate_counts_one_request() -> None:
    settings = RefineSettings(response_format="text", max_tokens=100)
    both = dry_run([ANEW, Task("rewrite", ("quality",), ORIGINAL)], settings)
    assert (both.requests, both.completion_tokens_at_most) == (3, 300)
    assert both.rows[0]["messages"][-1]["content"] == "Name 3 birds."


def test_the_old_prompt_is_asked_once_more_if_the_gate_has_a_bar() -> None:
    settings = {"gates": GateSettings(agreement=0.5)}
    low = Task("rewrite", ("quality",), sample("Capital of France?", "Lyon.", system="Be brief."))
    asked = ("<prompt>What is the capital of France?</prompt>", "It is Paris.")
    outcome, client = refine(low, *asked, "It is Paris.", settings=settings)
    assert outcome.example is not None
    assert client.asked[-1] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Capital of France?"},
    ]
    assert [exchange.step for exchange in outcome.exchanges] == ["prompt", "answer", "again"]
    assert len({exchange.attempt for exchange in outcome.exchanges}) == 1
    for other in ("It is Lyon.", ("It is Paris.", "length")):
        replies = [*asked, other, other] if isinstance(other, tuple) else [*asked, other]
        outcome, _ = refine(low, *replies, settings=settings)
        assert outcome.verdict is not None
        assert outcome.verdict.gate == "agreement"
    assert len(refine(low, *asked)[0].exchanges) == 2


def test_the_same_prompt_asked_once_more_is_another_request() -> None:
    requests, settings = [], RefineSettings(gates=GateSettings(agreement=0.5))

    class Listening(Scripted):
        async def complete(self, messages: Messages, **more: Any) -> Answer:
            requests.append(Requests("m", settings, seed=3).build(messages, attempt=more["attempt"]))
            return await super().complete(messages, **more)

    client = Listening("A wren, a robin.", "A wren, a robin.")
    asyncio.run(refine_tasks([ANEW], client, settings, round_index=0))
    first, again = requests
    assert first.body["messages"] == again.body["messages"]
    assert first.body["seed"] != again.body["seed"]
    assert first.key != again.key
