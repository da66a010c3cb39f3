"""Time, memory and disk of what runs on the host, by rows: prepare, select, merge, report and so on.

    python -m benchmarks scale                                  # 20,000, 60,000 and 200,000 rows
    python -m benchmarks scale --rows 2000000 --without tokenize plan --keep runs/big   # 10 GB of disk
    python -m benchmarks scale --rows 60000 --longer 4          # texts four times as long

Rows are like Alpaca's: a prompt of 19 words and a response of 58, with a column of the user's own. Scores are
random, each axis selects 1 % of the rows, and three of four rewrites are accepted. Each step is a process of
its own, whose time, peak memory (resident set) and files are printed, its imports included.

prepare   reads, checks and splits the rows, and writes the first dataset
tokenize  tokenizes the dataset and packs it, as scoring and training do before their first batch
select    scores -> three sets
plan      the tasks for the refiner
merge     finds what is dropped
final     writes the next dataset, and the same in the shape of the user's rows
report    the page
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

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


def write_rows(folder: Path, rows: int, longer: float = 1.0) -> None:
    """The user's data and a tokenizer; texts are `longer` times as long as Alpaca's."""
    from support.tiny_model import write_tiny_model

    write_tiny_model(folder / "model")
    rng = random.Random(0)
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
        for i in range(rows):
            prompt, response = _words(rng, 19 * longer), _words(rng, 58 * longer)
            texts = {"instruction": f"{i}: {prompt}?", "input": "", "output": f"{response}."}
            file.write(json.dumps({**texts, "source": f"s{i % 7}"}) + "\n")


def _words(rng: random.Random, mean: float) -> str:
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
    facts = {"n": len(data.kept), "format": data.format, "columns": list(data.columns)}
    first.finish("prepare", [first.dataset, run.heldout, run.rejected], 0.0, **facts)


def tokenize(folder: Path, rows: int) -> None:
    """Tokenizes the dataset and packs it, as scoring and training do before their first batch."""
    from middo_jax.config import load
    from middo_jax.progress import Silent
    from middo_jax.rundir import RunDir
    from middo_jax.session import Session, read_dataset

    session = Session(load(None, settings(folder)), Silent())
    with session.stage():
        session.plan_losses(session.tokenize(read_dataset(RunDir(folder / "run").round(0))))


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


def plan(folder: Path, rows: int) -> None:
    """Plans the tasks for the refiner."""
    from middo_jax.rundir import RunDir
    from middo_jax.stages.refine import plan_refinement

    plan_refinement(RunDir(folder / "run").round(0))


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
    """Merges, and writes what is dropped."""
    from middo_jax.config import load
    from middo_jax.progress import Silent
    from middo_jax.rundir import RunDir
    from middo_jax.session import Session
    from middo_jax.stages.merge import merge_stage

    first = RunDir(folder / "run").round(0)
    merge_stage(Session(load(None, settings(folder)), Silent()), first)
    first.finish("merge", [first.dropped], 1.0)


def final(folder: Path, rows: int) -> None:
    """Writes the next dataset, and the same in the shape of the user's rows."""
    from middo_jax.config import load
    from middo_jax.data.stored import Stored
    from middo_jax.exporting import own_shape, write_as_it_came
    from middo_jax.progress import Silent
    from middo_jax.rundir import RunDir, write_jsonl
    from middo_jax.session import Session
    from middo_jax.stages.merge import merged

    run = RunDir(folder / "run")
    here, found = run.final, merged(Session(load(None, settings(folder)), Silent()), run.round(0))
    write_jsonl(here.dataset, (example.to_json() for example in found))
    form = write_as_it_came(run, Stored(here.dataset), here.own_format, Silent())
    facts = {"n": len(found), "format": form, "shape": own_shape(run).to_json()}
    here.finish("prepare", [here.dataset, here.own_format], 1.0, **facts)


def report(folder: Path, rows: int) -> None:
    """Makes the page."""
    from middo_jax.report.build import build
    from middo_jax.rundir import RunDir

    build(RunDir(folder / "run"))


STEPS: dict[str, Callable[..., None]] = {
    step.__name__: step
    for step in (
        *(write_rows, prepare, tokenize, write_scores, select),
        *(plan, write_refined, merge, final, report),
    )
}

OPTIONAL = ("tokenize", "plan")  # no other step needs them


class Measured(NamedTuple):
    """What a step took: wall and CPU seconds, its largest resident set and its new files, both in GB."""

    seconds: float
    cpu_seconds: float
    peak: float
    files: float


def measured(name: str, folder: Path, rows: int, longer: float) -> Measured:
    """Runs a step in a process of its own."""
    sizes = ["--rows", str(rows), "--longer", str(longer)]
    command = [sys.executable, "-m", "benchmarks.scale", "--step", name, "--keep", str(folder), *sizes]
    before = _size(folder)
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
    seconds, cpu_seconds, peak = map(float, done.stdout.split()[-3:])
    return Measured(seconds, cpu_seconds, peak, _size(folder) - before)


def _peak() -> float:
    """GB of this process's largest resident set; Linux only."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e9


def _size(folder: Path) -> float:
    """GB of the files in a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e9


def main() -> None:
    """Measures all sizes, or runs one step in this process."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, nargs="*", default=SIZES)
    parser.add_argument("--longer", type=float, default=1.0, help="length of texts over Alpaca's")
    parser.add_argument("--without", nargs="*", choices=OPTIONAL, default=[], help="steps to leave out")
    parser.add_argument("--keep", type=Path, help="a new folder for the files, which stay there")
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step:
        began = time.monotonic()
        more = (arguments.longer,) if arguments.step == "write_rows" else ()
        STEPS[arguments.step](arguments.keep, arguments.rows[0], *more)
        print(time.monotonic() - began, time.process_time(), _peak())
        return
    print("| rows | step | seconds | CPU s | peak GB | GB of files |\n" + "|---:" * 6 + "|", flush=True)
    for rows in arguments.rows:
        with tempfile.TemporaryDirectory() as scratch:
            folder = arguments.keep or Path(scratch)
            folder.mkdir(parents=True, exist_ok=True)
            for name in (step for step in STEPS if step not in arguments.without):
                one = measured(name, folder, rows, arguments.longer)
                if name.startswith("write_"):
                    continue  # not a step of the package
                times = f"{one.seconds:.1f} | {one.cpu_seconds:.1f}"
                print(f"| {rows:,} | {name} | {times} | {one.peak:.2f} | {one.files:.3f} |", flush=True)


if __name__ == "__main__":
    main()
