"""Rows whose turns are no conversation: repaired and counted, or refused with data.strict."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from middo_jax.data import repair
from middo_jax.data.reading import Reading
from middo_jax.data.sources import DataError, count_reasons, read_rows
from middo_jax.data.user_rows import UserRows

A, U, S = "assistant", "user", "system"


def reading(tmp_path: Path, *chats: list[tuple[str, str]], **how: object) -> UserRows:
    rows = [{"messages": [{"role": role, "content": text} for role, text in turns]} for turns in chats]
    good = {"messages": [{"role": U, "content": "good"}, {"role": A, "content": "row"}]}
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in (good, *rows)), encoding="utf-8")
    return read_rows(str(path), "messages", reading=Reading(**how))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("turns", "kept", "repairs"),
    [
        ([(U, "q"), (A, "a"), (U, "r")], [(U, "q"), (A, "a")], [repair.TRAILING]),
        ([(U, "q"), (A, "a"), (U, "r"), (U, "s")], [(U, "q"), (A, "a")], [repair.JOINED, repair.TRAILING]),
        ([(U, "q"), (U, "r"), (A, "a")], [(U, "q\n\nr"), (A, "a")], [repair.JOINED]),
        ([(U, "q"), (A, "a"), (A, "b")], [(U, "q"), (A, "a\n\nb")], [repair.JOINED]),
        ([(S, "s"), (S, "t"), (U, "q"), (A, "a")], [(S, "s\n\nt"), (U, "q"), (A, "a")], [repair.JOINED]),
        ([(U, " "), (U, "q"), (A, "a")], [(U, "q"), (A, "a")], [repair.EMPTY_BESIDE]),
        ([(U, "q"), (A, "a"), (A, "")], [(U, "q"), (A, "a")], [repair.EMPTY_BESIDE]),
        (
            [(U, "q"), (A, ""), (A, "a"), (U, "r"), (U, "s"), (A, "b")],
            [(U, "q"), (A, "a"), (U, "r\n\ns"), (A, "b")],
            [repair.EMPTY_BESIDE, repair.JOINED],
        ),
        ([(U, ""), (A, "x"), (U, "q"), (A, "a")], [(U, "q"), (A, "a")], [repair.EMPTY]),
        ([(U, "q"), (A, "a"), (U, "r"), (A, " ")], [(U, "q"), (A, "a")], [repair.EMPTY]),
        ([(U, "q"), (A, ""), (U, "r"), (A, "a")], [(U, "r"), (A, "a")], [repair.EMPTY]),
        ([(A, "Hello!"), (U, "q"), (A, "a")], [(A, "Hello!"), (U, "q"), (A, "a")], [repair.LEADING]),
        (
            [(S, "s"), (A, "Hi"), (U, "q"), (A, "a")],
            [(S, "s"), (A, "Hi"), (U, "q"), (A, "a")],
            [repair.LEADING],
        ),
    ],
)
def test_repairs(
    tmp_path: Path, turns: list[tuple[str, str]], kept: list[tuple[str, str]], repairs: list[str]
) -> None:
    data = reading(tmp_path, turns)
    assert [(m.role, m.content) for m in data.examples[1].messages] == kept
    assert [r.reason for r in data.repairs] == repairs
    assert all(r.where.endswith("rows.jsonl:2") for r in data.repairs)
    strict = reading(tmp_path, turns, strict=True)
    assert (len(strict.examples), len(strict.rejections), strict.repairs) == (1, 1, [])


def test_a_leading_answer_is_not_learnt_and_all_others_are(tmp_path: Path) -> None:
    data = reading(tmp_path, [(A, "Hello!"), (U, "q"), (A, "a")])
    assert [m.learnt for m in data.examples[1].messages] == [False, True, True]


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ([(U, "q"), (A, "")], "empty response"),
        ([(U, " "), (A, "a")], "empty prompt"),
        ([(U, "q")], "ends with the user"),
        ([(A, "a")], "no prompt: the conversation has no user turn"),
        ([(U, "q"), (S, "s"), (A, "a")], "turn 2 is a system turn"),
    ],
)
def test_what_no_repair_makes_a_conversation_is_refused(
    tmp_path: Path, turns: list[tuple[str, str]], reason: str
) -> None:
    data = reading(tmp_path, turns)
    assert (len(data.examples), data.repairs) == (1, [])
    assert reason in data.rejections[0].reason


@pytest.mark.parametrize("nothing", [None, [], ""])
def test_a_turn_of_null_or_of_no_parts_is_an_empty_turn(tmp_path: Path, nothing: Any) -> None:
    data = reading(tmp_path, [(U, "q"), (A, nothing), (U, "r"), (A, "a")], [(U, "q"), (A, nothing)])
    assert [m.content for m in data.examples[1].messages] == ["r", "a"]
    assert [r.reason for r in data.repairs] == [repair.EMPTY]
    assert [r.reason for r in data.rejections] == ["empty response"]


def test_repairs_are_counted_largest_first(tmp_path: Path) -> None:
    trailing = [[(U, f"q{n}"), (A, "a"), (U, "r")] for n in range(3)]
    data = reading(tmp_path, [(U, "q"), (U, "r"), (A, "a")], *trailing)
    assert [(r.n, r.reason) for r in count_reasons(data.repairs)] == [
        (3, repair.TRAILING),
        (1, repair.JOINED),
    ]


def test_unknown_roles_are_mapped(tmp_path: Path) -> None:
    turns = [("narrator", "q"), ("oracle", "a")]
    refused = reading(tmp_path, turns)
    assert "data.roles='{narrator: user}'" in refused.rejections[0].reason
    data = reading(tmp_path, turns, roles={"narrator": "user", "oracle": "assistant"})
    assert [(m.role, m.content) for m in data.examples[1].messages] == [(U, "q"), (A, "a")]


def test_columns_of_other_names(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    row = {"question": "Two and three?", "best": "5", "output": "4", "level": 1}
    path.write_text(json.dumps(row) + "\n")
    columns = {"instruction": "question", "output": "best"}
    (example,) = read_rows(str(path), reading=Reading(columns=columns)).examples
    assert (example.prompt, example.response) == ("Two and three?", "5")
    assert example.extra == {"extra_output": "4", "level": 1}
    typo = Reading(columns={**columns, "contxt": "level"})
    with pytest.raises(DataError, match=r"'contxt', which no format has; did you mean 'context'\?"):
        read_rows(str(path), reading=typo)
    with pytest.raises(DataError, match=r"data\.columns names 'answer', and no row has such a column"):
        read_rows(str(path), reading=Reading(columns={"instruction": "question", "output": "answer"}))
