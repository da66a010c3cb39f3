"""What columns and fields beside the turns' own text mean: system turns, context, weights, parts, roles."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.tiny_model import write_tiny_model

from middo_jax.data.example import Example, Lineage, Message
from middo_jax.data.formats import DataError
from middo_jax.data.repair import BEHIND, JOINED, strict_hint
from middo_jax.data.sources import Rejection, read, read_rows, write
from middo_jax.data.tokenize import load_tokenizer, tokenize

TURNS = {
    "messages": [{"role": "user", "content": "Name a sea."}, {"role": "assistant", "content": "North"}],
    "conversations": [{"from": "human", "value": "Name a sea."}, {"from": "gpt", "value": "North"}],
}
ASKED = {
    "messages": {"messages": TURNS["messages"]},
    "sharegpt": {"conversations": TURNS["conversations"]},
    "alpaca": {"instruction": "Name a sea.", "output": "North"},
    "prompt_completion": {"prompt": "Name a sea.", "completion": "North"},
}
PAIR = (Message("user", "Name a sea."), Message("assistant", "North"))


def reading(tmp_path: Path, *rows: object) -> tuple[list[Example], list[Rejection]]:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read(str(path))


def chat(*turns: tuple[str, Any], **fields: Any) -> dict[str, Any]:
    """A row of messages; `fields` are the last turn's."""
    messages = [{"role": role, "content": content} for role, content in turns]
    return {"messages": [*messages[:-1], messages[-1] | fields]}


@pytest.mark.parametrize("column", ["system", "system_prompt", "system_message"])
@pytest.mark.parametrize("form", ASKED)
def test_a_system_column_is_the_system_turn(tmp_path: Path, form: str, column: str) -> None:
    (example,), rejections = reading(tmp_path, ASKED[form] | {column: "Rhyme."})
    assert (example.messages, rejections) == ((Message("system", "Rhyme."), *PAIR), [])
    assert example.extra == {}
    (example,), _ = reading(tmp_path, ASKED[form] | {column: " "})
    assert example.messages == PAIR
    (example,), _ = reading(tmp_path, ASKED[form] | {column: None})
    assert example.messages == PAIR


def test_one_system_turn_in_two_places(tmp_path: Path) -> None:
    own = chat(("system", "Rhyme."), ("user", "Name a sea."), ("assistant", "North"))
    again = ASKED["alpaca"] | {"system": "Rhyme.", "system_prompt": "Sing."}
    (example,), _ = reading(tmp_path, own | {"system": "Rhyme. "})
    assert example.messages == (Message("system", "Rhyme."), *PAIR)
    _, (rejected,) = reading(tmp_path, ASKED["messages"], own | {"system": "Sing."})
    assert rejected.reason == "several different system turns: its first turn and column 'system'"
    _, (rejected,) = reading(tmp_path, ASKED["alpaca"], again)
    assert rejected.reason == "several different system turns: column 'system' and column 'system_prompt'"


@pytest.mark.parametrize("form", ["alpaca", "prompt_completion"])
def test_context_is_of_the_prompt(tmp_path: Path, form: str) -> None:
    (example,), _ = reading(tmp_path, ASKED[form] | {"context": "Seas: North, East."})
    assert example.prompt == "Name a sea.\nSeas: North, East."
    assert example.extra == {}
    (example,), _ = reading(tmp_path, ASKED[form] | {"context": ""})
    assert example.prompt == "Name a sea."


def test_context_and_input(tmp_path: Path) -> None:
    (example,), _ = reading(tmp_path, ASKED["alpaca"] | {"context": "Seas: North.", "input": "Be brief."})
    assert example.prompt == "Name a sea.\nSeas: North.\nBe brief."


@pytest.mark.parametrize(
    "column",
    [
        {"context": "Seas: North, East."},
        {"tools": ["search"]},
        {"documents": ["a map"]},
        {"input": "of Europe"},
        {"Context": "Seas: North, East."},
        {"System": "Rhyme."},
        {"systemPrompt": "Rhyme."},
        {"System Message": "Rhyme."},
        {"system_instruction": "Rhyme."},
    ],
)
def test_a_column_that_the_prompt_needs_is_named(
    tmp_path: Path, column: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    (name,) = column
    with caplog.at_level(logging.WARNING):
        reading(tmp_path, ASKED["sharegpt"] | column)
    assert f"not trained on, though some rows have it: column '{name}'" in caplog.text


def test_a_column_that_repeats_the_conversation_is_not_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (example,), _ = reading(
        tmp_path, ASKED["messages"] | {"prompt": "Name a  sea.", "tools": [], "source": "x"}
    )
    assert example.extra["prompt"] == "Name a  sea."
    assert "not trained on" not in caplog.text


BAD_THEN_GOOD = (("user", "one"), ("assistant", "bad"), ("user", "two"), ("assistant", "good"))


@pytest.mark.parametrize(
    "field",
    [{"weight": 0}, {"weight": 0.0}, {"weight": "0"}, {"weight": False}, {"train": False}, {"loss": 0}],
)
def test_an_answer_of_no_weight_is_not_learnt(tmp_path: Path, field: dict[str, Any]) -> None:
    row = chat(*BAD_THEN_GOOD, weight=1)
    row["messages"][1] |= field
    (example,), _ = reading(tmp_path, row)
    assert [m.learnt for m in example.messages] == [True, False, True, True]
    tokenizer = load_tokenizer(write_tiny_model(tmp_path / "model"))
    t = tokenize(example, tokenizer, 1 << 20)
    assert tokenizer.decode(t.tokens_n[t.is_target_n].tolist()) == "good<|im_end|>"
    assert "bad" in str(tokenizer.decode(t.tokens_n.tolist()))
    assert not (t.is_target_n & t.in_prompt_n).any()
    assert Example.from_json(json.loads(json.dumps(example.to_json()))) == example


def test_weights_of_sharegpt_turns(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "one"}, {"from": "gpt", "value": "bad", "weight": 0}]
    (example,), _ = reading(tmp_path, {"conversations": [*turns, *TURNS["conversations"]]})
    assert [m.learnt for m in example.messages] == [True, False, True, True]


def test_a_row_that_teaches_nothing_is_refused(tmp_path: Path) -> None:
    row = chat(("user", "one"), ("assistant", "bad"), weight=0)
    _, (rejected,) = reading(tmp_path, ASKED["messages"], row)
    assert rejected.reason.startswith("nothing is learnt: every answer has weight 0, or")


def test_turns_behind_the_last_learnt_answer_are_counted_and_carried() -> None:
    data = read_rows([chat(*BAD_THEN_GOOD, weight=0)])
    (example,) = data.examples
    assert example.messages == (Message("user", "one"), Message("assistant", "bad"))
    assert example.behind == (Message("user", "two"), Message("assistant", "good", learnt=False))
    assert [r.reason for r in data.repairs] == [BEHIND]
    assert (strict_hint([BEHIND]), strict_hint([BEHIND, JOINED])) == (
        "",
        " (data.strict=true refuses such rows)",
    )
    assert again(example).behind == example.behind
    assert example.replace_text("other", "answer", example.lineage).behind == ()


def again(example: Example) -> Example:
    """The example after it was written to dataset.jsonl, and read from there as a user's dataset."""
    (found,) = read_rows([json.loads(json.dumps(example.to_json()))], "messages").examples
    return found


def test_fields_of_turns_are_carried(caplog: pytest.LogCaptureFixture) -> None:
    asked = {"role": "user", "content": "q", "name": "Ann", "weight": 1}
    answer = {"role": "assistant", "content": "a", "reasoning_content": "So.", "weight": 1, "tool_calls": []}
    (example,) = read_rows([{"messages": [asked, answer]}]).examples
    assert "some rows have it: name, reasoning_content" in caplog.text
    fields = [{"name": "Ann", "weight": 1}, {"reasoning_content": "So."}]
    assert [json.loads(m.fields) for m in example.messages] == fields
    plain = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    assert read_rows([plain]).examples == [example]  # no model sees the fields: ids are the same
    caplog.clear()
    assert [m.fields for m in again(example).messages] == [m.fields for m in example.messages]
    assert "some rows have it: name, reasoning_content" in caplog.text
    answered, rewritten = (example.replace_text(q, "other", example.lineage) for q in ("q", "r"))
    assert [m.fields for m in answered.messages] == [example.messages[0].fields, ""]
    assert [m.fields for m in rewritten.messages] == ["", ""]
    system = {"role": "system", "content": "Rhyme.", "id": 7}
    (example,) = read_rows([{"messages": [system, asked, answer]}]).examples
    added = example.replace_text("r", "other", Lineage(op="synthesize"))
    assert [m.fields for m in added.messages] == ["", "", ""]  # nothing that names the row it was made from


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"behind": "more"}, "column 'behind' must be a list of turns, not text"),
        ({"behind": [{"role": "user"}]}, "turn 1 has no 'content'"),
        (
            {"behind": [{"role": "user", "content": "q", "fields": 5}]},
            "'fields' must be an object, not a number",
        ),
    ],
)
def test_what_dataset_jsonl_carries_is_checked(change: dict[str, Any], reason: str) -> None:
    row: Any = Example(PAIR).to_json() | change
    good = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    assert reason in read_rows([good, row], "messages").rejections[0].reason


def test_fields_of_joined_turns_are_carried() -> None:
    turns = [("user", "q", {"name": "Ann"}), ("user", "r", {"name": "Bo", "mood": 1}), ("assistant", "a", {})]
    row = {"messages": [{"role": role, "content": text, **fields} for role, text, fields in turns]}
    assert json.loads(read_rows([row]).examples[0].messages[0].fields) == {"name": "Ann", "mood": 1}


@pytest.mark.parametrize(
    ("row", "parts"),
    [
        ({"instruction": "", "input": "q", "output": "a"}, {"input": "q"}),
        ({"instruction": None, "input": "q", "output": "a"}, {"input": "q"}),  # as tables have it
        ({"instruction": "q", "input": "", "output": "a"}, {}),
        ({"prompt": "q", "context": "It rains.", "completion": "a"}, {"prompt": "q", "context": "It rains."}),
        ({"prompt": "q: x?", "context": "x", "completion": "a"}, {"prompt": "q: x?", "context": "x"}),
        ({"prompt": "q", "context": " ", "completion": "a"}, {}),
        (
            {"prompt": [{"role": "user", "content": "q"}], "context": "x", "completion": "a"},
            {"prompt": "q", "context": "x"},
        ),
    ],
)
def test_the_columns_of_a_prompt_are_carried(row: dict[str, Any], parts: dict[str, str]) -> None:
    (example,) = read_rows([row]).examples
    assert example.prompt_columns == parts == again(example).prompt_columns
    assert example.replace_text(example.question, "other", example.lineage).prompt_columns == parts


def test_another_weight_is_named_as_not_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (example,), _ = reading(tmp_path, chat(("user", "q"), ("assistant", "a"), weight=0.5))
    assert example.messages[-1].learnt
    assert "weight" in caplog.text


def test_the_same_words_with_other_weights_are_another_sample(tmp_path: Path) -> None:
    unlearnt = chat(*BAD_THEN_GOOD)
    unlearnt["messages"][1]["weight"] = 0
    examples, rejections = reading(tmp_path, chat(*BAD_THEN_GOOD), unlearnt)
    assert (len(examples), rejections) == (2, [])


@pytest.mark.parametrize(
    "name",
    [
        "out.jsonl messages",
        "out.json sharegpt",
        "out.jsonl prompt_completion",
        "out.parquet parquet",
        "out tfds",
    ],
)
def test_weights_survive_writing(tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    row = chat(*BAD_THEN_GOOD)
    row["messages"][1]["weight"] = 0
    examples, _ = reading(tmp_path, row, chat(("user", "q"), ("assistant", "a")))
    file, form = name.split()
    write(examples, tmp_path / file, form)
    again, _ = read(str(tmp_path / file))
    assert [e.messages for e in again] == [e.messages for e in examples]
    assert [m.learnt for e in again for m in e.messages] == [True, False, True, True, True, True]
    assert "not trained on" not in caplog.text


def test_alpaca_has_no_place_for_weights(tmp_path: Path) -> None:
    row = chat(*BAD_THEN_GOOD)
    row["messages"][1]["weight"] = 0
    with pytest.raises(DataError, match="weight 0"):
        write(reading(tmp_path, row)[0], tmp_path / "out.json", "alpaca")


@pytest.mark.parametrize(
    "content",
    [
        [{"type": "text", "text": "Name "}, {"type": "text", "text": "a sea."}],
        [{"type": "text", "text": "Name a sea.", "image_url": None}],
        ["Name a ", {"text": "sea."}],
        [{"type": "input_text", "text": "Name a sea."}],
        {"type": "text", "text": "Name a sea."},
    ],
)
def test_text_parts_are_joined(tmp_path: Path, content: object) -> None:
    answer = [{"type": "output_text", "text": "North"}]
    rows = (
        chat(("user", content), ("assistant", answer)),
        {"conversations": [{"from": "human", "value": content}, {"from": "gpt", "value": answer}]},
        {"prompt": content, "completion": answer},
    )
    for row in rows:
        assert reading(tmp_path, row)[0][0].messages == PAIR


def test_other_parts_are_refused_by_name(tmp_path: Path) -> None:
    for part, reason in (
        (
            {"type": "image_url", "image_url": {"url": "x"}},
            "turn 1: 'content' has a part of type 'image_url'",
        ),
        ({"type": "input_audio", "text": "x"}, "turn 1: 'content' has a part of type 'input_audio'"),
        ({"type": "text"}, "turn 1: 'content' has a part without text"),
        (3, "turn 1: 'content' has a part without text"),
    ):
        _, (rejected,) = reading(tmp_path, ASKED["messages"], chat(("user", [part]), ("assistant", "a")))
        assert rejected.reason.startswith(reason)


@pytest.mark.parametrize(
    ("system", "user", "assistant"),
    [
        ("developer", "user", "assistant"),
        ("System", "User", "Assistant"),
        ("SYSTEM", "human", "gpt"),
        ("Developer", "Human", "model"),
        (" system", "prompter", "ChatGPT"),
        ("system", "human", "bot"),
    ],
)
def test_roles_by_their_other_names(tmp_path: Path, system: str, user: str, assistant: str) -> None:
    turns = ((system, "Rhyme."), (user, "Name a sea."), (assistant, "North"))
    shares = [{"from": role, "value": text} for role, text in turns]
    for row in (chat(*turns), {"conversations": shares}):
        assert reading(tmp_path, row)[0][0].messages == (Message("system", "Rhyme."), *PAIR)
    _, (rejected,) = reading(tmp_path, ASKED["messages"], chat((user, "q"), ("Tool", "4"), (assistant, "a")))
    assert rejected.reason == "turn 2 is a tool's result, and no turn right before it calls a tool"


def test_targets_without_weights_are_as_before(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_tiny_model(tmp_path / "model"))
    t = tokenize(Example(PAIR), tokenizer, 1 << 20)
    assert np.flatnonzero(t.is_target_n).tolist()[-1] == len(t) - 2
