"""One call, several kernels: which of them attends is a matter of platform, shape and need."""

from __future__ import annotations

from typing import Literal

import jax

from middo_jax.models.attention import cudnn, splash
from middo_jax.models.attention.workload import Workload
from middo_jax.models.attention.xla import xla_attention

Kernel = Literal["auto", "xla", "splash", "cudnn"]

_REFUSALS = {"splash": splash.refusal, "cudnn": cudnn.refusal}


class AttentionError(ValueError):
    """A kernel was asked for by name that cannot honour what is asked of it."""


def choose(workload: Workload, kernel: Kernel = "auto") -> Literal["xla", "splash", "cudnn"]:
    """The kernel that attends: the one that is asked for, or with "auto" splash where it can, else XLA.

    cuDNN is taken only by name: with a mask it does the work of every block, seen or not, and no figure of
    ours says that this is faster than XLA, which skips what lies behind a block or before its window.

    Raises:
      AttentionError: the kernel that is asked for cannot honour the workload.
    """
    if kernel == "auto":
        return "xla" if splash.refusal(workload) else "splash"
    if kernel != "xla" and (reason := _REFUSALS[kernel](workload)):
        raise AttentionError(
            f"attention: kernel {kernel!r} cannot honour {reason}. "
            "Ask for 'auto' to take one that can, or for 'xla', which always can"
        )
    return kernel


def packed_attention(
    q_bthd: jax.Array,
    k_bskd: jax.Array,
    v_bskd: jax.Array,
    segment_ids_bt: jax.Array,
    positions_bt: jax.Array,
    branch_ids_bt: jax.Array | None = None,
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    kernel: Kernel = "auto",
) -> jax.Array:
    """Causal attention inside segments; with branches, a segment is a tree.

    Position i sees position j <= i if both are of one segment, and j is of the stem (branch 0) or of i's own
    branch. So several continuations of one text can share its keys and values:

      tokens       [S S S A A B B]      segment_ids  [0 0 0 0 0 0 0]
      branch_ids   [0 0 0 1 1 2 2]      B sees S and B, never A.

    Args:
      q_bthd: queries, RoPE applied.
      k_bskd: keys, RoPE applied; heads a multiple of k.
      v_bskd: values.
      segment_ids_bt: which example a position belongs to; padding is -1 and sees only padding.
      positions_bt: position within the example; a segment without branches counts up from 0, row by row.
      branch_ids_bt: branch within the segment, None if all is stem.
      scale: factor of the scores, usually 1 / sqrt(d).
      window: i sees j only if positions_i - positions_j < window; None is no limit.
      soft_cap: c of c tanh(score / c), after scaling and before masking; None is off.
      kernel: "auto" is splash on a TPU where that honours all of this, XLA elsewhere; see `choose`.

    Returns:
      [b, t, h, d] in q's dtype; softmax in float32.

    Raises:
      AttentionError: the kernel that was asked for cannot honour this.
    """
    workload = Workload.of(q_bthd, k_bskd, has_branches=branch_ids_bt is not None, soft_cap=soft_cap)
    match choose(workload, kernel):
        case "splash":
            return splash.splash_attention(
                q_bthd, k_bskd, v_bskd, segment_ids_bt, scale=scale, window=window, soft_cap=soft_cap
            )
        case "cudnn":
            arrays = q_bthd, k_bskd, v_bskd, segment_ids_bt, positions_bt, branch_ids_bt
            return cudnn.cudnn_attention(*arrays, scale=scale, window=window)
        case "xla":
            arrays = q_bthd, k_bskd, v_bskd, segment_ids_bt, positions_bt, branch_ids_bt
            return xla_attention(*arrays, scale=scale, window=window, soft_cap=soft_cap)
