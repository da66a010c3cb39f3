"""Breaks a tiny closed loop and checks that it survives: a table of faults, and random ones.

    python -m benchmarks.faults --table [--only PATTERN]   every file x fault, every setting, model and data
    python -m benchmarks.faults --seconds 600 [--seed N]   random faults for so long
    python -m benchmarks.faults --seed N --trial K         one of them again

Prints a line per case and what broke, and exits with 1 if anything did. docs/reliability.md has the promises.
"""

from __future__ import annotations

import argparse
import collections
import fnmatch
import logging
import os
import sys
import tempfile
import time
import warnings
from pathlib import Path

import jax

from benchmarks.fault_table import cases
from benchmarks.fault_trials import trial
from benchmarks.fault_world import World, permissions, world


def main() -> None:
    """Runs, prints, and exits with 1 where something broke."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--table", action="store_true", help="run the whole table")
    parser.add_argument("--only", default="*", help="of the table, cases whose names fit this pattern")
    parser.add_argument("--seconds", type=float, default=0.0, help="random faults for so long")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trial", type=int, help="this trial alone")
    given = parser.parse_args()
    if not given.table and not given.seconds and given.trial is None:
        parser.error("give --table, --seconds or --trial")
    # Tiny models spend their time in the compiler; processes that are started inherit all of this.
    os.environ |= {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    logging.getLogger("middo_jax").setLevel(logging.ERROR)  # a scripted refiner counts no tokens
    warnings.filterwarnings("ignore", module="orbax")
    jax.config.update("jax_disable_most_optimizations", True)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)

    with (
        tempfile.TemporaryDirectory() as name,
        permissions() as apply,
        world(Path(name) / "project") as here,
    ):
        if not apply:
            print("files cannot be made unreadable here: such faults do nothing", flush=True)
        broken = 0
        if given.table:
            broken += _table(here, given.only)
        if given.seconds or given.trial is not None:
            broken += _random(here, given.seed, given.seconds, given.trial)
    sys.exit(1 if broken else 0)


def _table(here: World, only: str) -> int:
    began, n, broken = time.monotonic(), 0, 0
    for case in cases(here):
        if not fnmatch.fnmatch(case.name, only):
            continue
        n += 1
        found = case.check()
        broken += bool(found)
        _print(case.name, found)
    print(f"table: {n} cases, {broken} broken, {time.monotonic() - began:.0f} s", flush=True)
    return broken


def _random(here: World, seed: int, seconds: float, only: int | None) -> int:
    began, kinds, broken, number = time.monotonic(), collections.Counter[str](), 0, only or 0
    while only is not None or time.monotonic() - began < seconds:
        tried = trial(here, seed, number)
        kinds[tried.what.partition(":")[0]] += 1
        broken += bool(tried.broken)
        _print(f"trial {number}: {tried.what}", tried.broken)
        number += 1
        if only is not None:
            break
    counted = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    took = f"{time.monotonic() - began:.0f} s"
    print(f"random, seed {seed}: {kinds.total()} trials ({counted}), {broken} broken, {took}", flush=True)
    return broken


def _print(name: str, found: list[str]) -> None:
    print(f"{'BROKEN' if found else 'ok    '} {name}", flush=True)
    for line in found:
        print(f"         {line}", flush=True)


if __name__ == "__main__":
    main()
