"""What the compiled programs of 8B and 70B models do on slices: time, limits, collectives and copies.

    python -m benchmarks plan_pods                             # all rows of CASES
    python -m benchmarks plan_pods 8b-train-v6e-64 ...         # some of them
    python -m benchmarks plan_pods 8b-train-v6e-64 --set train.remat=dots
    python -m benchmarks plan_pods 70b-neighbours-v5p-512 --rows 100000000

Each case is a stage, compiled by the real TPU compiler (the `tpu` extra) as `middo plan` does. MFU counts the
FLOPs that the published formula needs over those of all chips in the predicted time. Every collective is
listed with its mesh axes and the JAX scope that it comes from, and every copy of at least 1 % of the bytes
that the program moves.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from typing import Any

os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}

import numpy as np

from benchmarks.paper_memory import SHAPES
from middo_jax.config import load
from middo_jax.planning.amounts import Amounts
from middo_jax.planning.chips import GIB, Slices
from middo_jax.planning.compiling import mesh_of
from middo_jax.planning.roofline import Cost
from middo_jax.planning.search import MeshShape
from middo_jax.planning.stages import PlannedStage, Workload, plan_stage
from middo_jax.training.flops import training_flops

LENGTH = 4096
ROWS = 2_000_000  # of the passes and of the search for neighbours, of 250 tokens on average
LLAMA_8B = SHAPES["llama-3.1-8b"]
LLAMA_70B = dataclasses.replace(
    LLAMA_8B, hidden_size=8192, intermediate_size=28672, num_layers=80, num_heads=64
)
MODELS = {"8b": LLAMA_8B, "70b": LLAMA_70B}


@dataclasses.dataclass(frozen=True)
class Case:
    """One stage of one model on one slice.

    Attributes:
      topology: the slice.
      mesh: devices along data, fsdp and tensor.
      rows: rows of a training's micro-batch per device along data and fsdp.
      settings: of training.
    """

    topology: str
    mesh: MeshShape
    rows: int = 1
    settings: tuple[str, ...] = ()


SLICES = {
    "v5e-16": Case("v5e:4x4", (1, 16, 1), settings=("train.optimizer=adafactor",)),
    "v5e-256": Case("v5e:16x16", (1, 256, 1)),
    "v5p-128": Case("v5p:4x4x8", (1, 128, 1), rows=2, settings=("train.remat=dots",)),
    "v6e-64": Case("v6e:8x8", (1, 64, 1)),
}
CASES = {f"8b-{stage}-{name}": case for stage in ("train", "score", "rate") for name, case in SLICES.items()}
CASES["70b-train-v5p-512"] = Case("v5p:8x8x8", (1, 512, 1), rows=1)
CASES |= {f"70b-{stage}-v5p-512": CASES["70b-train-v5p-512"] for stage in ("score", "rate", "neighbours")}
CASES["8b-neighbours-v5e-16"] = SLICES["v5e-16"]


def planned(name: str, more: list[str], n_rows: int = ROWS) -> tuple[Workload, PlannedStage]:
    """The stage of a case."""
    model, stage, _ = name.split("-", 2)
    case, decoder = CASES[name], MODELS[model]
    slices = Slices.parse(case.topology)
    ways = case.mesh[0] * case.mesh[1]
    settings: list[Any] = [
        {
            "model.path": "none",
            "data.path": "none",
            "model.max_length": LENGTH,
            "train.batch_size": case.rows * ways,
            "scoring.batch_tokens": 16_384 * ways,
        },
        *case.settings,
        *more,
    ]
    config = load(None, settings)
    amounts = _amounts(stage, config.train.batch_size, n_rows)
    workload = Workload(config, decoder, amounts, slices.chip, slices)
    return workload, plan_stage(
        stage, workload, mesh_of(slices, case.mesh), lambda text: print(text, flush=True)
    )


def _amounts(stage: str, per_step: int, n_rows: int) -> Amounts:
    """One step of full rows for training; instruction samples for the passes."""
    if stage == "train":
        return Amounts(per_step, np.full(per_step, LENGTH), 1.0, "full rows")
    return Amounts.assumed(n_rows, 250, LENGTH)


def useful_flops(stage: str, workload: Workload) -> float:
    """FLOPs that the stage needs at least: of a pass a third of training's, no head for ratings."""
    amounts = workload.amounts
    lengths = amounts.lengths_n.tolist()
    targets = int(amounts.lengths_n.sum() * amounts.target_share) if stage != "rate" else 0
    flops = training_flops(workload.decoder, lengths, targets) * amounts.scale
    return flops if stage == "train" else flops / 3


def show(name: str, workload: Workload, stage: PlannedStage) -> None:
    """Prints memory, time, limits, collectives and copies."""
    cost, memory = stage.cost, stage.memory
    print(f"\n## {name}\n")
    print(f"memory {memory.used / GIB:.2f} of {memory.usable / GIB:.2f} GiB: ", end="")
    print(", ".join(f"{kind} {size / GIB:.2f}" for kind, size in memory.parts.items()))
    if stage.seconds is None or workload.slices is None:
        print("does not fit")
        return
    peak = workload.slices.devices * workload.chip.matmul_flops * stage.seconds
    done = cost.flops / (workload.chip.matmul_flops * stage.seconds)
    print(f"time {stage.seconds:.3f} s; the compiler's estimate {cost.compiler_seconds(workload.chip):.3f} s")
    if stage.name == "train":
        print(f"MFU {useful_flops(stage.name, workload) / peak:.1%}, ", end="")
    print(f"computed FLOPs over peak {done:.1%}")
    parts = {"matmuls": cost.matmul_s, "memory": cost.memory_s, "exposed network": cost.network_s}
    print(", ".join(f"{kind} {seconds / stage.seconds:.1%}" for kind, seconds in parts.items()), "\n")
    _show_details(cost)


def _show_details(cost: Cost) -> None:
    print("| collective | axes | runs | MB each | seconds in all | from |")
    print("|---" * 6 + "|")
    rows = sorted(cost.collectives.items(), key=lambda item: -item[1][0] * item[1][1])
    for one, (runs, seconds) in rows:
        name = one.op_name.removeprefix("jit(")[-90:]
        line = f"| {one.kind} | {'+'.join(one.axes) or '-'} | {runs:.0f} | {one.bytes / 1e6:.2f} |"
        print(f"{line} {runs * seconds:.3f} | {name} |")
    copies = sorted(cost.copies.items(), key=lambda item: -item[1][0] * item[1][1])
    for scope, (runs, size) in copies:
        if runs * size >= 0.01 * cost.bytes:
            print(f"copy: {runs:.0f} times {size / 1e6:.1f} MB: {scope}")
    for note in cost.notes:
        print(f"note: {note}")
    print(flush=True)


def main() -> None:
    """Plans the cases that are named."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="*", help=f"of {', '.join(CASES)}")
    parser.add_argument("--set", action="append", default=[], help="a setting, such as train.remat=layer")
    parser.add_argument("--rows", type=int, default=ROWS, help="of the dataset; a training is one step")
    arguments = parser.parse_args()
    for name in arguments.cases or CASES:
        if name not in CASES:
            parser.error(f"{name} is none of {', '.join(CASES)}")
        show(name, *planned(name, arguments.set, arguments.rows))


if __name__ == "__main__":
    main()
