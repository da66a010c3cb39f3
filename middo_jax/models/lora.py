"""LoRA (arXiv 2106.09685): adapters and their base model, as two parts of one parameter tree.

    base = without_adapters(model)                       # the same arrays, without the adapters
    model = with_adapters(base, lora, adapters)          # and back
    trained, frozen = partition(model.params, model.config)

The base is never copied: any number of adapters, and the base model itself, can share its arrays.
Axes: docs/contributing.md#axes; i input, o output, r rank of an adapter.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from middo_jax.config import LoraSettings
from middo_jax.models.config import DecoderConfig, Lora
from middo_jax.models.decoder import abstract
from middo_jax.models.model import Model, Params, by_path, joined, parted, with_values
from middo_jax.models.parameters import ParameterSpec, adapters, parameters


def from_settings(settings: LoraSettings) -> Lora | None:
    """The adapters' shape according to the settings; None without a rank."""
    if settings.rank is None:
        return None
    return Lora(settings.rank, settings.alpha, tuple(settings.target_modules))


def trained_parameters(config: DecoderConfig) -> tuple[ParameterSpec, ...]:
    """The rows that training changes and a checkpoint contains: the adapters, or all if there are none."""
    return adapters(config) or parameters(config)


def partition(params: Params, config: DecoderConfig) -> tuple[Params, Params]:
    """(trained parameters, frozen parameters); the latter is empty without adapters."""
    return parted(params, {spec.path for spec in trained_parameters(config)})


def with_adapters(base: Model, lora: Lora, adapters: Params) -> Model:
    """The base model with these adapters."""
    config = dataclasses.replace(base.config, lora=lora)
    return Model.of(config, joined(base.params, adapters), base.mesh)


def without_adapters(model: Model) -> Model:
    """The base model; it shares the arrays. A model without adapters is returned unchanged."""
    if model.config.lora is None:
        return model
    config = dataclasses.replace(model.config, lora=None)
    return Model.of(config, partition(model.params, model.config)[1], model.mesh)


def with_fresh_adapters(base: Model, lora: Lora, seed: int) -> Model:
    """The base model with new adapters that change nothing yet: A is random, B is 0.

    Adapters are float32 whatever the base's dtype: bfloat16 would lose steps of the learning rate's size. The
    same seed produces the same adapters on any mesh.
    """
    config = dataclasses.replace(base.config, lora=lora)
    specs = adapters(config)
    values = jax.jit(
        functools.partial(_initial, specs, config), out_shardings=[spec.sharding(base.mesh) for spec in specs]
    )(jax.random.key(seed))
    of_path = {spec.path: value for spec, value in zip(specs, values, strict=True)}
    shapes, _ = partition(abstract(config)[1], config)
    return with_adapters(base, lora, with_values(shapes, of_path))


def _initial(specs: tuple[ParameterSpec, ...], config: DecoderConfig, key: jax.Array) -> list[jax.Array]:
    keys = jax.random.split(key, len(specs))
    return [spec.initial(key, config) for spec, key in zip(specs, keys, strict=True)]


def merge_adapters(model: Model) -> Model:
    """The equivalent model without adapters: W + scale * A B in float32, cast to W's dtype.

    Parameters are merged one by one and layer by layer, so only one layer is ever in float32.

    Args:
      model: model with adapters. The arrays of its target matrices are donated and cannot be used again.
    """
    config, base = model.config, without_adapters(model)
    if config.lora is None:
        return base
    values = by_path(model.params)
    for path in [spec.path for spec in parameters(config) if spec.path[-1] in config.lora.target_modules]:
        a, b = (values[*path[:-1], f"{path[-1]}_lora_{part}"] for part in "ab")
        values[path] = _merged(values[path], a, b, config.lora.scale)
    return base.with_params(with_values(base.params, values))


@functools.partial(jax.jit, donate_argnums=0)
def _merged(w_lio: jax.Array, a_lir: jax.Array, b_lro: jax.Array, scale: float) -> jax.Array:
    """Axes: l layer, i input, r rank, o output."""

    def merge(layer: int, w_lio: jax.Array) -> jax.Array:
        a_ir, b_ro = (x[layer].astype(jnp.float32) for x in (a_lir, b_lro))
        # HIGHEST: accelerators would otherwise round float32 operands to bfloat16 or TF32.
        change_io = scale * jnp.matmul(a_ir, b_ro, precision=jax.lax.Precision.HIGHEST)
        return w_lio.at[layer].set((w_lio[layer].astype(jnp.float32) + change_io).astype(w_lio.dtype))

    return jax.lax.fori_loop(0, w_lio.shape[0], merge, w_lio)
