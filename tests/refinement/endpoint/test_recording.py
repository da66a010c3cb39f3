"""Recorded answers: written from a cache, read by anybody, and refused if they are none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from middo_jax.config import ConfigError, RefineSettings, load, replayed_file
from middo_jax.refinement.endpoint.cache import AnswerCache
from middo_jax.refinement.endpoint.recording import (
    Recording,
    read_header,
    read_recording,
    sent_body,
    write_recording,
)
from middo_jax.refinement.endpoint.request import Answer, Requests
from middo_jax.refinement.endpoint.usage import Usage
from middo_jax.rundir import RunError

ASKED = [{"role": "user", "content": "Why \udc80 so?"}]
HEADER = {"recorded_answers": 1, "model": "big", "form": "text", "n": 1}
ROW = {
    "request": {"model": "big"},
    "text": "So.",
    "finish_reason": "stop",
    "prompt_tokens": 1,
    "completion_tokens": 2,
}


def cached(path: Path, *revisions: str | None, model: str = "big") -> AnswerCache:
    """A cache with an answer per revision to the same request, and one of another model."""
    cache = AnswerCache(path)
    for name, revision in (("other", None), *((model, revision) for revision in revisions)):
        request = Requests(name, RefineSettings(model_revision=revision), 7, "v1").build(ASKED, attempt=1)
        answer = Answer(f"So says {name} {revision}.", "stop", 9, 4, key=request.key)
        cache.enter("run", 0, "quality", Usage(answers=1), (request.canonical, answer))
    return cache


def recorded(folder: Path) -> Recording:
    cache = cached(folder / "cache.sqlite", "a", "b")
    cache.learn("form of big b", "json")
    cache.learn("form of bigger", "text")
    assert write_recording(folder / "answers.jsonl", cache, "big") == 1
    return read_recording(folder / "answers.jsonl")


def test_a_request_is_answered_by_an_equal_body_alone(tmp_path: Path) -> None:
    recording = recorded(tmp_path)
    assert (recording.model, recording.form) == ("big", "json")
    request = Requests("big", RefineSettings(), 7, "v2").build(ASKED, attempt=1)
    assert recording.answer(request.body) == Answer("So says big b.", "stop", 9, 4)
    assert sent_body(request.canonical) == request.body
    for change in ({"max_tokens": 9}, {"seed": 1}, {"model": "other"}, {"messages": []}):
        assert recording.answer({**request.body, **change}) is None


def test_an_existing_file_and_a_model_without_answers_are_refused(tmp_path: Path) -> None:
    recorded(tmp_path)
    cache = AnswerCache(tmp_path / "cache.sqlite")
    with pytest.raises(RunError, match=r"answers\.jsonl exists"):
        write_recording(tmp_path / "answers.jsonl", cache, "big")
    with pytest.raises(RunError, match="no answer of small"):
        write_recording(tmp_path / "new.jsonl", cache, "small")
    assert not (tmp_path / "new.jsonl").exists()


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "the file is empty"),
        (["{"], ":1: not JSON"),
        (["[]"], ":1: not an object"),
        ([{}], "not a file of recorded answers"),
        ([{**HEADER, "recorded_answers": 2}], "version 2; this middo-jax reads up to 1"),
        ([{**HEADER, "model": "a\x1bb"}], "`model` must name"),
        ([{**HEADER, "form": "xml"}], "`form` must be"),
        (
            [HEADER, {**ROW, "request": {"model": "other"}}],
            ":2: `request` must be the body of a request to big",
        ),
        ([HEADER, {**ROW, "text": None}], ":2: `text` and"),
        ([HEADER, {**ROW, "finish_reason": "x" * 65}], ":2: `text` and"),
        ([HEADER, ROW, {**ROW, "prompt_tokens": True}], ":3: `prompt_tokens`"),
        ([HEADER, json.dumps(ROW).replace('"big"', '"big", "seed": NaN')], ":2: `request` is not JSON"),
        ([HEADER, "[" * 100_000], ":2: not JSON"),
    ],
)
def test_what_is_no_recording_is_refused_with_its_line(
    tmp_path: Path, lines: list[Any], message: str
) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    with pytest.raises(RunError, match=message):
        read_recording(path)


def test_a_file_that_is_away_and_a_setting_without_one(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="cannot be read"):
        read_header(tmp_path / "none")
    assert replayed_file("replay:a/b.jsonl") == Path("a/b.jsonl")
    assert replayed_file("http://127.0.0.1/v1") is None
    given = ["model.path=m", "data.path=d"]
    for wrong in ("replay:", "[replay:a, replay:b]"):
        with pytest.raises(ConfigError, match=r"refine\.base_url"):
            load(None, [*given, f"refine.base_url={wrong}"])
