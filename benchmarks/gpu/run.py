"""Runs the jobs of the GPU table one after the other, keeps what each found, and prints the table.

benchmarks/gpu/run.sh OUT            on the GPU machine, see there
python -m benchmarks.gpu.run --table OUT/results.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gpu import shapes
from benchmarks.gpu.table import print_table

# Ours and the peer's in turns, what matters most first. A peer's job is (its job, model, distribution).
JOBS: dict[str, tuple[str, str, str] | None] = {
    "check": None,
    "scoring-8b": None,
    "peer-scoring-8b-alpaca": ("score", "8b", "alpaca"),
    "lora-8b": None,
    "full-1b": None,
    "peer-lora-8b": ("lora", "8b", "alpaca"),
    "decoding-1b": None,
    "ratings-8b": None,
    "peer-full-1b": ("full", "1b", "alpaca"),
    "published-8b-alpaca": ("published", "8b", "alpaca"),
    "neighbours": None,
    "scoring-1b": None,
    "peer-scoring-1b-alpaca": ("score", "1b", "alpaca"),
    "peer-scoring-8b-dolly": ("score", "8b", "dolly"),
    "peer-scoring-1b-dolly": ("score", "1b", "dolly"),
    "published-8b-dolly": ("published", "8b", "dolly"),
    "kernels": None,
}
TINY: dict[str, tuple[str, str, str] | None] = {
    "check": None,
    "scoring-tiny": None,
    "ratings-tiny": None,
    "lora-tiny": None,
    "full-tiny": None,
    "decoding-tiny": None,
    "neighbours": None,
    "kernels": None,
}
TINY_PEERS: dict[str, tuple[str, str, str] | None] = {
    "peer-scoring-tiny": ("score", "tiny", "tiny"),
    "peer-lora-tiny": ("lora", "tiny", "tiny"),
    "peer-full-tiny": ("full", "tiny", "tiny"),
    "published-tiny": ("published", "tiny", "tiny"),
}
SHORTEST_JOB_S = 40  # what a job on a GPU takes at least: with less left, none is started
LONGEST_JOB_S = 120  # of a job on a GPU: none of them should need half of it


def command(job: str, out: Path, tiny: bool) -> list[str]:
    """What a process is started with."""
    python = [sys.executable, "-W", "ignore"]
    if job == "check":
        # Many small programs: choosing the fastest product for each would take minutes.
        flags = "--xla_gpu_autotune_level=0" if not tiny else ""
        return ["env", f"XLA_FLAGS={flags}", *python, "-m", "benchmarks.gpu.check", "--out", str(out)]
    peer = {**JOBS, **TINY_PEERS}.get(job)
    if peer is None:
        tail = ["--tiny"] if tiny else []
        return [*python, "-m", "benchmarks.gpu.measure", job, "--out", str(out), *tail]
    what, model, distribution = peer
    lengths = out.parent / f"lengths-{model}-{distribution}.npz"
    tokens = {"8b": 600_000, "1b": 1_200_000}.get(model, 4_000)
    tokens_n, targets_n = shapes.lengths(distribution, tokens)
    np.savez(lengths, tokens_n=tokens_n, targets_n=targets_n)
    steps = "2" if tiny else "30" if what == "published" else "6"
    per_batch = {"score": "32768", "lora": "16384", "full": "16384"}.get(what, "32768")
    return [
        *(*python, "benchmarks/gpu/peer_torch.py", "--job", what, "--shape", model),
        *("--lengths", str(lengths), "--out", str(out), "--steps", steps),
        *("--tokens-per-batch", "512" if tiny else per_batch),
    ]


def run(job: str, scratch: Path, seconds: float, tiny: bool) -> dict[str, Any]:
    """The figures of a job, or how it failed; its output goes to this process's, and to a file."""
    out = scratch / f"{job}.json"
    began = time.monotonic()
    try:
        child = subprocess.run(
            command(job, out, tiny),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=seconds,
            check=False,
        )
        said, code = child.stdout, child.returncode
    except subprocess.TimeoutExpired as late:
        said = late.stdout.decode(errors="replace") if isinstance(late.stdout, bytes) else late.stdout or ""
        code = 124
    figures: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
    figures |= {"job_s": round(time.monotonic() - began, 1), "exit": code}
    if code:
        figures["said"] = said[-4000:]
    print(f"--- {job}: {figures['job_s']} s, exit {code}\n{said[-1500:]}", flush=True)
    return figures


def setting() -> dict[str, Any]:
    """The device and versions, as a process of its own finds them: this one must hold no memory of it."""
    code = (
        "import importlib.metadata as m, jax, json; d = jax.devices()[0]; "
        "v = lambda n: m.version(n) if any(x.name == n for x in m.distributions()) else None; "
        "print(json.dumps({'device': d.device_kind, 'jax': jax.__version__, 'torch': v('torch'), "
        "'transformers': v('transformers')}))"
    )
    said = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True
    )
    return json.loads(said.stdout.splitlines()[-1]) | {
        "python": platform.python_version(),
        "cores": os.cpu_count(),
    }


def main() -> None:
    """Runs what is not in the results yet; the exit status says whether every job has passed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("jobs", nargs="*", help="some of the jobs; all by default")
    parser.add_argument("--out", type=Path, help="folder of results.json")
    parser.add_argument("--limit", type=float, default=360, help="seconds; no job starts that may not end")
    parser.add_argument("--tiny", action="store_true", help="everything so small that a CPU bears it")
    parser.add_argument("--peers", action="store_true", help="with --tiny: the peers too, which need torch")
    parser.add_argument("--table", type=Path, help="only prints the table of these results")
    arguments = parser.parse_args()
    if arguments.table is not None:
        print_table(json.loads(arguments.table.read_text()))
        return
    if arguments.out is None:
        parser.error("--out is needed")
    began = time.monotonic()
    arguments.out.mkdir(parents=True, exist_ok=True)
    file = arguments.out / "results.json"
    results: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"setting": setting()}
    jobs = {**TINY, **(TINY_PEERS if arguments.peers else {})} if arguments.tiny else JOBS
    scratch = Path(tempfile.mkdtemp())
    for job in arguments.jobs or jobs:
        left = arguments.limit - (time.monotonic() - began)
        if results.get(job, {}).get("exit") == 0 or left < (0 if arguments.tiny else SHORTEST_JOB_S):
            continue
        results[job] = run(job, scratch, left if arguments.tiny else min(left, LONGEST_JOB_S), arguments.tiny)
        file.write_text(json.dumps(results, indent=1) + "\n")
    print_table(results)
    wanted = arguments.jobs or list(jobs)
    missing = [job for job in wanted if results.get(job, {}).get("exit") != 0]
    if missing:
        print(f"not measured: {', '.join(missing)}; the same command goes on with them")
    sys.exit(1 if missing else 0)


if __name__ == "__main__":
    main()
