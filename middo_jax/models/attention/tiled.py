"""Attention on CPUs in tiles of queries. Each tile reads only the keys that its queries attend to.

How far back a tile sees (its reach) is known at run time, not at compile time. So tiles are sorted by reach,
and for each of a few key counts one loop runs over the tiles that need no more keys. An accelerator would
wait for its host at every iteration of such a loop.

Axes: docs/contributing.md#axes; z positions of all rows, concatenated, c tiles of queries, u positions of
a tile, x tiles of a group.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from middo_jax.models.attention.arguments import AttentionSpec, Packing
from middo_jax.models.attention.placement import over_mesh
from middo_jax.models.attention.workload import Workload
from middo_jax.models.attention.xla import attend

# Query positions per tile. Smaller tiles read fewer masked keys; larger tiles multiply more efficiently.
TILE = 64
# Tiles per group, if it divides their number. Each gets as many keys as the one that needs the most.
GROUP = 2

Carry = TypeVar("Carry")


class _Constants(NamedTuple):
    """Compile-time constants: positions per padded row, whether rows contain trees, the key counts that a
    tile may get, positions of the prefix, and the layer's constants."""

    length: int
    has_trees: bool
    reaches: tuple[int, ...]
    prefix: int
    spec: AttentionSpec


class _MaskInputs(NamedTuple):
    """Values per position, each [z]; a segment is a tree without branches."""

    positions: jax.Array
    until: jax.Array


class _Schedule(NamedTuple):
    """Groups of tiles [groups, x], the furthest reach first; per key count, its first group and the end
    (exclusive) of its groups."""

    tiles: jax.Array
    begins: jax.Array
    ends: jax.Array


_Operands = tuple[jax.Array, jax.Array, jax.Array, _MaskInputs, _Schedule]


def refusal(workload: Workload) -> str | None:
    """Why the kernel cannot compute the workload; None if it can."""
    return workload.misfit()


def tiled_attention(
    q_bthe: jax.Array,
    k_bpke: jax.Array,
    v_bpke: jax.Array,
    packing: Packing,
    spec: AttentionSpec,
) -> jax.Array:
    """`packed_attention`; a segment begins wherever positions restart at 0.

    The cost depends on the keys that the batch's tiles see. `packing.longest` only saves loops, and so time
    to compile.
    """
    length, has_trees = q_bthe.shape[1], packing.until_bt is not None
    padded = length + -length % TILE
    window = None if has_trees else spec.window
    seen = min(n for n in (length, packing.longest, window) if n is not None)
    reaches = _reaches(min(seen - 1 + TILE, padded))
    constants = _Constants(padded, has_trees, reaches, packing.prefix, spec)
    ids_bt = [x for x in (packing.positions_bt, packing.until_bt) if x is not None]
    return over_mesh(partial(_one_device, constants), q_bthe, k_bpke, v_bpke, *ids_bt)


def _reaches(last: int) -> tuple[int, ...]:
    """Key counts up to `last`, each with a loop to compile: multiples of a tile, then four from n to 2n."""
    reaches, reach = [], TILE
    while reach < last:
        reaches.append(reach)
        reach += max(TILE, (1 << reach.bit_length() - 1) // 4)
    return *reaches, last


def _one_device(
    constants: _Constants, q_bthe: jax.Array, k_bpke: jax.Array, v_bpke: jax.Array, *ids_bt: jax.Array
) -> jax.Array:
    b, t, h, d = q_bthe.shape
    kv_heads = k_bpke.shape[2]

    def flat(x_bt: jax.Array) -> jax.Array:
        """[b, t, ...] -> [z, ...], each row padded to whole tiles."""
        widths = ((0, 0), (0, constants.length - t), *((0, 0),) * (x_bt.ndim - 2))
        return jnp.pad(x_bt, widths).reshape(-1, *x_bt.shape[2:])

    mask_inputs = _mask_inputs(constants, *map(flat, ids_bt))
    q_cugke = flat(q_bthe).reshape(-1, TILE, kv_heads, h // kv_heads, d)
    out_ckgue = _attend(
        constants,
        q_cugke.transpose(0, 2, 3, 1, 4),
        flat(k_bpke).swapaxes(0, 1),
        flat(v_bpke).swapaxes(0, 1),
        mask_inputs,
        _schedule(constants, mask_inputs),
    )
    return out_ckgue.transpose(0, 3, 1, 2, 4).reshape(b, constants.length, h, d)[:, :t]


def _mask_inputs(
    constants: _Constants, positions_z: jax.Array, until_z: jax.Array | None = None
) -> _MaskInputs:
    i_z = jnp.arange(len(positions_z))
    if until_z is not None:
        return _MaskInputs(positions_z, i_z // constants.length * constants.length + until_z)
    begins_z = jnp.where((positions_z == 0) | (i_z % constants.length == 0), i_z, len(i_z))
    next_z = jax.lax.cummin(begins_z, reverse=True)
    return _MaskInputs(positions_z, jnp.append(next_z[1:], len(i_z)))


def _schedule(constants: _Constants, mask_inputs: _MaskInputs) -> _Schedule:
    start_c = jnp.arange(0, len(mask_inputs.until), TILE)
    row_c = start_c // constants.length
    # A tile's first key is the first whose `until` exceeds the tile's start. The running maximum of `until`
    # exceeds the start from the same key on, and it is sorted, so it can be searched.
    until_bp = mask_inputs.until.reshape(-1, constants.length).at[:, : constants.prefix].set(0)
    furthest_bp = jax.lax.cummax(until_bp, axis=1)
    first_of = jax.vmap(partial(jnp.searchsorted, side="right"))
    first_bc = first_of(furthest_bp, start_c.reshape(len(until_bp), -1))
    first_c = jnp.minimum(row_c * constants.length + first_bc.ravel(), start_c)
    if constants.spec.window is not None and not constants.has_trees:  # close positions may be far apart
        first_c = jnp.maximum(first_c, start_c - constants.spec.window + 1)
    reach_c = start_c + TILE - first_c
    tiles_c = jnp.argsort(reach_c, descending=True)
    tiles = tiles_c.reshape(-1, GROUP if len(tiles_c) % GROUP == 0 else 1)
    most = reach_c[tiles[:, 0]]
    beyond = [(most > reach).sum() for reach in (0, *constants.reaches)]
    return _Schedule(tiles, jnp.stack(beyond[1:]), jnp.stack(beyond[:-1]))


def _attention(
    constants: _Constants,
    q_ckgue: jax.Array,
    k_kze: jax.Array,
    v_kze: jax.Array,
    mask_inputs: _MaskInputs,
    schedule: _Schedule,
) -> jax.Array:
    """Attention of all tiles, [c, k, g, u, e]."""

    def body(group: _Group, out_ckgue: jax.Array) -> jax.Array:
        of_group = group.tiles(q_ckgue), group.keys(k_kze), group.keys(v_kze)
        return group.with_tiles(out_ckgue, group.attention(mask_inputs)(*of_group))

    return _over_groups(constants, schedule, body, jnp.zeros_like(q_ckgue))


def _attention_and_operands(constants: _Constants, *operands: *_Operands) -> tuple[jax.Array, _Operands]:
    return _attention(constants, *operands), operands


def _gradient(
    constants: _Constants, operands: _Operands, grad_out_ckgue: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None, None]:
    q_ckgue, k_kze, v_kze, mask_inputs, schedule = operands

    def body(group: _Group, gradients: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        grad_q, grad_k, grad_v = gradients
        of_group = group.tiles(q_ckgue), group.keys(k_kze), group.keys(v_kze)
        pull = jax.vjp(group.attention(mask_inputs), *of_group)[1]
        of_q, of_k, of_v = pull(group.tiles(grad_out_ckgue))
        return group.with_tiles(grad_q, of_q), group.plus_keys(grad_k, of_k), group.plus_keys(grad_v, of_v)

    # Several tiles contribute to the gradient of a key; it is accumulated in float32.
    zeros = (jnp.zeros_like(q_ckgue), *(jnp.zeros(x.shape, jnp.float32) for x in (k_kze, v_kze)))
    grad_q, grad_k, grad_v = _over_groups(constants, schedule, body, zeros)
    return grad_q, grad_k.astype(k_kze.dtype), grad_v.astype(v_kze.dtype), None, None


# JAX cannot reverse-differentiate a loop whose trip count is known only at run time.
_attend = jax.custom_vjp(_attention, nondiff_argnums=(0,))
_attend.defvjp(_attention_and_operands, _gradient)


def _over_groups(
    constants: _Constants, schedule: _Schedule, body: Callable[[_Group, Carry], Carry], carry: Carry
) -> Carry:
    for reach, begin, end in zip(constants.reaches, schedule.begins, schedule.ends, strict=True):

        def turn(index: jax.Array, carry: Carry, reach: int = reach) -> Carry:
            return body(_Group(constants, schedule.tiles[index], reach), carry)

        carry = jax.lax.fori_loop(begin, end, turn, carry)
    return carry


class _Group:
    """Tiles processed together. The keys of each are its row's prefix and `reach` keys up to its own end."""

    def __init__(self, constants: _Constants, tiles_x: jax.Array, reach: int) -> None:
        self._asked, self._reach, self._tiles_x = constants, reach, tiles_x
        self._shared_x = tiles_x * TILE // constants.length * constants.length
        # Not before the tile's row: a non-finite value there would contribute 0 * NaN.
        self._near_x = jnp.maximum((tiles_x + 1) * TILE - reach, self._shared_x)

    def tiles(self, of_all: jax.Array) -> jax.Array:
        """Selects the group's tiles: [c, ...] -> [x, ...]."""
        return jnp.stack([jax.lax.dynamic_index_in_dim(of_all, c, keepdims=False) for c in self._tiles_x])

    def with_tiles(self, of_all: jax.Array, of_group: jax.Array) -> jax.Array:
        """[c, ...] with the group's tiles replaced by [x, ...]."""
        for part, c in zip(of_group, self._tiles_x, strict=True):
            of_all = jax.lax.dynamic_update_index_in_dim(of_all, part, c, 0)
        return of_all

    def keys(self, of_all_kze: jax.Array) -> jax.Array:
        """Selects the keys of each tile: [k, z, e] -> [x, k, p, e]."""
        return jnp.stack(
            [
                jnp.concatenate(
                    [jax.lax.dynamic_slice_in_dim(of_all_kze, *span, axis=1) for span in spans], axis=1
                )
                for spans in self._spans()
            ]
        )

    def plus_keys(self, of_all_kze: jax.Array, of_group_xkpe: jax.Array) -> jax.Array:
        """[k, z, e] with [x, k, p, e] added at the keys of each tile."""
        for part_kpe, spans in zip(of_group_xkpe, self._spans(), strict=True):
            taken = 0
            for start, size in spans:
                more = part_kpe[:, taken : taken + size]
                so_far = jax.lax.dynamic_slice_in_dim(of_all_kze, start, size, axis=1)
                of_all_kze = jax.lax.dynamic_update_slice_in_dim(of_all_kze, so_far + more, start, axis=1)
                taken += size
        return of_all_kze

    def attention(self, mask_inputs: _MaskInputs) -> Callable[[jax.Array, jax.Array, jax.Array], jax.Array]:
        """The function (queries, keys, values) -> [x, k, g, u, e]."""
        return partial(attend, visible_btp=self._visible(mask_inputs), spec=self._asked.spec)

    def _spans(self) -> list[list[tuple[jax.Array, int]]]:
        """(start, size) of each range of keys per tile: the prefix, if there is one, and the near keys."""
        near = [[(start, self._reach)] for start in self._near_x]
        if not self._asked.prefix:
            return near
        return [
            [(start, self._asked.prefix), *span] for start, span in zip(self._shared_x, near, strict=True)
        ]

    def _visible(self, mask_inputs: _MaskInputs) -> jax.Array:
        """Mask of the keys that each query sees: bool [x, u, p]."""
        prefix, window = self._asked.prefix, self._asked.spec.window
        i_xu = self._tiles_x[:, None] * TILE + jnp.arange(TILE)
        # Computed instead of sliced like the keys: XLA fuses this into each use, where slices are slow.
        s = jnp.arange(prefix + self._reach)
        j_xp = self._near_x[:, None] + s - prefix
        is_twice_xp = None
        if prefix:
            shared_x1 = self._shared_x[:, None]
            is_twice_xp = (s >= prefix) & (j_xp < shared_x1 + prefix)
            j_xp = jnp.where(s < prefix, shared_x1 + s, j_xp)
        until_xp = mask_inputs.until.at[j_xp].get(mode="promise_in_bounds")
        visible_xup = (j_xp[:, None] <= i_xu[:, :, None]) & (i_xu[:, :, None] < until_xp[:, None])
        if is_twice_xp is not None:
            visible_xup &= ~is_twice_xp[:, None]
        if window is not None:
            at_xu, at_xp = (mask_inputs.positions.at[x].get(mode="promise_in_bounds") for x in (i_xu, j_xp))
            visible_xup &= at_xu[:, :, None] - at_xp[:, None] < window
        return visible_xup
