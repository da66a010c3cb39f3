"""What a user sees of data and templates that are read: through the commands, on tiny models."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from tiny_model import CHAT_TEMPLATE, write_tiny_model

from middo_jax import cli


class Ended(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


Middo = Callable[..., Ended]


@pytest.fixture
def middo(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Middo:
    """Runs a command in this process, through the program's own entry."""
    monkeypatch.delenv("MIDDO_TRACEBACK", raising=False)

    def call(*arguments: object) -> Ended:
        monkeypatch.setattr(sys, "argv", ["middo", *map(str, arguments)])
        capsys.readouterr()
        code: Any = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code or 0
        out, err = capsys.readouterr()
        return Ended(code, str(out), str(err))

    return call


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
    assert f"{NO_END}, so the trained model will not stop: the chat template puts no control" in found.err
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
        "its text holds the model's control token <|endoftext|>"
    ]
