"""Does a published training fit the hardware that its config is for? Compiles its step and prints bytes.

    python -m benchmarks paper_memory                                  # both models, every TPU slice
    python -m benchmarks paper_memory llama-3.1-8b alpaca v5e-64       # one of them

Nothing is allocated and no chip is needed: shapes with shardings go through the real TPU compiler (the `tpu`
extra), and what it says of the program is printed. A step's memory does not depend on the dataset but for the
number of its micro-batches, so that one dataset is enough. Arguments are what a chip holds between steps:
parameters, the optimizer's moments, the batch; temporaries are what a step needs besides. Says 1 if one does
not fit.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

# Before jax is imported. Only a chip is not to be shared; without one, several compilers may run at a time.
os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from middo_jax.config import Config, load
from middo_jax.models.config import DecoderConfig, LayerKind, Llama3Rope
from middo_jax.models.model import Params, abstract_model
from middo_jax.parallel.mesh import MESH_AXES
from middo_jax.training.optimizer import abstract_opt_state, make_optimizer
from middo_jax.training.step import abstract_batch, make_train_step

PAPER = Path(__file__).parent.parent / "configs" / "paper"
# As their config.json, which is not at hand where this runs.
SHAPES = {
    "llama-3.1-8b": DecoderConfig(
        128256,
        4096,
        14336,
        32,
        32,
        8,
        128,
        131072,
        (LayerKind(rope_theta=500000.0, rope_scaling=Llama3Rope(8.0, 1.0, 4.0, 8192)),),
        dtype="bfloat16",
    ),
    "mistral-7b-v0.3": DecoderConfig(
        32768, 4096, 14336, 32, 32, 8, 128, 32768, (LayerKind(rope_theta=1e6),), dtype="bfloat16"
    ),
}
# Topology and bytes of a chip.
SLICES = {"v5e-64": ("v5e:8x8", 16e9), "v5p-32": ("v5p:2x2x4", 95e9), "v6e-32": ("v6e:4x8", 32e9)}
STEPS = 200  # of the training; enters the schedule only


def paper_config(model: str, dataset: str, hardware: str) -> Config:
    """What `middo run published.yaml models/... data/... hardware/...` reads."""
    parts = [PAPER / "models" / model, PAPER / "data" / dataset, PAPER / "hardware" / hardware]
    return load(PAPER / "published.yaml", [f"{part}.yaml" for part in parts])


def compile_step(shape: DecoderConfig, config: Config, topology: str) -> jax.stages.Compiled:
    """The training step of a config, compiled for a slice that is not there."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    sizes = [getattr(config.mesh, axis) for axis in MESH_AXES]
    mesh = Mesh(np.array(devices).reshape(sizes), MESH_AXES, axis_types=(AxisType.Auto,) * 3)
    settings, length = config.train, config.model.max_length
    model = abstract_model(shape, mesh, settings.param_dtype)
    optimizer = make_optimizer(settings, STEPS)
    state = model.params, abstract_opt_state(optimizer, model.params, mesh)
    chunk = config.scoring.unembed_chunk
    step = make_train_step(model.graphdef, settings, STEPS, chunk=chunk, state=state)
    with jax.set_mesh(mesh):
        return step.lower(*state, Params({}), abstract_batch(settings, length, mesh)).compile()


def main() -> int:
    """Compiles and prints; the exit status."""
    asked = [tuple(sys.argv[1:4])]
    if len(sys.argv) == 1:
        asked = [(model, "alpaca", hardware) for model in SHAPES for hardware in SLICES]
    print("| training | slice | mesh | arguments | temporaries | of a chip | compiled in |")
    print("|---" * 7 + "|")
    fits = True
    for model, dataset, hardware in asked:
        config, (topology, chip) = paper_config(model, dataset, hardware), SLICES[hardware]
        began = time.perf_counter()
        memory = compile_step(SHAPES[model], config, topology).memory_analysis()
        assert memory is not None  # a TPU's compiler tells
        # Donated arguments come out again in the same place.
        used = memory.argument_size_in_bytes + memory.temp_size_in_bytes
        fits &= used < chip
        mesh = ", ".join(str(getattr(config.mesh, axis)) for axis in MESH_AXES)
        print(
            f"| {model}, {dataset} | {topology} | {mesh} | {memory.argument_size_in_bytes / 1e9:.2f} GB | "
            f"{memory.temp_size_in_bytes / 1e9:.2f} GB | {used / chip:.0%} | "
            f"{time.perf_counter() - began:.0f} s |",
            flush=True,
        )
    return 0 if fits else 1


if __name__ == "__main__":
    sys.exit(main())
