"""`Decoder.hidden` as a pure function, to be jitted with its first argument static."""

from __future__ import annotations

import jax

from middo_jax.models.model import Params, Structure, bound


def forward(
    graphdef: Structure,
    params: Params,
    tokens_bt: jax.Array,
    segment_ids_bt: jax.Array,
    positions_bt: jax.Array,
) -> jax.Array:
    """Last hidden states [b, t, d] of packed rows."""
    return bound(graphdef, params).hidden(tokens_bt, segment_ids_bt, positions_bt)
