"""The processes of `scoring.py`: `middo score`, the peer, and the rate of a matrix product.

python -m benchmarks scoring_sides models/SmolLM2-135M-Instruct       # prints the rate alone
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from middo_jax.models.config import read_config
from middo_jax.models.parameters import parameters
from middo_jax.rundir import RoundDir
from middo_jax.signals.embeddings import read_embeddings
from middo_jax.signals.table import as_floats, read_scores

LONGEST = 2048  # tokens of a row
# Our passes by the peer's names of them.
PHASES = {
    "loss before training": "loss_pre",
    "loss and embeddings": "loss_post",
    "embeddings of raw prompts": "embedding",
    "ratings": "judge",
}


class Turn(NamedTuple):
    """What one process did.

    Attributes:
      phases: seconds by phase.
      compiling: seconds.
      seconds: of the whole process.
      peak: bytes.
      real: share of the computed positions, judging left out, that hold a token.
      shapes: programs that were compiled, all passes together.
      found: arrays by name: what was computed.
    """

    phases: dict[str, float]
    compiling: float
    seconds: float
    peak: int
    real: float
    shapes: int
    found: dict[str, Any]


def run(command: Sequence[str], cache: Path) -> tuple[str, float, int]:
    """(stdout, seconds, peak bytes) of a process. Ends this one if that fails."""
    environment = {"JAX_PLATFORMS": "cpu", **os.environ, "JAX_COMPILATION_CACHE_DIR": str(cache)}
    with tempfile.TemporaryFile("w+") as printed, tempfile.TemporaryFile("w+") as said:
        began, peak = time.perf_counter(), 0
        child = subprocess.Popen(command, stdout=printed, stderr=said, env=environment)
        while child.poll() is None:
            status = Path(f"/proc/{child.pid}/status").read_text(encoding="utf-8")
            peak = max(peak, 1024 * int((re.findall(r"VmHWM:\s+(\d+) kB", status) or [0])[0]))
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(0.2)
        seconds = time.perf_counter() - began
        for file in (printed, said):
            file.seek(0)
        if child.returncode:
            sys.exit(f"{shlex.join(command)}\nended with {child.returncode}:\n{said.read()[-4000:]}")
        return printed.read(), seconds, peak


def ours(arguments: argparse.Namespace, data: Path, scratch: Path, judging: bool) -> Turn:
    """`middo score` of a file."""
    out = RoundDir(tempfile.mkdtemp(dir=scratch))
    command = [
        sys.executable,
        "-m",
        "middo_jax",
        "score",
        "--json",
        "--data",
        str(data),
        "--out",
        str(out.path),
    ]
    command += ["--model", arguments.model, "model.dtype=float32", f"model.max_length={LONGEST}"]
    if judging:
        command += ["--axes", "quality"]
    else:
        command += ["--axes", "complexity,diversity", "--pre-model", arguments.pre_model]
        command += [f"diversity.text={arguments.text}", "diversity.m=1"]
    _, seconds, peak = run(command, scratch / "compiled")
    passes = out.stages()["score"]["passes"]
    scores = read_scores(out.scores)
    of_text = [facts for name, facts in passes.items() if name != "ratings"]
    return Turn(
        phases={PHASES[name]: facts["seconds"] for name, facts in passes.items()},
        compiling=sum(facts["compile_seconds"] for facts in passes.values()),
        seconds=seconds,
        peak=peak,
        real=sum(f["real_tokens"] for f in of_text) / sum(f["computed_tokens"] for f in of_text),
        shapes=sum(facts["shapes"] for facts in passes.values()),
        found={name: as_floats(scores, name) for name in ("loss_pre", "loss_post", "n_target_tokens")}
        | {"embedding": read_embeddings(out.embeddings, scores["id"].to_pylist())},
    )


def peer(
    arguments: argparse.Namespace, data: Path, scratch: Path, count: int, max_new: int | None = None
) -> Turn:
    """The published pipeline's passes of a file; with `max_new` also its ratings."""
    out = scratch / "peer.json"
    command = [sys.executable, arguments.peer, "--pre", arguments.pre_model, "--post", arguments.model]
    command += ["--data", str(data), "--limit", str(count), "--out", str(out)]
    command += ["--judge", "--max-new", str(max_new)] if max_new else []
    printed, seconds, peak = run(command, scratch / "compiled")
    line = json.loads(printed.splitlines()[-1])
    found = json.loads(out.read_text(encoding="utf-8"))
    found = {name: value if name == "judge" else np.asarray(value) for name, value in found.items()}
    phases = {phase: took for phase, took in line["seconds"].items() if phase != "load"}
    return Turn(phases, 0.0, seconds, peak, line["real_tokens"] / line["computed_tokens"], 0, found)


def matmul_rate(model: str) -> float:
    """FLOPs a second of a float32 product of 2,048 positions and a matrix of the model: the best of all."""
    import jax

    config = read_config(model)
    shapes = {spec.shape(config)[1:] for spec in parameters(config) if len(spec.axes) == 3}
    rng, product, best = np.random.default_rng(0), jax.jit(lambda x, w: x @ w), 0.0
    for inputs, outputs in sorted(shapes | {(config.hidden_size, config.vocab_size)}):
        x = jax.device_put(rng.standard_normal((2048, inputs), np.float32))
        w = jax.device_put(rng.standard_normal((inputs, outputs), np.float32))
        for _ in range(20 if outputs != config.vocab_size else 5):
            began = time.perf_counter()
            product(x, w).block_until_ready()
            best = max(best, 2 * x.size * outputs / (time.perf_counter() - began))
    return best


def measure_rate(arguments: argparse.Namespace, scratch: Path) -> float:
    """`matmul_rate` in a process of its own, so that this one keeps no threads."""
    return float(run([sys.executable, __file__, arguments.model], scratch / "compiled")[0])


def main() -> None:
    """Prints the rate for the model that the command names."""
    print(matmul_rate(sys.argv[1]))


if __name__ == "__main__":
    main()
