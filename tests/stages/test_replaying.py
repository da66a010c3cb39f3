"""Recorded answers make the same rewrites as the server did; what is missing is answered and counted."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.testclient import TestClient
from support.loop_fixture import Finished, fake_answer, selected
from support.said import Said

from middo_jax import recording, stages
from middo_jax.config import load
from middo_jax.refinement import AnswerCache
from middo_jax.refinement.endpoint.recording import Recording, body_key, write_recording
from middo_jax.refinement.endpoint.request import Answer
from middo_jax.report.card import card
from middo_jax.rundir import RoundDir, RunDir, RunError, read_jsonl
from middo_jax.rundir.chain import chain
from middo_jax.session import Session
from middo_jax.stages import endpoint
from middo_jax.stages.replaying import Replay

pytest_plugins = ["support.loop_fixture"]


@contextlib.contextmanager
def embedded(session: Session, name: str) -> Iterator[Starlette]:
    """An embedded endpoint without a model, which says what the fake refiner says."""

    async def chat(request: Request) -> JSONResponse:
        body: dict[str, Any] = await request.json()
        assert body["model"] == name
        message = {"role": "assistant", "content": fake_answer(body["messages"][-1]["content"])}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        return JSONResponse({"choices": [choice], "usage": {"prompt_tokens": 7, "completion_tokens": 5}})

    yield Starlette(routes=[Route("/v1/chat/completions", chat, methods=["POST"])])


def replayed(finished: Finished, to: Path, file: Path) -> tuple[RoundDir, list[str]]:
    here, said = RoundDir(selected(finished, to)), Said()
    config = load(None, finished.settings(refine__base_url=f"replay:{file}", refine__model="null"))
    stages.refine_round(Session(config, said), here)
    return here, said.lines


def test_a_replay_makes_the_same_rewrites_and_a_missing_answer_is_counted(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "answers.jsonl"
    finished.copy(tmp_path / "source")
    n, model = recording.record(tmp_path / "source" / "run" / "round_00", file)
    assert (n, model) == (len({json.dumps(body) for body in finished.own_requests}), "fake")

    def never(*_: object) -> None:
        raise AssertionError("nothing is missing")

    with monkeypatch.context() as patched:
        patched.setattr(endpoint, "_embedded", never)
        here, said = replayed(finished, tmp_path / "whole", file)
    was = read_jsonl(finished.run.round(0).refined)
    assert [row["example"] for row in read_jsonl(here.refined)] == [row["example"] for row in was]
    assert [row for row in was if row["accepted"]]
    facts = here.stages()["refine"]["recorded"]
    assert (facts["model"], facts["misses"]) == ("fake", 0)
    assert f"{facts['answers']} of {facts['answers']} answers are recorded, from fake" in said

    assert "recorded answers of fake; what they lacked: " in card(RunDir(here.path.parent), {}, "messages")

    # Without the answers that one accepted rewrite needed, the embedded model writes it: so says its lineage.
    lost = next(row for row in was if row["accepted"])
    asked = [
        r["messages"] for r in read_jsonl(finished.run.round(0).requests) if r["task_id"] == lost["task_id"]
    ]
    header, *rows = read_jsonl(file)
    less = tmp_path / "less.jsonl"
    kept = [row for row in rows if row["request"]["messages"] not in asked]
    less.write_text("".join(f"{json.dumps(row)}\n" for row in (header, *kept)), encoding="utf-8")
    monkeypatch.setattr(endpoint, "_embedded", embedded)
    here, _ = replayed(finished, tmp_path / "less", less)
    facts = here.stages()["refine"]["recorded"]
    assert facts["misses"] == len(asked)
    by_task = {row["task_id"]: row for row in read_jsonl(here.refined)}
    assert by_task[lost["task_id"]]["example"]["lineage"]["refiner"] == facts["embedded"] == "model"
    assert sum(row["accepted"] for row in by_task.values()) == sum(row["accepted"] for row in was)
    others = {
        row["example"]["lineage"]["refiner"]
        for t, row in by_task.items()
        if row["accepted"] and t != lost["task_id"]
    }
    assert others == {"fake"}
    with pytest.raises(RunError, match="recorded already"):
        recording.record(here.path, tmp_path / "again.jsonl", settings=[f"refine.base_url=replay:{less}"])


def test_the_first_line_says_it_and_the_stage_depends_on_the_file(finished: Finished, tmp_path: Path) -> None:
    file = tmp_path / "answers.jsonl"
    write_recording(file, AnswerCache(finished.run.llm_cache), "fake")
    config = load(None, finished.settings(refine__base_url=f"replay:{file}", refine__model="null"))
    assert stages.recorded_line(config) == (
        f"the refiner's answers are recorded: {file}, from fake; the base model answers the rest"
    )
    assert stages.recorded_line(load(None, finished.settings())) is None
    assert stages.check_refiner(config, asks=True) == []
    refined = next(link for link in chain(finished.run, config) if link.name == "refine")
    assert refined.inputs["recorded"] == file


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"origin": "https://evil.example"}, 403),
        ({"host": "evil.example"}, 403),
        ({"content-type": "text/plain"}, 415),
        ({"content-length": str(10**12)}, 413),
    ],
)
def test_a_replay_is_for_programs_of_this_machine(headers: dict[str, str], status: int) -> None:
    body = {"model": "big", "messages": []}
    answers = {body_key(body): Answer("Hello.", "stop")}
    replay = Replay(Recording(Path("answers.jsonl"), "big", "hash", "text", answers), Starlette)
    client = TestClient(replay.app(), base_url="http://127.0.0.1:8000")
    given = {"content-type": "application/json"} | headers
    response = client.post("/v1/chat/completions", content=json.dumps(body), headers=given)
    assert response.status_code == status
