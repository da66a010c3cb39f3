"""A refiner's endpoint on a bad day, in real time: about 5,000 tries against tests/support/hostile_server.py.

    python -m benchmarks hostile_refiner [--samples 1650] [--scale 1]

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
from typing import Any, NamedTuple

TESTS = Path(__file__).parent.parent / "tests"
sys.path.insert(0, str(TESTS))

from support.hostile_load import REFUSALS, Load, check, run_load, served  # noqa: E402
from support.hostile_server import (  # noqa: E402
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


class Place(NamedTuple):
    """A place in flight that one try of a sample took, by the clock; from `vain` on it was held in vain."""

    sample: int
    began: float
    vain: float
    ended: float


def places(tries: list[dict[str, Any]], scale: float, with_backoff: bool) -> list[Place]:
    """What the server's log says of the client's places in flight.

    A place is held in vain while nothing answers, while the server asked to wait, and for the part of an
    answer that an overloaded or waking server took longer; after a refusal or a time-out also,
    `with_backoff`, until the same is asked again. What came and was of no use is not counted as a wait.
    """
    by_request: dict[str, list[dict[str, Any]]] = collections.defaultdict(list)
    for line in sorted(tries, key=lambda line: line["began"]):
        by_request[line["key"]].append(line)
    found = []
    for lines in by_request.values():
        for line, again in itertools.zip_longest(lines, lines[1:]):
            began = vain = line["began"]
            if line["what"] in (*REFUSALS, "hang"):
                imposed = {"hang": TIMEOUT_S, "429 retry-after": RETRY_AFTER_S}.get(line["what"], 0.0)
                ended = again["began"] if again and with_backoff else began + imposed / scale
            else:
                ended = line["ended"]
                vain += (ended - began) / line["slower"]
            found.append(Place(line["sample"], began, vain, ended))
    return found


def waits_s(load: Load, tries: list[dict[str, Any]], scale: float, with_backoff: bool) -> dict[str, float]:
    """Seconds that the faults imposed, in real time.

    While the server loads, is overloaded or is not there, all of them; while it warms up, but the fifth that
    it works; else the share of places that are held in vain. Once all samples have begun, nobody waits for a
    place any more: then it is by how much the last sample would have ended earlier, had none waited in vain.
    """
    held = places(tries, scale, with_backoff)
    first, end = min(place.began for place in held), max(place.ended for place in held)
    begun: dict[int, float] = {}
    for place in sorted(held, key=lambda place: place.began):
        begun.setdefault(place.sample, place.began)
    all_begun = max(begun.values())
    windows = [
        ("loading", first, first + LOADING_S / scale, 1.0),
        ("warming up", first + LOADING_S / scale, first + (LOADING_S + WARMING_S) / scale, 1 - 1 / SLOWER),
        ("overload", first + OVERLOAD_AT_S / scale, first + (OVERLOAD_AT_S + OVERLOAD_S) / scale, 1.0),
        *([("restart", *load.away, 1.0)] if load.away else []),
    ]
    waits = {
        name: share * max(min(until, all_begun) - since, 0.0) * scale for name, since, until, share in windows
    }
    waits["places held in vain"] = 0.0
    events: list[tuple[float, int, int]] = []  # when; change of the places held, of those in vain
    for place in held:
        events += [(place.began, 1, 0), (place.vain, 0, 1), (place.ended, -1, -1)]
    in_flight = in_vain = 0
    for (when, change, vain), (following, *_) in itertools.pairwise(sorted(events)):
        in_flight, in_vain = in_flight + change, in_vain + vain
        inside = any(since <= when < until for _, since, until, _ in windows)
        if in_vain > 0 and when < min(following, all_begun) and not inside:
            waits["places held in vain"] += in_vain / in_flight * (following - when) * scale
    unhindered: dict[int, float] = {}  # when a sample would have ended
    for sample in begun:
        mine = [place for place in held if place.sample == sample]
        in_vain_s = sum(max(place.ended - max(place.vain, all_begun), 0.0) for place in mine)
        unhindered[sample] = max(place.ended for place in mine) - in_vain_s
    waits["the last samples"] = (end - max(all_begun, *unhindered.values())) * scale
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
        command = [sys.executable, "-m", "support.hostile_load", str(folder / "memory.jsonl"), "1000"]
        memory = json.loads(subprocess.run(command, cwd=TESTS, capture_output=True, check=True).stdout)
    here = bad.ledger.here
    waits = waits_s(bad, tries, given.scale, with_backoff=True)
    imposed = sum(waits_s(bad, tries, given.scale, with_backoff=False).values())
    longer, strictly = (
        (bad.seconds * given.scale - seconds) / (calm.seconds * given.scale)
        for seconds in (sum(waits.values()), imposed)
    )
    print(
        f"with faults: {here.requests:,} requests, {here.retries:,} of them retries, in {bad.seconds:.0f} s"
    )
    print("  tries:", dict(collections.Counter(str(line["what"]) for line in tries).most_common()))
    print("  samples:", dict(bad.reasons().most_common()))
    print("  faulty waits, s:", {name: round(seconds, 1) for name, seconds in waits.items()})
    print(
        f"  {longer:.2f} times as long as without faults, these aside; {strictly:.2f} with our own back-off"
    )
    tokens = f"{here.prompt_tokens:,} prompt and {here.completion_tokens:,} completion tokens"
    print(f"  {tokens}, as the server counts; ${here.usd:.6f}, ${here.aside_usd:.6f} set aside")
    print("1,000 requests in flight:", memory)
    if longer > MOST_TIMES_LONGER or memory["rss_mb"] > MOST_MB:
        sys.exit("a promise is broken")


if __name__ == "__main__":
    main()
