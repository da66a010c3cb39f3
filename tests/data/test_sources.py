"""Laws of datasets: what is written reads back, no row vanishes, no held-out prompt is trained on."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
import tempfile
import weakref
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.model_selection import train_test_split

from middo_jax.data import sources
from middo_jax.data.example import Example, Lineage, Message
from middo_jax.data.formats import detect
from middo_jax.data.reading import Reading
from middo_jax.data.sources import DataError, Rejection, read, read_rows, write
from middo_jax.data.split import split_heldout

TARGETS = [
    *(
        (form, ending)
        for form in ("alpaca", "sharegpt", "messages", "prompt_completion")
        for ending in ("json", "jsonl")
    ),
    ("alpaca", "parquet"),
    ("sharegpt", "parquet"),
    ("prompt_completion", "parquet"),
    ("parquet", "parquet"),
    ("tfds", ""),
]

texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(str.strip)
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | texts,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(texts, inner, max_size=2),
    max_leaves=4,
)
column_names = st.sampled_from(
    ["source", "id", "lineage", "extra", "n", "messages", "prompt", "input", "extra_prompt"]
)


@st.composite
def conversations(draw: st.DrawFn) -> tuple[Message, ...]:
    system = [Message("system", draw(texts))] if draw(st.booleans()) else []
    pairs = draw(st.lists(st.tuples(texts, texts), min_size=1, max_size=3))
    return (
        *system,
        *(m for user, reply in pairs for m in (Message("user", user), Message("assistant", reply))),
    )


def datasets_of(extras: st.SearchStrategy) -> st.SearchStrategy[list[Example]]:
    rows = st.lists(st.tuples(conversations(), extras), min_size=1, max_size=4, unique_by=lambda row: row[0])
    return rows.map(lambda rows: [Example(messages, extra=extra) for messages, extra in rows])


def example(prompt: str, response: str = "reply", /, **extra: object) -> Example:
    return Example((Message("user", prompt), Message("assistant", response)), extra=extra)


def reading(form: str, path: Path) -> tuple[str, str]:
    """Path and format with which `read` takes what `write` made."""
    if form == "tfds":
        return f"tfds:{path}:train", "messages"
    return str(path), "messages" if form == "parquet" else form


def jsonl(folder: Path, *rows: object) -> str:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


class Counted(dict):
    """A row whose life can be observed."""

    __hash__ = object.__hash__  # type: ignore[assignment]


@pytest.mark.parametrize("form", ["auto", "alpaca"])
def test_rows_are_freed_while_the_next_ones_are_read(form: str) -> None:
    alive, most = weakref.WeakSet[Counted](), 0

    def rows() -> Iterator[Counted]:
        nonlocal most
        for n in range(500):
            row = Counted(instruction=f"Name {n}.", output="Yes.", source=f"s{n}")
            alive.add(row)
            most = max(most, len(alive))
            yield row
            del row

    data = read_rows(rows(), form)
    assert (len(data.examples), data.rows, data.columns) == (500, None, ["instruction", "output", "source"])
    assert most <= (103 if form == "auto" else 3)  # a hundred tell the format
    kept = read_rows(rows(), form, keep_rows=True).rows
    assert kept is not None
    assert [row["source"] for row in kept] == [f"s{n}" for n in range(500)]


def test_what_all_examples_have_is_stored_once(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{n}", "completion": "c", "source": f"s{n}"} for n in range(2)]
    bare = [{"prompt": f"q{n}", "completion": "c"} for n in range(2)]
    examples, _ = read(jsonl(tmp_path, *rows, *bare))
    stored = [Example.from_json(json.loads(json.dumps(e.to_json()))) for e in examples]
    assert stored == examples
    for one, other in (examples[:2], stored[:2]):
        assert one.lineage is other.lineage
        assert next(iter(one.extra)) is next(iter(other.extra))
        assert one.messages[0].role is other.messages[0].role
    assert examples[2].extra is examples[3].extra is stored[2].extra is examples[0].prompt_columns
    assert [e.root_id for e in stored] == [e.to_json()["lineage"]["root_id"] for e in examples]
    assert [e.root_id for e in stored] == [e.id for e in examples]


# Round trips


@pytest.mark.parametrize(("form", "ending"), TARGETS)
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_what_is_written_reads_back(form: str, ending: str, data: st.DataObject) -> None:
    examples = data.draw(datasets_of(st.dictionaries(column_names, json_values, max_size=3)))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"out.{ending}" if ending else Path(folder) / "out"
        write(examples, path, form)
        back, rejected = read(*reading(form, path))
    assert rejected == []
    assert [e.messages for e in back] == [e.messages for e in examples]
    assert [e.id for e in back] == [e.id for e in examples]


@pytest.mark.parametrize(("form", "ending"), TARGETS)
@given(examples=datasets_of(st.fixed_dictionaries({"source": json_values, "n": json_values})))
@settings(max_examples=15, deadline=None)
def test_extra_columns_read_back_and_the_format_is_told(
    form: str, ending: str, examples: list[Example]
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"out.{ending}" if ending else Path(folder) / "out"
        write(examples, path, form)
        back, _ = read(reading(form, path)[0])
    assert back == examples


@given(examples=datasets_of(st.dictionaries(column_names, json_values, max_size=3)))
@settings(max_examples=30, deadline=None)
def test_dataset_jsonl_reads_back_exactly(examples: list[Example]) -> None:
    lineage = Lineage(("p",), "r", 2, "rewrite", "hard", ("h",), "gpt", "v1", {"loss": 1.5, "q": None})
    examples = [Example(e.messages, e.id, lineage, e.extra) for e in examples]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "dataset.jsonl"
        sources.write_jsonl(path, (e.to_json() for e in examples))
        assert read(str(path)) == (examples, [])


def test_damaged_lineage_is_a_rejection_and_added_columns_survive(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [json.loads(json.dumps(example(f"prompt {i}").to_json())) for i in range(3)]
    good, bad, odd = rows
    good["note"] = "added by hand"
    bad["lineage"]["round"] = "one"
    odd["lineage"]["surprise"] = 1
    examples, rejected = read(jsonl(tmp_path, good, bad, odd))
    assert [e.extra for e in examples] == [{"note": "added by hand"}]
    assert "lineage.round" in rejected[0].reason
    assert "surprise" in rejected[1].reason


def test_a_clashing_column_is_renamed_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write([example("q", prompt="theirs", id=7)], tmp_path / "out.jsonl", "prompt_completion")
    row = json.loads((tmp_path / "out.jsonl").read_text())
    assert row == {"prompt": "q", "completion": "reply", "extra_prompt": "theirs", "id": 7}
    assert "prompt -> extra_prompt" in caplog.text
    back, _ = read(str(tmp_path / "out.jsonl"))
    assert (back[0].extra, back[0].user_id) == ({"extra_prompt": "theirs"}, 7)


def test_tfds_needs_no_tensorflow(tmp_path: Path) -> None:
    program = """
import sys
from pathlib import Path
from middo_jax.data.example import Example, Message
from middo_jax.data.sources import read, write
out = sys.argv[1]
examples = [Example((Message("user", f"q{i}"), Message("assistant", "a")), extra={"n": i}) for i in range(50)]
write(examples, out, "tfds")
assert read(f"tfds:{out}:train") == (examples, [])
import tensorflow_datasets as tfds
source = tfds.builder_from_directory(out).as_data_source("train")
assert [row["id"].decode() for row in source] == [e.id for e in examples]
assert "tensorflow" not in sys.modules
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "out")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""  # progress belongs on stderr


# Formats

PAIR = (Message("user", "q"), Message("assistant", "a"))
LONG = (Message("system", "s"), Message("user", "q0"), Message("assistant", "a0"), *PAIR)


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"instruction": "q", "output": "a"}, PAIR),
        ({"instruction": "q", "input": "", "output": "a", "system": "", "history": []}, PAIR),
        ({"instruction": "do", "input": "it", "output": "a"}, (Message("user", "do\nit"), PAIR[1])),
        ({"instruction": "q", "output": "a", "system": "s", "history": [["q0", "a0"]]}, LONG),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, PAIR),
        (
            {
                "conversations": [{"from": "system", "value": "s"}]
                + [
                    {"from": f, "value": v}
                    for f, v in (("user", "q0"), ("assistant", "a0"), ("human", "q"), ("gpt", "a"))
                ]
            },
            LONG,
        ),
        ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}, PAIR),
        ({"prompt": "q", "completion": "a"}, PAIR),
        (
            {
                "prompt": [{"role": "user", "content": "q"}],
                "completion": [{"role": "assistant", "content": "a"}],
            },
            PAIR,
        ),
    ],
)
def test_formats(tmp_path: Path, row: dict, messages: tuple[Message, ...]) -> None:
    examples, rejected = read(jsonl(tmp_path, {**row, "source": "x"}))
    assert rejected == []
    assert examples == [Example(messages, extra={"source": "x"})]


def test_alpaca_keeps_several_turns_and_system(tmp_path: Path) -> None:
    write([Example(LONG)], tmp_path / "out.json", "alpaca")
    row = json.loads((tmp_path / "out.json").read_text())[0]
    assert {**row, "id": ""} == {
        "id": "", "instruction": "q", "input": "", "output": "a", "system": "s", "history": [["q0", "a0"]],
    }  # fmt: skip


def test_turns_of_prompt_completion_as_text_of_a_table_are_turns(tmp_path: Path) -> None:
    """A list in the text of an answer is text; with a role in it, it is turns."""
    turns = [[{"role": "user", "content": "Hi."}], [{"role": "assistant", "content": "I."}]]
    rows = [{"prompt": "Count.", "completion": "[1, 2]"}]
    rows.append(dict(zip(("prompt", "completion"), map(json.dumps, turns), strict=True)))
    table = io.StringIO()
    writer = csv.DictWriter(table, ["prompt", "completion"])
    writer.writeheader()
    writer.writerows(rows)
    (tmp_path / "rows.csv").write_text(table.getvalue())
    plain, conversation = read(str(tmp_path / "rows.csv"))[0]
    assert (plain.prompt, plain.response) == ("Count.", "[1, 2]")
    assert (conversation.prompt, conversation.response) == ("Hi.", "I.")


def test_prompt_completion_is_conversational_where_text_cannot_say_it(tmp_path: Path) -> None:
    write([Example(PAIR)], tmp_path / "short.jsonl", "prompt_completion")
    assert json.loads((tmp_path / "short.jsonl").read_text())["prompt"] == "q"
    write([Example(LONG)], tmp_path / "long.jsonl", "prompt_completion")
    row = json.loads((tmp_path / "long.jsonl").read_text())
    assert [turn["role"] for turn in row["prompt"]] == ["system", "user", "assistant", "user"]
    assert row["completion"] == [{"role": "assistant", "content": "a"}]


def test_unknown_and_ambiguous_columns_are_named(tmp_path: Path) -> None:
    with pytest.raises(
        DataError,
        match=r"question, answer.*fit no format.*data\.columns=.*alpaca.*sharegpt.*messages.*prompt_comp",
    ):
        read(jsonl(tmp_path, {"question": "q", "answer": "a"}))
    both = {"prompt": "q", "completion": "a", "instruction": "q", "output": "a"}
    with pytest.raises(DataError, match="alpaca and prompt_completion"):
        read(jsonl(tmp_path, both))
    assert read(jsonl(tmp_path, both), "alpaca")[0][0].extra == {"prompt": "q", "completion": "a"}
    assert detect([{"instruction": "q"}, {"instruction": "q", "output": "a"}]) == "alpaca"


# Bad input


def turns(*roles: str) -> dict:
    return {"messages": [{"role": role, "content": f"{role} {n}"} for n, role in enumerate(roles)]}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"instruction": "q"}, "'output' is missing"),
        ({"instruction": "q", "output": None}, "'output' is missing"),
        ({"instruction": "q", "output": " \n"}, "empty response"),
        ({"instruction": "", "output": "a"}, "empty prompt"),
        ({"instruction": 3, "output": "a"}, "'instruction' must be text, not a number"),
        ({"instruction": "q", "output": ["a"]}, "'output' must be text, not a list"),
        ({"instruction": "q", "output": "a", "history": ["x"]}, "pair 1"),
        ({"instruction": "q", "output": "a", "history": [["", "x"]]}, "turn 2 (user) is empty"),
        ({"instruction": "q", "output": "\ud800"}, "lone surrogate"),
        ({"instruction": "q", "output": "a", "tag": ["\udfff"]}, "lone surrogate"),
        ("text", "must be an object"),
        ({"messages": []}, "no response"),
        ({"messages": "hello"}, "must be a list of turns, not text"),
        ({"messages": ["hello"]}, "turn 1 must be an object, not text"),
        ({"messages": [{"role": "user"}]}, "turn 1 has no 'content'; a turn has 'role' and 'content', or"),
        ({"messages": [{"from": "gpt", "text": "x"}]}, "turn 1 has no 'value'; "),
        (
            {"messages": [{"speaker": "user", "text": "x"}]},
            "turn 1 has no 'role'; a turn has 'role' and 'content', or 'from' and 'value', and it has "
            "'speaker', 'text'",
        ),
        ({"messages": [{"role": "user", "content": 3}]}, "turn 1: 'content' must be text, not a number"),
        (turns("user", "assistant", "user"), "ends with the user"),
        (turns("system"), "ends with the system"),
        (turns("assistant"), "no prompt: the conversation has no user turn"),
        (turns("user", "user", "assistant"), "turn 2 is the user's"),
        (turns("user", "assistant", "assistant"), "turn 3 is the assistant's"),
        (turns("user", "system", "assistant"), "turn 2 is a system turn"),
        (turns("system", "system", "user", "assistant"), "turn 2 is a system turn"),
        (turns("user", "narrator", "assistant"), "unknown role 'narrator'"),
        (turns("user", "a\x1b[2J", "assistant"), r"data.roles='{'a\x1b[2J': user}'"),
        (
            turns("user", "tool", "assistant"),
            "turn 2 is a tool's result, and no turn right before it calls a tool",
        ),
        (
            {"messages": [{"role": "assistant", "content": None, "tool_calls": [{}]}]},
            "turn 1: a tool call needs a 'name'",
        ),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "turn 1: 'role' must be text, not a list"),
    ],
)
def test_unusable_rows_say_why(tmp_path: Path, row: object, reason: str) -> None:
    form = "messages" if isinstance(row, dict) and "messages" in row else "alpaca"
    good = turns("user", "assistant") if form == "messages" else {"instruction": "q", "output": "a"}
    strict = Reading(strict=True)
    data = read_rows(jsonl(tmp_path, good, row), form, reading=strict)
    (rejected,) = data.rejections
    assert len(data.examples) == 1
    assert rejected.where.endswith("rows.jsonl:2")
    assert reason in rejected.reason
    sources.write_jsonl(tmp_path / "rejected.jsonl", [rejected.to_json()])  # also with surrogates
    with pytest.raises(DataError, match="none of its 1 rows") as error:
        read_rows(jsonl(tmp_path, row), form, reading=strict)
    assert reason in str(error.value)


def test_duplicates_name_the_first(tmp_path: Path) -> None:
    row = {"prompt": "q", "completion": "a"}
    (kept,), (first, second) = read(jsonl(tmp_path, row, {**row, "source": "x"}, row))
    assert first.reason == f"duplicate of {kept.id} ({tmp_path}/rows.jsonl:1)"
    assert (first.row, second.where) == ({**row, "source": "x"}, f"{tmp_path}/rows.jsonl:3")


raw_rows = st.lists(
    st.one_of(
        st.sampled_from([{"prompt": "q", "completion": "a"}, {"prompt": "q2", "completion": "a"}]),
        st.dictionaries(st.sampled_from(["prompt", "completion", "x"]), json_values),
        json_values,
    ).map(json.dumps)
    | st.sampled_from(
        ["{", "nul", "[1", '"\\ud800"', '{"prompt": "\\ud800", "completion": "a"}', "[" * 5000]
    ),
    min_size=1,
    max_size=8,
)


@given(lines=raw_rows, limit=st.none() | st.integers(1, 8))
@settings(max_examples=100, deadline=None)
def test_no_row_vanishes(lines: list[str], limit: int | None) -> None:
    good = '{"prompt": "first", "completion": "a"}'
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        path.write_text("\n".join([good, "", *lines]), encoding="utf-8")
        examples, rejected = read(str(path), "prompt_completion", limit)
        sources.write_jsonl(Path(folder) / "rejected.jsonl", [r.to_json() for r in rejected])
    assert len(examples) + len(rejected) == min(len(lines) + 1, limit or 99)
    assert len({e.id for e in examples}) == len(examples)


def test_broken_lines_are_rejected_one_by_one(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    good = b'{"prompt": "q\xe2\x80\xa8", "completion": "a"}'  # U+2028 ends no line
    path.write_bytes(b"\xef\xbb\xbf" + good + b"\r\n\r\n{oops}\r\n" + b'{"prompt": "\xff"}\n')
    examples, (broken, binary) = read(str(path))
    assert examples[0].prompt == "q\u2028"
    assert broken == Rejection(
        f"{path}:3", "broken JSON: Expecting property name enclosed in double quotes (column 2)", "{oops}"
    )
    assert binary.where == f"{path}:4"
    assert "not UTF-8: byte 0xff at column 13" in binary.reason


def test_json_files(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    row = {"prompt": "q", "completion": "a"}
    for value in ([row], {"data": [row]}, {"version": 1, "rows": [row]}):
        path.write_text(json.dumps(value), encoding="utf-8-sig")
        assert read(str(path)) == ([example("q", "a")], [])
    for content, message in (
        ('[{"prompt": 1},\n {"prompt": }]', "line 2, column 13"),
        ('{"prompt": "q"}\n{"prompt": "q"}', r"\.jsonl file"),
        ('{"prompt": "q"}', "must contain a list of rows"),
        ("", "has no rows"),
        ("[]", "has no rows"),
        ("[" * 5000, "JSON beyond the limits of the parser"),
    ):
        path.write_text(content)
        with pytest.raises(DataError, match=message):
            read(str(path))
    path.write_bytes(b'[\n"\xff"]')
    with pytest.raises(DataError, match=r"rows\.json:2: not UTF-8"):
        read(str(path))


def test_paths_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "rows.xlsx").write_text("a,b")
    (tmp_path / "rows.parquet").write_text("no parquet")
    for path, message in (
        (str(tmp_path / "none.jsonl"), "there is no file"),
        (str(tmp_path / "rows.xlsx"), r"must end in \.json"),
        (str(tmp_path / "rows.parquet"), "not a readable Parquet file"),
        ("hf:owner/name", "names no split"),
        (f"hf:{tmp_path}/none:train", "there is no directory"),
        (f"tfds:{tmp_path}:train", "not a prepared TFDS directory"),
        ("tfds:no_such_dataset_at_all:train", "not found"),
    ):
        with pytest.raises(DataError, match=message):
            read(path)
    with pytest.raises(DataError, match="unknown format"):
        read(str(tmp_path / "rows.csv"), "csv")


def test_fields_inside_turns_are_not_dropped_in_silence(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    row = {
        "conversations": [
            {"from": "human", "value": "q", "weight": 0},
            {"from": "gpt", "value": "a", "n": None},
        ]
    }
    assert read(jsonl(tmp_path, row)) == ([Example(PAIR)], [])
    assert "weight" in caplog.text


# Columnar files and hubs


def test_parquet_types_become_plain(tmp_path: Path) -> None:
    pq.write_table(
        pa.table(
            {
                "instruction": ["q", "r"],
                "output": ["a", "b"],
                "input": [float("nan"), float("nan")],
                "score": np.array([0.5, np.nan], np.float32),
                "tags": [["x"], []],
                "when": np.array(["2024-01-02", "2024-01-03"], "datetime64[D]"),
            }
        ),
        tmp_path / "rows.parquet",
    )
    first, second = read(str(tmp_path / "rows.parquet"))[0]
    assert first.extra == {"score": 0.5, "tags": ["x"], "when": "2024-01-02"}
    assert second.extra["score"] is None
    assert first.messages == PAIR


def test_a_missing_response_in_parquet_is_a_rejection(tmp_path: Path) -> None:
    pq.write_table(pa.table({"prompt": ["q", "r"], "completion": ["a", None]}), tmp_path / "rows.parquet")
    (kept,), (rejected,) = read(str(tmp_path / "rows.parquet"))
    assert (kept.prompt, rejected.where) == ("q", "row 2")
    assert "'completion' is missing or null" in rejected.reason


def test_hf_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    table = datasets.Dataset.from_list([{"prompt": "q", "completion": "a", "n": 1}])
    expected = ([example("q", "a", n=1)], [])
    table.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"test": table}).save_to_disk(str(tmp_path / "several"))
    (tmp_path / "files").mkdir()
    table.to_parquet(str(tmp_path / "files" / "part-0.parquet"))
    for name in ("one:train", "several:test", "files:train"):
        assert read(f"hf:{tmp_path / name}") == expected
    assert read(str(tmp_path / "one")) == expected
    with pytest.raises(DataError, match="cannot read split 'train'"):
        read(f"hf:{tmp_path / 'several'}:train")


def test_hf_names_the_extra_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"middo-jax\[hub\]"):
        read("hf:owner/name:train")


# Writing


def test_writing_refuses_what_it_cannot_do(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for path, form, message in (
        ("full", "tfds", "not an empty directory"),
        ("out.csv", "messages", "must end in"),
        ("out.json", "parquet", r"must end in \.parquet"),
        ("out.json", "csv", "unknown format"),
    ):
        with pytest.raises(DataError, match=message):
            write([example("q")], tmp_path / path, form)
    with pytest.raises(DataError, match="no examples"):
        write([], tmp_path / "out.json", "messages")
    assert [p.name for p in tmp_path.iterdir()] == ["full"]
    for path in ("full/file/out.jsonl", "full/file/out"):
        with pytest.raises(DataError, match="cannot write"):
            write([example("q")], tmp_path / path, "messages" if path.endswith("l") else "tfds")
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(DataError, match="cannot write"):
        write([example("q")], tmp_path / "folder.json", "messages")
    (tmp_path / "folder.json").rmdir()
    (tmp_path / "empty").mkdir()
    write([example("q")], tmp_path / "empty", "tfds")
    assert len(read(str(tmp_path / "empty"))[0]) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "full"]  # no temporary is left


# Held-out split

sources_of_rows = st.lists(
    st.tuples(
        st.sampled_from("abcdefgh"), st.integers(0, 99), st.sampled_from(["x", "y", "z", "w", ["list"], None])
    ),
    max_size=40,
    unique_by=lambda row: row[:2],
)


@given(rows=sources_of_rows, fraction=st.floats(0, 0.95), seed=st.integers(0, 5), shuffle=st.randoms())
@settings(max_examples=80, deadline=None)
def test_split_is_a_partition_that_keeps_prompts_apart(rows, fraction, seed, shuffle) -> None:
    examples = [example(prompt, f"reply {n}", source=source) for prompt, n, source in rows]
    train, heldout = split_heldout(examples, fraction, seed, "source")
    held = {e.id for e in heldout}
    assert train == [e for e in examples if e.id not in held]
    assert heldout == [e for e in examples if e.id in held]
    assert not {e.prompt for e in train} & {e.prompt for e in heldout}
    if fraction == 0:
        assert heldout == []
    elif len({e.prompt for e in examples}) > 1:
        assert train
        assert heldout
    shuffled = list(examples)
    shuffle.shuffle(shuffled)
    assert {e.id for e in split_heldout(shuffled, fraction, seed, "source")[1]} == held


def test_split_is_stratified_and_pools_rare_sources(caplog: pytest.LogCaptureFixture) -> None:
    examples = [example(f"p{n}", source="big" if n < 80 else "small") for n in range(100)]
    lone = [example("rare 1", source="r1")]
    for extra in ([], lone, [*lone, example("rare 2", source="r2")]):
        _, heldout = split_heldout([*examples, *extra], 0.1, 0, "source")
        count = Counter(e.extra["source"] for e in heldout)
        assert (count["big"], count["small"] + count["r1"] + count["r2"]) == (8, 2)
    assert caplog.text == ""
    split_heldout([*examples, example("no source")], 0.1, 0, "source")
    assert "1 of 101 prompts have no 'source'" in caplog.text
    split_heldout([example(f"p{n}", source=n) for n in range(10)], 0.2, 0, "source")
    assert "too few prompts" in caplog.text


def test_split_is_that_of_the_prompts_and_sources_themselves() -> None:
    sources = ["a", "b", "big", ["list"], 7, "Z"]  # as JSON not in this order
    examples = [example(f"p{n}", source=sources[n % 13 % 6]) for n in range(300)]
    by_id = sorted(examples, key=lambda e: e.id)
    strata = [json.dumps(e.extra["source"]) for e in by_id]
    _, expected = train_test_split([e.prompt for e in by_id], test_size=60, random_state=3, stratify=strata)
    _, heldout = split_heldout(examples, 0.2, 3, "source")
    assert sorted(e.prompt for e in heldout) == sorted(expected)


def test_split_depends_on_the_seed() -> None:
    examples = [example(f"p{n}") for n in range(100)]
    first, second = (split_heldout(examples, 0.1, seed, "source")[1] for seed in (0, 1))
    assert first != second
    assert len(first) == len(second) == 10
    with pytest.raises(DataError, match="fraction"):
        split_heldout(examples, 1.0, 0, "source")
