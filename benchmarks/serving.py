"""Answers a second of OpenAI-compatible servers, side by side, at several concurrencies. Prints a table.

    middo serve models/SmolLM2-135M-Instruct --port 8000 serve.max_batch=32 model.dtype=float32
    python -m llama_cpp.server --model SmolLM2-135M-Instruct.Q4_1.gguf --n_ctx 2048 --port 8001
    python -m benchmarks serving --server ours=http://127.0.0.1:8000/v1 \
        --server llama.cpp=http://127.0.0.1:8001/v1

The servers are asked in turn, each concurrency `--repeats` times; what is printed are medians. The requests
are those that ask for rewrites of configs/quickstart_data.jsonl: all share their instructions. Answers
are greedy and end at `--max-tokens`. `slowest / median` of the times to answer says how fair a server is:
requests that are all sent at once should not wait in line for each other.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from pathlib import Path
from typing import NamedTuple, cast

import openai
from openai.types.chat import ChatCompletionMessageParam

from middo_jax.refinement.endpoint.request import Messages
from middo_jax.refinement.prompts import revise
from middo_jax.refinement.words import SHIPPED

DATA = Path(__file__).parent.parent / "configs" / "quickstart_data.jsonl"


class Load(NamedTuple):
    """What one server did under one load."""

    tokens_per_second: float
    median_seconds: float
    slowest_seconds: float


async def ask_all(base_url: str, requests: list[Messages], concurrency: int, max_tokens: int) -> Load:
    """Sends all requests, so many at a time."""
    waiting, seconds, tokens = iter(requests), [], 0
    async with openai.AsyncOpenAI(base_url=base_url, api_key="none", max_retries=0, timeout=3600) as client:
        model = (await client.models.list()).data[0].id

        async def work() -> None:
            nonlocal tokens
            for messages in waiting:
                began = time.perf_counter()
                answer = await client.chat.completions.create(
                    model=model,
                    messages=cast(list[ChatCompletionMessageParam], messages),
                    temperature=0,
                    max_tokens=max_tokens,
                )
                assert answer.usage is not None
                tokens += answer.usage.completion_tokens
                seconds.append(time.perf_counter() - began)

        began = time.perf_counter()
        await asyncio.gather(*(work() for _ in range(concurrency)))
        elapsed = time.perf_counter() - began
    return Load(tokens / elapsed, statistics.median(seconds), max(seconds))


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--server", action="append", required=True, metavar="NAME=URL", help="repeatable")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument(
        "--requests", type=int, default=32, help="of each load at most; 2 a place, 4 at least"
    )
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    servers = dict(server.split("=", 1) for server in arguments.server)
    rows = [json.loads(line) for line in DATA.open(encoding="utf-8")]
    print("| concurrency | server | completion tokens/s | median s an answer | slowest / median |")
    print("|---|---|---|---|---|")
    for concurrency in arguments.concurrency:
        count = min(arguments.requests, max(2 * concurrency, 4))
        loads: dict[str, list[Load]] = {name: [] for name in servers}
        for repeat in range(arguments.repeats + 1):
            # Others each time: an answer that a server remembers would say nothing of its speed.
            numbers = range(repeat * count, (repeat + 1) * count)
            asked = [
                revise(SHIPPED.rewrite, (f"{rows[i % len(rows)]['instruction']} ({i})", None))
                for i in numbers
            ]
            for name, url in servers.items():
                load = asyncio.run(ask_all(url, asked, concurrency, arguments.max_tokens))
                if repeat:  # the first one compiles
                    loads[name].append(load)
        for name, of in loads.items():
            rate, median, slowest = (statistics.median(column) for column in zip(*of, strict=True))
            print(
                f"| {concurrency} | {name} | {rate:.1f} | {median:.2f} | {slowest / median:.1f} |", flush=True
            )


if __name__ == "__main__":
    main()
