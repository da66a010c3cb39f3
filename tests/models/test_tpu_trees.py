"""The TPU's kernel for trees in JAX's interpreter == attention's definition, and its count of blocks."""

from __future__ import annotations

from collections.abc import Callable

import jax
import pytest
from support.attention import SCALE, Batch, assert_equal, definition

from middo_jax.config import MeshSettings
from middo_jax.models.attention import AttentionSpec, tpu_trees
from middo_jax.parallel.mesh import make_mesh


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 128, so that short rows have several."""
    monkeypatch.setattr(tpu_trees, "BLOCK", 128)


def interpreted(
    batch: Batch, window: int | None = None, soft_cap: float | None = None, prefix: int = 0
) -> Callable[..., jax.Array]:
    packing, spec = batch.packing(prefix), AttentionSpec(SCALE, window, soft_cap)
    return lambda q, k, v: tpu_trees.tree_attention(q, k, v, packing, spec, interpret=True)


@pytest.mark.parametrize(
    ("length", "kv_heads", "window", "soft_cap", "prefix"),
    [(300, 2, None, None, 0), (390, 1, 30, 1.5, 140), (256, 4, None, None, 5)],
)
def test_it_is_the_definition(
    length: int, kv_heads: int, window: int | None, soft_cap: float | None, prefix: int
) -> None:
    batch = Batch.random(2, length, kv_heads=kv_heads).grown(prefix)
    ours = interpreted(batch, window, soft_cap, prefix)
    theirs = definition(batch, window, soft_cap)
    assert_equal(batch.values_and_gradients(ours), batch.values_and_gradients(theirs))


def test_on_a_mesh_it_is_the_definition() -> None:
    batch = Batch.random(4, 300).grown(20)
    with jax.set_mesh(make_mesh(MeshSettings(data=2, fsdp=2, tensor=2))):
        found = batch.values_and_gradients(interpreted(batch, prefix=20))
    assert_equal(found, batch.values_and_gradients(definition(batch, None, None)))


def test_blocks_beyond_the_longest_tree_are_not_read() -> None:
    """The bound leaves out steps of the grid and changes no result."""
    batch = Batch.random(1, 640).grown(10)
    longest = max(
        int((batch.segment_ids[0] == segment).sum()) for segment in set(batch.segment_ids[0]) - {-1}
    )
    packing = batch.packing(10, longest)
    spec = AttentionSpec(SCALE)

    def ours(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return tpu_trees.tree_attention(q, k, v, packing, spec, interpret=True)

    assert_equal(batch.values_and_gradients(ours), batch.values_and_gradients(definition(batch, None, None)))
    names = {str(equation) for equation in jax.make_jaxpr(ours)(*batch.qkv).eqns}
    assert any(f"p1_r{min(5, 2 + -(-(longest - 1) // 128))}_b128" in name for name in names)


def test_a_kernels_name_says_how_many_blocks_it_reads() -> None:
    # Rows of 4 blocks: 1 + 2 + 3 + 3 pairs with at most 3 per block of queries.
    assert tpu_trees.blocks_of_kernel("jit(f)/tree_attention_p1_r3_b512/pallas_call", 2048) == (9, 512)
    assert tpu_trees.blocks_of_kernel("splash_mha_fwd", 2048) is None
