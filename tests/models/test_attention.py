"""Every kernel of attention == its definition: segments, trees, windows, caps; forward and backward."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.attention import SCALE, Batch, assert_equal, definition

from middo_jax.config import MeshSettings
from middo_jax.models.attention import (
    CACHE_BLOCK,
    QUERY_BLOCK,
    AttentionError,
    AttentionSpec,
    CachedLayer,
    Kernel,
    Packing,
    Workload,
    cached_attention,
    choose,
    packed_attention,
)
from middo_jax.models.attention.splash import splash_attention
from middo_jax.models.attention.tiled import TILE
from middo_jax.parallel.mesh import make_mesh

TPU = Workload("tpu", 8, 256, heads=8, kv_heads=2, head_dim=64, dtype=jnp.dtype(jnp.bfloat16))
GPU = dataclasses.replace(TPU, platform="gpu")
CPU = dataclasses.replace(TPU, platform="cpu")


@pytest.mark.parametrize(
    ("length", "window", "soft_cap"),
    [
        (1, 1, None),
        (37, None, None),
        (QUERY_BLOCK, 20, None),
        (QUERY_BLOCK + 1, None, 1.5),
        (2 * QUERY_BLOCK + 45, None, None),
        (2 * QUERY_BLOCK + 45, 30, 1.5),
        (2 * QUERY_BLOCK + 45, QUERY_BLOCK + 9, None),
    ],
)
@pytest.mark.parametrize("trees", [False, True])
@pytest.mark.parametrize("kernel", ["xla", "tiled"])
def test_a_kernel_is_the_definition(
    length: int, window: int | None, soft_cap: float | None, trees: bool, kernel: Kernel
) -> None:
    batch = Batch.random(2, length).grown() if trees else Batch.random(2, length)

    def ours(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return packed_attention(q, k, v, batch.packing(), AttentionSpec(SCALE, window, soft_cap), kernel)

    theirs = definition(batch, window, soft_cap)
    assert_equal(batch.values_and_gradients(ours), batch.values_and_gradients(theirs))


@pytest.mark.parametrize("kv_heads", [1, 4])
def test_any_number_of_key_heads(kv_heads: int) -> None:
    batch = Batch.random(1, 33, kv_heads=kv_heads)

    def ours(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return packed_attention(q, k, v, batch.packing(), AttentionSpec(SCALE))

    theirs = definition(batch, None, None)
    assert_equal(batch.values_and_gradients(ours), batch.values_and_gradients(theirs))


def test_packed_is_unpacked_under_a_window() -> None:
    """Three texts in one row == each alone, though the window is longer than what lies between them."""
    window, lengths = 40, (150, 7, 100)
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((1, sum(lengths), n, 8)), jnp.float32) for n in (4, 2, 2))
    segment_ids = jnp.asarray(np.repeat(np.arange(3), lengths)[None])
    positions = jnp.asarray(np.concatenate([np.arange(n) for n in lengths])[None])
    attend = jax.jit(functools.partial(packed_attention, spec=AttentionSpec(SCALE, window)))
    packed = attend(q, k, v, Packing(segment_ids, positions))
    for start, length in zip(np.cumsum((0, *lengths)), lengths, strict=False):
        own = slice(start, start + length)
        one_segment, counted = jnp.zeros((1, length), jnp.int32), jnp.arange(length)[None]
        alone = attend(q[:, own], k[:, own], v[:, own], Packing(one_segment, counted))
        np.testing.assert_allclose(packed[:, own], alone, rtol=1e-5, atol=1e-6)


def test_a_window_reads_no_further_back() -> None:
    """What no row of the last block sees is not even multiplied by zero: the cost is length x window."""
    length, window = 3 * QUERY_BLOCK, 50
    x = jnp.ones((1, length, 1, 8)).at[:, : 2 * QUERY_BLOCK - window + 1].set(jnp.nan)
    positions = jnp.arange(length)[None]
    attend = jax.jit(functools.partial(packed_attention, spec=AttentionSpec(SCALE, window)))
    out = attend(x, x, x, Packing(jnp.zeros_like(positions), positions))
    np.testing.assert_allclose(out[:, 2 * QUERY_BLOCK :], 1.0, rtol=1e-6)


@pytest.mark.parametrize("trees", [False, True])
def test_what_a_segment_does_not_see_is_not_read(trees: bool) -> None:
    """A tile costs what its own segment holds, whatever else is in the row: NaN times zero would be NaN."""
    lengths = (4 * TILE, 30, 2 * TILE - 30)
    segment_ids = jnp.asarray(np.repeat(np.arange(3), lengths)[None])
    positions = jnp.asarray(np.concatenate([np.arange(n) for n in lengths])[None])
    until = jnp.asarray(np.repeat(np.cumsum(lengths), lengths)[None]) if trees else None
    x = jnp.ones((1, sum(lengths), 1, 8)).at[:, : lengths[0]].set(jnp.nan)

    @jax.jit
    def behind(x: jax.Array) -> jax.Array:
        packing = Packing(segment_ids, positions, until)
        attended = packed_attention(x, x, x, packing, AttentionSpec(SCALE), "tiled")
        return attended[:, lengths[0] :]

    out, pull = jax.vjp(behind, x)
    np.testing.assert_allclose(out, 1.0, rtol=1e-6)
    assert np.isfinite(pull(out)[0][:, lengths[0] :]).all()


@pytest.mark.parametrize("kernel", ["xla", "tiled"])
def test_what_is_not_finite_stays_in_its_row(kernel: Kernel) -> None:
    length = 10 * TILE
    positions = jnp.tile(jnp.arange(length), (2, 1))
    x = jnp.ones((2, length, 1, 8)).at[0, -20:].set(jnp.nan)
    packing = Packing(jnp.zeros_like(positions), positions)
    attend = jax.jit(functools.partial(packed_attention, spec=AttentionSpec(SCALE), kernel=kernel))
    out = attend(x, x, x, packing)
    np.testing.assert_allclose(out[1], 1.0, rtol=1e-6)


@pytest.mark.parametrize("kernel", ["xla", "tiled"])
def test_a_window_reaches_over_the_branches_between(kernel: Kernel) -> None:
    """A stem is near the last of its branches, though long ones lie between them."""
    stem, branches = 10, (3 * TILE, TILE)
    batch = Batch.random(1, stem + sum(branches))
    rows, ends = np.arange(stem + sum(branches)), stem + np.cumsum(branches)
    until = np.repeat([ends[-1], *ends], (stem, *branches))
    starts = np.repeat([0, stem, ends[0]], (stem, *branches))
    positions = rows - starts + np.where(starts, stem, 0)
    above = (rows <= rows[:, None]) & (rows[:, None] < until)
    batch = dataclasses.replace(
        batch,
        segment_ids=np.zeros_like(batch.segment_ids),
        positions=positions[None],
        until=until[None],
        above=above[None],
    )

    def ours(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return packed_attention(q, k, v, batch.packing(), AttentionSpec(SCALE, 20), kernel)

    assert_equal(batch.values_and_gradients(ours), batch.values_and_gradients(definition(batch, 20, None)))


@pytest.mark.parametrize("kernel", ["xla", "tiled"])
@pytest.mark.parametrize("window", [None, 70])
def test_a_prefix_and_the_longest_tree_only_save_work(kernel: Kernel, window: int | None) -> None:
    prefix = 20
    batch = Batch.random(3, 5 * TILE + 9).grown(prefix)
    longest = int(np.bincount(batch.segment_ids[:2, prefix:].ravel() + 1)[1:].max())

    def ours(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        packing = batch.packing(prefix=prefix, longest=longest)
        return packed_attention(q, k, v, packing, AttentionSpec(SCALE, window), kernel)

    theirs = definition(batch, window, None)
    assert_equal(batch.values_and_gradients(ours), batch.values_and_gradients(theirs))


@pytest.mark.parametrize(
    ("kv_heads", "mesh"),
    [(2, MeshSettings(data=2, fsdp=2, tensor=2)), (2, MeshSettings(data=1, fsdp=2, tensor=4))],
)
def test_tiled_on_a_mesh_is_the_definition(kv_heads: int, mesh: MeshSettings) -> None:
    """Every device plans the tiles of its own rows, of which some hold more than others."""
    batch = Batch.random(4, 4 * TILE + 1, kv_heads=kv_heads).grown()

    def ours(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return packed_attention(q, k, v, batch.packing(), AttentionSpec(SCALE), "tiled")

    with jax.set_mesh(make_mesh(mesh)):
        found = batch.values_and_gradients(ours)
    assert_equal(found, batch.values_and_gradients(definition(batch, None, None)))


def cache_of(rng: np.random.Generator, rows: int, slots: int) -> tuple[jax.Array, jax.Array]:
    keys, values = (jnp.asarray(rng.standard_normal((2, rows, slots, 2, 8)), jnp.float32) for _ in range(2))
    return keys, values


@pytest.mark.parametrize("slots", [CACHE_BLOCK // 2, 2 * CACHE_BLOCK + 44])
@pytest.mark.parametrize(
    ("window", "soft_cap"), [(None, None), (1, None), (30, 1.5), (CACHE_BLOCK + 3, None)]
)
def test_cached_is_packed(slots: int, window: int | None, soft_cap: float | None) -> None:
    rng = np.random.default_rng(slots)
    keys, values = cache_of(rng, 2, slots)
    q = jnp.asarray(rng.standard_normal((2, slots, 4, 8)), jnp.float32)
    positions = jnp.broadcast_to(jnp.arange(slots), (2, slots))
    spec = AttentionSpec(SCALE, window, soft_cap)
    attend = jax.jit(functools.partial(packed_attention, spec=spec))
    whole = attend(q, keys[1], values[1], Packing(jnp.zeros_like(positions), positions))
    # Rows of one batch stand at different places, as in decoding.
    at = jnp.array([[3, 9], [slots - 7, slots - 1]])
    some = jnp.take_along_axis(q, at[..., None, None], axis=1)
    cached = CachedLayer(keys, values, jnp.int32(1))
    out = jax.jit(functools.partial(cached_attention, spec=spec))(some, cached, at)
    expected = jnp.take_along_axis(whole, at[..., None, None], axis=1)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("window", [None, 5, CACHE_BLOCK, CACHE_BLOCK + 1])
def test_cached_rows_do_not_see_their_neighbours_to_the_bit(window: int | None) -> None:
    rng = np.random.default_rng(0)
    slots = 3 * CACHE_BLOCK + 20
    keys, values = cache_of(rng, 3, slots)
    q = jnp.asarray(rng.standard_normal((3, 1, 4, 8)), jnp.float32)
    attend = jax.jit(functools.partial(cached_attention, spec=AttentionSpec(SCALE, window)))
    cached = CachedLayer(keys, values, jnp.int32(0))
    for mine in (0, 4, CACHE_BLOCK - 1, CACHE_BLOCK, 2 * CACHE_BLOCK + 5, slots - 1):
        answers = [
            np.asarray(attend(q, cached, jnp.array([[mine], [one], [other]])))[0]
            for one, other in [(0, 0), (mine, slots), (slots - 1, 0), (slots - 1, slots), (slots, slots)]
        ]
        for answer in answers[1:]:
            np.testing.assert_array_equal(answers[0], answer)


def test_cached_blocks_that_no_row_sees_are_not_read() -> None:
    slots, window = 4 * CACHE_BLOCK, 10
    cache = jnp.full((1, 2, slots, 1, 8), jnp.nan).at[:, :, CACHE_BLOCK : 2 * CACHE_BLOCK].set(1.0)
    at = jnp.array([[CACHE_BLOCK + 20], [slots]])  # the second row is idle
    cached = CachedLayer(cache, cache, jnp.int32(0))
    out = cached_attention(jnp.ones((2, 1, 1, 8)), cached, at, AttentionSpec(SCALE, window))
    np.testing.assert_allclose(out[0], 1.0, rtol=1e-6)


@pytest.mark.parametrize(
    ("rows", "length", "kv_heads", "window", "soft_cap", "mesh"),
    [
        (2, 256, 2, None, None, None),
        (2, 173, 1, 30, 1.5, None),
        (4, 128, 2, 40, None, MeshSettings(data=2, fsdp=2, tensor=2)),
        (2, 100, 2, None, 1.5, MeshSettings(data=1, fsdp=2, tensor=4)),  # two devices share a key head
    ],
)
def test_splash_is_xla(
    rows: int,
    length: int,
    kv_heads: int,
    window: int | None,
    soft_cap: float | None,
    mesh: MeshSettings | None,
) -> None:
    batch = Batch.random(rows, length, kv_heads=kv_heads)
    spec, packing = AttentionSpec(SCALE, window, soft_cap), batch.packing()

    def ours(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return splash_attention(q, k, v, packing.segment_ids_bt, spec, interpret=True)

    def theirs(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return packed_attention(q, k, v, packing, spec, "xla")

    with contextlib.nullcontext() if mesh is None else jax.set_mesh(make_mesh(mesh)):
        found = batch.values_and_gradients(ours)
    assert_equal(found, batch.values_and_gradients(theirs))


@pytest.mark.parametrize(
    ("workload", "kernel"),
    [
        (TPU, "splash"),
        (dataclasses.replace(TPU, soft_cap=50.0), "splash"),
        (dataclasses.replace(TPU, batch_shards=4, head_shards=8), "splash"),
        (dataclasses.replace(TPU, has_trees=True), "splash"),
        (dataclasses.replace(TPU, batch_shards=16), "xla"),
        (dataclasses.replace(TPU, head_shards=3), "xla"),
        (dataclasses.replace(TPU, heads=24, kv_heads=6, head_shards=4), "xla"),
        (GPU, "triton"),
        (dataclasses.replace(GPU, has_trees=True, soft_cap=50.0, dtype=jnp.dtype(jnp.float32)), "triton"),
        (dataclasses.replace(GPU, head_dim=80), "xla"),
        (dataclasses.replace(GPU, batch_shards=16), "xla"),
        (CPU, "tiled"),
        (dataclasses.replace(CPU, has_trees=True, soft_cap=50.0), "tiled"),
        (dataclasses.replace(CPU, length=128), "xla"),
        (dataclasses.replace(CPU, batch_shards=16), "xla"),
    ],
)
def test_auto_takes_what_can_honour_everything(workload: Workload, kernel: str) -> None:
    assert choose(workload) == kernel
    assert choose(workload, "xla") == "xla"


@pytest.mark.parametrize(
    ("kernel", "workload", "reason"),
    [
        ("splash", GPU, "it is a TPU kernel"),
        ("splash", dataclasses.replace(TPU, batch=6, batch_shards=4), "6 rows on 4 devices"),
        ("splash", dataclasses.replace(TPU, head_shards=3), "8 heads on 3 devices"),
        ("splash", dataclasses.replace(TPU, heads=12, kv_heads=6, head_shards=4), "6 key/value heads on 4"),
        ("triton", TPU, "it is a GPU kernel"),
        ("triton", dataclasses.replace(GPU, dtype=jnp.dtype(jnp.float64)), "float64"),
        ("triton", dataclasses.replace(GPU, head_dim=80), "head_dim=80"),
        ("triton", dataclasses.replace(GPU, head_dim=512), "head_dim=512"),
        ("triton", dataclasses.replace(GPU, batch=6, batch_shards=4), "6 rows on 4 devices"),
    ],
)
def test_what_a_kernel_cannot_honour_raises(kernel: Kernel, workload: Workload, reason: str) -> None:
    with pytest.raises(AttentionError, match=f"attention={kernel} cannot be used for .*{reason}"):
        choose(workload, kernel)


@pytest.mark.parametrize("kernel", ["splash", "triton"])
def test_a_kernel_asked_for_by_name_is_not_replaced(kernel: Kernel) -> None:
    batch = Batch.random(1, 16)
    with pytest.raises(AttentionError, match=f"attention={kernel} cannot be used for a cpu"):
        packed_attention(*batch.qkv, batch.packing(), AttentionSpec(SCALE), kernel)


def test_products_are_of_the_compute_dtype_backwards_too() -> None:
    """An accelerator multiplies float32 at a fraction of the rate."""
    x = jnp.ones((1, 2 * QUERY_BLOCK, 2, 8), jnp.bfloat16)
    counted = jnp.arange(x.shape[1], dtype=jnp.int32)[None]
    packing = Packing(jnp.zeros_like(counted), counted)

    def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        out = packed_attention(q, k, v, packing, AttentionSpec(1.0), "xla")
        return out.astype(jnp.float32).sum()

    def products(jaxpr: Any) -> Iterator[Any]:
        for equation in jaxpr.eqns:
            if equation.primitive.name == "dot_general":
                yield equation
            for inner in equation.params.values():
                if hasattr(inner, "jaxpr"):
                    yield from products(inner.jaxpr)

    found = list(products(jax.make_jaxpr(jax.grad(loss, (0, 1, 2)))(x, x, x).jaxpr))
    assert len(found) == 2 * 6  # blocks; two forward, four backward
    assert {operand.aval.dtype.name for equation in found for operand in equation.invars} == {"bfloat16"}


@pytest.mark.parametrize("kernel", ["xla", "tiled"])
def test_gradients_in_bfloat16_are_as_exact_as_it_is(kernel: Kernel) -> None:
    """Also where values have a mean, which no gradient of a weight depends on."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((4, 1, 8 * QUERY_BLOCK, 4, 64)), jnp.bfloat16)
    q, k, v, by_out = x[0], x[1, :, :, :2], x[2, :, :, :2] + 4, x[3]
    counted = jnp.arange(q.shape[1], dtype=jnp.int32)[None]
    packing = Packing(jnp.zeros_like(counted), counted)

    def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        out = packed_attention(q, k, v, packing, AttentionSpec(64**-0.5), kernel)
        return (out.astype(jnp.float32) * by_out).sum()

    gradient = jax.jit(jax.grad(loss, (0, 1, 2)))
    exact = gradient(*(x.astype(jnp.float32) for x in (q, k, v)))
    for ours, theirs in zip(gradient(q, k, v), exact, strict=True):
        assert jnp.linalg.norm(ours - theirs) < jnp.finfo(jnp.bfloat16).eps / 2 * jnp.linalg.norm(theirs)
