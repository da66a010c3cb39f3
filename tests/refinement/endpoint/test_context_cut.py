"""A server that reads less of a prompt than it was sent says so in its usage only."""

from __future__ import annotations

import pytest
from support.scripted_server import ScriptedServer, ask, good

from middo_jax.refinement.endpoint.cache import AnswerCache

pytest_plugins = ["support.scripted_server"]

ENGLISH = "The heron waits in the reeds until a fish swims by. " * 400
CHINESE = "苍鹭在芦苇丛中等待一条鱼游过。" * 800
CODE = ("def f(x):\n" + " " * 40 + "return x\n" + "-" * 60 + "\n") * 100


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


@pytest.mark.parametrize(
    ("prompt", "read"), [(ENGLISH, 2048), (ENGLISH, 512), (CHINESE, 1024), ("word " * 7200, 4096)]
)
def test_a_cut_prompt_is_told_once(
    server: ScriptedServer, cache: AnswerCache, caplog: pytest.LogCaptureFixture, prompt: str, read: int
) -> None:
    server.script = lambda text, n: good("fine", prompt_tokens=read)
    ask(server.url, cache, f"1 {prompt}", f"2 {prompt}")
    ask(server.url, cache, f"3 {prompt}")
    [said] = warnings(caplog)
    assert f"read {read:,} of about " in said
    assert "Raise the context" in said


@pytest.mark.parametrize(
    ("prompt", "read", "cached"),
    [
        (ENGLISH, 4000, 0),  # five characters a token
        (CHINESE, 7000, 0),
        (CODE, 1200, 0),
        (ENGLISH, 0, 0),  # not counted
        (ENGLISH, 30, 5000),  # counted without what was cached
        ("Why?", 1, 0),
    ],
)
def test_a_prompt_that_was_read_is_no_news(
    server: ScriptedServer,
    cache: AnswerCache,
    caplog: pytest.LogCaptureFixture,
    prompt: str,
    read: int,
    cached: int,
) -> None:
    details = {"cached_tokens": cached}
    server.script = lambda text, n: good("fine", prompt_tokens=read, prompt_tokens_details=details)
    ask(server.url, cache, prompt)
    assert warnings(caplog) == []
