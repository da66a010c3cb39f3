"""Random packed rows and trees, and attention by its definition: with the whole matrix of scores."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from middo_jax.models.attention import Packing

SCALE = 0.3


@dataclasses.dataclass
class Batch:
    """Packed rows: arrays that attention reads, and a cotangent that is zero on padding.

    As trees, `until` says what attention is told, and `above` the same as a matrix: i sees j if [b, i, j].
    """

    qkv: tuple[jax.Array, jax.Array, jax.Array]
    segment_ids: np.ndarray
    positions: np.ndarray
    cotangent: jax.Array
    until: np.ndarray | None = None
    above: np.ndarray | None = None

    @classmethod
    def random(cls, rows: int, length: int, heads: int = 4, kv_heads: int = 2, dim: int = 8) -> Batch:
        """Rows of a few segments and a tail of padding; the last row is padding only if there are two."""
        rng = np.random.default_rng(length + heads)
        segment_ids = np.sort(rng.integers(0, 1 + length // 60, (rows, length)), axis=1).astype(np.int32)
        segment_ids[:, length - length // 5 :] = -1
        segment_ids[1:][-1:] = -1
        positions = np.zeros_like(segment_ids)
        for row, segment in np.ndindex(rows, int(segment_ids.max()) + 1):
            at = np.flatnonzero(segment_ids[row] == segment)
            positions[row, at] = np.arange(len(at))
        shapes = (heads, kv_heads, kv_heads, heads)
        q, k, v, cotangent = (
            jnp.asarray(rng.standard_normal((rows, length, n, dim)), jnp.float32) for n in shapes
        )
        cotangent *= (segment_ids >= 0)[..., None, None]
        return cls((q, k, v), segment_ids, positions, cotangent)

    def grown(self, prefix: int = 0) -> Batch:
        """The same with a random tree in the place of each segment, positions counted along its branches.

        With a prefix, what stands there is of no segment, and all trees of the row grow from it.
        """
        rng = np.random.default_rng(0)
        rows, length = self.segment_ids.shape
        positions = np.zeros_like(self.positions)
        until = np.tile(np.arange(1, length + 1, dtype=np.int32), (rows, 1))
        above = np.tile(np.eye(length, dtype=bool), (rows, 1, 1))
        positions[:, :prefix], until[:, :prefix] = np.arange(prefix), length
        above[:, :, :prefix] = np.tri(length, prefix, dtype=bool)

        def grow(row: int, start: int, stop: int, path: list[int]) -> None:
            while start < stop:
                tree = start + int(rng.integers(1, stop - start + 1))
                stem = list(range(start, start + int(rng.integers(1, tree - start + 1))))
                for i in stem:
                    seen = [*path, *range(start, i + 1)]
                    above[row, i] = np.isin(np.arange(length), seen)
                    positions[row, i], until[row, i] = len(seen) - 1, tree
                grow(row, stem[-1] + 1, tree, path + stem)
                start = tree

        for row, segment in np.ndindex(rows, int(self.segment_ids.max()) + 1):
            at = prefix + np.flatnonzero(self.segment_ids[row, prefix:] == segment)
            if len(at):
                grow(row, int(at[0]), int(at[-1]) + 1, list(range(prefix)))
        return dataclasses.replace(self, positions=positions, until=until, above=above)

    def packing(self, prefix: int = 0, longest: int | None = None) -> Packing:
        """What attention is told about the rows."""
        until = None if self.until is None else jnp.asarray(self.until)
        return Packing(jnp.asarray(self.segment_ids), jnp.asarray(self.positions), until, prefix, longest)

    def values_and_gradients(self, attend: Callable[..., jax.Array]) -> list[np.ndarray]:
        """Attention of all that is not padding, and the gradients of q, k and v."""

        @jax.jit
        def both(qkv: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            out, pull = jax.vjp(lambda *qkv: attend(*qkv), *qkv)
            return out, *pull(self.cotangent.astype(out.dtype))

        out, *gradients = both(self.qkv)
        assert all(np.isfinite(x).all() for x in (out, *gradients))  # padding included
        return [np.asarray(out)[self.segment_ids >= 0], *map(np.asarray, gradients)]


def assert_equal(ours: list[np.ndarray], theirs: list[np.ndarray], tolerance: float = 1e-5) -> None:
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(
            one.astype(np.float32), other.astype(np.float32), rtol=tolerance, atol=tolerance
        )


def definition(batch: Batch, window: int | None, soft_cap: float | None) -> Callable[..., jax.Array]:
    """Attention with the whole matrix of scores, from the sentences of the docstring."""
    i, j = np.indices(batch.segment_ids.shape[1:] * 2)
    segments, positions = batch.segment_ids, batch.positions
    visible = (j <= i) & (segments[:, i] == segments[:, j]) if batch.above is None else batch.above.copy()
    if window is not None:
        visible &= positions[:, i] - positions[:, j] < window

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        group = q.shape[2] // k.shape[2]
        k, v = jnp.repeat(k, group, axis=2), jnp.repeat(v, group, axis=2)
        scores = SCALE * jnp.einsum("bthd,bshd->bhts", q, k)
        if soft_cap is not None:
            scores = soft_cap * jnp.tanh(scores / soft_cap)
        weights = jnp.exp(scores - scores.max(axis=-1, keepdims=True)) * visible[:, None]
        return jnp.einsum("bhts,bshd->bthd", weights / weights.sum(axis=-1, keepdims=True), v)

    return attend
