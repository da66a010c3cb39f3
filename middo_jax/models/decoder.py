"""The one dense decoder: Flax NNX declares it, plain JAX runs it.

    graphdef, params = split(Decoder(config, key))        # once, at the boundary: see models/model.py
    hidden_btd = bound(graphdef, params).hidden(tokens_bt, segment_ids_bt, positions_bt)

Losses, embeddings, ratings and training are built on `hidden()`, generation on `hidden_cached()`.
Axes: docs/contributing.md#axes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from middo_jax.models.attention import (
    ATTENDED,
    AttentionSpec,
    CachedLayer,
    Packing,
    cached_attention,
    packed_attention,
)
from middo_jax.models.attention.placement import platform
from middo_jax.models.config import DecoderConfig, LayerKind, LinearRope, Llama3Rope
from middo_jax.models.parameters import adapters, parameters
from middo_jax.parallel.mesh import constrain

Result = TypeVar("Result")
Rope = tuple[jax.Array, jax.Array]
Remat = Literal["none", "dots", "layer"]


class KVCache(NamedTuple):
    """Keys and values of the tokens read so far, each [layers, b, s, kv heads, head_dim]."""

    keys: jax.Array
    values: jax.Array


class Layers(nnx.Module):
    """All layers, stacked on the leading axis of every parameter."""


class Decoder(nnx.Module):
    """Dense decoder; its parameters are the rows of `parameters(config)` and `adapters(config)`."""

    embed: nnx.Param
    lm_head: nnx.Param  # absent if tied
    final_norm: nnx.Param

    def __init__(self, config: DecoderConfig, key: jax.Array) -> None:
        self.config = config
        self.layers = Layers()
        specs = (*parameters(config), *adapters(config))
        for spec, spec_key in zip(specs, jax.random.split(key, len(specs)), strict=True):
            owner = self.layers if spec.is_stacked else self
            setattr(owner, spec.path[-1], nnx.Param(spec.initial(spec_key, config)))

    def hidden(
        self,
        tokens_bt: jax.Array,
        segment_ids_bt: jax.Array,
        positions_bt: jax.Array,
        until_bt: jax.Array | None = None,
        *,
        prefix: int = 0,
        longest: int | None = None,
        remat: Remat = "none",
    ) -> jax.Array:
        """Last hidden state, after the final norm, of packed sequences.

        Args:
          tokens_bt: int32 token ids.
          segment_ids_bt: each position's example, -1 for padding.
          positions_bt: position within the example, for RoPE and windows.
          until_bt, prefix, longest: see `Packing`.
          remat: what each layer saves for the backward pass; the rest is recomputed. "none": everything;
            "dots": its input, its products with weights and the result of attention; "layer": its input.

        Returns:
          [b, t, d] in the config's dtype.
        """
        packing = Packing(segment_ids_bt, positions_bt, until_bt, prefix, longest)
        attention = functools.partial(packed_attention, kernel=self.config.attention)
        ropes, attends = self._ropes(positions_bt), self._by_kind(attention)

        def layer(x_btd: jax.Array, inputs: tuple[dict[str, jax.Array], jax.Array]) -> tuple[jax.Array, None]:
            weights, kind = inputs
            q, k, v = self._project(x_btd, weights, _of_kind(kind, ropes))
            return self._finish(x_btd, _of_kind(kind, attends, q, k, v, packing), weights), None

        body = layer if remat == "none" else jax.checkpoint(layer, policy=_KEPT[remat])
        x_btd, _ = jax.lax.scan(body, self._embed(tokens_bt), (self._stacked(), self._kinds()))
        return self._norm(x_btd, self.final_norm[...])

    def hidden_cached(
        self, tokens_bt: jax.Array, positions_bt: jax.Array, cache: KVCache, first_row: jax.Array | int = 0
    ) -> tuple[jax.Array, KVCache]:
        """Processes t more tokens for b rows of the cache, and writes their keys and values into it.

        Prefill and decode are the same pass. A position attends to all cache slots up to its own, so a prompt
        may be padded on the right: the padding's slots follow the prompt, and are overwritten before any
        position attends to them. A position >= s (an idle row) writes nothing.

        Args:
          tokens_bt: int32 token ids.
          positions_bt: cache slot of each token within its row.
          cache: cache of b rows or more.
          first_row: index of the first row that is read; the others follow it.

        Returns:
          ([b, t, d] last hidden state after the final norm, the cache with t more tokens).
        """
        ropes, attends = self._ropes(positions_bt), self._by_kind(cached_attention)
        rows_b1 = first_row + jnp.arange(tokens_bt.shape[0])[:, None]

        # The cache is part of the carry: as a scanned input and output it would be copied on every call.
        def layer(
            carry: tuple[jax.Array, KVCache], inputs: tuple[dict[str, jax.Array], jax.Array, jax.Array]
        ) -> tuple[tuple[jax.Array, KVCache], None]:
            (x_btd, (keys, values)), (weights, kind, index) = carry, inputs
            q, k, v = self._project(x_btd, weights, _of_kind(kind, ropes))
            keys = keys.at[index, rows_b1, positions_bt].set(k, mode="drop")
            values = values.at[index, rows_b1, positions_bt].set(v, mode="drop")
            cached = CachedLayer(keys, values, index, first_row)
            attended = _of_kind(kind, attends, q, cached, positions_bt)
            return (self._finish(x_btd, attended, weights), KVCache(keys, values)), None

        layers = (self._stacked(), self._kinds(), jnp.arange(self.config.num_layers))
        # On a GPU, a loop copies each layer's weights out of the stack, which triples a decode step's bytes.
        unroll = self.config.num_layers if platform() == "gpu" else 1
        (x_btd, cache), _ = jax.lax.scan(layer, (self._embed(tokens_bt), cache), layers, unroll=unroll)
        return self._norm(x_btd, self.final_norm[...]), cache

    def unembed(self, hidden_nd: jax.Array) -> jax.Array:
        """Float32 logits [n, v] of n hidden states."""
        return soft_capped(head_product(self.head(), hidden_nd), self.config.final_soft_cap)

    def head(self) -> jax.Array:
        """The unembedding matrix [v, d], in the parameters' dtype."""
        return (self.embed if self.config.tie_word_embeddings else self.lm_head)[...]

    def _stacked(self) -> dict[str, jax.Array]:
        specs = (*parameters(self.config), *adapters(self.config))
        names = [spec.path[-1] for spec in specs if spec.is_stacked]
        return {name: getattr(self.layers, name)[...] for name in names}

    def _kinds(self) -> jax.Array:
        """Index of each layer's kind, [l]."""
        return jnp.asarray(self.config.kind_of_layer or (0,) * self.config.num_layers)

    def _ropes(self, positions_bt: jax.Array) -> list[Callable[[], Rope]]:
        """Per kind of layer, a function that returns its rotary angles, computed once for all layers."""
        tables = [rope_tables(kind, self.config.head_dim, positions_bt) for kind in self.config.kinds]
        return [functools.partial(lambda table: table, table) for table in tables]

    def _by_kind(self, attention: Callable[..., jax.Array]) -> list[Callable[..., jax.Array]]:
        """Per kind of layer, its attention function."""
        scale, soft_cap = self.config.attention_scale, self.config.attention_soft_cap
        specs = (AttentionSpec(scale, kind.window, soft_cap) for kind in self.config.kinds)
        return [functools.partial(attention, spec=spec) for spec in specs]

    def _norm(self, x: jax.Array, scale: jax.Array) -> jax.Array:
        return rms_norm(x, scale, self.config.rms_norm_eps, self.config.norm_offset)

    def _embed(self, tokens_bt: jax.Array) -> jax.Array:
        # Gathered along fsdp before the look-up, as every other matrix is before its product.
        table_vd = constrain(self.embed[...], "vocab", "hidden")
        x_btd = table_vd[tokens_bt].astype(self.config.dtype)
        if self.config.embed_scale != 1:
            x_btd *= jnp.asarray(self.config.embed_scale, x_btd.dtype)
        return constrain(x_btd, "batch", "length", "hidden")

    def _linear(self, x_btd: jax.Array, weights: dict[str, jax.Array], name: str) -> jax.Array:
        """x W, plus the output of the matrix's adapter and its bias, where it has them."""
        y_btf = _matmul(x_btd, weights[name])
        if (lora := self.config.lora) and name in lora.target_modules:
            low_btr = checkpoint_name(_matmul(x_btd, weights[f"{name}_lora_a"]), _PRODUCT)
            y_btf += lora.scale * _matmul(low_btr, weights[f"{name}_lora_b"])
        if (bias := name.replace("_proj", "_bias")) in weights:
            y_btf += weights[bias].astype(y_btf.dtype)
        return checkpoint_name(y_btf, _PRODUCT)

    @jax.named_scope("qkv")
    def _project(
        self, x_btd: jax.Array, weights: dict[str, jax.Array], rope: Rope
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        config = self.config
        normed_btd = self._norm(x_btd, weights["attention_norm"])

        def heads(name: str, count: int, axis: str) -> jax.Array:
            y = constrain(self._linear(normed_btd, weights, name), "batch", "length", axis)
            return y.reshape(*y.shape[:2], count, config.head_dim)

        q_bthe = heads("q_proj", config.num_heads, "heads")
        k_btke = heads("k_proj", config.num_kv_heads, "kv_heads")
        v_btke = heads("v_proj", config.num_kv_heads, "kv_heads")
        if config.qk_norm:
            q_bthe = self._norm(q_bthe, weights["q_norm"])
            k_btke = self._norm(k_btke, weights["k_norm"])
        return apply_rope(q_bthe, rope), apply_rope(k_btke, rope), v_btke

    @jax.named_scope("o_mlp")
    def _finish(self, x_btd: jax.Array, attended_bthe: jax.Array, weights: dict[str, jax.Array]) -> jax.Array:
        config = self.config

        def add(x_btd: jax.Array, y_btd: jax.Array, post_norm: str) -> jax.Array:
            if config.post_norms:
                y_btd = self._norm(y_btd, weights[post_norm])
            return constrain(x_btd + y_btd, "batch", "length", "hidden")

        merged = attended_bthe.reshape(*attended_bthe.shape[:2], -1)
        x_btd = add(x_btd, self._linear(merged, weights, "o_proj"), "post_attention_norm")
        normed_btd = self._norm(x_btd, weights["mlp_norm"])
        gate_btf = _ACTIVATIONS[config.hidden_act](self._linear(normed_btd, weights, "gate_proj"))
        up_btf = self._linear(normed_btd, weights, "up_proj")
        inner_btf = constrain(gate_btf * up_btf, "batch", "length", "mlp")
        return add(x_btd, self._linear(inner_btf, weights, "down_proj"), "post_mlp_norm")


def head_product(head_vd: jax.Array, hidden_nd: jax.Array) -> jax.Array:
    """Logits before the soft cap, [n, v] float32; the product is in the hidden states' dtype."""
    return jnp.einsum(
        "nd,vd->nv", hidden_nd, head_vd.astype(hidden_nd.dtype), preferred_element_type=jnp.float32
    )


def soft_capped(logits_nv: jax.Array, cap: float | None) -> jax.Array:
    """cap * tanh(logits / cap), or the logits unchanged without a cap (arXiv 2408.00118, section 2)."""
    return logits_nv if cap is None else cap * jnp.tanh(logits_nv / cap)


def split(model: Decoder) -> tuple[nnx.GraphDef[Decoder], nnx.State]:
    """Splits a decoder into its static structure and its parameters."""
    return nnx.split(model)


def abstract(config: DecoderConfig) -> tuple[nnx.GraphDef[Decoder], nnx.State]:
    """Structure and parameters without any array: the parameters are shapes and dtypes."""
    return split(nnx.eval_shape(lambda: Decoder(config, jax.random.key(0))))


def empty_cache(config: DecoderConfig, batch: int, length: int) -> KVCache:
    """A cache of zeros for `batch` rows of `length` positions, in the config's dtype."""
    shape = (config.num_layers, batch, length, config.num_kv_heads, config.head_dim)
    return KVCache(jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype))


def rms_norm(x: jax.Array, scale: jax.Array, eps: float, offset: float = 0.0) -> jax.Array:
    """x / rms(x) * (offset + scale) over the last axis, the quotient in float32 (arXiv 1910.07467).

    With an offset, the result is rounded after the multiplication by the scale; without one, before it. The
    models with and without an offset were trained this way.
    """
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    if offset:
        return (x32 * (offset + scale.astype(jnp.float32))).astype(x.dtype)
    return x32.astype(x.dtype) * scale.astype(x.dtype)


def rope_tables(kind: LayerKind, head_dim: int, positions_bt: jax.Array) -> Rope:
    """(cos, sin) [b, t, 1, head_dim / 2] of the rotary angles.

    float32: bfloat16 rounds 257 to 256, and a RoPE angle of 257 is not one of 256.
    """
    exponents = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    frequencies = 1.0 / kind.rope_theta**exponents
    match kind.rope_scaling:
        case LinearRope(factor):
            frequencies /= factor
        case Llama3Rope():
            frequencies = _llama3_frequencies(frequencies, kind.rope_scaling)
    angles = positions_bt[..., None, None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def _llama3_frequencies(frequencies: jax.Array, scaling: Llama3Rope) -> jax.Array:
    """Divides low frequencies by `factor`, keeps high ones, and interpolates between them.

    The formula is that of Llama 3.1's reference code. Low: the wavelength is longer than
    original_max_position_embeddings / low_freq_factor. High: it is shorter than .../high_freq_factor.
    """
    wavelengths = 2 * math.pi / frequencies
    ratio = scaling.original_max_position_embeddings / wavelengths
    high_share = (ratio - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    high_share = jnp.clip(high_share, 0.0, 1.0)
    return frequencies * ((1 - high_share) / scaling.factor + high_share)


def apply_rope(x_bthe: jax.Array, rope: Rope) -> jax.Array:
    """Rotates each pair (i, i + head_dim / 2) by its angle (arXiv 2104.09864, Hugging Face's layout)."""
    cos, sin = rope
    first, second = jnp.split(x_bthe.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_bthe.dtype)


# What a checkpointed layer saves for the backward pass besides its input; the rest is recomputed. The output
# of an adapter is saved only as part of the sum.
_PRODUCT = "product"
_KEPT = {"dots": jax.checkpoint_policies.save_only_these_names(_PRODUCT, ATTENDED), "layer": None}
_ACTIVATIONS = {"silu": jax.nn.silu, "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True)}


def _of_kind(kind: jax.Array, functions: Sequence[Callable[..., Result]], *operands: Any) -> Result:
    """Calls the function of a layer's kind. Only that one runs; with a single kind there is no switch."""
    return functions[0](*operands) if len(functions) == 1 else jax.lax.switch(kind, functions, *operands)


def _matmul(x_btd: jax.Array, weight_df: jax.Array) -> jax.Array:
    # Flattened: XLA would transpose the operands of a weight's gradient that contracts over two axes.
    rows_nd = x_btd.reshape(-1, x_btd.shape[-1])
    return (rows_nd @ weight_df.astype(x_btd.dtype)).reshape(*x_btd.shape[:-1], -1)
