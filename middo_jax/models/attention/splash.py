"""Attention on TPUs by JAX's splash kernel (Pallas): no scores in memory, no work on fully masked blocks.

It computes segments; trees are computed by `tpu_trees`, under the same name.

Axes: docs/contributing.md#axes.
"""

from __future__ import annotations

from typing import cast

import jax
import jax.numpy as jnp

from middo_jax.models.attention.arguments import ATTENDED, AttentionSpec
from middo_jax.models.attention.placement import over_mesh
from middo_jax.models.attention.workload import Workload

# Positions per block: the largest size that divides the length. A TPU's lanes require multiples of 128.
BLOCKS = (512, 256, 128)


def refusal(workload: Workload) -> str | None:
    """Why the kernel cannot compute the workload; None if it can."""
    if workload.platform != "tpu":
        return f"a {workload.platform}: it is a TPU kernel"
    return workload.misfit()


def splash_attention(
    q_bthe: jax.Array,
    k_btke: jax.Array,
    v_btke: jax.Array,
    segment_ids_bt: jax.Array,
    spec: AttentionSpec,
    *,
    interpret: bool = False,
) -> jax.Array:
    """`packed_attention` of segments.

    Args:
      q_bthe: queries, RoPE applied.
      k_btke: keys, RoPE applied.
      v_btke: values.
      segment_ids_bt: each position's example, -1 for padding.
      spec: scale, window and soft cap.
      interpret: run the kernel's Python instead of compiling it: on any platform, but slowly.

    Returns:
      [b, t, h, e] in q's dtype.
    """
    # The kernel does not scale. float32: bfloat16 would round the factor, an error common to all scores.
    scaled_bthe = (q_bthe.astype(jnp.float32) * spec.scale).astype(q_bthe.dtype)

    def local(q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array) -> jax.Array:
        return _one_device(q, k, v, segment_ids, spec, interpret)

    return over_mesh(local, scaled_bthe, k_btke, v_btke, segment_ids_bt)


def _one_device(
    q_bthe: jax.Array,
    k_btke: jax.Array,
    v_btke: jax.Array,
    segment_ids_bt: jax.Array,
    spec: AttentionSpec,
    interpret: bool,
) -> jax.Array:
    # Pallas takes half a second to import, and only TPUs need it.
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    length = q_bthe.shape[1]
    missing = -length % min(BLOCKS)  # added behind the rows, which do not see it
    widths = ((0, 0), (0, missing), (0, 0), (0, 0))
    q_bhte, k_bkte, v_bkte = (jnp.pad(x, widths).swapaxes(1, 2) for x in (q_bthe, k_btke, v_btke))
    segment_ids_bt = jnp.pad(segment_ids_bt, widths[:2], constant_values=-1)
    padded = length + missing
    # A segment is contiguous, so distances in positions are distances in the row.
    reach = None if spec.window is None else spec.window - 1
    mask = splash.LocalMask((padded, padded), window_size=(reach, 0), offset=0)
    block = next(block for block in BLOCKS if padded % block == 0)
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([mask] * q_bthe.shape[2]),
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=spec.soft_cap,
        # Named so that a checkpointed layer can save output and log-sum-exp; otherwise the kernel runs again.
        residual_checkpoint_name=ATTENDED,
        block_sizes=splash.BlockSizes(
            block_q=block,
            block_kv=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_q_dq=block,
            block_kv_dq=block,
        ),
        interpret=interpret,
    )
    segment_ids = splash.SegmentIds(q=segment_ids_bt, kv=segment_ids_bt)
    attended_bhte = cast(jax.Array, jax.vmap(kernel)(q_bhte, k_bkte, v_bkte, segment_ids))
    return attended_bhte.swapaxes(1, 2)[:, :length]
