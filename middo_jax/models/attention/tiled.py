"""Attention on CPUs in tiles of queries. Each tile reads the keys that its queries attend to.

How far back a tile sees is known when it runs, not when it is compiled. So tiles are sorted by that, and for
each of a few numbers of keys a loop goes over those tiles which it suffices for. An accelerator would wait
for its host at every turn of such a loop.

Axes: docs/contributing.md#axes; p key position, e head dimension, g query heads per key/value head,
z positions of all rows, one row behind the other, c tiles of queries, u positions of a tile,
x tiles of a group.
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

# Query positions of a tile: fewer see fewer keys of others, more make better products.
TILE = 64
# Tiles that are handled at a time, if their number is a multiple of it: they get as many keys as one needs.
GROUP = 2

Carry = TypeVar("Carry")


class _Asked(NamedTuple):
    """What is known when it is compiled: positions of a padded row, whether rows hold trees, the numbers of
    keys that a tile may get, positions of the prefix, and what to compute."""

    length: int
    has_trees: bool
    reaches: tuple[int, ...]
    prefix: int
    spec: AttentionSpec


class _Places(NamedTuple):
    """Of each position, [z] each; a segment is a tree without branches."""

    positions: jax.Array
    until: jax.Array


class _Schedule(NamedTuple):
    """Groups of tiles [groups, x], those that see furthest first; of each reach, its first group and the
    one behind its last."""

    tiles: jax.Array
    begins: jax.Array
    ends: jax.Array


_Operands = tuple[jax.Array, jax.Array, jax.Array, _Places, _Schedule]


def refusal(workload: Workload) -> str | None:
    """What of it the kernel cannot honour; None if it can all of it."""
    return workload.misfit()


def tiled_attention(
    q_bthe: jax.Array,
    k_bpke: jax.Array,
    v_bpke: jax.Array,
    packing: Packing,
    spec: AttentionSpec,
) -> jax.Array:
    """`packed_attention`, whose segments begin where positions begin anew.

    Its cost is the tiles that the batch at hand sees; `packing.longest` only saves loops, and so time to
    compile.
    """
    length, has_trees = q_bthe.shape[1], packing.until_bt is not None
    padded = length + -length % TILE
    window = None if has_trees else spec.window
    seen = min(n for n in (length, packing.longest, window) if n is not None)
    reaches = _reaches(min(seen - 1 + TILE, padded))
    asked = _Asked(padded, has_trees, reaches, packing.prefix, spec)
    ids_bt = [x for x in (packing.positions_bt, packing.until_bt) if x is not None]
    return over_mesh(partial(_one_device, asked), q_bthe, k_bpke, v_bpke, *ids_bt)


def _reaches(last: int) -> tuple[int, ...]:
    """Numbers of keys up to the last, each a loop to compile: multiples of a tile, then four from n to 2n."""
    reaches, reach = [], TILE
    while reach < last:
        reaches.append(reach)
        reach += max(TILE, (1 << reach.bit_length() - 1) // 4)
    return *reaches, last


def _one_device(
    asked: _Asked, q_bthe: jax.Array, k_bpke: jax.Array, v_bpke: jax.Array, *ids_bt: jax.Array
) -> jax.Array:
    b, t, h, d = q_bthe.shape
    kv_heads = k_bpke.shape[2]

    def flat(x_bt: jax.Array) -> jax.Array:
        """[z, ...], each row padded to whole tiles."""
        widths = ((0, 0), (0, asked.length - t), *((0, 0),) * (x_bt.ndim - 2))
        return jnp.pad(x_bt, widths).reshape(-1, *x_bt.shape[2:])

    places = _places(asked, *map(flat, ids_bt))
    q_cugke = flat(q_bthe).reshape(-1, TILE, kv_heads, h // kv_heads, d)
    out_ckgue = _attend(
        asked,
        q_cugke.transpose(0, 2, 3, 1, 4),
        flat(k_bpke).swapaxes(0, 1),
        flat(v_bpke).swapaxes(0, 1),
        places,
        _schedule(asked, places),
    )
    return out_ckgue.transpose(0, 3, 1, 2, 4).reshape(b, asked.length, h, d)[:, :t]


def _places(asked: _Asked, positions_z: jax.Array, until_z: jax.Array | None = None) -> _Places:
    i_z = jnp.arange(len(positions_z))
    if until_z is not None:
        return _Places(positions_z, i_z // asked.length * asked.length + until_z)
    begins_z = jnp.where((positions_z == 0) | (i_z % asked.length == 0), i_z, len(i_z))
    next_z = jax.lax.cummin(begins_z, reverse=True)
    return _Places(positions_z, jnp.append(next_z[1:], len(i_z)))


def _schedule(asked: _Asked, places: _Places) -> _Schedule:
    start_c = jnp.arange(0, len(places.until), TILE)
    row_c = start_c // asked.length
    # A tile's first key is the first whose `until` is behind the tile's start. There the running maximum
    # passes it too, and that can be searched.
    until_bp = places.until.reshape(-1, asked.length).at[:, : asked.prefix].set(0)
    furthest_bp = jax.lax.cummax(until_bp, axis=1)
    first_of = jax.vmap(partial(jnp.searchsorted, side="right"))
    first_bc = first_of(furthest_bp, start_c.reshape(len(until_bp), -1))
    first_c = jnp.minimum(row_c * asked.length + first_bc.ravel(), start_c)
    if asked.spec.window is not None and not asked.has_trees:  # whose near positions may be far rows
        first_c = jnp.maximum(first_c, start_c - asked.spec.window + 1)
    reach_c = start_c + TILE - first_c
    tiles_c = jnp.argsort(reach_c, descending=True)
    tiles = tiles_c.reshape(-1, GROUP if len(tiles_c) % GROUP == 0 else 1)
    most = reach_c[tiles[:, 0]]
    beyond = [(most > reach).sum() for reach in (0, *asked.reaches)]
    return _Schedule(tiles, jnp.stack(beyond[1:]), jnp.stack(beyond[:-1]))


def _attention(
    asked: _Asked,
    q_ckgue: jax.Array,
    k_kze: jax.Array,
    v_kze: jax.Array,
    places: _Places,
    schedule: _Schedule,
) -> jax.Array:
    """Attention of all tiles, [c, k, g, u, e]."""

    def body(group: _Group, out_ckgue: jax.Array) -> jax.Array:
        of_group = group.tiles(q_ckgue), group.keys(k_kze), group.keys(v_kze)
        return group.with_tiles(out_ckgue, group.attention(places)(*of_group))

    return _over_groups(asked, schedule, body, jnp.zeros_like(q_ckgue))


def _attention_and_operands(asked: _Asked, *operands: *_Operands) -> tuple[jax.Array, _Operands]:
    return _attention(asked, *operands), operands


def _gradient(
    asked: _Asked, operands: _Operands, by_out_ckgue: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None, None]:
    q_ckgue, k_kze, v_kze, places, schedule = operands

    def body(group: _Group, gradients: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        by_q, by_k, by_v = gradients
        of_group = group.tiles(q_ckgue), group.keys(k_kze), group.keys(v_kze)
        pull = jax.vjp(group.attention(places), *of_group)[1]
        of_q, of_k, of_v = pull(group.tiles(by_out_ckgue))
        return group.with_tiles(by_q, of_q), group.plus_keys(by_k, of_k), group.plus_keys(by_v, of_v)

    # A key is of several tiles: what they say of it is added in float32.
    zeros = (jnp.zeros_like(q_ckgue), *(jnp.zeros(x.shape, jnp.float32) for x in (k_kze, v_kze)))
    by_q, by_k, by_v = _over_groups(asked, schedule, body, zeros)
    return by_q, by_k.astype(k_kze.dtype), by_v.astype(v_kze.dtype), None, None


# XLA has no gradient of a loop whose number of turns it does not know.
_attend = jax.custom_vjp(_attention, nondiff_argnums=(0,))
_attend.defvjp(_attention_and_operands, _gradient)


def _over_groups(
    asked: _Asked, schedule: _Schedule, body: Callable[[_Group, Carry], Carry], carry: Carry
) -> Carry:
    for reach, begin, end in zip(asked.reaches, schedule.begins, schedule.ends, strict=True):

        def turn(index: jax.Array, carry: Carry, reach: int = reach) -> Carry:
            return body(_Group(asked, schedule.tiles[index], reach), carry)

        carry = jax.lax.fori_loop(begin, end, turn, carry)
    return carry


class _Group:
    """Tiles that are handled together, each with its row's prefix as keys and so many up to its own end."""

    def __init__(self, asked: _Asked, tiles_x: jax.Array, reach: int) -> None:
        self._asked, self._reach, self._tiles_x = asked, reach, tiles_x
        self._shared_x = tiles_x * TILE // asked.length * asked.length
        # Never before its row: what is not finite there would come here as 0 * NaN.
        self._near_x = jnp.maximum((tiles_x + 1) * TILE - reach, self._shared_x)

    def tiles(self, of_all: jax.Array) -> jax.Array:
        """[x, ...] of [c, ...]."""
        return jnp.stack([jax.lax.dynamic_index_in_dim(of_all, c, keepdims=False) for c in self._tiles_x])

    def with_tiles(self, of_all: jax.Array, of_group: jax.Array) -> jax.Array:
        """[c, ...] with these tiles replaced by [x, ...]."""
        for part, c in zip(of_group, self._tiles_x, strict=True):
            of_all = jax.lax.dynamic_update_index_in_dim(of_all, part, c, 0)
        return of_all

    def keys(self, of_all_kze: jax.Array) -> jax.Array:
        """[x, k, p, e] of [k, z, e]."""
        return jnp.stack(
            [
                jnp.concatenate(
                    [jax.lax.dynamic_slice_in_dim(of_all_kze, *span, axis=1) for span in spans], axis=1
                )
                for spans in self._spans()
            ]
        )

    def plus_keys(self, of_all_kze: jax.Array, of_group_xkpe: jax.Array) -> jax.Array:
        """[k, z, e], with what its keys are given added to it."""
        for part_kpe, spans in zip(of_group_xkpe, self._spans(), strict=True):
            taken = 0
            for start, size in spans:
                more = part_kpe[:, taken : taken + size]
                so_far = jax.lax.dynamic_slice_in_dim(of_all_kze, start, size, axis=1)
                of_all_kze = jax.lax.dynamic_update_slice_in_dim(of_all_kze, so_far + more, start, axis=1)
                taken += size
        return of_all_kze

    def attention(self, places: _Places) -> Callable[[jax.Array, jax.Array, jax.Array], jax.Array]:
        """(queries, keys, values) -> [x, k, g, u, e]."""
        return partial(attend, visible_btp=self._visible(places), spec=self._asked.spec)

    def _spans(self) -> list[list[tuple[jax.Array, int]]]:
        """Of each tile, where its keys begin and how many: in the prefix if there is one, and near."""
        near = [[(start, self._reach)] for start in self._near_x]
        if not self._asked.prefix:
            return near
        return [
            [(start, self._asked.prefix), *span] for start, span in zip(self._shared_x, near, strict=True)
        ]

    def _visible(self, places: _Places) -> jax.Array:
        """Which keys each query sees: bool [x, u, p]."""
        prefix, window = self._asked.prefix, self._asked.spec.window
        i_xu = self._tiles_x[:, None] * TILE + jnp.arange(TILE)
        # Computed, not sliced and stacked as the keys are: XLA fuses it into each use, where slices are slow.
        s = jnp.arange(prefix + self._reach)
        j_xp = self._near_x[:, None] + s - prefix
        is_twice_xp = None
        if prefix:
            shared_x1 = self._shared_x[:, None]
            is_twice_xp = (s >= prefix) & (j_xp < shared_x1 + prefix)
            j_xp = jnp.where(s < prefix, shared_x1 + s, j_xp)
        until_xp = places.until.at[j_xp].get(mode="promise_in_bounds")
        visible_xup = (j_xp[:, None] <= i_xu[:, :, None]) & (i_xu[:, :, None] < until_xp[:, None])
        if is_twice_xp is not None:
            visible_xup &= ~is_twice_xp[:, None]
        if window is not None:
            at_xu, at_xp = (places.positions.at[x].get(mode="promise_in_bounds") for x in (i_xu, j_xp))
            visible_xup &= at_xu[:, :, None] - at_xp[:, None] < window
        return visible_xup
