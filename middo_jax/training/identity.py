"""Which training a checkpoint belongs to: a hash of all that decides what is learnt."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from middo_jax.config import TrainSettings, affecting
from middo_jax.data.tokenize import TokenizedExample
from middo_jax.models.config import DecoderConfig
from middo_jax.models.model import Params
from middo_jax.parallel.hosts import to_host


def identity(
    config: DecoderConfig,
    params: Params,
    tokenized: Sequence[TokenizedExample],
    settings: TrainSettings,
    seed: int,
    pack_length: int,
    metadata: Mapping[str, Any],
) -> str:
    """SHA-256 of model, parameters before training, examples and settings.

    The mesh, the attention kernel and settings that do not affect training do not enter it.
    """
    learnt = affecting(settings, {"training"})
    start = np.stack(to_host(checksums(params))).tolist()
    model = repr(dataclasses.replace(config, attention="auto"))
    decisive = [model, start, learnt, seed, pack_length, dict(metadata)]
    digest = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode())
    for example in tokenized:
        digest.update(f"\n{example.id} {len(example)}\n".encode())
        digest.update(example.tokens_n.astype("<i4").tobytes() + np.packbits(example.is_target_n).tobytes())
    return digest.hexdigest()


@jax.jit
def checksums(params: Params) -> list[jax.Array]:
    """32 bits of each parameter: each value's bits, mixed with its place, added up modulo 2**32.

    Such a sum does not depend on the order in which devices and processes add, as a sum of floats would. The
    mixing is MurmurHash3's last step.
    """

    def checksum(x: jax.Array) -> jax.Array:
        bits = jax.lax.bitcast_convert_type(x, jnp.uint16 if x.dtype.itemsize == 2 else jnp.uint32)
        mixed = bits.astype(jnp.uint32)
        for axis in range(x.ndim):
            mixed = 31 * mixed + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
            for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
                mixed = (mixed ^ (mixed >> shift)) * jnp.uint32(factor)
        return mixed.sum(dtype=jnp.uint32)

    return [checksum(x) for x in jax.tree.leaves(params)]
