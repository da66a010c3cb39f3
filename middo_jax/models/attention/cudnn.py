"""Attention on NVIDIA GPUs by cuDNN's fused kernel.

The kernel takes no segment ids. Its packed layout (sequence lengths and offsets) is private to JAX, read
wrong keys of grouped heads before jax 0.11.2 (jax-ml/jax#39521) and must know the number of segments in
advance. So segments, trees and windows reach it as a mask: exact, of b t^2 numbers for all heads together.

Axes: b batch, t query position, s key position, h query heads, k key/value heads, d head dimension.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from middo_jax.models.attention.placement import over_mesh
from middo_jax.models.attention.workload import Workload
from middo_jax.models.attention.xla import Places, visible

MAX_HEAD_DIM = 128  # with gradients, on every GPU from Ampere on


def refusal(workload: Workload) -> str | None:
    """What of it the kernel cannot honour; None if it can all of it."""
    if workload.platform != "gpu":
        return f"a {workload.platform}: it is a GPU kernel"
    if workload.soft_cap is not None:
        return f"soft_cap={workload.soft_cap:g}"
    if workload.dtype not in (jnp.bfloat16, jnp.float16):
        return f"{workload.dtype.name}: it computes in bfloat16 or float16"
    if workload.head_dim % 8 or workload.head_dim > MAX_HEAD_DIM:
        return f"head_dim={workload.head_dim}: it takes multiples of 8 up to {MAX_HEAD_DIM}"
    if workload.length % 2:
        return f"an odd length ({workload.length}) together with a mask"
    # Older versions ask cuDNN for the gradient of any mask, of one row cuDNN has none (jax-ml/jax#39512).
    if workload.batch == workload.batch_shards and jax.__version_info__ < (0, 11, 2):
        return f"one row a device with jax {jax.__version__}; 0.11.2 can"
    return workload.misfit()


def cudnn_attention(
    q_bthd: jax.Array,
    k_bskd: jax.Array,
    v_bskd: jax.Array,
    segment_ids_bt: jax.Array,
    positions_bt: jax.Array,
    until_bt: jax.Array | None,
    *,
    scale: float,
    window: int | None,
) -> jax.Array:
    """`packed_attention` without soft cap, in bfloat16 or float16."""

    def local(q: jax.Array, k: jax.Array, v: jax.Array, *ids_bt: jax.Array) -> jax.Array:
        segment_ids_bt, positions_bt, *until_bt = ids_bt
        places = Places.of(segment_ids_bt, positions_bt, *(until_bt or [None]))
        visible_bts = visible(places, places, window)
        return jax.nn.dot_product_attention(
            q, k, v, mask=visible_bts[:, None], scale=scale, is_causal=True, implementation="cudnn"
        )

    trees = () if until_bt is None else (until_bt,)
    return over_mesh(local, q_bthd, k_bskd, v_bskd, segment_ids_bt, positions_bt, *trees)
