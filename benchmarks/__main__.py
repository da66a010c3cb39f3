"""`python -m benchmarks --list` lists the benchmarks, `python -m benchmarks NAME ...` runs one."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import sys
from pathlib import Path
from typing import NamedTuple


class Benchmark(NamedTuple):
    """One row of the index.

    Attributes:
      name: of its module in this package.
      needs: what it is given, and packages beyond the `dev` extra.
      takes: a rough estimate of how long, with the arguments of its docstring, on two CPU cores or one GPU.
      device: on which it runs.
    """

    name: str
    needs: str
    takes: str
    device: str = "CPU"


ALPACA, MODEL = "alpaca.json", "a model"
INDEX = (
    Benchmark("agreement", "a folder of `middo score`, its models, torch", "5 minutes"),
    Benchmark("embedding_texts", f"{ALPACA}, {MODEL}", "20 minutes"),
    Benchmark("end_to_end", f"{ALPACA}, {MODEL}, torch (peft with --rank)", "1 hour"),
    Benchmark("evaluation", f"GSM8K, {MODEL}, the `eval` extra, torch", "15 minutes"),
    Benchmark("families", "torch", "2 minutes"),
    Benchmark("faults", "the `eval` extra with --table", "as long as one likes; 30 minutes with --table"),
    Benchmark("gates.ask", f"rows that experts revised, {MODEL}", "10 minutes"),
    Benchmark("gates.measure", f"rows that experts revised, {MODEL}", "10 minutes"),
    Benchmark("gates.roc", "nothing", "seconds"),
    Benchmark("hostile_refiner", "nothing", "10 minutes"),
    Benchmark("loading", "12 GB of disk", "10 minutes"),
    Benchmark("logits", f"{MODEL}, torch", "5 minutes"),
    Benchmark("neighbours", "faiss-cpu for its side", "5 minutes"),
    Benchmark("neighbours_update", "nothing", "10 minutes"),
    Benchmark("oracle", f"{ALPACA}, {MODEL}", "an hour per seed and budget"),
    Benchmark("paper_memory", "the `tpu` extra", "10 minutes", "CPU; compiles for TPUs"),
    Benchmark("plan_check", "the `tpu` extra with --published", "5 minutes"),
    Benchmark("plan_pods", "the `tpu` extra", "20 minutes", "CPU; compiles for TPUs"),
    Benchmark("planted_defects", f"{ALPACA}, GSM8K, {MODEL}", "hours"),
    Benchmark("readings_cost", f"{ALPACA}, {MODEL}", "5 minutes"),
    Benchmark("refine_examples", "a folder of `middo refine`", "seconds"),
    Benchmark("rubric_wordings", f"{ALPACA}, {MODEL}", "1 hour"),
    Benchmark("saving", MODEL, "10 minutes"),
    Benchmark("scale", "nothing", "3 minutes; half an hour for two million rows"),
    Benchmark("scoring", f"{ALPACA}, two models, a peer's script, torch", "1 hour"),
    Benchmark("scoring_sides", MODEL, "1 minute"),
    Benchmark("second_start", f"{ALPACA}, {MODEL}", "10 minutes"),
    Benchmark("serving", "servers that run", "10 minutes"),
    Benchmark("serving_fuzz", "nothing", "10 minutes"),
    Benchmark("serving_load", "nothing", "3 minutes"),
    Benchmark("training", f"{ALPACA}, {MODEL}, torch", "1 hour"),
    Benchmark("gpu.check", "jax for CUDA", "3 minutes", "GPU"),
    Benchmark("gpu.compile", "jax for CUDA", "2 minutes", "CPU; compiles for GPUs"),
    Benchmark("gpu.measure", "jax for CUDA", "1 to 3 minutes per job", "GPU"),
    Benchmark("gpu.peer_torch", "torch for CUDA", "1 minute per job", "GPU"),
    Benchmark("gpu.run", "jax and torch for CUDA; benchmarks/gpu/run.sh starts it", "15 minutes", "GPU"),
)


def summary(name: str) -> str:
    """The first sentence of a benchmark's docstring; the module is not imported."""
    spec = importlib.util.find_spec(f"benchmarks.{name}")
    assert spec is not None
    assert spec.origin is not None
    text = ast.get_docstring(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))) or ""
    line = text.partition("\n")[0]
    end = min((i + 1 for mark in ".:?" if (i := line.find(f"{mark} ")) >= 0), default=len(line))
    return line[:end].rstrip(":")


def listing() -> str:
    """The index as text, two lines per benchmark."""
    return "\n".join(
        f"{row.name}\n    {summary(row.name)}\n    needs {row.needs}; takes about {row.takes}; {row.device}"
        for row in INDEX
    )


def main(arguments: list[str]) -> None:
    """Prints the list, or runs a benchmark."""
    if arguments in ([], ["--list"], ["-h"], ["--help"]):
        print(__doc__, "", listing(), sep="\n")
        return
    name, *rest = arguments
    if name not in {row.name for row in INDEX}:
        sys.exit(f"there is no benchmark {name!r}; python -m benchmarks --list shows all")
    sys.argv = [f"python -m benchmarks {name}", *rest]
    # Imported, not run as `__main__`: worker processes unpickle functions by the name of their module.
    sys.exit(importlib.import_module(f"benchmarks.{name}").main())


if __name__ == "__main__":
    main(sys.argv[1:])
