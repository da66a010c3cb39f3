"""Compiles the real programs for GPUs that are not there, and prints the memory that each needs per GPU.

    pip install "jax[cuda13]"
    JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1 python -m benchmarks.gpu.compile --gpus 8 --program full --model 8b

XLA's GPU compiler runs without a device and compiles the kernels of attention too. It only leaves out the
choice between products, which needs timing. Memory is that of one program: what else a process holds comes on
top. Rows have 4,096 tokens.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental import topologies
from jax.sharding import Mesh

from benchmarks.gpu import shapes
from middo_jax.config import MeshSettings, TrainSettings
from middo_jax.models.config import DecoderConfig, Lora
from middo_jax.models.decoder import abstract
from middo_jax.models.lora import partition
from middo_jax.models.parameters import LORA_TARGETS, adapters, parameters
from middo_jax.parallel.mesh import make_mesh, named_sharding
from middo_jax.passes.loss_plan import MIN_LENGTH
from middo_jax.passes.losses import LossInputs, score_batch
from middo_jax.training.optimizer import abstract_opt_state, make_optimizer
from middo_jax.training.step import abstract_batch, make_train_step

LENGTH = 4096
# An H100 SXM as XLA describes it.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84929347584 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 } registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 12 }
runtime_version { major: 13 minor: 0 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def mesh_of(gpus: int) -> Mesh:
    """A host of so many GPUs that is not there, parameters split over all."""
    described = topologies.get_topology_desc("", "cuda", target_config=H100, topology=f"1x1x{gpus}")
    return make_mesh(MeshSettings(data=1, fsdp=gpus, tensor=1), described.devices)


def abstract_params(config: DecoderConfig, dtype: Any, mesh: Mesh) -> nnx.State:
    """Shapes, dtypes and places of the parameters; adapters are float32."""
    specs = {spec.path: spec for spec in (*parameters(config), *adapters(config))}

    def of(path: tuple[Any, ...], param: Any) -> Any:
        spec = specs[path]
        kept = jnp.float32 if "_lora_" in path[-1] else dtype
        return param.replace(jax.ShapeDtypeStruct(spec.shape(config), kept, sharding=spec.sharding(mesh)))

    return nnx.map_state(of, abstract(config)[1])


def scoring_program(config: DecoderConfig, rows: int, mesh: Mesh) -> jax.stages.Lowered:
    """The scoring pass of packed rows."""

    def of(dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows, LENGTH), dtype, sharding=named_sharding(mesh, "batch", None))

    batch = LossInputs(
        *(of(jnp.int32) for _ in range(4)), is_target_bt=of(jnp.bool_), in_prompt_bt=of(jnp.bool_)
    )
    params = abstract_params(config, jnp.bfloat16, mesh)
    static: dict[str, Any] = {"max_segments": LENGTH // MIN_LENGTH, "chunk": 4096, "longest": LENGTH}
    return score_batch.trace(abstract(config)[0], params, batch, **static).lower(lowering_platforms=("cuda",))


def training_program(config: DecoderConfig, rows: int, remat: Any, mesh: Mesh) -> jax.stages.Lowered:
    """A training step: of the adapters if there are any, else of all weights in float32."""
    settings = TrainSettings(batch_size=rows, remat=remat)
    params = abstract_params(config, jnp.bfloat16 if config.lora else jnp.float32, mesh)
    trained, frozen = partition(params, config)
    optimizer = make_optimizer(settings, 100)
    state = trained, abstract_opt_state(optimizer, trained, mesh)
    step = make_train_step(abstract(config)[0], settings, 100, chunk=2048, state=state, longest=LENGTH)
    batch = abstract_batch(settings, LENGTH, mesh)
    return step.trace(*state, frozen, batch).lower(lowering_platforms=("cuda",))


def main() -> None:
    """Prints a line of the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--program", choices=("scoring", "lora", "full"), default="scoring")
    parser.add_argument("--model", choices=sorted(shapes.MODELS), default="8b")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--rows", type=int, default=8, help="of all GPUs together")
    parser.add_argument("--remat", choices=("none", "dots", "layer"), default="dots")
    arguments = parser.parse_args()
    config, mesh = shapes.MODELS[arguments.model], mesh_of(arguments.gpus)
    if arguments.program == "lora":
        config = dataclasses.replace(config, lora=Lora(16, 32.0, tuple(LORA_TARGETS)))
    began = time.monotonic()
    with jax.set_mesh(mesh):
        if arguments.program == "scoring":
            lowered = scoring_program(config, arguments.rows, mesh)
        else:
            lowered = training_program(config, arguments.rows, arguments.remat, mesh)
        memory = lowered.compile().memory_analysis()
    assert memory is not None
    what = f"{arguments.program} {arguments.model}, {arguments.gpus} GPUs, {arguments.rows} rows of {LENGTH}"
    kept = "" if arguments.program == "scoring" else f", remat {arguments.remat}"
    print(
        f"{what}{kept}: arguments {memory.argument_size_in_bytes / 1e9:.1f} GB, "
        f"temporaries {memory.temp_size_in_bytes / 1e9:.1f} GB per GPU; "
        f"compiled in {time.monotonic() - began:.0f} s"
    )


if __name__ == "__main__":
    main()
