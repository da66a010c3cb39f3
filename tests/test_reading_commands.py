"""What a user sees of data and templates that are read: through the commands, on tiny models."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from support.command import Middo
from support.tiny_model import CHAT_TEMPLATE, write_tiny_model

pytest_plugins = ["support.command"]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "model")


def write_rows(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def chat(*texts: str) -> dict[str, Any]:
    roles = ("user", "assistant") * len(texts)
    return {"messages": [{"role": r, "content": t} for r, t in zip(roles, texts, strict=False)]}


NO_END = "no sample learns where an answer ends"


def test_that_no_row_learns_where_to_stop_is_said(middo: Middo, model: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "d.jsonl", chat("Name a sea.", "North"), chat("Name a lake.", "Wener " * 40))
    assert NO_END not in middo("inspect", data, "--model", model).err
    endless = tmp_path / "endless.jinja"
    endless.write_text(CHAT_TEMPLATE.replace("'<|im_end|>' + ", ""))
    found = middo("inspect", data, "--model", model, f"model.template={endless}")
    assert found.code == 0
    assert f"{NO_END}, so the trained model will not stop: the chat template writes no control" in found.err
    long = write_rows(tmp_path / "long.jsonl", chat("Name a lake.", "Wener " * 40))
    found = middo("inspect", long, "--model", model, "model.max_length=32")
    assert "every conversation is cut at model.max_length=32" in found.err
    many = write_rows(tmp_path / "many.jsonl", chat("Name a sea.", "North", "And?", "East"))
    found = middo("eval", "--data", many, "--model", model, f"model.template={endless}")
    assert found.code == 0, found.err
    assert NO_END in found.err


def test_a_row_with_another_stop_token_is_refused(middo: Middo, model: Path, tmp_path: Path) -> None:
    (model / "generation_config.json").write_text('{"eos_token_id": [2, 0]}')
    rows = (chat("Name a sea.", "North"), chat("What is it?", "It is <|endoftext|>, a token."))
    data = write_rows(tmp_path / "d.jsonl", *rows)
    found = json.loads(middo("inspect", data, "--model", model, "--json").out)
    assert found["n"] == 1
    assert [r["reason"] for r in found["rejected"]] == [
        "its text contains the model's control token <|endoftext|>"
    ]


def test_convert_reads_the_format_that_is_named(middo: Middo, tmp_path: Path) -> None:
    row = chat("Name a sea.", "North") | {"instruction": "Name a lake.", "output": "Wener"}
    data, out = write_rows(tmp_path / "d.jsonl", row), tmp_path / "out.jsonl"
    refused = middo("convert", data, out, "--format", "messages")
    assert refused.code == 1
    assert "--from NAME" in refused.err
    for form, answer in (("messages", "North"), ("alpaca", "Wener")):
        assert middo("convert", data, out, "--format", "messages", "--from", form).code == 0
        assert json.loads(out.read_text())["messages"][-1]["content"] == answer
    assert (
        "unknown format 'chat'" in middo("convert", data, out, "--format", "messages", "--from", "chat").err
    )


def test_a_warning_is_printed_as_one_line_and_no_handler_stays(
    middo: Middo, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    handlers = list(logging.getLogger().handlers)
    data = write_rows(tmp_path / "d.jsonl", chat("Name a sea.", "North") | {"lineage": "mine"})
    ended = middo("convert", data, tmp_path / "out.jsonl", "--format", "messages")
    text = "extra columns are renamed, since messages uses their names: lineage -> extra_lineage"
    assert ended.err.splitlines() == [f"warning: {text}"]
    assert [record.getMessage() for record in caplog.records] == [text]
    assert logging.getLogger().handlers == handlers
    assert logging.getLogger("middo_jax").handlers == []


def test_convert_counts_the_reasons(middo: Middo, tmp_path: Path) -> None:
    empty = [chat(f"Name sea {n}.", " ") for n in range(3)]
    data = write_rows(tmp_path / "d.jsonl", *empty, chat("q"), chat("Name a sea.", "North"))
    err = middo("convert", data, tmp_path / "out.jsonl", "--format", "alpaca").err
    assert "4 rows could not be used" in err
    assert f"  3 of 4: empty response ({data}:1)" in err


@pytest.mark.parametrize(
    "file",
    ["merges.txt", "vocab.json", "vocab.txt", "spiece.model", "tokenizer.model", "chat_template.jinja"],
)
def test_every_file_of_a_tokenizer_is_downloaded(
    file: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fnmatch

    import huggingface_hub

    from middo_jax.models.resolve import resolve

    def download(repo: str, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        assert any(fnmatch.fnmatch(file, pattern) for pattern in allow_patterns)
        assert not any(fnmatch.fnmatch(file, pattern) for pattern in ignore_patterns)
        assert not any(fnmatch.fnmatch("pytorch_model.bin", pattern) for pattern in allow_patterns)
        return str(model)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    assert resolve("org/tiny") == model


def test_several_sources_are_inspected_and_converted_as_one(
    middo: Middo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "a.jsonl", *(chat(f"Name sea {i}.", "North") for i in range(4)))
    (tmp_path / "b.csv").write_text("instruction,output\nName a lake.,Wener\nName a river.,Elbe\n")
    sources = "data.sources=[{path: a.jsonl, weight: 1}, {path: b.csv, weight: 1}]"
    found = middo("inspect", sources, "--json")
    assert json.loads(found.out)["n"] == 4
    assert found.err.splitlines() == ["a.jsonl: 2 of 4 rows taken", "b.csv: 2 of 2 rows taken"]
    done = middo("convert", sources, "out.jsonl", "--format", "alpaca")
    assert (done.code, done.out) == (0, "out.jsonl\n")
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["output"] for row in rows] == ["North", "North", "Wener", "Elbe"]
    # The same from a file of settings, and nothing that is read is written.
    (tmp_path / "mine.yaml").write_text("data: {sources: [{path: a.jsonl}, {path: b.csv}]}\n")
    assert json.loads(middo("inspect", "mine.yaml", "--json").out)["n"] == 6
    before = (tmp_path / "a.jsonl").read_bytes()
    refused = middo("convert", "mine.yaml", "a.jsonl", "--format", "messages")
    assert (refused.code, "a.jsonl is read as data" in refused.err) == (1, True)
    assert (tmp_path / "a.jsonl").read_bytes() == before
    # A dataset replaces that of a file of settings.
    assert json.loads(middo("inspect", "b.csv", "mine.yaml", "--json").out)["n"] == 2
    assert json.loads(middo("inspect", "mine.yaml", "data.path=b.csv", "--json").out)["n"] == 2
    both = middo("inspect", "a.jsonl", sources)
    assert (both.code, "give data.path or data.sources, not both" in both.err) == (1, True)


def test_the_first_line_of_a_run_is_first(middo: Middo, model: Path, tmp_path: Path) -> None:
    rows = [chat(f"Name sea {n}.", "North") for n in range(4)]
    rows[0]["messages"][0]["name"] = "Ann"
    data = write_rows(tmp_path / "d.jsonl", *rows)
    settings = f"model: {{path: {model}}}\ndata: {{path: {data}, eval_fraction: 0}}\nruns_dir: {tmp_path}\n"
    (tmp_path / "run.yaml").write_text(settings)
    ended = middo("run", tmp_path / "run.yaml", "train.batch_size=512")  # an error behind the first line
    lines = ended.err.splitlines()
    assert (ended.code, "of the 512 rows of a batch" in ended.err) == (1, True)
    assert lines[0].startswith("middo-jax ")
    assert lines[0].endswith(f"model {model}, data {data} (4 rows)")
    assert lines[1] == f"warning: {data}: not trained on, though some rows have it: name"
    # Where the rows cannot be read, too.
    data.write_text("")
    lines = middo("run", tmp_path / "run.yaml").err.splitlines()
    assert lines[0].endswith(f"data {data}")
    assert "has no rows" in lines[1]
