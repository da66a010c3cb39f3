"""The key stands in no file, log, message or list of arguments, even if an endpoint shouts it back."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from starlette.responses import Response
from support.loop_fixture import Finished, selected
from support.scripted_server import ScriptedServer, ask, fault, good

from middo_jax.refinement.endpoint.cache import AnswerCache

pytest_plugins = ["support.loop_fixture", "support.scripted_server"]

KEY = "sk-live-7d1e44b09c5f4e1fa2"
OTHER = "5d0c7be1a9f24f60"  # of the URL
SECRET = ("7d1e44b0", "5d0c7be1", KEY.encode("utf-16-le").decode("latin-1"))  # half of it tells as much


@pytest.mark.multiprocess
def test_the_key_stands_nowhere(server: ScriptedServer, finished: Finished, tmp_path: Path) -> None:
    def shouts(text: str, n: int) -> Response:
        kind = server.requests % 5
        if kind == 1:
            return fault(400, "x" * 290 + KEY + OTHER)
        if kind == 2 and n == 0:
            return fault(500, f"Bearer {KEY}, {OTHER}", x_key=KEY)
        if kind == 3 and n == 0:
            return Response(f"<html>{KEY}".encode(), media_type="text/html")
        return good(
            f"<prompt>Say {KEY}.</prompt>" if "<original>" in text else f"Your keys are {KEY}, {OTHER}."
        )

    here = selected(finished, tmp_path / "run")
    server.script = shouts
    command = [sys.executable, "-m", "middo_jax", "refine", str(here), "refine.base_url=null"]
    command += ["refine.max_retries=2", "refine.concurrency=1"]
    env = {name: value for name, value in os.environ.items() if not name.startswith("OPENAI_")}
    env |= {"OPENAI_API_KEY": KEY, "JAX_PLATFORMS": "cpu"}
    env["OPENAI_BASE_URL"] = f"{server.url}?api_key={OTHER}"
    arguments: set[bytes] = set()
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        while process.poll() is None and server.requests == 0:
            arguments.add(Path(f"/proc/{process.pid}/cmdline").read_bytes())
            time.sleep(0.01)
        out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err.decode()
    assert server.keys == {f"Bearer {KEY}"}
    said = [out, err, *arguments]
    said += [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert b"Your keys are ***, ***." in b"".join(said)
    assert b"refused (400)" in b"".join(said)
    for text in said:
        assert not any(part.encode("latin-1") in text for part in SECRET)


def test_a_dummy_key_is_a_word_like_any_other(
    server: ScriptedServer, cache: AnswerCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "EMPTY")
    server.script = lambda text, n: good("The list is EMPTY.")
    assert ask(server.url, cache, "a")[0][0].text == "The list is EMPTY."
