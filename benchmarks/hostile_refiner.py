"""A refiner's endpoint on a bad day, in real time: about 5,000 tries against tests/hostile_server.py.

    python benchmarks/hostile_refiner.py [--samples 1650] [--scale 1]

The same samples without faults, then with all of them, over real sockets and with the server in a process of
its own; then a process with 1,000 requests in flight. Prints what happened, and fails if a sample was lost or
doubled, if the money is not the server's to the token, if the bad day took more than 1.5 times as long with
the faulty waits aside, or if memory passed 500 MB. Takes about ten minutes; `--scale 20` makes all times a
twentieth.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent.parent / "tests"
sys.path.insert(0, str(TESTS))

from hostile_load import Load, check, run_load, served  # noqa: E402
from hostile_server import (  # noqa: E402
    LOADING_S,
    OVERLOAD_S,
    RETRY_AFTER_S,
    SLOWER,
    WARMING_S,
)

CONCURRENCY = 64
OVERLOAD_AT_S = 150.0
TIMEOUT_S = 30.0  # twice as long as the slowest answer takes
MOST_TIMES_LONGER = 1.5
MOST_MB = 500


def measure(folder: Path, samples: int, scale: float, faults: bool) -> tuple[Load, list[dict[str, Any]]]:
    """One load, checked; with what the server says of it."""
    name = "faults" if faults else "none"
    more = ("--faults", "--overload", str(OVERLOAD_AT_S)) if faults else ()
    with served(folder / f"{name}.jsonl", scale, *more) as server:
        server.wait()
        cache = folder / f"{name}.sqlite"
        load = run_load(server, samples, cache, CONCURRENCY, restart=faults, timeout=TIMEOUT_S / scale)
        check(load, server, cache)
        return load, server.tries()


def waits_s(load: Load, tries: list[dict[str, Any]], scale: float) -> dict[str, float]:
    """Seconds that no client can help, in real time.

    While the server loads, is overloaded or is not there, all of them; while it warms up, but the fifth that
    it works; else the share of requests in flight that are never answered, or that it asked to wait.
    """
    first = min(line["began"] for line in tries)
    windows = [
        ("loading", first, first + LOADING_S / scale, 1.0),
        ("warming up", first + LOADING_S / scale, first + (LOADING_S + WARMING_S) / scale, 1 - 1 / SLOWER),
        ("overload", first + OVERLOAD_AT_S / scale, first + (OVERLOAD_AT_S + OVERLOAD_S) / scale, 1.0),
        *([("restart", *load.away, 1.0)] if load.away else []),
    ]
    events: list[tuple[float, int, int]] = []  # when; change of those in flight, of those in vain
    for line in tries:
        vain = line["what"] in ("hang", "429 retry-after")
        took = {"hang": TIMEOUT_S, "429 retry-after": RETRY_AFTER_S}.get(line["what"])
        ended = line["began"] + took / scale if took else line["ended"]
        events += [(line["began"], 1, vain), (ended, -1, -vain)]
    waits = {name: share * (until - since) * scale for name, since, until, share in windows}
    waits["never answered or told to wait"] = 0.0
    in_flight = in_vain = 0
    for (when, change, vain), (following, *_) in itertools.pairwise(sorted(events)):
        in_flight, in_vain = in_flight + change, in_vain + vain
        inside = any(since <= when < until for _, since, until, _ in windows)
        if in_vain and not inside:
            waits["never answered or told to wait"] += in_vain / in_flight * (following - when) * scale
    return waits


def main() -> None:
    """Runs, prints, and exits with 1 where a promise is broken."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=1650)
    parser.add_argument("--scale", type=float, default=1.0, help="divides every time")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        calm, _ = measure(folder, given.samples, given.scale, faults=False)
        print(f"without faults: {calm.ledger.here.requests:,} requests in {calm.seconds:.0f} s", flush=True)
        bad, tries = measure(folder, given.samples, given.scale, faults=True)
        command = [sys.executable, str(TESTS / "hostile_load.py"), str(folder / "memory.jsonl"), "1000"]
        memory = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    here, waits = bad.ledger.here, waits_s(bad, tries, given.scale)
    longer = (bad.seconds * given.scale - sum(waits.values())) / (calm.seconds * given.scale)
    print(
        f"with faults: {here.requests:,} requests, {here.retries:,} of them retries, in {bad.seconds:.0f} s"
    )
    print("  tries:", dict(collections.Counter(str(line["what"]) for line in tries).most_common()))
    print("  samples:", dict(bad.reasons().most_common()))
    print("  faulty waits, s:", {name: round(seconds, 1) for name, seconds in waits.items()})
    print(f"  {longer:.2f} times as long as without faults, these aside")
    tokens = f"{here.prompt_tokens:,} prompt and {here.completion_tokens:,} completion tokens"
    print(f"  {tokens}, as the server counts; ${here.usd:.6f}, ${here.aside_usd:.6f} set aside")
    print("1,000 requests in flight:", memory)
    if longer > MOST_TIMES_LONGER or memory["rss_mb"] > MOST_MB:
        sys.exit("a promise is broken")


if __name__ == "__main__":
    main()
