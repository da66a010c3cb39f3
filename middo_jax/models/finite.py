"""Weights must be finite: one NaN in a model makes every score NaN.

Each tensor is reduced to one flag where it lies, and all flags of a model are read together.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp


def not_finite_names(flags: Mapping[str, jax.Array]) -> list[str]:
    """The names whose flag, of `is_finite`, is False."""
    return [name for name, flag in jax.device_get(dict(flags)).items() if not flag]


@jax.jit
def is_finite(x: jax.Array) -> jax.Array:
    """bool: whether no element is NaN or infinite."""
    return jnp.isfinite(x).all()


def not_finite(where: object, names: Iterable[str]) -> str:
    """The sentence about tensors that are not finite."""
    first, *others = names
    which = f"tensor {first} and {len(others)} more hold" if others else f"tensor {first} holds"
    return (
        f"{where}: {which} NaN or infinite values; the file is damaged, or its training "
        "diverged: get the model again, or take an earlier one"
    )
