"""A thousand requests at `middo serve`, 200 at a time: good ones, hostile ones, and clients that leave.

    python -m benchmarks serving_load [--requests 1000] [--concurrency 200] [--rounds 12]

The server is a process of its own with a tiny random model. One in five requests is hostile; one in ten is
good, but its client leaves before the answer. Every good one must get the answer that it gets alone. Every
hostile one must be refused with a 4xx status or lose its connection. The load is repeated: the first round
compiles programs, and from the second on memory must not grow, which is compared from 8 rounds on.
`slowest / median` of the good ones' times to answer shows how fair the server is.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from support.tiny_model import write_tiny_model

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
TIMEOUT_S = 120.0
FAIREST = 4.0  # slowest / median that is still fair: a client waits for its turn, not for all others
FLAT_MB = 16.0  # growth from the first half of the rounds to the second
FEWEST_ROUNDS = 8  # whose memory is compared


class Message(NamedTuple):
    """Bytes to send, and how: a client that leaves closes its connection after so many seconds."""

    data: bytes
    leaves_after: float | None = None


class Load(NamedTuple):
    """What became of one round.

    Attributes:
      seconds: times to answer of the good requests.
      n_hostile: refused.
      n_left: whose clients left.
      faults: everything that must not happen, in words.
      wall_s: of the round.
    """

    seconds: list[float]
    n_hostile: int
    n_left: int
    faults: list[str]
    wall_s: float

    @property
    def unfairness(self) -> float:
        """Slowest / median time to answer."""
        return max(self.seconds) / statistics.median(self.seconds)


def http(path: str, body: bytes, *, headers: dict[str, str] | None = None, method: str = "POST") -> bytes:
    """A request's bytes; a header given as "" is left out."""
    head = {
        "Host": "127.0.0.1",
        "Content-Type": "application/json",
        "Content-Length": str(len(body)),
        "Connection": "close",
    } | (headers or {})
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in head.items() if value)]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def good_requests() -> list[bytes]:
    """Greedy or seeded, so that each has one right answer: chats, texts, streams, scores, several answers."""
    requests = []
    for i in range(4):
        text = f"Tell me about number {i}, " + "please " * (5 * i)
        same = {"max_tokens": 6 + 3 * i, "seed": i}
        chat = {"messages": [{"role": "user", "content": text}], **same}
        for path, fields in (
            (CHAT, {**chat, "temperature": 0}),
            (CHAT, {**chat, "n": 2, "logprobs": True, "top_logprobs": 2}),
            (CHAT, {**chat, "stream": True}),
            (COMPLETIONS, {"prompt": text, **same, "stop": ["e"]}),
            (COMPLETIONS, {"prompt": [text, "Once"], **same, "max_tokens": 1, "logprobs": 1, "echo": True}),
        ):
            requests.append(http(path, json.dumps(fields).encode()))
    return requests


def hostile_requests() -> list[bytes]:
    """What must be refused: fields out of range, no JSON, foreign pages, bodies without end, no HTTP."""
    chat: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}]}
    fields: list[dict[str, Any]] = [
        {"top_k": 10**30},
        {"top_k": 2**31},
        {"temperature": float("nan")},
        {"temperature": 1e300},
        {"n": 10**9},
        {"max_tokens": -1},
        {"seed": 2**70},
        {"stop": ["x" * 2000]},
        {"logit_bias": {"1": 100}},
        {"messages": [{"role": "user", "content": "word " * 100_000}]},
        {"messages": []},
    ]
    bodies = [json.dumps(chat | each).encode() for each in fields]
    bodies += [b"", b"\xff", b"[" * 100_000, b'{"messages": [{"role": "user", "content": "\\ud800"}]}']
    hostile = [http(CHAT, body) for body in bodies]
    hostile += [
        http(COMPLETIONS, json.dumps({"prompt": prompt, "max_tokens": 1}).encode())
        for prompt in ([10**6], [-1], [[1], ["a"]], "word " * 100_000, "")
    ]
    body = json.dumps(chat).encode()
    hostile += [
        http(CHAT, body, headers={"Content-Type": "text/plain"}),
        http(CHAT, body, headers={"Content-Type": ""}),
        http(CHAT, body, headers={"Origin": "https://evil.example"}),
        http(CHAT, body, headers={"Host": "evil.example"}),
        http(CHAT, body, headers={"Content-Length": str(10**12)}),
        http(CHAT, body, method="DELETE"),
        http("/v1/embeddings", body),
        http(
            CHAT,
            b"200000\r\n" + b"x" * 0x200000,
            headers={"Content-Length": "", "Transfer-Encoding": "chunked"},
        ),
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 no HTTP at all\r\n\r\n",
    ]
    return hostile


async def exchange(port: int, message: Message) -> tuple[int, str]:
    """(status, body without what differs each time); status 0: the connection was closed, with no answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        with contextlib.suppress(ConnectionError):  # refused before it was sent whole: the answer is there
            writer.write(message.data)
            await writer.drain()
        if message.leaves_after is not None:
            await asyncio.sleep(message.leaves_after)
            return 0, ""
        try:
            answer = await asyncio.wait_for(reader.read(), TIMEOUT_S)
        except ConnectionError:
            return 0, ""
    finally:
        writer.close()
    head, _, body = answer.partition(b"\r\n\r\n")
    status = int(head.split(b" ")[1]) if head.startswith(b"HTTP/") else 0
    text = re.sub(rb"^[0-9a-f]+\r\n|\r\n", b"", body, flags=re.MULTILINE).decode(errors="replace")
    return status, re.sub(r'"id":\s*"[^"]*"|"created":\s*\d+', "", text)


def plan(n_requests: int, hostile: float, leaving: float, seed: int) -> list[tuple[str, int, float]]:
    """(kind, a number that picks the request, seconds until a client leaves) of each request."""
    rng = np.random.default_rng(seed)
    kinds = rng.choice(["hostile", "left", "good"], n_requests, p=[hostile, leaving, 1 - hostile - leaving])
    numbers, seconds = rng.integers(0, 2**31, n_requests), rng.uniform(0, 0.3, n_requests)
    return list(zip(kinds.tolist(), numbers.tolist(), seconds.tolist(), strict=True))


async def alone(port: int) -> list[str]:
    """The answers to the good requests, one after the other."""
    answers = []
    for request in good_requests():
        status, text = await exchange(port, Message(request))
        assert status == 200, text
        answers.append(text)
    return answers


async def run_load(
    port: int, expected: list[str], requests: list[tuple[str, int, float]], concurrency: int
) -> Load:
    """Sends the requests, so many at a time."""
    good, hostile = good_requests(), hostile_requests()
    seconds, faults, counts = list[float](), list[str](), {"hostile": 0, "left": 0, "good": 0}
    waiting = iter(requests)

    async def work() -> None:
        for kind, number, leaves_after in waiting:
            counts[kind] += 1
            data = hostile[number % len(hostile)] if kind == "hostile" else good[number % len(good)]
            began = time.perf_counter()
            try:
                status, text = await exchange(port, Message(data, leaves_after if kind == "left" else None))
            except (OSError, TimeoutError) as error:
                faults.append(f"{kind}: {type(error).__name__} {error}, of {data[:200]!r}")
                continue
            if kind == "good":
                seconds.append(time.perf_counter() - began)
                if (status, text) != (200, expected[number % len(good)]):
                    faults.append(f"good: {status} {text[:200]}, of {data[:200]!r}")
            elif kind == "hostile" and not (status == 0 or 400 <= status < 500):
                faults.append(f"hostile: {status} {text[:200]}, of {data[:200]!r}")

    began = time.perf_counter()
    await asyncio.gather(*(work() for _ in range(concurrency)))
    return Load(seconds, counts["hostile"], counts["left"], faults, time.perf_counter() - began)


def growth(memory: Sequence[float]) -> float | None:
    """By how much the least memory of a round, in MB, grew from the first half of the rounds to the second.

    Memory goes up and down by 30 MB, so the least of several rounds is compared. The first round, which
    compiles programs, is left out. None: these are too few rounds.
    """
    if len(memory) < FEWEST_ROUNDS:
        return None
    half = len(memory) // 2
    return min(memory[half:]) - min(memory[1:half])


class Server(NamedTuple):
    """A running `middo serve`."""

    port: int
    pid: int

    @property
    def megabytes(self) -> float:
        """Resident memory."""
        status = Path(f"/proc/{self.pid}/status").read_text(encoding="utf-8")
        return int(status.split("VmRSS:")[1].split()[0]) / 1024


@contextlib.contextmanager
def serving(folder: Path, *settings: str) -> Iterator[Server]:
    """`middo serve` of a tiny random model, as a process."""
    model = write_tiny_model(folder / "tiny", max_position_embeddings=512)
    log = folder / "serve.log"
    command = [sys.executable, "-m", "middo_jax", "serve", str(model), "--port", "0", "serve.max_context=512"]
    with log.open("w", encoding="utf-8") as to:
        process = subprocess.Popen([*command, *settings], stderr=to)
    try:
        while not (found := re.search(r"http://127\.0\.0\.1:(\d+)", log.read_text(encoding="utf-8"))):
            if process.poll() is not None:
                sys.exit(f"the server did not start:\n{log.read_text(encoding='utf-8')}")
            time.sleep(0.1)
        yield Server(int(found[1]), process.pid)
        if process.poll() is not None:
            sys.exit(f"the server has ended:\n{log.read_text(encoding='utf-8')}")
    finally:
        process.terminate()
        process.wait()


def main() -> None:
    """Runs all rounds, prints a line per round, and fails if anything happened that must not."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--concurrency", type=int, default=200)
    parser.add_argument("--hostile", type=float, default=0.2)
    parser.add_argument("--leaving", type=float, default=0.1)
    parser.add_argument("--rounds", type=int, default=12)
    options = parser.parse_args()
    faults, memory = list[str](), list[float]()
    with tempfile.TemporaryDirectory() as folder, serving(Path(folder), "serve.max_batch=32") as server:
        expected = asyncio.run(alone(server.port))
        print("round   good hostile   left    wall s  median s slowest s  slowest/median   memory MB")
        for number in range(options.rounds):
            requests = plan(options.requests, options.hostile, options.leaving, seed=number)
            load = asyncio.run(run_load(server.port, expected, requests, options.concurrency))
            memory.append(server.megabytes)
            faults += load.faults
            if load.unfairness > FAIREST:
                faults.append(f"unfair: the slowest answer took {load.unfairness:.1f} times the median")
            print(
                f"{number:5}{len(load.seconds):7}{load.n_hostile:8}{load.n_left:7}{load.wall_s:10.1f}"
                f"{statistics.median(load.seconds):10.2f}{max(load.seconds):10.2f}{load.unfairness:16.2f}"
                f"{memory[-1]:12.1f}",
                flush=True,
            )
        if asyncio.run(alone(server.port)) != expected:
            faults.append("after the load, good requests get other answers than before")
    if (grown := growth(memory)) is None:
        print(f"memory was not compared: that takes {FEWEST_ROUNDS} rounds")
    elif grown > FLAT_MB:
        faults.append(f"the least memory of a round grew by {grown:.1f} MB from the first half to the second")
    print(*faults[:20], sep="\n")
    print(f"{len(faults)} faults")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
