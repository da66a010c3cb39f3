"""Attention on GPUs by this package's own Pallas kernels, compiled by Triton, forward and backward.

The kernels keep no scores in memory and skip keys that a block of queries cannot see. Each block of queries
reads the row's shared prefix and then one range of keys: from the first key that any of its queries sees up
to the block itself. The range is exact for packed segments and windows. Inside a tree it may include a
branch, which is masked. The mask is the tree rule: i sees j if j <= i < until_j. The algorithm is that of
arXiv 2307.08691.

Axes: docs/contributing.md#axes; c block of queries or of keys, in which q and p are counted.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from middo_jax.models.attention.arguments import ATTENDED, AttentionSpec, Packing
from middo_jax.models.attention.placement import over_mesh
from middo_jax.models.attention.triton_kernels import (
    Blocks,
    Constants,
    dkv_kernel,
    dq_kernel,
    forward_kernel,
    pallas,
)
from middo_jax.models.attention.workload import Workload

MIN_HEAD_DIM, MAX_HEAD_DIM = 16, 256


class _MaskInputs(NamedTuple):
    """Per position, int32 [b, t]: its index in its text, and the end (exclusive) of the positions in the row
    that see it."""

    positions: jax.Array
    until: jax.Array


def refusal(workload: Workload) -> str | None:
    """Why the kernel cannot compute the workload; None if it can."""
    if workload.platform != "gpu":
        return f"a {workload.platform}: it is a GPU kernel"
    if workload.dtype not in (jnp.bfloat16, jnp.float32):
        return f"{workload.dtype.name}: it computes in bfloat16 or float32"
    d = workload.head_dim
    if d & (d - 1) or not MIN_HEAD_DIM <= d <= MAX_HEAD_DIM:
        return f"head_dim={d}: it takes powers of two from {MIN_HEAD_DIM} to {MAX_HEAD_DIM}"
    return workload.misfit()


def triton_attention(
    q_bthe: jax.Array,
    k_btke: jax.Array,
    v_btke: jax.Array,
    packing: Packing,
    spec: AttentionSpec,
    *,
    interpret: bool = False,
) -> jax.Array:
    """`packed_attention` on a GPU.

    Args:
      q_bthe: queries, RoPE applied.
      k_btke: keys, RoPE applied.
      v_btke: values.
      packing: how the rows are packed; positions are read only with a window.
      spec: scale, window and soft cap.
      interpret: run the kernel in JAX's interpreter: on any platform, slowly.

    Returns:
      [b, t, h, e] in q's dtype. A position that sees no key gets finite values without meaning.
    """
    constants = Constants(*spec, packing.prefix, packing.until_bt is not None, interpret)
    until_bt = segment_ends(packing.segment_ids_bt) if packing.until_bt is None else packing.until_bt
    local = functools.partial(_one_device, constants)
    return over_mesh(local, q_bthe, k_btke, v_btke, packing.positions_bt, until_bt)


def _one_device(
    constants: Constants,
    q_bthe: jax.Array,
    k_btke: jax.Array,
    v_btke: jax.Array,
    positions_bt: jax.Array,
    until_bt: jax.Array,
) -> jax.Array:
    length = q_bthe.shape[1]
    padded = length + -length % _row_multiple(q_bthe)
    widths = ((0, 0), (0, padded - length), (0, 0), (0, 0))
    q_bthe, k_btke, v_btke = (jnp.pad(x, widths) for x in (q_bthe, k_btke, v_btke))
    # The added positions see no position, and no position sees them.
    mask_inputs = _MaskInputs(jnp.pad(positions_bt, widths[:2]), jnp.pad(until_bt, widths[:2]))
    out_bthe: jax.Array = _attend(constants, q_bthe, k_btke, v_btke, mask_inputs)
    return out_bthe[:, :length]


def blocks_of(head_dim: int, dtype: Any, kernel: str) -> Blocks:
    """Block sizes of a kernel: "forward", "dq" or "dkv". float32 blocks take twice the shared memory."""
    if jnp.dtype(dtype) == jnp.float32:
        return Blocks(32, 32, 4, 1) if head_dim > 64 else Blocks(64, 32, 4, 1)
    return BLOCKS[kernel][max(64, head_dim)]


# Block sizes per head_dim. Those for 64 and 128 are fast both on packed rows and on one text per row, among
# the sizes tried by benchmarks/gpu/attention.py on an H200. Those for 256 are not tuned.
BLOCKS = {
    "forward": {64: Blocks(64, 64, 4, 2), 128: Blocks(64, 64, 4, 3), 256: Blocks(64, 32, 8, 2)},
    "dq": {64: Blocks(64, 64, 4, 2), 128: Blocks(128, 64, 8, 2), 256: Blocks(64, 32, 8, 1)},
    "dkv": {64: Blocks(64, 64, 4, 2), 128: Blocks(64, 64, 4, 2), 256: Blocks(32, 64, 8, 1)},
}


def _row_multiple(q_bthe: jax.Array) -> int:
    sizes = [blocks_of(q_bthe.shape[3], q_bthe.dtype, kernel) for kernel in BLOCKS]
    return math.lcm(*(n for size in sizes for n in (size.queries, size.keys)))


def segment_ends(segment_ids_bt: jax.Array) -> jax.Array:
    """End of each position's segment (exclusive), int32 [b, t]; each padding position is its own segment.

    segment_ids [0 0 0 1 1 -1 -1]  ->  [3 3 3 5 5 6 7]
    """
    length = segment_ids_bt.shape[1]
    behind_t = jnp.arange(1, length + 1, dtype=jnp.int32)
    is_last_bt = jnp.pad(
        segment_ids_bt[:, 1:] != segment_ids_bt[:, :-1], ((0, 0), (0, 1)), constant_values=True
    )
    is_last_bt |= segment_ids_bt < 0
    return jax.lax.cummin(jnp.where(is_last_bt, behind_t, length), axis=1, reverse=True)


def _first_key_bc(constants: Constants, mask_inputs: _MaskInputs, block: int) -> jax.Array:
    """First key after the prefix that each block of `block` queries may see, [b, c]."""
    length = mask_inputs.until.shape[1]
    start_c = jnp.arange(0, length, block, dtype=jnp.int32)
    # This is the first key whose `until` exceeds the block's start. The running maximum of `until` exceeds
    # the start from the same key on, so the number of keys where it does not is that key's index.
    furthest_bt = jax.lax.cummax(mask_inputs.until.at[:, : constants.prefix].set(0), axis=1)
    before_bc = (furthest_bt[:, None] <= start_c[:, None]).sum(axis=2, dtype=jnp.int32)
    first_bc = jnp.minimum(before_bc, start_c)
    if (
        constants.window is not None and not constants.has_trees
    ):  # in a tree, close positions may be far apart
        first_bc = jnp.maximum(first_bc, start_c - constants.window + 1)
    return first_bc


def _end_query_bc(constants: Constants, mask_inputs: _MaskInputs, block: int) -> jax.Array:
    """End of the queries (exclusive) that may see any key of each block of `block` keys, [b, c]."""
    b, length = mask_inputs.until.shape
    end_bc = mask_inputs.until.reshape(b, -1, block).max(axis=2)
    if constants.window is not None and not constants.has_trees:
        last_key_c = jnp.arange(block, length + 1, block, dtype=jnp.int32) - 1
        end_bc = jnp.minimum(end_bc, last_key_c + constants.window)
    return end_bc.astype(jnp.int32)


def _forward(
    constants: Constants, q_bthe: jax.Array, k_btke: jax.Array, v_btke: jax.Array, mask_inputs: _MaskInputs
) -> tuple[jax.Array, jax.Array]:
    """(attention [b, t, h, e], log2 of the sum of the scores' exponentials [b, h, t] float32)."""
    b, t, h, d = q_bthe.shape
    sizes = blocks_of(d, q_bthe.dtype, "forward")
    shapes = (
        jax.ShapeDtypeStruct(q_bthe.shape, q_bthe.dtype),
        jax.ShapeDtypeStruct((b, h, t), jnp.float32),
    )
    specs = _QuerySpecs.of(q_bthe, k_btke, sizes)
    return _call(
        functools.partial(forward_kernel, constants, sizes),
        constants,
        sizes,
        grid=(t // sizes.queries, b, h),
        in_specs=[specs.queries, specs.keys, specs.keys, specs.row, specs.row, specs.first],
        out_specs=(specs.queries, specs.of_query),
        out_shape=shapes,
        name="attention_forward",
    )(
        q_bthe,
        k_btke,
        v_btke,
        mask_inputs.positions,
        mask_inputs.until,
        _first_key_bc(constants, mask_inputs, sizes.queries),
    )


class _QuerySpecs(NamedTuple):
    """The part of each array that a program (block of queries, row, query head) reads or writes."""

    queries: Any
    keys: Any
    row: Any
    first: Any
    of_query: Any

    @classmethod
    def of(cls, q_bthe: jax.Array, k_btke: jax.Array, sizes: Blocks) -> _QuerySpecs:
        pl, _ = pallas()
        _, t, h, d = q_bthe.shape
        group = h // k_btke.shape[2]
        return cls(
            pl.BlockSpec((None, sizes.queries, None, d), lambda c, b, h: (b, c, h, 0)),
            pl.BlockSpec((None, t, None, d), lambda c, b, h: (b, 0, jax.lax.div(h, group), 0)),
            pl.BlockSpec((None, t), lambda c, b, h: (b, 0)),
            pl.BlockSpec((None, t // sizes.queries), lambda c, b, h: (b, 0)),
            pl.BlockSpec((None, None, sizes.queries), lambda c, b, h: (b, h, c)),
        )


def _call(kernel: Any, constants: Constants, sizes: Blocks, **how: Any) -> Any:
    pl, plgpu = pallas()
    return pl.pallas_call(
        kernel,
        interpret=constants.interpret,
        compiler_params=plgpu.CompilerParams(num_warps=sizes.warps, num_stages=sizes.stages),
        **how,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    constants: Constants, q_bthe: jax.Array, k_btke: jax.Array, v_btke: jax.Array, mask_inputs: _MaskInputs
) -> jax.Array:
    return _forward(constants, q_bthe, k_btke, v_btke, mask_inputs)[0]


def _attend_and_residuals(
    constants: Constants, q_bthe: jax.Array, k_btke: jax.Array, v_btke: jax.Array, mask_inputs: _MaskInputs
) -> tuple[jax.Array, tuple[Any, ...]]:
    found = _forward(constants, q_bthe, k_btke, v_btke, mask_inputs)
    # Named so that a checkpointed layer can save them; otherwise the backward pass reruns the kernel.
    out_bthe, log_sum_bht = (checkpoint_name(x, ATTENDED) for x in found)
    return out_bthe, (q_bthe, k_btke, v_btke, mask_inputs, out_bthe, log_sum_bht)


def _gradient(
    constants: Constants, residuals: tuple[Any, ...], grad_out_bthe: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    pl, _ = pallas()
    q_bthe, k_btke, v_btke, mask_inputs, out_bthe, log_sum_bht = residuals
    b, t, h, d = q_bthe.shape
    kv_heads = k_btke.shape[2]
    group = h // kv_heads
    wide = (x.astype(jnp.float32) for x in (out_bthe, grad_out_bthe))
    common_bht = functools.reduce(jnp.multiply, wide).sum(axis=3).swapaxes(1, 2)

    sizes = blocks_of(d, q_bthe.dtype, "dq")
    specs = _QuerySpecs.of(q_bthe, k_btke, sizes)
    dq_bthe = _call(
        functools.partial(dq_kernel, constants, sizes),
        constants,
        sizes,
        grid=(t // sizes.queries, b, h),
        in_specs=[
            *(specs.queries, specs.keys, specs.keys, specs.row, specs.row, specs.first),
            *(specs.queries, specs.of_query, specs.of_query),
        ],
        out_specs=specs.queries,
        out_shape=jax.ShapeDtypeStruct(q_bthe.shape, q_bthe.dtype),
        name="attention_dq",
    )(
        *(q_bthe, k_btke, v_btke, mask_inputs.positions, mask_inputs.until),
        *(_first_key_bc(constants, mask_inputs, sizes.queries), grad_out_bthe, log_sum_bht, common_bht),
    )

    sizes = blocks_of(d, q_bthe.dtype, "dkv")
    heads = pl.BlockSpec((None, t, group, d), lambda c, b, k: (b, 0, k, 0))
    keys = pl.BlockSpec((None, sizes.keys, None, d), lambda c, b, k: (b, c, k, 0))
    row = pl.BlockSpec((None, t), lambda c, b, k: (b, 0))
    ends = pl.BlockSpec((None, t // sizes.keys), lambda c, b, k: (b, 0))
    of_queries = pl.BlockSpec((None, group, t), lambda c, b, k: (b, k, 0))
    dk_btke, dv_btke = _call(
        functools.partial(dkv_kernel, constants, sizes, group),
        constants,
        sizes,
        grid=(t // sizes.keys, b, kv_heads),
        in_specs=[heads, keys, keys, row, row, ends, heads, of_queries, of_queries],
        out_specs=(keys, keys),
        out_shape=tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k_btke, v_btke)),
        name="attention_dkv",
    )(
        *(q_bthe, k_btke, v_btke, mask_inputs.positions, mask_inputs.until),
        *(_end_query_bc(constants, mask_inputs, sizes.keys), grad_out_bthe, log_sum_bht, common_bht),
    )
    return dq_bthe, dk_btke, dv_btke, None


_attend.defvjp(_attend_and_residuals, _gradient)
