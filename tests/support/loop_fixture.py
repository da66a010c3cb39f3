"""What the tests of the loop share: a small dataset, a refiner that always answers alike, a finished run.

    with fake_refiner() as (url, requests):
        config = load(None, settings(tmp_path, base_url=url))

A plugin of pytest, so that all modules that name it share the one finished run.
PYTEST_DONT_REWRITE: there are no assertions in it, and those modules import it too.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from middo_jax.config import load
from middo_jax.inference.listening import serve_in_background
from middo_jax.loop import run_loop
from middo_jax.progress import Silent
from middo_jax.rundir import RunDir, read_jsonl
from support.tiny_model import write_tiny_model

KEY = "sk-marker-5f0e9d1c7a"  # what must be written nowhere
_TOPICS = ("the sea", "a cat", "fractions", "Paris", "rain", "bread", "the moon", "a train")
_ASKED = ("Describe {} in one sentence.", "Name three things about {}.", "Why do people like {}?")


def write_data(path: Path, rows: int = 24) -> Path:
    """Alpaca rows of quite different lengths, every third with an input; `source` is the user's column."""
    table = []
    for i in range(rows):
        topic, asked = _TOPICS[i % len(_TOPICS)], _ASKED[i // len(_TOPICS) % len(_ASKED)]
        table.append(
            {
                "instruction": asked.format(topic),
                "input": f"Think of number {i}." if i % 3 == 0 else "",
                "output": " ".join([f"{topic.capitalize()} has {i} sides."] * (1 + i % 4)),
                "source": f"part {i % 2}",
            }
        )
    path.write_text(json.dumps(table), encoding="utf-8")
    return path


def fake_answer(text: str) -> str:
    """What the fake refiner says to a last user message: a function of that message alone."""
    digest = hashlib.sha256(text.encode()).hexdigest()
    if "<prompt>" in text:
        return f"Sure.\n<prompt>Say in your own words what number {int(digest[:6], 16)} is for.</prompt>"
    return f"It is for counting up to {int(digest[6:10], 16)}, as everybody knows."


@contextlib.contextmanager
def fake_refiner(
    seconds: float = 0.0, answer: Callable[[str], str] = fake_answer
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """(base URL, the requests as they come) of an endpoint that serves one model called `fake`.

    A request is its body and its `authorization`; every answer takes `seconds` and is that of `answer` to the
    last user message.
    """
    bodies: list[dict[str, Any]] = []
    lock = threading.Lock()

    async def chat(request: Request) -> JSONResponse:
        body = await request.json() | {"authorization": request.headers.get("authorization")}
        with lock:
            bodies.append(body)
        await asyncio.sleep(seconds)
        text = answer(body["messages"][-1]["content"])
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        usage = {"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12}
        return JSONResponse(
            {"id": "x", "object": "chat.completion", "model": "fake", "choices": [choice], "usage": usage}
        )

    app = Starlette(routes=[Route("/v1/chat/completions", chat, methods=["POST"])])
    with serve_in_background(app) as url:
        yield url, bodies


def settings(root: Path, base_url: str | None = None, **more: Any) -> list[str]:
    """Settings of a small loop as overrides, with `root`/model and `root`/data.json, made if missing.

    Args:
      root: where model, data and runs lie.
      base_url: of the refiner; None leaves it to the embedded endpoint.
      more: further settings, `__` for the dot: train__num_epochs=2.
    """
    if not (root / "model").exists():
        write_tiny_model(root / "model")
    if not (root / "data.json").exists():
        write_data(root / "data.json")
    values = {
        "name": "run",
        "runs_dir": root / "runs",
        "seed": 3,
        "model.path": root / "model",
        "model.dtype": "float32",
        "model.max_length": 512,
        "data.path": root / "data.json",
        "data.eval_fraction": 0.15,
        "train.batch_size": 8,
        "train.learning_rate": 0.01,
        "complexity.fraction": 0.2,
        "diversity.fraction": 0.15,
        "quality.fraction": 0.2,
        "refine.temperature": 0,
        "refine.preflight": False,  # tests count the requests of the stage
        "refine.max_tokens": 16,
        "refine.accept": "sane",  # what a random model measures of nonsense says nothing
        "refine.gates.open": "[numbers]",  # the fake refiner keeps none
        "serve.max_context": 1024,
    }
    if base_url is not None:
        values |= {"refine.base_url": base_url, "refine.model": "fake"}
    values |= {name.replace("__", "."): value for name, value in more.items()}
    return [f"{name}={value}" for name, value in values.items()]


def contents(folder: Path, *names: str) -> dict[str, bytes]:
    """Bytes of all files below a folder by relative path, of those called one of `names` if any are given."""
    files = (p for p in sorted(folder.rglob("*")) if p.is_file() and (not names or p.name in names))
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}


def rows_by_id(path: Path) -> dict[str, dict[str, Any]]:
    """Rows of a dataset.jsonl by id."""
    return {row["id"]: row for row in read_jsonl(path)}


class Finished(NamedTuple):
    """A finished run of two rounds, never changed by a test, and what is needed to make others of it.

    `own_requests` are those of this run; `requests` grows with every other one.
    """

    root: Path
    url: str
    run: RunDir
    own_requests: tuple[dict[str, Any], ...]
    requests: list[dict[str, Any]]

    def settings(self, **more: Any) -> list[str]:
        """The run's settings, with changes."""
        return settings(self.root, self.url, **{"rounds": 2, **more})

    def copy(self, to: Path) -> str:
        """The run's folder copied below `to`; returns that runs_dir."""
        shutil.copytree(self.run.path, to / "run")
        return str(to)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Finished]:
    """The finished run; its refiner goes on answering."""
    root = tmp_path_factory.mktemp("loop")
    with fake_refiner() as (url, requests), pytest.MonkeyPatch.context() as environment:
        environment.setenv("OPENAI_API_KEY", KEY)
        run = run_loop(load(None, settings(root, url, rounds=2)), Silent())
        environment.undo()
        yield Finished(root, url, run, tuple(requests), requests)


def selected(finished: Finished, to: Path) -> Path:
    """A round that is scored and selected, and not yet refined."""
    here = to / "round_00"
    shutil.copytree(finished.run.round(0).path, here, ignore=shutil.ignore_patterns("checkpoint"))
    shutil.copyfile(finished.run.config, to / "config.yaml")
    for name in ("requests.jsonl", "refined.jsonl", "candidates.jsonl"):
        (here / name).unlink(missing_ok=True)
    manifest = json.loads((here / "manifest.json").read_text(encoding="utf-8"))
    del manifest["checksum"]
    del manifest["stages"]["refine"], manifest["stages"]["merge"]
    (here / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return here


def begun(run: RunDir, skip: int = 0) -> list[tuple[str, str]]:
    """(folder, stage) of the stages that were started, but for so many of the first events."""
    events = read_jsonl(run.events)[skip:]
    return [(e["round"], e["stage"]) for e in events if e["event"] == "start"]
