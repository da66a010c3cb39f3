"""How a dataset writes its turns, found in its rows and written again."""

from __future__ import annotations

import json
from typing import Any

import pytest

from middo_jax.config.settings import DataSettings
from middo_jax.data.formats import to_example
from middo_jax.data.layout import to_rows
from middo_jax.data.own_shape import OwnShape
from middo_jax.data.reading import Reading
from middo_jax.data.spelling import Spelling, SpellingCount
from middo_jax.data.turns import RowError

Rows = list[dict[str, Any]]


def turns(*pairs: tuple[str, Any], keys: tuple[str, str] = ("role", "content")) -> list[dict[str, Any]]:
    return [dict(zip(keys, pair, strict=True)) for pair in pairs]


def spelling_of(rows: Rows, settings: DataSettings, form: str) -> Spelling:
    count = SpellingCount(Reading.of(settings), form)
    for row in rows:
        count.add(row)
    return count.commonest(form)


def there_and_back(form: str, rows: Rows, **data: Any) -> Rows:
    """Rows as they are written after they were read; without our ids."""
    settings = DataSettings(path="x", **data)
    spelling = spelling_of(rows, settings, form)
    assert Spelling.from_json(json.loads(json.dumps(spelling.to_json()))) == spelling
    examples = [to_example(row, form, Reading.of(settings)).example for row in rows]
    written = OwnShape.of(form, rows[0], settings.model_dump(mode="json"), spelling).rows(examples)
    return [{name: value for name, value in row.items() if name != "id"} for row in written]


CALL = {"name": "add", "arguments": {"a": 1}}
CASES: dict[str, tuple[str, Rows]] = {
    "names of roles": ("messages", [{"messages": turns(("Human", "Hi."), ("AI", "I."))}]),
    "developer": ("messages", [{"messages": turns(("developer", "Be."), ("user", "Hi."), ("model", "I."))}]),
    "usual names": (
        "sharegpt",
        [{"conversations": turns(("human", "Hi."), ("gpt", "I."), keys=("from", "value"))}],
    ),
    "keys of sharegpt in messages": (
        "messages",
        [{"messages": turns(("user", "Hi."), ("assistant", "I."), keys=("from", "value"))}],
    ),
    "parts of the user alone": (
        "messages",
        [{"messages": turns(("user", [{"type": "input_text", "text": "Hi."}]), ("assistant", "I."))}],
    ),
    "parts that are texts": ("messages", [{"messages": turns(("user", ["Hi."]), ("assistant", ["I."]))}]),
    "prompt and completion as lists of one turn": (
        "prompt_completion",
        [{"prompt": turns(("user", "Hi.")), "completion": turns(("assistant", "I."))}],
    ),
    "prompt and completion as turns": (
        "prompt_completion",
        [{"prompt": turns(("system", "Be."), ("human", "Hi.")), "completion": turns(("gpt", "I."))}],
    ),
    "calls as turns of messages": (
        "messages",
        [{"messages": turns(("user", "Add."), ("function_call", json.dumps(CALL)), ("observation", "1"),
                            ("assistant", "1."))}],
    ),
    "lists of tools": (
        "sharegpt",
        [{"conversations": turns(("human", "Hi."), ("gpt", "I."), keys=("from", "value")), "tools": [CALL]}],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_rows_come_back_as_they_were_written(case: str) -> None:
    form, rows = CASES[case]
    assert there_and_back(form, rows) == rows


def test_the_field_that_says_what_is_learnt_keeps_its_name_and_type() -> None:
    row = {"messages": turns(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))}
    row["messages"][1] |= {"train": False}
    [written] = there_and_back("messages", [row])
    assert [turn["train"] for turn in written["messages"]] == [None, False, None, True]
    assert "weight" not in written["messages"][1]


def test_of_several_spellings_the_commonest_is_written() -> None:
    rows = [
        {"conversations": turns((user, text), ("gpt", "I."), keys=("from", "value"))}
        for user, text in (("me", "a"), ("user", "b"), ("me", "c"))
    ]
    written = there_and_back("sharegpt", rows, roles={"me": "user"})
    assert [row["conversations"][0]["from"] for row in written] == ["me", "me", "me"]


def test_columns_by_the_users_names_and_rows_of_another_format_are_told_apart() -> None:
    rows = [
        {"chat": turns(("Q", "a"), ("A", "b"))},
        {"conversations": turns(("human", "a"), ("gpt", "b"), keys=("from", "value"))},
        {"chat": None},
    ]
    settings = DataSettings(path="x", columns={"messages": "chat"}, roles={"Q": "user", "A": "assistant"})
    assert spelling_of(rows, settings, "messages") == Spelling({"user": "Q", "assistant": "A"})
    assert spelling_of(rows, settings, "alpaca") == Spelling()


def test_a_row_without_tools_has_null_beside_rows_that_have_them() -> None:
    # TRL and axolotl parse any text as JSON, and "" is none.
    rows = [{**CASES["lists of tools"][1][0], "tools": tools} for tools in (json.dumps([CALL]), None)]
    written = to_rows([to_example(row, "sharegpt").example for row in rows], "sharegpt")
    assert [row["tools"] for row in written] == [json.dumps([CALL]), None]


def test_turns_that_are_json_text_are_read() -> None:
    chat = turns(("Q", "Hi."), ("A", "I."))
    settings = DataSettings(path="x", columns={"messages": "chat"}, roles={"Q": "user", "A": "assistant"})
    read, _, _ = to_example({"chat": json.dumps(chat)}, "messages", Reading.of(settings))
    assert [(m.role, m.content) for m in read.messages] == [("user", "Hi."), ("assistant", "I.")]
    assert spelling_of([{"chat": json.dumps(chat)}], settings, "messages").roles == {
        "user": "Q",
        "assistant": "A",
    }
    lone = json.dumps({"chat": turns(("Q", "\ud800"), ("A", "I."))}["chat"])
    with pytest.raises(RowError, match="column 'messages' must be a list of turns, not text"):
        to_example({"chat": lone}, "messages", Reading.of(settings))


def test_a_role_that_is_no_text_is_a_reason_also_with_a_map_of_roles() -> None:
    row = {"messages": [{"role": ["user"], "content": "x"}]}
    with pytest.raises(RowError, match="turn 1: 'role' must be text, not a list"):
        to_example(row, "messages", Reading(roles={"Q": "user"}))


def test_a_prompt_in_text_parts_is_no_list_of_turns() -> None:
    rows = [{"prompt": [{"type": "text", "text": "Hi."}], "completion": "I."}]
    assert there_and_back("prompt_completion", rows) == [{"prompt": "Hi.", "completion": "I."}]
