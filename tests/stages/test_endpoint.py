"""The embedded refiner: whose answers the cache has, who may ask it in a job, and who helps to serve it."""

from __future__ import annotations

import datetime
import socket
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from support.loop_fixture import settings
from support.tiny_model import write_tiny_model

from middo_jax.config import load
from middo_jax.progress import Lines, Silent
from middo_jax.session import Session
from middo_jax.stages import endpoint
from middo_jax.stages.endpoint import served_revision

DAY = datetime.date(2026, 11, 27)


def test_whatever_changes_an_answer_changes_the_revision(tmp_path: Path) -> None:
    config = load(None, settings(tmp_path))
    model = write_tiny_model(tmp_path / "served")

    def revision(template: str = "a", day: datetime.date = DAY, **more: Any) -> str:
        changed = load(None, settings(tmp_path, **more)) if more else config
        return served_revision(model, template, day, changed)

    first = revision()
    assert revision() == first
    assert revision(serve__max_batch=3) == first  # decoded together with others, an answer is the same
    others = [revision("b"), revision(day=datetime.date(2026, 11, 28)), revision(model__dtype="bfloat16")]
    others.append(revision(serve__max_context=99))
    write_tiny_model(tmp_path / "served", seed=1)
    others.append(revision())
    assert len({first, *others}) == 6


def status(url: str, token: str | None) -> int:
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    try:
        with urllib.request.urlopen(urllib.request.Request(f"{url}/models", headers=headers)) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_in_a_job_a_stranger_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    token = "0123456789abcdef" * 4
    monkeypatch.setattr(endpoint, "shared_secret", lambda name: token)
    session = Session(load(None, settings(tmp_path)), Silent())
    with endpoint.endpoint(session) as served:
        assert (served.token, served.sends_key) == (token, False)
        [url] = served.url
        assert [status(url, given) for given in (None, token[:-1], f"{token}0")] == [401] * 3
        assert status(url, token) == 200


def test_a_server_that_process_0_cannot_reach_is_named_and_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    session = Session(load(None, settings(tmp_path)), Lines())
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_server(("127.0.0.1", 0)) as closed:
        urls = [f"http://127.0.0.1:{one.getsockname()[1]}/v1" for one in (server, closed)]
        closed.close()
        assert endpoint._reached(session, urls) == (urls[0],)
    said = capsys.readouterr().err
    assert f"process 0 cannot reach the refiner of process 1 at {urls[1]} ([Errno 111]" in said
    assert "the refiner is served by 1 of 2 processes" in said
