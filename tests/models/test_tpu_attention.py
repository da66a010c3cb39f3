"""The real TPU compiler takes the splash kernel, forward and backward, and "auto" picks it without a TPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

# A process of its own: the suite's one is on simulated CPU devices. Prints the kernels of the program.
PROGRAM = """
import functools, json, re, sys
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh
from middo_jax.models.attention import ATTENDED, AttentionSpec, Packing, packed_attention
from middo_jax.parallel.mesh import MESH_AXES, named_sharding

case = json.loads(sys.argv[1])
devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:4x4").devices
mesh = Mesh(np.array(devices).reshape(2, 2, 4), MESH_AXES, axis_types=(AxisType.Auto,) * 3)
b, t, d = 4, case["length"], case["head_dim"]

def array(dtype, *shape):
    axes = ("batch", "length") if len(shape) == 2 else ("batch", "length", None, None)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=named_sharding(mesh, *axes))

# As in a layer that saves attention's results and recomputes the rest.
@functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names(ATTENDED))
def loss(q, k, v, *ids):
    spec = AttentionSpec(d**-0.5, case["window"], case["soft_cap"])
    return packed_attention(q, k, v, Packing(*ids), spec).astype(jnp.float32).sum()

q, kv = (array(jnp.bfloat16, b, t, case[heads], d) for heads in ("heads", "kv_heads"))
ids = [array(jnp.int32, b, t) for _ in range(3 if case["trees"] else 2)]
with jax.set_mesh(mesh):
    text = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2))).lower(q, kv, kv, *ids).compile().as_text()
calls = [line for line in text.splitlines() if "tpu_custom_call" in line]
phases = "splash_mha_(fwd|dq|dkv)|(tree)_attention"
print(json.dumps(sorted("".join(re.search(phases, call).groups("")) for call in calls)))
"""


def model(heads: int, kv_heads: int, head_dim: int, **asked: float) -> dict[str, float | None]:
    return {
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "window": None,
        "soft_cap": None,
    } | asked


# On four devices along the heads: two key heads each, one each, one for two devices, one for all.
LLAMA_1B = model(32, 8, 64)
GEMMA2_2B = model(8, 4, 256, window=4096, soft_cap=50.0)
QWEN2_1B = model(12, 2, 128)
GEMMA3_1B = model(4, 1, 256, window=512)


@pytest.mark.tpu_compile
@pytest.mark.parametrize(
    ("shape", "length", "trees", "kernels"),
    [
        (LLAMA_1B, 2048, False, ["dkv", "dq", "fwd"]),
        (GEMMA2_2B, 8192, False, ["dkv", "dq", "fwd"]),
        (QWEN2_1B, 1024, False, ["dkv", "dq", "fwd"]),
        (GEMMA3_1B, 1000, False, ["dkv", "dq", "fwd"]),
        (LLAMA_1B, 256, True, ["tree"]),
    ],
)
def test_auto_compiles_to_splash(
    shape: dict[str, float | None], length: int, trees: bool, kernels: list[str]
) -> None:
    pytest.importorskip("libtpu")
    # Only a chip is not to be shared; without one, several compilers may run at a time.
    environment = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(shape | {"length": length, "trees": trees})],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == kernels
