"""The embedded endpoint within the stage: one load for all attempts, on the whole mesh, and no key for it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, NamedTuple

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
from middo_jax.stages.endpoint import refines_itself
from middo_jax.stages.refine import ITSELF

pytest_plugins = ["support.loop_fixture"]


class Heard(Silent):
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


class Refined(NamedTuple):
    """A round that was refined: its folder, the engines, the keys that they got, what the user was told."""

    directory: RoundDir
    engines: list[Any]
    keys: set[str | None]
    said: list[str]


@pytest.fixture
def refined(finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Refined:
    """A round refined by the embedded endpoint in two attempts.

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
    changes |= {"refine__timeout": 0.001}  # that is for servers of others
    heard = Heard()
    session = Session(load(None, finished.settings(**changes, mesh__tensor=2)), heard)
    cache = AnswerCache(tmp_path / "cache.sqlite")
    stages.refine_stage(session, directory, 0, cache)
    cache.close()
    return Refined(directory, engines, keys, heard.said)


def test_it_is_loaded_once_for_all_attempts_on_all_devices_and_gets_no_key(refined: Refined) -> None:
    directory, engines, keys, said = refined
    assert said.count(ITSELF) == 1
    assert {row["attempt"] for row in read_jsonl(directory.candidates)} == {0, 1}
    [engine] = engines
    assert engine._mesh is not None
    assert set(engine._mesh.devices.flat) == set(jax.devices())
    assert len(jax.devices()) == 8
    assert keys == {"Bearer none"}


def test_a_refiner_is_the_model_under_training_by_its_path_alone(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = finished.root / "model"
    (tmp_path / "link").symlink_to(base)

    def itself(**changes: Any) -> bool:
        config = load(None, finished.settings(**{"refine__base_url": "null", **changes}))
        return refines_itself(Session(config, Silent()))

    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    assert itself(refine__model="null")
    assert itself(refine__model=base)
    assert itself(refine__model=tmp_path / "link")
    assert not itself(refine__model="another/model")  # and it is not looked up on a hub
    assert not itself(refine__base_url="http://127.0.0.1:1/v1", refine__model=base)
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:1/v1")
    assert not itself(refine__model=base)
