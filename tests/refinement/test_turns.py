"""Conversations of several turns stay whole: which turns change, what the refiner sees, what is counted."""

from __future__ import annotations

import dataclasses

import pytest
from support.scripted_refiner import refine, sample

from middo_jax.config import RefineSettings
from middo_jax.data.example import Example, Lineage, Message
from middo_jax.refinement.estimate import dry_run
from middo_jax.refinement.rewrite import first_request
from middo_jax.refinement.tasks import Task, plan_tasks, why_kept
from middo_jax.report.terminal import render_dry_run


def chat(*texts: str, unlearnt: int | None = None) -> Example:
    """[system, u, a, u, a, ...] with these texts; the answer `unlearnt` is context only."""
    roles = ("user", "assistant")
    turns = [Message(roles[n % 2], text, n != unlearnt) for n, text in enumerate(texts)]
    return Example((Message("system", "Be brief."), *turns))


LONG = chat("Name a bird.", "A wren.", "And a fish?", "A carp.", "Which one can fly, and why?", "The wren.")
TASK = Task("rewrite", ("quality",), LONG)
NEW = "<prompt>Which of the two can fly, and what lets it fly?</prompt>"


def texts(example: Example | None) -> list[str]:
    assert example is not None
    return [m.content for m in example.messages]


def test_only_the_last_question_and_its_answer_change() -> None:
    outcome, client = refine(TASK, NEW, "The wren can, by its wings.")
    assert texts(outcome.example) == [
        *("Be brief.", "Name a bird.", "A wren.", "And a fish?", "A carp."),
        *("Which of the two can fly, and what lets it fly?", "The wren can, by its wings."),
    ]
    asked = client.asked[0][-1]["content"]
    assert "<original>\nWhich one can fly, and why?\n</original>" in asked
    assert "[user] Name a bird.\n\n[assistant] A wren.\n\n[user] And a fish?" in asked
    assert [turn["role"] for turn in client.asked[1]] == ["system", *("user", "assistant") * 2, "user"]
    assert client.asked[1][2]["content"] == "A wren."


def test_all_answers_are_written_anew_in_the_new_context() -> None:
    replies = (NEW, "A robin.", "A trout.", "The robin, by its wings.")
    outcome, client = refine(TASK, *replies, settings={"turns": "all"})
    assert texts(outcome.example) == [
        *("Be brief.", "Name a bird.", "A robin.", "And a fish?", "A trout."),
        *("Which of the two can fly, and what lets it fly?", "The robin, by its wings."),
    ]
    assert [turn["content"] for turn in client.asked[2]] == texts(outcome.example)[:4]
    assert [e.step for e in outcome.exchanges] == ["prompt", "answer", "answer", "answer"]


def test_an_answer_that_is_not_learnt_is_not_written_anew() -> None:
    example = chat("Name a bird.", "A wren.", "And a fish?", "A carp.", unlearnt=1)
    task = Task("rewrite", ("quality",), example)
    new = "<prompt>And which fish lives in ponds?</prompt>"
    outcome, client = refine(task, new, "A tench.", settings={"turns": "all"})
    assert outcome.example is not None
    assert outcome.example.messages[2] == Message("assistant", "A wren.", learnt=False)
    assert len(client.asked) == 2


def test_a_refused_earlier_answer_ends_the_task_and_is_named() -> None:
    outcome, client = refine(TASK, NEW, "I'm sorry, but I can't help with that.", settings={"turns": "all"})
    assert outcome.example is None
    assert str(outcome.verdict) == "answer_sane: turn 3: refused"
    assert len(client.asked) == 2
    same, _ = refine(TASK, NEW, "A wren.", "A carp.", "The wren can.", settings={"turns": "all"})
    assert same.example is not None  # an earlier answer may stay as it was


def test_an_addition_has_one_prompt_and_its_core_is_shown_turn_by_turn() -> None:
    task = Task("synthesize", ("diversity",), LONG, (sample("Name a tree."),))
    outcome, client = refine(task, "<prompt>Name a river in Asia.</prompt>", "The Amur.")
    assert texts(outcome.example) == ["Be brief.", "Name a river in Asia.", "The Amur."]
    assert "[turn 1] Name a bird.\n\n[turn 2] And a fish?\n\n[turn 3] Which" in client.asked[0][-1]["content"]
    single = Task("synthesize", ("diversity",), sample("Name a tree."), (sample("Name a bush."),))
    assert "[turn" not in first_request(single, RefineSettings())[-1]["content"]


def test_the_gates_on_texts_compare_the_turn_that_is_rewritten() -> None:
    example = chat("Add 17 and 4.", "21", "Now double it.", "42")
    hard = Task("simplify", ("complexity",), example)
    outcome, _ = refine(hard, "<prompt>Now double it.</prompt>")
    assert str(outcome.verdict) == "sane: unchanged"
    outcome, _ = refine(
        Task("rewrite", ("quality",), example), "<prompt>Double that sum.</prompt>", "It is 42."
    )
    assert outcome.example is not None  # 17 and 4 are numbers of another turn


def test_a_long_context_keeps_its_last_turns() -> None:
    words = [f"word{n} " * 300 for n in range(12)]
    asked = first_request(Task("rewrite", ("quality",), chat(*words)), RefineSettings())[-1]["content"]
    assert "[...]\n\n[user] word" in asked
    assert "word9" in asked
    assert "word1 " not in asked
    assert len(asked) < 10_000


@pytest.mark.parametrize(("turns", "n"), [("skip", 1), ("last", 2), ("all", 2)])
def test_several_turns_are_skipped_on_request(turns: str, n: int) -> None:
    short = sample("Name a tree.")
    tasks = plan_tasks([LONG, short], {"quality": {LONG.id, short.id}}, {}, {}, turns=turns)  # type: ignore[arg-type]
    assert len(tasks) == n
    assert (why_kept(LONG, turns) is None) == (n == 2)  # type: ignore[arg-type]
    assert why_kept(short, turns) is None  # type: ignore[arg-type]


def test_a_dry_run_says_how_many_turns_change() -> None:
    tasks = [TASK, Task("rewrite", ("quality",), sample("Name a tree."))]
    kept = {"several turns": 3}
    last, every = (
        dry_run(tasks, RefineSettings(turns=turns, response_format="text"), kept=kept)
        for turns in ("last", "all")
    )
    assert (last.requests, last.conversations, last.turns_changed, last.turns) == (4, 1, 2, 7)
    assert (every.requests, every.turns_changed) == (6, 4)
    assert every.completion_tokens_at_most == 6 * 1024
    assert every.completion_tokens_estimate > last.completion_tokens_estimate
    shown = render_dry_run(dataclasses.asdict(every))
    assert "1 conversations of several turns: 4 of their 7 turns change" in shown
    assert "3 selected samples stay as they are: several turns" in shown


def test_changed_turns_of_rewrites_of_both_kinds() -> None:
    lineage = Lineage((LONG.id,), LONG.id, 1, "rewrite")
    assert LONG.replace_text("New?", "Yes.", lineage).changed_turns(LONG) == [5, 6]
    flat = Example((*LONG.messages[:1], Message("user", "New?"), Message("assistant", "Yes.")))
    assert flat.changed_turns(LONG) == [1, 2]
