"""Time and memory of the stages that run on the host, by rows: prepare, select, merge and report.

    python -m benchmarks scale                                  # 20,000, 60,000 and 200,000 rows
    python -m benchmarks scale --rows 2000000 --keep runs/big   # two million, 10 GB of disk

Rows are like Alpaca's: a prompt of 19 words and a response of 58, with a column of the user's own. Scores are
random, each axis selects 1 % of the rows, and three of four rewrites are accepted. Each stage is a process of
its own, whose time and peak memory (resident set) are printed; they include the imports, about 0.5 GB.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

SIZES = (20_000, 60_000, 200_000)
GROUP = 50_000  # rows of scores that are made at a time
WORDS = [
    "the",
    "sea",
    "and",
    "a",
    "long",
    "road",
    "by",
    "old",
    "stone",
    "houses",
    "where",
    "people",
    "sell",
    "bread",
    "early",
    "while",
    "rain",
    "falls",
    "on",
]


def settings(folder: Path) -> list[Any]:
    """The settings of the run in a folder."""
    named = {"model.path": str(folder / "model"), "data.path": str(folder / "rows.jsonl"), "name": "run"}
    few = {f"{axis}.fraction": 0.01 for axis in ("complexity", "diversity", "quality")}
    return [{**named, **few, "runs_dir": str(folder), "data.eval_fraction": 0.01, "model.dtype": "float32"}]


def write_rows(folder: Path, rows: int) -> None:
    """The user's data and a tokenizer."""
    from support.tiny_model import write_tiny_model

    write_tiny_model(folder / "model")
    rng = random.Random(0)
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
        for i in range(rows):
            texts = {"instruction": f"{i}: {_words(rng, 19)}?", "input": "", "output": f"{_words(rng, 58)}."}
            file.write(json.dumps({**texts, "source": f"s{i % 7}"}) + "\n")


def _words(rng: random.Random, mean: int) -> str:
    return " ".join(rng.choices(WORDS, k=max(1, round(rng.lognormvariate(0, 0.6) * mean / 1.2))))


def prepare(folder: Path, rows: int) -> None:
    """Reads, checks and splits the data, and writes the first dataset."""
    from middo_jax.config import load
    from middo_jax.progress import Silent
    from middo_jax.rundir import RunDir, write_jsonl, write_text
    from middo_jax.session import Session
    from middo_jax.session import prepare as prepared

    config = load(None, settings(folder))
    run = RunDir(folder / "run")
    data = prepared(Session(config, Silent()))
    write_text(run.config, config.to_yaml())
    write_jsonl(run.rejected, (row.to_json() for row in data.rejections))
    write_jsonl(run.heldout, (example.to_json() for example in data.heldout))
    first = run.round(0)
    write_jsonl(first.dataset, (example.to_json() for example in data.kept))
    first.finish("prepare", [first.dataset, run.heldout, run.rejected], 0.0, n=len(data.kept))


def write_scores(folder: Path, rows: int) -> None:
    """Random scores of all columns that the published axes use."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    from middo_jax.rundir import RunDir
    from middo_jax.rundir.files import each_jsonl
    from middo_jax.signals.table import SCHEMA

    first, rng = RunDir(folder / "run").round(0), np.random.default_rng(0)
    ids = [row["id"] for row in each_jsonl(first.dataset)]
    floats = [name for name in SCHEMA.names if SCHEMA.field(name).type == pa.float32()]
    names = [name for name in floats if name != "consistency"]  # of an optional axis
    with pq.ParquetWriter(first.scores, SCHEMA) as writer:
        for start in range(0, len(ids), GROUP):
            own = ids[start : start + GROUP]
            n = len(own)
            columns = {name: pa.array(rng.gamma(9, 0.2, n), pa.float32()) for name in names}
            near = rng.integers(0, len(ids), (n, 2))
            columns |= {
                "id": pa.array(own),
                "n_target_tokens": pa.array(rng.integers(5, 200, n), pa.int32()),
                "truncated": pa.array(np.zeros(n, bool)),
                "knn_ids": pa.array([[ids[a], ids[b]] for a, b in near]),
                "knn_sims": pa.array([[0.9, 0.8]] * n, pa.list_(pa.float32())),
                "prompt_hash": pa.array(own),
            }
            arrays = [columns.get(f.name, pa.nulls(n, f.type)) for f in SCHEMA]
            writer.write_table(pa.table(arrays, schema=SCHEMA))
    first.finish("score", [first.scores], 1.0)


def select(folder: Path, rows: int) -> None:
    """Selects the three sets."""
    from middo_jax.config import load
    from middo_jax.rundir import RunDir
    from middo_jax.stages.select import select_stage

    select_stage(load(None, settings(folder)), RunDir(folder / "run").round(0))


def write_refined(folder: Path, rows: int) -> None:
    """A refiner's results: three of four rewrites are accepted."""
    from middo_jax.data.example import Example, Lineage
    from middo_jax.rundir import RunDir, write_jsonl
    from middo_jax.rundir.files import each_jsonl, read_json

    first = RunDir(folder / "run").round(0)
    axes = read_json(first.selection)["axes"]
    wanted = {id_: axis for axis, facts in axes.items() for id_ in facts["ids"]}
    ops = {"complexity": "simplify", "diversity": "synthesize", "quality": "rewrite"}

    def results() -> Iterator[dict[str, Any]]:
        for number, row in enumerate(r for r in each_jsonl(first.dataset) if r["id"] in wanted):
            axis, original = wanted[row["id"]], Example.from_json(row)
            op: Any = ops[axis]
            lineage = Lineage((original.id,), original.id, 0, op, axis, (), "a refiner", "1")
            prompt, response = f"{original.prompt} Be brief ({number}).", f"{original.response} And so on."
            accepted = number % 4 != 0
            yield {
                "task_id": f"{op}:{original.id}",
                "op": op,
                "axes": [axis],
                "source_id": original.id,
                "hint_ids": [],
                "attempts": 1,
                "accepted": accepted,
                "gate": None if accepted else "quality",
                "detail": None if accepted else "no better",
                "replaces": None if op == "synthesize" else original.id,
                "scores_before": {},
                "example": original.replace_text(prompt, response, lineage).to_json() if accepted else None,
                "original": original.to_json(),
                "usage": {"requests": 2, "prompt_tokens": 400, "completion_tokens": 150},
            }

    write_jsonl(first.refined, results())
    write_jsonl(first.requests, [])
    first.finish("refine", [first.refined, first.requests], 1.0, usage={})


def merge(folder: Path, rows: int) -> None:
    """Merges, and writes the next dataset."""
    from middo_jax.config import load
    from middo_jax.progress import Silent
    from middo_jax.rundir import RunDir, write_jsonl
    from middo_jax.session import Session
    from middo_jax.stages.merge import merge_stage

    run = RunDir(folder / "run")
    merged = merge_stage(Session(load(None, settings(folder)), Silent()), run.round(0))
    write_jsonl(run.final.dataset, (example.to_json() for example in merged))
    run.round(0).finish("merge", [run.round(0).dropped], 1.0)
    run.final.finish("prepare", [run.final.dataset], 1.0, n=len(merged))


def report(folder: Path, rows: int) -> None:
    """Makes the page."""
    from middo_jax.report.build import build
    from middo_jax.rundir import RunDir

    build(RunDir(folder / "run"))


STEPS: dict[str, Callable[[Path, int], None]] = {
    step.__name__: step for step in (write_rows, prepare, write_scores, select, write_refined, merge, report)
}


def measured(folder: Path, rows: int) -> Iterator[tuple[str, float, float]]:
    """(stage, seconds, peak GB) of each stage that is the package's."""
    for name in STEPS:
        command = [sys.executable, "-m", "benchmarks.scale", "--step", name, "--folder", str(folder)]
        done = subprocess.run([*command, "--rows", str(rows)], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
        if not name.startswith("write_"):
            seconds, peak = map(float, done.stdout.split()[-2:])
            yield name, seconds, peak


def main() -> None:
    """Measures all sizes, or runs one step in this process."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, nargs="*", default=SIZES)
    parser.add_argument("--keep", type=Path, help="a new folder for the files, which stay there")
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step:
        began = time.monotonic()
        STEPS[arguments.step](arguments.folder, arguments.rows[0])
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
        print(time.monotonic() - began, peak)
        return
    print("| rows | stage | seconds | peak GB |\n|---:|---|---:|---:|", flush=True)
    for rows in arguments.rows:
        with tempfile.TemporaryDirectory() as scratch:
            folder = arguments.keep or Path(scratch)
            folder.mkdir(parents=True, exist_ok=True)
            for name, seconds, peak in measured(folder, rows):
                print(f"| {rows:,} | {name} | {seconds:.1f} | {peak:.2f} |", flush=True)


if __name__ == "__main__":
    main()
