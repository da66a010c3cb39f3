"""Stochastic rounding from float32 to bfloat16: the expected value is the number itself.

Rounding to nearest loses every update smaller than half a unit in the last place: with the 8 bits of
bfloat16, all updates under 1/512 of the parameter. Stochastic rounding keeps them on average
(Gupta et al. 2015, arXiv 1502.02551).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def stochastic_round(x: jax.Array, key: jax.Array) -> jax.Array:
    """Rounds each float32 to one of its two bfloat16 neighbours, the nearer one with higher probability.

    The lower 16 bits of a float32 are its distance from the lower neighbour, in 1/65536 of the gap. The
    function adds a random 16-bit number and drops the lower 16 bits. Values that bfloat16 can represent, inf
    and NaN stay unchanged.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    # The upper 16 bits of the sum are the bfloat16.
    upper = ((bits + noise) >> 16).astype(jnp.uint16)
    rounded = jax.lax.bitcast_convert_type(upper, jnp.bfloat16)
    return jnp.where(jnp.isfinite(x), rounded, x.astype(jnp.bfloat16))
