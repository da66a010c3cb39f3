"""Breaks a tiny closed loop and checks that it survives: a table of faults, and random ones.

    python -m benchmarks.faults --table [--only PATTERN]   every file x fault, every setting, model and data
    python -m benchmarks.faults --seconds 600 [--seed N]   random faults for so long
    python -m benchmarks.faults --seed N --trial K         one of them again

With `--keep FOLDER` the same command goes on where it was stopped: cases that passed are not run again, and
random faults go on with the next trial. Remove FOLDER after a change of the program.

Prints a line per case and what broke, and exits with 1 if anything did. docs/reliability.md has the promises.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import fnmatch
import json
import logging
import os
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import jax

from benchmarks.fault_table import cases
from benchmarks.fault_trials import trial
from benchmarks.fault_wide import wide, wide_cases
from benchmarks.fault_world import World, permissions, programs_kept, world


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
    parser.add_argument("--keep", type=Path, help="folder for the loop and the results, to go on later")
    given = parser.parse_args()
    if not given.table and not given.seconds and given.trial is None:
        parser.error("give --table, --seconds or --trial")
    # Tiny models spend their time in the compiler; processes that are started inherit all of this.
    os.environ |= {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    logging.getLogger("middo_jax").setLevel(logging.ERROR)  # a scripted refiner counts no tokens
    warnings.filterwarnings("ignore", module="orbax")
    jax.config.update("jax_disable_most_optimizations", True)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)

    with contextlib.ExitStack() as stack:
        folder = given.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if not stack.enter_context(permissions()):
            print("files cannot be made unreadable here: such faults do nothing", flush=True)
        stack.enter_context(programs_kept())
        (folder / "project").mkdir(parents=True, exist_ok=True)
        here, results = stack.enter_context(world(folder / "project")), Results(folder / "results.jsonl")
        broken = 0
        if given.table:
            broken += _table(here, given.only, results)
        if given.seconds or given.trial is not None:
            broken += _random(here, given, results)
    sys.exit(1 if broken else 0)


class Results:
    """The results so far, one JSON line each: of a case of the table, or of a trial of a seed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        self.rows: list[dict[str, Any]] = [json.loads(line) for line in lines]

    def add(self, **row: Any) -> None:
        """Adds a result."""
        self.rows.append(row)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def passed(self) -> dict[str, float]:
        """Seconds of the cases of the table that passed, by name."""
        return {row["case"]: row["seconds"] for row in self.rows if "case" in row and not row["broken"]}

    def trials(self, seed: int) -> list[dict[str, Any]]:
        """The trials of a seed."""
        return [row for row in self.rows if row.get("seed") == seed]


def _table(here: World, only: str, results: Results) -> int:
    rows = (*cases(here), *wide_cases(wide(here), here))
    wanted = [case for case in rows if fnmatch.fnmatch(case.name, only)]
    passed = {name: took for name, took in results.passed().items() if name in {c.name for c in wanted}}
    left = [case for case in wanted if case.name not in passed]
    began, broken = time.monotonic(), 0
    for n, case in enumerate(left, 1):
        at = time.monotonic()
        try:
            found = case.check()
        except Exception as error:  # whatever the loop raises that the program would not print is a find
            found = [f"{type(error).__name__}: {error}"]
        broken += bool(found)
        results.add(case=case.name, broken=found, seconds=time.monotonic() - at)
        to_go = (time.monotonic() - began) / n * (len(left) - n)
        _print(f"[{len(passed) + n}/{len(wanted)}, about {to_go / 60:.0f} min left] {case.name}", found)
    seconds = sum(passed.values()) + time.monotonic() - began
    print(f"table: {len(wanted)} cases, {broken} broken, {seconds:.0f} s", flush=True)
    return broken


def _random(here: World, given: argparse.Namespace, results: Results) -> int:
    seed, earlier = given.seed, [] if given.trial is not None else results.trials(given.seed)
    kinds, broken = collections.Counter[str](row["kind"] for row in earlier), 0
    spent, number = sum(row["seconds"] for row in earlier), given.trial or len(earlier)
    while given.trial is not None or spent < given.seconds:
        began = time.monotonic()
        tried = trial(here, seed, number)
        kind, took = tried.what.partition(":")[0], time.monotonic() - began
        kinds[kind], broken, spent = kinds[kind] + 1, broken + bool(tried.broken), spent + took
        results.add(seed=seed, trial=number, kind=kind, what=tried.what, broken=tried.broken, seconds=took)
        _print(f"[{spent:.0f} s] trial {number}: {tried.what}", tried.broken)
        number += 1
        if given.trial is not None:
            break
    broken += sum(bool(row["broken"]) for row in earlier)
    counted = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    print(
        f"random, seed {seed}: {kinds.total()} trials ({counted}), {broken} broken, {spent:.0f} s", flush=True
    )
    return broken


def _print(name: str, found: list[str]) -> None:
    print(f"{'BROKEN' if found else 'ok    '} {name}", flush=True)
    for line in found:
        print(f"         {line}", flush=True)


if __name__ == "__main__":
    main()
