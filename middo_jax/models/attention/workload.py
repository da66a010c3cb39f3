"""The properties of an attention call that determine its kernel. Axes: docs/contributing.md#axes."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from middo_jax.models.attention.placement import Platform, platform, shards


@dataclasses.dataclass(frozen=True)
class Workload:
    """Shapes, options and devices of an attention call.

    Attributes:
      platform: the platform that it will run on.
      batch: rows on all devices together.
      length: positions per row.
      heads: query heads.
      kv_heads: key/value heads.
      head_dim: width of a head.
      dtype: dtype of queries, keys and values.
      has_trees: whether rows contain trees.
      soft_cap: soft cap of the scores; None: off.
      batch_shards: devices along the rows.
      head_shards: devices along the heads.
    """

    platform: Platform
    batch: int
    length: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: jnp.dtype
    has_trees: bool = False
    soft_cap: float | None = None
    batch_shards: int = 1
    head_shards: int = 1

    @classmethod
    def of(cls, q_bthe: jax.Array, k_bpke: jax.Array, *, has_trees: bool, soft_cap: float | None) -> Workload:
        """The workload of these arrays on the mesh in use."""
        batch, length, heads, head_dim = q_bthe.shape
        return cls(
            platform(),
            batch,
            length,
            heads,
            k_bpke.shape[2],
            head_dim,
            q_bthe.dtype,
            has_trees,
            soft_cap,
            shards("batch"),
            shards("heads"),
        )

    def misfit(self) -> str | None:
        """Why rows or heads cannot be sharded evenly over the devices; None if they can."""
        if self.batch % self.batch_shards:
            return f"{self.batch} rows on {self.batch_shards} devices along the batch"
        if self.heads % self.head_shards:
            return f"{self.heads} heads on {self.head_shards} devices along the heads"
        if self.kv_heads % self.head_shards and self.head_shards % self.kv_heads:
            return f"{self.kv_heads} key/value heads on {self.head_shards} devices along the heads"
        return None
