"""The real TPU compiler takes the scoring pass of an 8B model, splash included, and it fits the chip."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

# A process of its own: the suite's one is on simulated CPU devices. Prints bytes a chip.
PROGRAM = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh
from middo_jax.models.model import abstract_model
from middo_jax.passes.losses import LossInputs, score_batch
from middo_jax.models.config import DecoderConfig, LayerKind, Llama3Rope
from middo_jax.parallel.mesh import MESH_AXES, named_sharding

name, shape, length = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
devices = topologies.get_topology_desc(platform="tpu", topology_name=name).devices
mesh = Mesh(np.array(devices).reshape(shape), MESH_AXES, axis_types=(AxisType.Auto,) * 3)
layers = LayerKind(rope_theta=500000.0, rope_scaling=Llama3Rope(8.0, 1.0, 4.0, 8192))
llama_8b = DecoderConfig(128256, 4096, 14336, 32, 32, 8, 128, 131072, (layers,), dtype="bfloat16")
model = abstract_model(llama_8b, mesh, "bfloat16")
rows = shape[0] * shape[1]
batch = LossInputs(*(
    jax.ShapeDtypeStruct((rows, length), dtype, sharding=named_sharding(mesh, "batch", "length"))
    for dtype in (jnp.int32, jnp.int32, jnp.int32, jnp.int32, jnp.bool_, jnp.bool_)
))
with jax.set_mesh(mesh):
    lowered = score_batch.lower(model.graphdef, model.params, batch, max_segments=64, chunk=256, longest=512)
compiled = lowered.compile()
memory = compiled.memory_analysis()
sizes = {"arguments": memory.argument_size_in_bytes, "temporaries": memory.temp_size_in_bytes}
print(json.dumps(sizes | {"has_splash": "splash_mha_fwd" in compiled.as_text()}))
"""


@pytest.mark.tpu_compile
@pytest.mark.parametrize(
    ("topology", "shape"),
    [("v5e:4x4", [1, 4, 4]), pytest.param("v5e:4x4", [1, 16, 1], marks=pytest.mark.slow)],
)
def test_scoring_an_8b_model_fits_a_slice(topology: str, shape: list[int]) -> None:
    pytest.importorskip("libtpu")
    # Only a chip is not to be shared; without one, several compilers may run at a time.
    compiler = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    arguments = [topology, json.dumps(shape), "2048"]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments],
        env=os.environ | compiler,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    memory = json.loads(done.stdout.splitlines()[-1])
    assert memory["has_splash"]
    parameters = 2 * 8.03e9 / 16  # bfloat16, split over all chips
    assert memory["arguments"] == pytest.approx(parameters, rel=0.02)
    assert memory["arguments"] + memory["temporaries"] < 14e9  # of the chip's 16 GB
