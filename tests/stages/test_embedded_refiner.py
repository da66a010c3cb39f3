"""The embedded endpoint within the stage: one load for all attempts, on the whole mesh, and no key for it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import jax
import pytest
from starlette.requests import Request
from support.loop_fixture import KEY, Finished

from middo_jax import stages
from middo_jax.config import load
from middo_jax.inference import server
from middo_jax.progress import Silent
from middo_jax.refinement import AnswerCache
from middo_jax.rundir import RoundDir, read_jsonl
from middo_jax.session import Session

pytest_plugins = ["support.loop_fixture"]


@pytest.fixture
def refined(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[RoundDir, list[Any], set[str | None]]:
    """A round refined by the embedded endpoint in two attempts: (its folder, the engines, the keys they got).

    The model's random weights write nothing that can be read, so that every sample is tried again.
    """
    directory = RoundDir(tmp_path / "round_00")
    shutil.copytree(finished.run.round(0).path, directory.path)
    directory.forget("refine")
    engines, keys = [], set[str | None]()
    load_engine, chat = server.load_engine, server._Served.chat

    def counted(*args: Any) -> Any:
        loaded = load_engine(*args)
        engines.append(loaded[0])
        return loaded

    async def listening(self: Any, request: Request) -> Any:
        keys.add(request.headers.get("authorization"))
        return await chat(self, request)

    monkeypatch.setattr(server, "load_engine", counted)
    monkeypatch.setattr(server._Served, "chat", listening)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    changes = {"refine__base_url": "null", "refine__model": "null", "refine__max_attempts": 2}
    session = Session(load(None, finished.settings(**changes, mesh__tensor=2)), Silent())
    cache = AnswerCache(tmp_path / "cache.sqlite")
    stages.refine_stage(session, directory, 0, cache)
    cache.close()
    return directory, engines, keys


def test_it_is_loaded_once_for_all_attempts_on_all_devices_and_gets_no_key(
    refined: tuple[RoundDir, list[Any], set[str | None]],
) -> None:
    directory, engines, keys = refined
    assert {row["attempt"] for row in read_jsonl(directory.candidates)} == {0, 1}
    [engine] = engines
    assert engine._mesh is not None
    assert set(engine._mesh.devices.flat) == set(jax.devices())
    assert len(jax.devices()) == 8
    assert keys == {"Bearer none"}
