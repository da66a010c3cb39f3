"""A load for the hostile server: samples through the whole client, and what became of them and of the money.

Shared by the test (times divided by 20) and by benchmarks/hostile_refiner.py (real life). As a program, it
says what a client takes with so many requests in flight: `python hostile_load.py LOG REQUESTS`.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import json
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from middo_jax.config import Prices, RefineSettings
from middo_jax.data.example import Example, Message
from middo_jax.refinement import AnswerCache, ChatClient, Ledger, Outcome, Task, prompts, refine_tasks
from middo_jax.refinement.endpoint import throttle
from support.hostile_server import answer, better

TIMEOUT_S = 100.0  # in real life; the slowest answer takes 15, and a busy machine its time
REFUSALS = ("429", "429 retry-after", "overload", "loading")
RESTART_S = 10.0  # between the end of one server and the start of the next
PRICES = Prices(prompt=1.0, completion=4.0)


def samples(n: int) -> list[Task]:
    """`n` tasks whose every answer is known."""
    axes = ("complexity",), ("quality",), ("complexity", "quality")
    examples = [
        Example((Message("user", f"Question {i} is long"), Message("assistant", "No."))) for i in range(n)
    ]
    return [Task("rewrite", axes[i % 3], example) for i, example in enumerate(examples)]


class Server:
    """The hostile server as a process, which can be told to go and come again."""

    def __init__(self, log: Path, scale: float, *more: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.log, self.scale, self._more = log, scale, more
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Where it is, or will be."""
        return f"http://127.0.0.1:{self.port}/v1"

    def start(self) -> None:
        """Starts it and returns at once: it takes its time, as servers do."""
        command = [
            sys.executable,
            str(Path(__file__).with_name("hostile_server.py")),
            "--port",
            str(self.port),
        ]
        command += ["--log", str(self.log), "--scale", str(self.scale), *self._more]
        self._process = subprocess.Popen(command)

    def wait(self) -> None:
        """Returns once it listens."""
        for _ in range(1000):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port)):
                return
            time.sleep(0.02)
        raise RuntimeError("the hostile server did not start")

    def stop(self) -> None:
        """Ends it; what it was doing is cut off."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait(timeout=10)
            self._process = None

    def tries(self) -> list[dict[str, Any]]:
        """Its own log."""
        return [json.loads(line) for line in self.log.read_text(encoding="utf-8").splitlines()]


@contextlib.contextmanager
def served(log: Path, scale: float, *more: str) -> Iterator[Server]:
    """A server that is gone after the block."""
    server = Server(log, scale, *more)
    log.touch()
    server.start()
    try:
        yield server
    finally:
        server.stop()


@dataclasses.dataclass
class Load:
    """What came of a load; `away` is when nobody listened in its middle, from and to, by the clock."""

    tasks: list[Task]
    outcomes: list[Outcome]
    ended: list[str]
    ledger: Ledger
    seconds: float
    away: tuple[float, float] | None
    most_in_flight: int

    def reasons(self) -> collections.Counter[str]:
        """Samples by how they ended."""
        return collections.Counter(
            "accepted" if o.example else o.verdict.detail.partition(":")[0] if o.verdict else ""
            for o in self.outcomes
        )


def run_load(server: Server, n: int, cache: Path, concurrency: int, restart: bool, **more: Any) -> Load:
    """`n` samples through `refine_tasks`; with `restart` the server goes when half of them have ended."""
    scale = server.scale
    settings = RefineSettings(
        **{
            "concurrency": concurrency,
            "timeout": TIMEOUT_S / scale,
            "response_format": "json",
            "max_tokens": 64,
            "accept": "sane",
            "prices": PRICES,
            **more,
        }
    )
    tasks, ended, away, most = samples(n), [], [], [0]

    async def load() -> tuple[list[Outcome], Ledger]:
        answers = AnswerCache(cache)
        client = ChatClient(prompts.requests("hostile", settings), server.url, answers, backoff_s=1.0 / scale)
        restarts: list[asyncio.Task[None]] = []

        async def again() -> None:
            began = time.time()
            await asyncio.to_thread(server.stop)
            await asyncio.sleep(RESTART_S / scale)
            server.start()
            await asyncio.to_thread(server.wait)
            away.append((began, time.time()))

        def on_done(outcome: Outcome) -> None:
            ended.append(outcome.task.task_id)
            most[0] = max(most[0], *(e.throttle.in_flight for e in client.endpoints.all))
            if restart and len(ended) == n // 2:
                restarts.append(asyncio.ensure_future(again()))

        try:
            outcomes = await refine_tasks(tasks, client, settings, 0, on_done)
            await asyncio.gather(*restarts)
            return outcomes, client.ledger
        finally:
            await client.close()
            answers.close()

    began = time.monotonic()
    outcomes, ledger = asyncio.run(load())
    seconds = time.monotonic() - began
    return Load(tasks, outcomes, ended, ledger, seconds, away[0] if away else None, most[0])


def check(load: Load, server: Server, cache: Path) -> None:
    """What must hold of every load, however bad the day was; raises AssertionError."""
    # No sample is lost, none is doubled, none has another's text.
    assert [o.task for o in load.outcomes] == load.tasks
    assert sorted(load.ended) == sorted(task.task_id for task in load.tasks)
    for i, outcome in enumerate(load.outcomes):
        assert (outcome.example is None) == bool(outcome.verdict)
        if outcome.example:
            assert outcome.example.prompt == better(str(i))
            assert outcome.example.response == answer(better(str(i)))
    # No request is sent again after an answer or a refusal, and no more often than it may be.
    tries = collections.defaultdict(list)
    for line in server.tries():
        tries[line["key"]].append(line)
    for lines in tries.values():
        finals = [line["completion"] > 0 or line["what"] in ("400", "empty") for line in lines]
        assert not any(finals[:-1])
        # Refusals count as a quarter while others get through; what fails while nobody does, not at all.
        assert sum(line["what"] not in REFUSALS for line in lines) <= 7
    # The money is what the server counts, to the token.
    here = load.ledger.here
    charged = [line for line in server.tries() if line["prompt"]]
    assert here.answers == len(charged)
    assert here.prompt_tokens == sum(line["prompt"] for line in charged)
    assert here.completion_tokens == sum(line["completion"] for line in charged)
    usd = (here.prompt_tokens * PRICES.prompt + here.completion_tokens * PRICES.completion) / 1e6
    assert abs(here.usd - usd) < 1e-9
    # What was set aside is of the tries whose cost nobody told, and what is kept in the file is the same.
    unknown = sum(line["what"] in ("hang", "drop", "body", "gone") for line in server.tries())
    assert (here.aside_tokens > 0) == (unknown > 0)
    kept = AnswerCache(cache)
    try:
        assert len(kept) == here.answers
        assert {axis: usage.answers for (_, axis), usage in kept.spent("run").items()} == {
            axis: usage.answers for axis, usage in load.ledger.by_account.items()
        }
    finally:
        kept.close()


def memory(server: Server, n: int, cache: Path) -> dict[str, int]:
    """Peak memory of this process, in megabytes, with `n` requests in flight at once."""
    throttle.START = float(n)
    # Between tags: with a schema the first request goes alone, and this server waits until all are there.
    load = run_load(server, n, cache, n, restart=False, timeout=120.0, response_format="text")
    # Not getrusage's figure, which starts from the parent's.
    status = Path("/proc/self/status").read_text(encoding="ascii")
    rss_mb = int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) // 1024
    return {"rss_mb": rss_mb, "most_in_flight": load.most_in_flight, "accepted": load.reasons()["accepted"]}


if __name__ == "__main__":
    log, count = Path(sys.argv[1]), int(sys.argv[2])
    with served(log, 20.0, "--gather", str(count)) as hostile:
        hostile.wait()
        print(json.dumps(memory(hostile, count, log.with_name("memory.sqlite"))))
