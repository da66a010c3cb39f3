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
import json
import subprocess
import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).parent.parent / "tests"
sys.path.insert(0, str(TESTS))

from hostile_load import Load, check, run_load, served  # noqa: E402
from hostile_server import LOADING_S, OVERLOAD_S, SLOWER, WARMING_S  # noqa: E402

CONCURRENCY = 64
TIMEOUT_S = 30.0  # twice as long as the slowest answer takes
MOST_TIMES_LONGER = 1.5
MOST_MB = 500


def measure(folder: Path, samples: int, scale: float, faults: bool) -> tuple[Load, list[dict[str, object]]]:
    """One load, checked; with what the server says of it."""
    name = "faults" if faults else "none"
    more = ("--faults", "--overload", "150") if faults else ()
    with served(folder / f"{name}.jsonl", scale, *more) as server:
        server.wait()
        cache = folder / f"{name}.sqlite"
        load = run_load(server, samples, cache, CONCURRENCY, restart=faults, timeout=TIMEOUT_S / scale)
        check(load, server, cache)
        return load, server.tries()


def waits_s(load: Load, tries: list[dict[str, object]], scale: float) -> dict[str, float]:
    """Seconds that no client can help: tries never answered, as a share of those in flight."""
    hangs = sum(line["what"] == "hang" for line in tries)
    return {
        "never answered": hangs * TIMEOUT_S / scale / CONCURRENCY,
        "loading and warming up": (LOADING_S + WARMING_S * (1 - 1 / SLOWER)) / scale,
        "overload": OVERLOAD_S / scale,
        "restart": load.restart_s,
    }


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
    longer = (bad.seconds - sum(waits.values())) / calm.seconds
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
