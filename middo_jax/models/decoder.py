"""The one dense decoder: Flax NNX declares it, plain JAX runs it.

    graphdef, params = split(Decoder(config, key))        # once, at the boundary
    hidden_btd = forward(graphdef, params, tokens_bt, segment_ids_bt, positions_bt)

Loss, embedding, judge, training and generation all stand on `hidden()` and `unembed()`.
Axes: b batch, t position, d model width, h query heads, k key/value heads, f MLP width, v vocabulary,
s cache position, l layer.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from middo_jax.models.attention import cached_attention, packed_attention
from middo_jax.models.config import DecoderConfig, Llama3Rope
from middo_jax.models.parameters import parameters
from middo_jax.parallel.mesh import constrain


class KVCache(NamedTuple):
    """Keys and values of what was read so far: [layers, b, s, kv heads, head_dim] each."""

    keys: jax.Array
    values: jax.Array


class Layers(nnx.Module):
    """All layers, stacked on the leading axis of every parameter."""


class Decoder(nnx.Module):
    """Llama-shaped decoder; its parameters are the rows of `parameters(config)`."""

    embed: nnx.Param
    lm_head: nnx.Param  # absent if tied
    final_norm: nnx.Param

    def __init__(self, config: DecoderConfig, key: jax.Array) -> None:
        self.config = config
        self.layers = Layers()
        specs = parameters(config)
        for spec, spec_key in zip(specs, jax.random.split(key, len(specs)), strict=True):
            owner = self.layers if spec.is_stacked else self
            setattr(owner, spec.path[-1], nnx.Param(spec.initial(spec_key, config)))

    def hidden(
        self,
        tokens_bt: jax.Array,
        segment_ids_bt: jax.Array,
        positions_bt: jax.Array,
        branch_ids_bt: jax.Array | None = None,
        *,
        remat: bool = False,
    ) -> jax.Array:
        """Last hidden state, after the final norm, of packed sequences.

        Args:
          tokens_bt: int32 token ids.
          segment_ids_bt: which example a position belongs to, -1 for padding.
          positions_bt: position within the example, for RoPE.
          branch_ids_bt: see `packed_attention`.
          remat: keep only each layer's input for the backward pass, recompute the rest.

        Returns:
          [b, t, d] in the config's dtype.
        """
        rope = rope_tables(self.config, positions_bt)

        def attend(q_bthd: jax.Array, k_btkd: jax.Array, v_btkd: jax.Array) -> jax.Array:
            return packed_attention(q_bthd, k_btkd, v_btkd, segment_ids_bt, branch_ids_bt)

        def layer(x_btd: jax.Array, weights: dict[str, jax.Array]) -> tuple[jax.Array, None]:
            q, k, v = self._project(x_btd, weights, rope)
            return self._finish(x_btd, attend(q, k, v), weights), None

        body = jax.checkpoint(layer) if remat else layer
        x_btd, _ = jax.lax.scan(body, self._embed(tokens_bt), self._stacked())
        return rms_norm(x_btd, self.final_norm[...], self.config.rms_norm_eps)

    def hidden_cached(
        self, tokens_bt: jax.Array, positions_bt: jax.Array, cache: KVCache
    ) -> tuple[jax.Array, KVCache]:
        """Reads t more tokens of every row, writing their keys and values into the cache.

        Prefill and decode are the same pass. A position attends to all cache slots up to itself, so that a
        prompt padded on the right is harmless: what its padding wrote lies behind, and is overwritten before
        it is ever seen. A position >= s (an idle row) writes nothing.

        Returns:
          ([b, t, d] last hidden state after the final norm, the cache with t more tokens).
        """
        rope = rope_tables(self.config, positions_bt)
        rows_b1 = jnp.arange(tokens_bt.shape[0])[:, None]

        # The cache is carried, not scanned over: as a scanned input and output it would be copied every call.
        def layer(
            carry: tuple[jax.Array, KVCache], inputs: tuple[dict[str, jax.Array], jax.Array]
        ) -> tuple[tuple[jax.Array, KVCache], None]:
            (x_btd, (keys, values)), (weights, index) = carry, inputs
            q, k, v = self._project(x_btd, weights, rope)
            keys = keys.at[index, rows_b1, positions_bt].set(k, mode="drop")
            values = values.at[index, rows_b1, positions_bt].set(v, mode="drop")
            attended = cached_attention(q, keys, values, index, positions_bt)
            return (self._finish(x_btd, attended, weights), KVCache(keys, values)), None

        layers = (self._stacked(), jnp.arange(self.config.num_layers))
        (x_btd, cache), _ = jax.lax.scan(layer, (self._embed(tokens_bt), cache), layers)
        return rms_norm(x_btd, self.final_norm[...], self.config.rms_norm_eps), cache

    def unembed(self, hidden_nd: jax.Array) -> jax.Array:
        """Logits [n, v] in float32 of n hidden states."""
        head_vd = self.embed if self.config.tie_word_embeddings else self.lm_head
        head_vd = head_vd[...].astype(hidden_nd.dtype)
        return jnp.einsum("nd,vd->nv", hidden_nd, head_vd, preferred_element_type=jnp.float32)

    def _stacked(self) -> dict[str, jax.Array]:
        return {
            spec.path[-1]: getattr(self.layers, spec.path[-1])[...]
            for spec in parameters(self.config)
            if spec.is_stacked
        }

    def _embed(self, tokens_bt: jax.Array) -> jax.Array:
        # Gathered along fsdp before the look-up, as every other matrix is before its product.
        table_vd = constrain(self.embed[...], "vocab", "hidden")
        return constrain(table_vd[tokens_bt].astype(self.config.dtype), "batch", "length", "hidden")

    def _project(
        self, x_btd: jax.Array, weights: dict[str, jax.Array], rope: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        config = self.config
        normed_btd = rms_norm(x_btd, weights["attention_norm"], config.rms_norm_eps)

        def heads(name: str, count: int, axis: str) -> jax.Array:
            y = constrain(_linear(normed_btd, weights[name]), "batch", "length", axis)
            return y.reshape(*y.shape[:2], count, config.head_dim)

        q_bthd = apply_rope(heads("q_proj", config.num_heads, "heads"), rope)
        k_btkd = apply_rope(heads("k_proj", config.num_kv_heads, "kv_heads"), rope)
        return q_bthd, k_btkd, heads("v_proj", config.num_kv_heads, "kv_heads")

    def _finish(self, x_btd: jax.Array, attended_bthd: jax.Array, weights: dict[str, jax.Array]) -> jax.Array:
        merged = attended_bthd.reshape(*attended_bthd.shape[:2], -1)
        x_btd = constrain(x_btd + _linear(merged, weights["o_proj"]), "batch", "length", "hidden")
        normed_btd = rms_norm(x_btd, weights["mlp_norm"], self.config.rms_norm_eps)
        gate_btf = jax.nn.silu(_linear(normed_btd, weights["gate_proj"]))
        inner_btf = constrain(gate_btf * _linear(normed_btd, weights["up_proj"]), "batch", "length", "mlp")
        return constrain(x_btd + _linear(inner_btf, weights["down_proj"]), "batch", "length", "hidden")


def split(model: Decoder) -> tuple[nnx.GraphDef[Decoder], nnx.State]:
    """(static structure, parameters): the only place where NNX meets the rest of the program."""
    return nnx.split(model)


def abstract(config: DecoderConfig) -> tuple[nnx.GraphDef[Decoder], nnx.State]:
    """The same without any array: the parameters are shapes and dtypes."""
    return split(nnx.eval_shape(lambda: Decoder(config, jax.random.key(0))))


def forward(
    graphdef: nnx.GraphDef[Decoder],
    params: nnx.State,
    tokens_bt: jax.Array,
    segment_ids_bt: jax.Array,
    positions_bt: jax.Array,
) -> jax.Array:
    """`Decoder.hidden` as a pure function of its parameters."""
    return nnx.merge(graphdef, params).hidden(tokens_bt, segment_ids_bt, positions_bt)


def empty_cache(config: DecoderConfig, batch: int, length: int) -> KVCache:
    """A cache of zeros for `batch` rows of `length` positions, in the config's dtype."""
    shape = (config.num_layers, batch, length, config.num_kv_heads, config.head_dim)
    return KVCache(jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype))


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """x / rms(x) * scale over the last axis, computed in float32 (arXiv 1910.07467)."""
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return x32.astype(x.dtype) * scale.astype(x.dtype)


def rope_tables(config: DecoderConfig, positions_bt: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(cos, sin) [b, t, 1, head_dim / 2] of the rotary angles.

    float32: bfloat16 rounds 257 to 256, and a RoPE angle of 257 is not one of 256.
    """
    exponents = jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponents
    if config.rope_scaling is not None:
        frequencies = _llama3_frequencies(frequencies, config.rope_scaling)
    angles = positions_bt[..., None, None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def _llama3_frequencies(frequencies: jax.Array, scaling: Llama3Rope) -> jax.Array:
    """Low frequencies are divided by `factor`, high ones kept, those between interpolated.

    The formula is that of Llama 3.1's reference code: a wavelength longer than
    original_max_position_embeddings / low_freq_factor is low, one shorter than .../high_freq_factor is high.
    """
    wavelengths = 2 * math.pi / frequencies
    ratio = scaling.original_max_position_embeddings / wavelengths
    high_share = (ratio - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    high_share = jnp.clip(high_share, 0.0, 1.0)
    return frequencies * ((1 - high_share) / scaling.factor + high_share)


def apply_rope(x_bthd: jax.Array, rope: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates the pairs (i, i + head_dim / 2) by their angles (arXiv 2104.09864, Hugging Face's layout)."""
    cos, sin = rope
    first, second = jnp.split(x_bthd.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_bthd.dtype)


def _linear(x_btd: jax.Array, weight_df: jax.Array) -> jax.Array:
    return jnp.einsum("btd,df->btf", x_btd, weight_df.astype(x_btd.dtype))
