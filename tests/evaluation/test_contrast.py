"""The contrast margin: what is planted where, and margins equal to losses computed row by row."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import pytest
from support.tiny_model import write_tiny_model

from middo_jax.config import load
from middo_jax.data.example import Example, Message
from middo_jax.evaluation.contrast import faulty, last_answer
from middo_jax.progress import Silent
from middo_jax.session import Session
from middo_jax.stages.evaluate import Contrast, HeldOut

LONG = "There are 12 months, and each one has about 30 days in it."


def chat(*texts: str) -> Example:
    roles = ("user", "assistant") * len(texts)
    return Example(tuple(Message(role, text) for role, text in zip(roles, texts, strict=False)))


ROWS = [
    chat("How many months has a year?", LONG),
    chat("Hello", "Hi"),
    chat("Name a sea.", "The Baltic Sea.", "And its depth?", "At most 459 m."),
    chat("List two.", "1. One\n2. Two"),
]


def test_each_fault_is_planted_where_it_can_be_and_into_the_last_answer_alone() -> None:
    planted = {(one.place, one.fault): one.example.response for one in faulty(ROWS)}
    assert {key for key in planted if key[1] != "swapped"} == {(0, "cut"), (0, "numbers"), (2, "numbers")}
    assert planted[0, "cut"] == "There are 12 months, and each"
    assert planted[0, "numbers"] != LONG
    assert len(planted[0, "numbers"]) == len(LONG)
    swapped = [planted[place, "swapped"] for place in range(4)]
    assert sorted(swapped) == sorted(row.response for row in ROWS)
    assert all(text != row.response for text, row in zip(swapped, ROWS, strict=True))
    for one in faulty(ROWS):
        *before, last = one.example.messages
        assert [turn.content for turn in before] == [turn.content for turn in ROWS[one.place].messages[:-1]]
        assert [turn.learnt for turn in one.example.messages] == [*(False for _ in before), True]
        assert last.role == "assistant"


def test_the_order_of_rows_changes_nothing() -> None:
    order = random.Random(0).sample(range(4), 4)
    shuffled = [ROWS[place] for place in order]

    def told(rows: list[Example]) -> set[tuple[str, str, str]]:
        return {(rows[one.place].id, one.fault, one.example.response) for one in faulty(rows)}

    assert told(shuffled) == told(ROWS)


def test_what_carries_no_fault_is_left_out() -> None:
    unlearnt = dataclasses.replace(ROWS[0], messages=(ROWS[0].messages[0], Message("assistant", LONG, False)))
    assert faulty([unlearnt]) == []
    assert faulty([]) == []
    assert faulty([ROWS[1]]) == []  # there is no other answer, no number, and nothing to cut
    assert faulty([ROWS[1], chat("Good day", "Hi")]) == []  # the other answer is the same


def test_margins_are_those_of_each_row_by_itself(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "model")
    session = Session(load(None, [f"model.path={path}", "data.path=none", "model.dtype=float32"]), Silent())
    model = session.load_model(path)

    def loss(example: Example) -> float:
        return HeldOut(session, [example]).loss(model).loss

    rows = HeldOut(session, ROWS).rows(model)
    found = {(one.id, one.fault): one.margin for one in Contrast(session, ROWS).margins(model, rows)}
    by_hand = {
        (ROWS[one.place].id, one.fault): loss(one.example) - loss(last_answer(ROWS[one.place]))
        for one in faulty(ROWS)
    }
    assert found == {key: pytest.approx(margin, abs=1e-5) for key, margin in by_hand.items()}
    assert len(found) == 7
    assert Contrast(session, ROWS[1:2]).margins(model, HeldOut(session, ROWS[1:2]).rows(model)) == []
