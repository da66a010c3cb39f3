"""The identity of a training: a hash of everything that determines its result."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import weakref
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from middo_jax.config import affecting
from middo_jax.models.model import Model
from middo_jax.parallel.hosts import to_host
from middo_jax.training.plan import TrainingPlan


def identity(model: Model, plan: TrainingPlan) -> str:
    """Returns the SHA-256 of the model's config, its initial parameters, the examples and the settings.

    All processes must call it.

    The mesh, the attention kernel, the base model's place and settings that do not affect training do not
    enter it.
    """
    learnt = affecting(plan.settings, {"training"})
    start = values_of(model)
    config = repr(dataclasses.replace(model.config, attention="auto"))
    # Not where the base model lies: its parameters are in `start`, and it may be moved.
    about = {name: value for name, value in plan.metadata.items() if name != "base"}
    about |= {} if plan.n_steps is None else {"n_steps": plan.n_steps}
    decisive = [config, start, learnt, plan.seed, plan.pack_length, about]
    digest = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode())
    for id_, length, of_example in zip(plan.facts.ids, plan.facts.length_n, plan.facts.digests, strict=True):
        digest.update(f"\n{id_} {length}\n".encode() + of_example)
    return digest.hexdigest()


def of_model(model: Model) -> str:
    """Returns the SHA-256 of a model's config and parameters; the attention kernel does not enter it."""
    config = repr(dataclasses.replace(model.config, attention="auto"))
    return hashlib.sha256(json.dumps([config, values_of(model)]).encode()).hexdigest()


def values_of(model: Model) -> list[int]:
    """Returns the checksums of a model's parameters, on every host.

    Those of the last models are known as long as their arrays live: a stage asks for them once per pass.
    """
    leaves = jax.tree.leaves(model.params)
    for arrays, values in _known:
        if len(arrays) == len(leaves) and all(a() is leaf for a, leaf in zip(arrays, leaves, strict=True)):
            return values
    values = values_of_arrays(model.params)
    _known.append(([weakref.ref(leaf) for leaf in leaves], values))
    return values


_known: collections.deque[tuple[list[weakref.ref[jax.Array]], list[int]]] = collections.deque(maxlen=2)


def values_of_arrays(arrays: Any) -> list[int]:
    """Returns the checksums of all arrays of a tree, on every host."""
    return np.stack(to_host(checksums(arrays))).tolist()


@jax.jit
def checksums(params: Any) -> list[jax.Array]:
    """Returns a uint32 per array: the sum modulo 2**32 of each value's bits, mixed with its indices.

    Unlike a sum of floats, it does not depend on the order in which devices and processes add. The mixing is
    MurmurHash3's finalizer.
    """

    def checksum(x: jax.Array) -> jax.Array:
        bits = x
        if x.dtype.itemsize > 1:
            bits = jax.lax.bitcast_convert_type(x, jnp.uint16 if x.dtype.itemsize == 2 else jnp.uint32)
        mixed = bits.astype(jnp.uint32)
        for axis in range(x.ndim):
            mixed = 31 * mixed + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
            for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
                mixed = (mixed ^ (mixed >> shift)) * jnp.uint32(factor)
        return mixed.sum(dtype=jnp.uint32)

    return [checksum(x) for x in jax.tree.leaves(params)]
