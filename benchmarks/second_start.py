"""What the compilation cache saves: commands with an empty cache, and again with what they left in it.

    python -m benchmarks second_start --model DIR --data FILE [--rows 64] [--repeats 3]

`middo score` and `middo train` run as processes of their own, as a user starts them. The first start of a
repeat has an empty cache. The second one has the cache of the first, and again an empty folder, so that it
computes everything anew. `seconds` and `cpu_s` are those of the whole process; the latter does not depend on
other work of the machine. `compile_s` is the part of scoring in which its passes wait for their programs. JAX
stores only programs that took a second to compile.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

COMMANDS = {"score": (), "train": ("train.num_epochs=1", "train.batch_size=2")}


def run_once(command: str, out: Path, cache: Path, given: argparse.Namespace) -> dict[str, float]:
    """Seconds of one start on the clock and on all cores, and of compiling where the command records that."""
    environment = {name: x for name, x in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    arguments = ["--data", str(given.data), "--model", str(given.model), "--out", str(out)]
    settings = [f"compilation_cache={cache}", f"data.limit={given.rows}", "model.max_length=512"]
    began, cpu_before = time.perf_counter(), cpu_seconds()
    ended = subprocess.run(
        [sys.executable, "-m", "middo_jax", command, *arguments, *settings, *COMMANDS[command]],
        env=environment,
        capture_output=True,
        text=True,
    )
    found = {"seconds": time.perf_counter() - began, "cpu_s": cpu_seconds() - cpu_before}
    if ended.returncode:
        sys.exit(ended.stderr)
    if command == "score":
        stages = json.loads((out / "manifest.json").read_text(encoding="utf-8"))["stages"]
        passes = stages["score"]["passes"].values()
        found["compile_s"] = sum(facts["compile_seconds"] for facts in passes)
    return found


def cpu_seconds() -> float:
    """Seconds that all ended child processes have computed."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    """Prints one JSON object: medians, and the values of all repeats."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    values: dict[str, list[float]] = defaultdict(list)
    stored: dict[str, float] = {}
    for _ in range(given.repeats):
        for command in COMMANDS:
            with tempfile.TemporaryDirectory(prefix="second-start-") as folder:
                cache = Path(folder) / "cache"
                for start in ("first", "second"):
                    for name, value in run_once(command, Path(folder) / start, cache, given).items():
                        values[f"{command}, {start} start, {name}"].append(round(value, 2))
                files = [path for path in cache.rglob("*") if path.is_file()]
                stored[f"{command}, MB"] = round(sum(path.stat().st_size for path in files) / 1e6, 1)
    medians = {name: statistics.median(all_of_it) for name, all_of_it in values.items()}
    print(json.dumps({"medians": medians, "all": values, "stored": stored}, indent=2))


if __name__ == "__main__":
    main()
