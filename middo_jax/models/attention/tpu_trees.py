"""Attention over trees on TPUs by this package's own Pallas kernel: splash supports segments only.

As in `triton`, a block of queries reads the row's shared prefix and then the keys from the first one that
any of its queries sees. Which blocks these are is in scalar memory before the kernel starts.
Only the forward pass is a kernel, since no training reads trees; the gradient is that of XLA's attention.

Axes: docs/contributing.md#axes; c block of queries.
"""

from __future__ import annotations

import functools
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from middo_jax.models.attention.arguments import AttentionSpec, Packing
from middo_jax.models.attention.placement import over_mesh
from middo_jax.models.attention.xla import xla_attention

BLOCK = 512  # keys per block, and queries per block of all heads that share a key head
LANES = 128  # of a vector register
UNSEEN = -1e30  # finite: the difference of two such scores is 0 and not NaN
_NAME = re.compile(r"tree_attention_p(\d+)_r(\d+)_b(\d+)")


class _Constants(NamedTuple):
    """Compile-time constants: of `packed_attention`, and sizes in blocks.

    Attributes:
      spec: scale, window and soft cap.
      prefix: positions of the prefix.
      longest: upper bound of the length of a tree without the prefix.
      block: positions per block.
      interpret: whether the kernel runs in JAX's interpreter.
    """

    spec: AttentionSpec
    prefix: int
    longest: int
    block: int
    interpret: bool

    @property
    def shared(self) -> int:
        """Blocks that contain the prefix."""
        return -(-self.prefix // self.block)

    def steps(self, blocks: int) -> int:
        """Most blocks of keys that a block of queries reads, of a row of so many blocks."""
        return min(blocks, self.shared + -(-(self.longest - 1) // self.block) + 1)

    def name(self, blocks: int) -> str:
        """The kernel's name; `flops` reads the sizes from it, which a compiled program does not have."""
        return f"tree_attention_p{self.shared}_r{self.steps(blocks)}_b{self.block}"


def blocks_of_kernel(name: str, length: int) -> tuple[int, int] | None:
    """What a kernel of this name computes of a row: (pairs of blocks, at most; positions per block).

    None if it is another kernel.
    """
    found = _NAME.search(name)
    if found is None:
        return None
    _, most, block = map(int, found.groups())
    return sum(min(c + 1, most) for c in range(length // block)), block


def tree_attention(
    q_bthe: jax.Array,
    k_btke: jax.Array,
    v_btke: jax.Array,
    packing: Packing,
    spec: AttentionSpec,
    *,
    interpret: bool = False,
) -> jax.Array:
    """`packed_attention` of trees on a TPU.

    Args:
      q_bthe: queries, RoPE applied.
      k_btke: keys, RoPE applied.
      v_btke: values.
      packing: the trees.
      spec: scale, window and soft cap.
      interpret: run the kernel in JAX's interpreter: on any platform, slowly.

    Returns:
      [b, t, h, e] in q's dtype. A position that sees no key gets finite values without meaning.
    """
    assert packing.until_bt is not None
    length = q_bthe.shape[1]
    block = min(BLOCK, length + -length % LANES)
    longest = length if packing.longest is None else min(packing.longest, length)
    constants = _Constants(spec, packing.prefix, longest, block, interpret)

    def local(q: jax.Array, k: jax.Array, v: jax.Array, *ids: jax.Array) -> jax.Array:
        return _attend(constants, q, k, v, *ids)

    ids = packing.segment_ids_bt, packing.positions_bt, packing.until_bt
    return over_mesh(local, q_bthe, k_btke, v_btke, *ids)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(constants: _Constants, *arrays: jax.Array) -> jax.Array:
    """The kernel; `arrays` is (q_bthe, k_btke, v_btke, segment_ids_bt, positions_bt, until_bt)."""
    q_bthe, k_btke, v_btke, _, positions_bt, until_bt = arrays
    b, length, h, d = q_bthe.shape
    kv_heads = k_btke.shape[2]
    missing = -length % constants.block
    # The added positions see no position, and no position sees them.
    q_bthe, k_btke, v_btke = (
        jnp.pad(x, ((0, 0), (0, missing), (0, 0), (0, 0))) for x in (q_bthe, k_btke, v_btke)
    )
    positions_bt, until_bt = (jnp.pad(x, ((0, 0), (0, missing))) for x in (positions_bt, until_bt))
    padded = length + missing
    q_bkgte = q_bthe.reshape(b, padded, kv_heads, h // kv_heads, d).transpose(0, 2, 3, 1, 4)
    k_bkte, v_bkte = k_btke.swapaxes(1, 2), v_btke.swapaxes(1, 2)
    out_bkgte = _call(constants, q_bkgte, k_bkte, v_bkte, positions_bt, until_bt)
    return out_bkgte.transpose(0, 3, 1, 2, 4).reshape(b, padded, h, d)[:, :length]


def _forward(constants: _Constants, *arrays: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return _attend(constants, *arrays), arrays


def _gradient(constants: _Constants, arrays: tuple[jax.Array, ...], grad_out_bthe: jax.Array) -> tuple:
    q_bthe, k_btke, v_btke, segment_ids_bt, positions_bt, until_bt = arrays
    packing = Packing(segment_ids_bt, positions_bt, until_bt, constants.prefix, constants.longest)

    def attended(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return xla_attention(q, k, v, packing, constants.spec)

    _, pull = jax.vjp(attended, q_bthe, k_btke, v_btke)
    return *pull(grad_out_bthe), *(np.zeros(x.shape, jax.dtypes.float0) for x in arrays[3:])


_attend.defvjp(_forward, _gradient)


def _first_block_bc(constants: _Constants, until_bt: jax.Array) -> jax.Array:
    """First block of keys behind the prefix that each block of queries sees, int32 [b, c]."""
    length, block = until_bt.shape[1], constants.block
    start_c = jnp.arange(0, length, block, dtype=jnp.int32)
    # The first key whose `until` exceeds the block's start; the running maximum exceeds it from there on.
    furthest_bt = jax.lax.cummax(until_bt.at[:, : constants.prefix].set(0), axis=1)
    before_bc = (furthest_bt[:, None] <= start_c[:, None]).sum(axis=2, dtype=jnp.int32)
    return jnp.maximum(jnp.minimum(before_bc, start_c) // block, constants.shared)


def _call(
    constants: _Constants,
    q_bkgte: jax.Array,
    k_bkte: jax.Array,
    v_bkte: jax.Array,
    positions_bt: jax.Array,
    until_bt: jax.Array,
) -> jax.Array:
    # Pallas takes half a second to import, and only TPUs need it.
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    b, kv_heads, group, length, d = q_bkgte.shape
    block, blocks = constants.block, length // constants.block
    queries = max(LANES, block // group // LANES * LANES)
    per_block, steps = block // queries, constants.steps(blocks)

    def key_block(b: Any, c: Any, step: Any, first_bc: Any) -> Any:
        near = first_bc[b, c // per_block] + step - constants.shared
        # Behind the diagonal the same block is named again, so that nothing is read for it.
        return jnp.minimum(jnp.where(step < constants.shared, step, near), c // per_block)

    of_queries = pl.BlockSpec((None, None, group, queries, d), lambda b, k, c, s, first: (b, k, 0, c, 0))
    of_keys = pl.BlockSpec(
        (None, None, block, d), lambda b, k, c, s, first: (b, k, key_block(b, c, s, first), 0)
    )
    row = pl.BlockSpec((None, 1, block), lambda b, k, c, s, first: (b, 0, key_block(b, c, s, first)))
    column = pl.BlockSpec((None, queries, LANES), lambda b, k, c, s, first: (b, c, 0))
    wide_bt1 = jnp.broadcast_to(positions_bt[..., None], (*positions_bt.shape, LANES))
    return pl.pallas_call(
        functools.partial(_kernel, constants, queries),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(b, kv_heads, length // queries, steps),
            in_specs=[of_queries, of_keys, of_keys, column, row, row],
            out_specs=of_queries,
            scratch_shapes=[
                pltpu.VMEM((group * queries, d), jnp.float32),
                pltpu.VMEM((group * queries, LANES), jnp.float32),
                pltpu.VMEM((group * queries, LANES), jnp.float32),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(q_bkgte.shape, q_bkgte.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary")
        ),
        interpret=constants.interpret,
        name=constants.name(blocks),
    )(
        _first_block_bc(constants, until_bt),
        q_bkgte,
        k_bkte,
        v_bkte,
        wide_bt1,
        positions_bt[:, None],
        until_bt[:, None],
    )


def _kernel(constants: _Constants, queries: int, first_ref: Any, *refs: Any) -> None:
    """Adds one block of keys to the attention of one block of queries; `refs` is those of `_call`."""
    from jax.experimental import pallas as pl

    q_ref, k_ref, v_ref, position_q_ref, position_p_ref, until_ref, out_ref, *sums = refs
    sum_ref, highest_ref, total_ref = sums
    b, c, step = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    block = constants.block
    own = c * queries // block
    near = first_ref[b, own] + step - constants.shared
    j_block = jnp.where(step < constants.shared, step, near)

    @pl.when(step == 0)
    def _() -> None:
        sum_ref[...] = jnp.zeros_like(sum_ref)
        highest_ref[...] = jnp.full_like(highest_ref, UNSEEN)
        total_ref[...] = jnp.zeros_like(total_ref)

    @pl.when(j_block <= own)
    def _() -> None:
        group, d = q_ref.shape[0], q_ref.shape[2]
        scores_qp = _dot(q_ref[...].reshape(group * queries, d), k_ref[...], transposed=True)
        scores_qp = scores_qp * constants.spec.scale
        if (cap := constants.spec.soft_cap) is not None:
            scores_qp = cap * jnp.tanh(scores_qp / cap)
        i_qp = c * queries + jax.lax.broadcasted_iota(jnp.int32, (queries, block), 0)
        j_qp = j_block * block + jax.lax.broadcasted_iota(jnp.int32, (queries, block), 1)
        visible_qp = (j_qp <= i_qp) & (i_qp < until_ref[...])
        if constants.spec.window is not None:
            distance_qp = position_q_ref[:, :1] - position_p_ref[...]
            visible_qp &= distance_qp < constants.spec.window
        scores_gqp = scores_qp.reshape(group, queries, block)
        scores_qp = jnp.where(visible_qp[None], scores_gqp, UNSEEN).reshape(group * queries, block)
        highest_q1 = highest_ref[:, :1]
        new_highest_q1 = jnp.maximum(highest_q1, scores_qp.max(axis=1, keepdims=True))
        # 0 at a query's first visible key: this discards what masked blocks have accumulated.
        rescale_q1 = jnp.exp(highest_q1 - new_highest_q1)
        weights_qp = jnp.exp(scores_qp - new_highest_q1)
        added_qe = _dot(weights_qp.astype(v_ref.dtype), v_ref[...])
        sum_ref[...] = sum_ref[...] * rescale_q1 + added_qe
        total_q1 = total_ref[:, :1] * rescale_q1 + weights_qp.sum(axis=1, keepdims=True)
        total_ref[...] = jnp.broadcast_to(total_q1, total_ref.shape)
        highest_ref[...] = jnp.broadcast_to(new_highest_q1, highest_ref.shape)

    @pl.when(step == pl.num_programs(3) - 1)
    def _() -> None:
        total_q1 = jnp.maximum(total_ref[:, :1], 1e-30)  # not 0 for a query without keys
        out_ref[...] = (sum_ref[...] / total_q1).reshape(out_ref.shape).astype(out_ref.dtype)


def _dot(x: jax.Array, y: jax.Array, transposed: bool = False) -> jax.Array:
    """x y, or x y^T, in float32. HIGHEST: float32 operands would otherwise be rounded to bfloat16."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    dimensions = (((1,), (1 if transposed else 0,)), ((), ()))
    return jax.lax.dot_general(x, y, dimensions, precision=precision, preferred_element_type=jnp.float32)
