"""The GPU's kernel in JAX's interpreter == attention's definition: segments, trees, windows, caps, meshes."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.attention import SCALE, Batch, assert_equal, definition

from middo_jax.config import MeshSettings
from middo_jax.models.attention import (
    AttentionSpec,
    CachedLayer,
    Packing,
    cached_attention,
    triton,
    triton_cached,
)
from middo_jax.parallel.mesh import make_mesh

DIM = triton.MIN_HEAD_DIM


def interpreted(
    batch: Batch, window: int | None = None, soft_cap: float | None = None, prefix: int = 0
) -> Callable[..., jax.Array]:
    """The kernel, told what the batch holds."""
    packing, spec = batch.packing(prefix), AttentionSpec(SCALE, window, soft_cap)
    return lambda q, k, v: triton.triton_attention(q, k, v, packing, spec, interpret=True)


@pytest.mark.parametrize("trees", [False, True])
@pytest.mark.parametrize(
    ("length", "kv_heads", "window", "soft_cap"),
    [(1, 2, None, None), (173, 1, 30, 1.5), (256, 4, None, None), (300, 2, 100, None), (200, 2, None, 1.5)],
)
def test_it_is_the_definition(
    length: int, kv_heads: int, window: int | None, soft_cap: float | None, trees: bool
) -> None:
    batch = Batch.random(2, length, kv_heads=kv_heads, dim=DIM)
    batch = batch.grown() if trees else batch
    ours = interpreted(batch, window=window, soft_cap=soft_cap)
    theirs = definition(batch, window, soft_cap)
    assert_equal(batch.values_and_gradients(ours), batch.values_and_gradients(theirs))


@pytest.mark.parametrize("prefix", [5, 64, 90])
@pytest.mark.parametrize("window", [None, 70])
def test_a_prefix_is_seen_by_all_trees(prefix: int, window: int | None) -> None:
    batch = Batch.random(3, 330, dim=DIM).grown(prefix)
    ours = interpreted(batch, window=window, prefix=prefix)
    theirs = definition(batch, window, None)
    assert_equal(batch.values_and_gradients(ours), batch.values_and_gradients(theirs))


@pytest.mark.parametrize(
    ("kv_heads", "mesh"),
    [(2, MeshSettings(data=2, fsdp=2, tensor=2)), (2, MeshSettings(data=1, fsdp=2, tensor=4))],
)
def test_on_a_mesh_it_is_the_definition(kv_heads: int, mesh: MeshSettings) -> None:
    batch = Batch.random(4, 130, kv_heads=kv_heads, dim=DIM).grown()
    with jax.set_mesh(make_mesh(mesh)):
        found = batch.values_and_gradients(interpreted(batch))
    assert_equal(found, batch.values_and_gradients(definition(batch, None, None)))


def test_packed_is_unpacked_to_the_bit_where_blocks_are_the_same() -> None:
    """A text's neighbours in a row change nothing of it, whatever they hold."""
    size = triton.blocks_of(DIM, jnp.float32, "forward").queries
    lengths = (2 * size, size, 3 * size)
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((1, sum(lengths), n, DIM)), jnp.float32) for n in (4, 2, 2))
    segment_ids = jnp.asarray(np.repeat(np.arange(3), lengths)[None])
    positions = jnp.asarray(np.concatenate([np.arange(n) for n in lengths])[None])

    def attend(part: slice, segment_ids: jax.Array) -> jax.Array:
        own_q, own_k, own_v = (x[:, part] for x in (q, k, v))
        packing = Packing(segment_ids, positions[:, part])
        return triton.triton_attention(own_q, own_k, own_v, packing, AttentionSpec(SCALE), interpret=True)

    packed = attend(slice(None), segment_ids)
    for start, length in zip(np.cumsum((0, *lengths)), lengths, strict=False):
        own = slice(int(start), int(start) + length)
        np.testing.assert_array_equal(packed[:, own], attend(own, segment_ids[:, own]))


@pytest.mark.parametrize("trees", [False, True])
def test_what_no_block_sees_is_not_read(trees: bool) -> None:
    """Blocks behind a text's beginning are passed over: NaN times zero would be NaN, forward and backward."""
    size = max(max(triton.blocks_of(DIM, jnp.float32, name)[:2]) for name in ("forward", "dq", "dkv"))
    lengths = (4 * size, size // 2, 2 * size - size // 2)
    segment_ids = jnp.asarray(np.repeat(np.arange(3), lengths)[None])
    positions = jnp.asarray(np.concatenate([np.arange(n) for n in lengths])[None])
    until = jnp.asarray(np.repeat(np.cumsum(lengths), lengths)[None]) if trees else None
    x = jnp.ones((1, sum(lengths), 1, DIM)).at[:, : lengths[0]].set(jnp.nan)

    def behind(x: jax.Array) -> jax.Array:
        packing = Packing(segment_ids, positions, until)
        attended = triton.triton_attention(x, x, x, packing, AttentionSpec(SCALE), interpret=True)
        return attended[:, lengths[0] :]

    out, pull = jax.vjp(behind, x)
    np.testing.assert_allclose(out, 1.0, rtol=1e-6)
    assert np.isfinite(pull(out)[0][:, lengths[0] :]).all()


def test_a_position_that_sees_nothing_is_finite() -> None:
    """Rows of padding alone, which trees may leave without any visible key."""
    batch = Batch.random(2, 80, dim=DIM)
    batch = dataclasses.replace(batch, until=np.zeros_like(batch.positions))
    out, *gradients = batch.values_and_gradients(interpreted(batch))
    assert all(np.isfinite(x).all() for x in (out, *gradients))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_it_lowers_for_a_gpu(head_dim: int, dtype: jnp.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton takes every operation of the three kernels; the lowering needs no GPU but its description."""
    from jax._src.pallas.triton import pallas_call_registration as registration

    gpu_info_lib = getattr(registration, "gpu_info_lib", None)
    if gpu_info_lib is not None:  # since jax 0.11 it asks for the GPU at hand
        info = dataclasses.make_dataclass("Info", [("compute_capability", int)])(90)
        monkeypatch.setattr(gpu_info_lib, "get_gpu_info", lambda: info)
    batch = Batch.random(8, 512, dim=head_dim)
    qkv = [x.astype(dtype) for x in batch.qkv]
    packing, spec = batch.packing(), AttentionSpec(SCALE, window=60, soft_cap=30.0)
    attend = functools.partial(triton.triton_attention, packing=packing, spec=spec)
    gradient = jax.grad(lambda *qkv: attend(*qkv).astype(jnp.float32).sum(), argnums=(0, 1, 2))
    with (
        contextlib.nullcontext() if head_dim > 64 else jax.set_mesh(make_mesh(MeshSettings(data=2, tensor=4)))
    ):
        text = jax.jit(gradient).trace(*qkv).lower(lowering_platforms=("cuda",)).as_text()
    for name in ("forward", "dq", "dkv"):
        assert f"attention_{name}" in text
    assert text.count("__gpu$xla.gpu.triton") == 3


@pytest.mark.parametrize("slots", [40, 150])
@pytest.mark.parametrize(("window", "soft_cap"), [(None, None), (1, None), (30, 1.5), (70, None)])
def test_cached_is_cached_in_xla(slots: int, window: int | None, soft_cap: float | None) -> None:
    """Decoding: a position per row, at different places; and a prompt's chunk, which starts in the middle."""
    rng = np.random.default_rng(slots)
    shape = (2, 3, slots, 2, DIM)
    keys, values = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for _ in range(2))
    spec = AttentionSpec(SCALE, window, soft_cap)
    decoding = jnp.array([[0], [slots - 1], [slots // 2]])
    chunk = jnp.arange(5, 38)[None]
    for positions, first_row in ((decoding, 0), (chunk, 2)):
        q = jnp.asarray(rng.standard_normal((*positions.shape, 8, DIM)), jnp.float32)
        asked = (q, CachedLayer(keys, values, jnp.int32(1), jnp.int32(first_row)), positions, spec)
        ours = triton_cached.triton_cached_attention(*asked, interpret=True)
        np.testing.assert_allclose(ours, cached_attention(*asked), rtol=1e-5, atol=1e-5)


def test_cached_rows_do_not_see_their_neighbours_to_the_bit() -> None:
    rng = np.random.default_rng(0)
    slots = 2 * triton_cached.SLOTS + 20
    keys, values = (jnp.asarray(rng.standard_normal((1, 3, slots, 2, DIM)), jnp.float32) for _ in range(2))
    q = jnp.asarray(rng.standard_normal((3, 1, 4, DIM)), jnp.float32)

    cached, spec = CachedLayer(keys, values, jnp.int32(0)), AttentionSpec(SCALE)

    def attend(*positions: int) -> np.ndarray:
        at = jnp.asarray(positions)[:, None]
        return np.asarray(triton_cached.triton_cached_attention(q, cached, at, spec, interpret=True))

    for mine in (0, triton_cached.SLOTS, slots - 1):
        alone = attend(mine, slots, slots)
        np.testing.assert_array_equal(alone[0], attend(mine, 3, slots - 1)[0])
        assert not alone[1:].any()  # idle
