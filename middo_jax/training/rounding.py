"""float32 -> bfloat16 by chance: up or down, such that the expected value is the number itself.

Rounding to nearest loses every update that is less than half of a parameter's last place: in bfloat16, with
its 8 bits, all steps under 1/512 of the parameter. By chance they are taken that often that they add up
(Gupta et al. 2015, arXiv 1502.02551).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def stochastic_round(x: jax.Array, key: jax.Array) -> jax.Array:
    """Each float32 to one of its two bfloat16 neighbours, to the nearer one more often.

    The lower 16 bits of a float32 are how far it is from the one below, in 1/65536 of the gap: a random
    number of 16 bits is added, and they are cut off. What bfloat16 holds exactly stays; so do inf and NaN.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    # The upper half of the sum is the bfloat16 itself.
    upper = ((bits + noise) >> 16).astype(jnp.uint16)
    rounded = jax.lax.bitcast_convert_type(upper, jnp.bfloat16)
    return jnp.where(jnp.isfinite(x), rounded, x.astype(jnp.bfloat16))
