"""Chooses the attention kernel by platform, shape and options, and calls it.

Axes: docs/contributing.md#axes.
"""

from __future__ import annotations

from typing import Literal

import jax
from jax.ad_checkpoint import checkpoint_name

from middo_jax.models.attention import splash, tiled, tpu_trees, triton
from middo_jax.models.attention.arguments import ATTENDED, AttentionSpec, Packing
from middo_jax.models.attention.placement import Platform, platform
from middo_jax.models.attention.workload import Workload
from middo_jax.models.attention.xla import xla_attention

Kernel = Literal["auto", "xla", "tiled", "splash", "triton"]

_REFUSALS = {
    "splash": splash.refusal,
    "triton": triton.refusal,
    "tiled": tiled.refusal,
}

_FASTEST: dict[Platform, Literal["tiled", "splash", "triton"]] = {
    "cpu": "tiled",
    "gpu": "triton",
    "tpu": "splash",
}


class AttentionError(ValueError):
    """The kernel that the caller named cannot compute the workload."""


def choose(workload: Workload, kernel: Kernel = "auto") -> Literal["xla", "tiled", "splash", "triton"]:
    """Returns the kernel to use: the named one, or for "auto" the fastest one that supports the workload.

    "auto" is splash on a TPU, Triton on a GPU, and on a CPU the tiled kernel for rows of several tiles. It is
    XLA where that kernel refuses the workload.

    Raises:
      AttentionError: the named kernel cannot compute the workload.
    """
    if kernel == "auto":
        if workload.platform == "cpu" and workload.length <= tiled.GROUP * tiled.TILE:
            return "xla"
        fastest: Literal["tiled", "splash", "triton"] = _FASTEST[workload.platform]
        return "xla" if _REFUSALS[fastest](workload) else fastest
    if kernel != "xla" and (reason := _REFUSALS[kernel](workload)):
        raise AttentionError(
            f"model.attention={kernel} cannot be used for {reason}. "
            "Use auto, which chooses a kernel that can, or xla, which always can"
        )
    return kernel


def shares_prefixes(kernel: Kernel) -> bool:
    """Whether the kernel for segments on the mesh in use is also that for trees; a TPU has one for each."""
    return kernel not in ("auto", "splash") or (kernel == "auto" and platform() != "tpu")


@jax.named_scope("attention")
def packed_attention(
    q_bthe: jax.Array,
    k_bpke: jax.Array,
    v_bpke: jax.Array,
    packing: Packing,
    spec: AttentionSpec,
    kernel: Kernel = "auto",
) -> jax.Array:
    """Causal attention within segments, or along the branches of trees.

    Position i sees position j <= i of its own segment. With `packing.until_bt` a row contains trees instead,
    in depth-first order: the descendants of j directly follow it, up to until_j (exclusive), and i sees j if
    j <= i < until_j. So texts with a common beginning share its keys and values, at any depth:

      tokens   [S S A A a a b B]      S A a, S A b and S B
      until    [8 8 7 7 6 6 7 8]      b sees S, A and itself, never a.

    Args:
      q_bthe: queries, RoPE applied.
      k_bpke: keys, RoPE applied; h is a multiple of k.
      v_bpke: values.
      packing: segments or trees; see `Packing`.
      spec: scale, window and soft cap; see `AttentionSpec`.
      kernel: name of the kernel, or "auto"; see `choose`.

    Returns:
      [b, t, h, e] in q's dtype; softmax in float32.

    Raises:
      AttentionError: the named kernel cannot compute the workload.
    """
    has_trees = packing.until_bt is not None
    workload = Workload.of(q_bthe, k_bpke, has_trees=has_trees, soft_cap=spec.soft_cap)
    qkv = q_bthe, k_bpke, v_bpke
    match choose(workload, kernel):
        case "triton":  # calls checkpoint_name itself, on its log-sum-exp too; so does splash
            return triton.triton_attention(*qkv, packing, spec)
        case "splash" if has_trees:
            out_bthe = tpu_trees.tree_attention(*qkv, packing, spec)
        case "splash":
            # A window of the longest segment's length masks nothing, but lets the kernel skip whole blocks.
            near = min((n for n in (spec.window, packing.longest) if n is not None), default=None)
            near_spec = spec._replace(window=near)
            return splash.splash_attention(*qkv, packing.segment_ids_bt, near_spec)
        case "tiled":
            out_bthe = tiled.tiled_attention(*qkv, packing, spec)
        case "xla":
            out_bthe = xla_attention(*qkv, packing, spec)
    return checkpoint_name(out_bthe, ATTENDED)
