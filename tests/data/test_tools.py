"""Tools: read in every form, rendered by the template, learnt where the assistant speaks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from support.tiny_model import write_tiny_model

from middo_jax.config import RefineSettings
from middo_jax.data.example import Example
from middo_jax.data.sources import DataError, read, write
from middo_jax.data.tokenize import load_tokenizer, refusal, tokenize
from middo_jax.refinement.tasks import plan_tasks, why_kept

ADD = {"name": "add", "description": "Adds.", "parameters": {"type": "object", "properties": {}}}
CALL = {"name": "add", "arguments": {"a": 2, "b": 3}}
MESSAGES: dict[str, Any] = {
    "tools": [{"type": "function", "function": ADD}],
    "messages": [
        {"role": "developer", "content": "Use tools."},
        {"role": "user", "content": "Two and three?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {
                    "id": "call_1",
                    "type": "function",
                    "function": {"name": "add", "arguments": json.dumps(CALL["arguments"])},
                }
            ],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": '{"sum": 5}'},
        {"role": "assistant", "content": "Five."},
    ],
}
SHAREGPT: dict[str, Any] = {
    "system": "Use tools.",
    "tools": json.dumps([ADD]),
    "conversations": [
        {"from": "human", "value": "Two and three?"},
        {"from": "function_call", "value": json.dumps(CALL)},
        {"from": "observation", "value": '{"sum": 5}'},
        {"from": "gpt", "value": "Five."},
    ],
}
TEMPLATE = (
    "{% if tools %}<|im_start|>system\nTools:"
    "{% for tool in tools %} {{ tool | tojson }}{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}{% if m.role == 'tool' %}"
    "<|im_start|>user\n<result>{{ m.content | tojson }}</result><|im_end|>\n"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<call>{{ call.function | tojson }}</call>{% endfor %}<|im_end|>\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def reading(tmp_path: Path, *rows: Any) -> tuple[list[Example], list[Any]]:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return read(str(path))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    loaded = load_tokenizer(write_tiny_model(tmp_path_factory.mktemp("model")))
    loaded.chat_template = TEMPLATE
    return loaded


@pytest.mark.parametrize("row", [MESSAGES, SHAREGPT])
def test_calls_and_results_are_read_in_both_forms(tmp_path: Path, row: dict[str, Any]) -> None:
    (example,), rejections = reading(tmp_path, row)
    assert rejections == []
    assert [m.role for m in example.messages] == ["system", "user", "assistant", "tool", "assistant"]
    [call] = json.loads(example.messages[2].tool)["tool_calls"]
    assert call["function"] == CALL
    assert example.messages[2].text == json.dumps(CALL)
    assert json.loads(example.tools)[0].get("function", json.loads(example.tools)[0]) == ADD
    assert example.extra == {}
    assert Example.from_json(json.loads(json.dumps(example.to_json()))) == example
    assert reading(tmp_path, example.to_json())[0] == [example]


def test_the_tools_are_part_of_the_id(tmp_path: Path) -> None:
    other = SHAREGPT | {"tools": json.dumps([ADD | {"name": "plus"}])}
    examples, rejections = reading(tmp_path, SHAREGPT, other, SHAREGPT | {"tools": "[]"})
    assert (len({e.id for e in examples}), rejections) == (3, [])


def test_a_call_behind_a_text_and_parallel_calls_are_one_turn(tmp_path: Path) -> None:
    turns = SHAREGPT["conversations"]
    calls = [CALL, CALL | {"arguments": {"a": 1, "b": 1}}]
    row = {
        "conversations": [
            turns[0],
            {"from": "gpt", "value": "I add."},
            {"from": "function_call", "value": json.dumps(calls)},
            turns[2],
            turns[2],
            turns[3],
        ]
    }
    (example,), _ = reading(tmp_path, row)
    assert [m.role for m in example.messages] == ["user", "assistant", "tool", "tool", "assistant"]
    assert example.messages[1].content == "I add."
    assert len(json.loads(example.messages[1].tool)["tool_calls"]) == 2


@pytest.mark.parametrize(
    ("turn", "reason"),
    [
        ({"from": "function_call", "value": "add(2, 3)"}, "turn 2: a tool call must be JSON"),
        ({"from": "function_call", "value": "{}"}, "turn 2: a tool call needs a 'name'"),
        (
            {"from": "function_call", "value": '{"name": "add", "arguments": [1]}'},
            "turn 2: the arguments of the call of 'add' must be an object",
        ),
        (
            {"from": "observation", "value": "5"},
            "turn 2 is a tool's result, and no turn right before it calls a tool",
        ),
    ],
)
def test_broken_calls_are_refused_by_their_turn(tmp_path: Path, turn: dict[str, str], reason: str) -> None:
    turns = SHAREGPT["conversations"]
    _, (rejected,) = reading(tmp_path, SHAREGPT, {"conversations": [turns[0], turn, *turns[2:]]})
    assert reason in rejected.reason


def test_an_answer_behind_a_call_without_its_result_is_refused(tmp_path: Path) -> None:
    turns = SHAREGPT["conversations"]
    _, (rejected,) = reading(tmp_path, SHAREGPT, {"conversations": [*turns[:2], turns[3]]})
    assert "turn 3: an answer follows a tool call without the tool's result" in rejected.reason


@pytest.mark.parametrize("row", [MESSAGES, SHAREGPT])
def test_only_the_assistant_is_learnt_calls_among_it(
    tmp_path: Path, row: dict[str, Any], tokenizer: Any
) -> None:
    (example,), _ = reading(tmp_path, row)
    assert refusal(example, tokenizer) is None
    t = tokenize(example, tokenizer, 1 << 20)
    text = str(tokenizer.decode(t.tokens_n.tolist()))
    learnt = str(tokenizer.decode(t.tokens_n[t.is_target_n].tolist()))
    assert learnt.count("<|im_end|>") == 2
    assert learnt.startswith("<call>")
    assert '"add"' in learnt
    assert learnt.endswith("</call><|im_end|>Five.<|im_end|>")
    assert "result" in text
    assert "result" not in learnt
    assert "Adds." in text
    prompt = str(tokenizer.decode(t.tokens_n[t.in_prompt_n].tolist()))
    assert prompt.strip() == "Two and three?"


def test_a_call_of_no_weight_is_not_learnt(tmp_path: Path, tokenizer: Any) -> None:
    row = json.loads(json.dumps(MESSAGES))
    row["messages"][2]["weight"] = 0
    (example,), _ = reading(tmp_path, row)
    t = tokenize(example, tokenizer, 1 << 20)
    assert str(tokenizer.decode(t.tokens_n[t.is_target_n].tolist())) == "Five.<|im_end|>"


WELCOME = {"role": "assistant", "content": "Welcome!"}
FIRST_CALL, RESULT = MESSAGES["messages"][2], {"role": "tool", "content": "1"}


@pytest.mark.parametrize(
    "first",
    [
        [WELCOME],
        [FIRST_CALL],
        [FIRST_CALL, RESULT, WELCOME],
        [WELCOME, FIRST_CALL, RESULT, WELCOME],
        [FIRST_CALL, RESULT],  # unfinished, and nothing of it is learnt
        [FIRST_CALL, {"role": "tool", "content": ""}, WELCOME],
    ],
)
def test_an_exchange_before_the_first_question_is_context(
    tmp_path: Path, tokenizer: Any, first: list[dict[str, Any]]
) -> None:
    turns = [*first, *MESSAGES["messages"][1:]]
    (example,), _ = reading(tmp_path, MESSAGES | {"messages": turns})
    assert refusal(example, tokenizer) is None
    t = tokenize(example, tokenizer, 1 << 20)
    learnt = str(tokenizer.decode(t.tokens_n[t.is_target_n].tolist()))
    assert (learnt.count("<call>"), learnt.count("<|im_end|>"), "Welcome" in learnt) == (1, 2, False)


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ([RESULT, WELCOME], "turn 1 is a tool's result, and no turn right before it calls a tool"),
        (
            [{"role": "user", "content": "Two?"}, FIRST_CALL, RESULT],
            "turn 4 is the user's, right behind a tool's result; the assistant's answer is missing",
        ),
    ],
)
def test_an_exchange_that_lacks_a_turn_is_refused(tmp_path: Path, turns: list[Any], reason: str) -> None:
    _, (rejected,) = reading(tmp_path, MESSAGES, {"messages": [*turns, *MESSAGES["messages"][1:]]})
    assert rejected.reason == reason


def test_a_template_that_shows_no_tools_refuses_the_row_and_says_what_to_do(tmp_path: Path) -> None:
    tiny = load_tokenizer(write_tiny_model(tmp_path / "model"))
    (with_definitions, with_calls), _ = reading(tmp_path, MESSAGES, MESSAGES | {"tools": []})
    assert "does not show the tool 'add' of column 'tools'" in str(refusal(with_definitions, tiny))
    assert "does not show the tool calls of turn 3" in str(refusal(with_calls, tiny))


def test_samples_with_tools_are_never_rewritten(tmp_path: Path) -> None:
    (example,), _ = reading(tmp_path, MESSAGES)
    assert plan_tasks([example], {"quality": {example.id}}, {}, {}) == []
    assert why_kept(example, RefineSettings().turns) == "tools are used, and a refiner has none"


@pytest.mark.parametrize(
    ("form", "ending"),
    [("messages", ".jsonl"), ("sharegpt", ".jsonl"), ("prompt_completion", ".json"), ("parquet", ".parquet")],
)
def test_tools_are_written_and_read_back(tmp_path: Path, form: str, ending: str) -> None:
    single = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}
    examples, _ = reading(tmp_path, MESSAGES, single)
    out = tmp_path / f"out{ending}"
    write(examples, out, form)
    assert read(str(out))[0] == examples
    if form == "parquet":  # for readers that do not know this program: typed columns, no JSON text
        turns = pq.read_table(out)["messages"].to_pylist()[0]
        assert json.loads(turns[2]["tool_calls"][0]["function"]["arguments"]) == CALL["arguments"]


@pytest.mark.parametrize(("form", "name"), [("alpaca", "out.json"), ("tfds", "out")])
def test_a_format_without_a_place_for_tools_says_so(tmp_path: Path, form: str, name: str) -> None:
    examples, _ = reading(tmp_path, MESSAGES)
    with pytest.raises(DataError, match=f"{form} has no place for tool.*write messages instead"):
        write(examples, tmp_path / name, form)


def test_a_column_called_tools_that_defines_none_is_the_users_own(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (example,), _ = reading(
        tmp_path, {"instruction": "Build.", "output": "Done.", "tools": ["hammer", "saw"]}
    )
    assert (example.tools, example.extra) == ("", {"tools": ["hammer", "saw"]})
    assert "column 'tools'" in caplog.text
