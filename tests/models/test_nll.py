"""Laws of the chunked loss: it and its gradient are those of whole logits, and shares keep to themselves."""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.tiny_training import mesh_of

from middo_jax.models.config import DecoderConfig
from middo_jax.models.decoder import Decoder, split
from middo_jax.models.model import Params, abstract_model, bound
from middo_jax.models.nll import target_nll, target_nll_sum
from middo_jax.parallel.mesh import named_sharding

CONFIG = DecoderConfig(400, 32, 64, 1, 4, 2, 8, 64)
Batch = tuple[jax.Array, jax.Array, jax.Array]  # hidden states, next tokens, which are targets


def naive_nll(model: Any, hidden_btd: jax.Array, next_bt: jax.Array, is_target_bt: jax.Array) -> jax.Array:
    b, t, d = hidden_btd.shape
    log_p = jax.nn.log_softmax(model.unembed(hidden_btd.reshape(b * t, d)).reshape(b, t, -1))
    chosen = jnp.take_along_axis(log_p, next_bt[..., None], axis=2)[..., 0]
    return jnp.where(is_target_bt, -chosen, 0.0)


@pytest.mark.parametrize("cap", [None, 0.5])
@pytest.mark.parametrize("chunk", [1, 21, 400])
def test_chunked_loss_and_gradient_are_those_of_whole_logits(chunk: int, cap: float | None) -> None:
    rng = np.random.default_rng(chunk)
    config = dataclasses.replace(CONFIG, final_soft_cap=cap)
    graphdef, params = split(Decoder(config, jax.random.key(chunk)))
    hidden = jnp.asarray(rng.standard_normal((4, 21, 32)), jnp.float32)
    next_bt = jnp.asarray(rng.integers(0, 400, (4, 21)), jnp.int32)

    def gradient_of(nll_sum: Any) -> Any:
        def loss(params: Params, hidden: jax.Array, is_target: jax.Array) -> jax.Array:
            return 3 * nll_sum(bound(graphdef, params), hidden, next_bt, is_target)

        return jax.jit(jax.value_and_grad(loss, (0, 1)))

    def by_position(nll: Any, params: Params, hidden: jax.Array, is_target: jax.Array) -> jax.Array:
        return nll(bound(graphdef, params), hidden, next_bt, is_target)

    ours = gradient_of(functools.partial(target_nll_sum, chunk=chunk))
    theirs = gradient_of(lambda *x: naive_nll(*x).sum())
    for share in (0.0, 0.3, 1.0):
        is_target = rng.random((4, 21)) < share * np.asarray([[1.0], [0.2], [0.0], [1.0]])
        is_target[:, -1] = False  # nothing follows
        x = params, hidden, jnp.asarray(is_target)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), ours(*x), theirs(*x)
        )
        chunked = by_position(functools.partial(target_nll, chunk=chunk), *x)
        np.testing.assert_allclose(chunked, by_position(naive_nll, *x), rtol=1e-5, atol=1e-5)


def test_in_the_loop_nothing_passes_between_shares() -> None:
    """The head is sent to the shares before it, and what they add up of its gradient is added behind it."""
    mesh, chunk = mesh_of(2, 4, 1), 8
    model = abstract_model(CONFIG, mesh, "float32")

    def batch(*inner: int, dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((8, 21, *inner), dtype, sharding=named_sharding(mesh, "batch"))

    def by_position(params: Params, *batch: *Batch) -> jax.Array:
        return target_nll(bound(model.graphdef, params), *batch, chunk)

    def total(params: Params, *batch: *Batch) -> jax.Array:
        return target_nll_sum(bound(model.graphdef, params), *batch, chunk)

    arrays = model.params, batch(32, dtype=jnp.float32), batch(dtype=jnp.int32), batch(dtype=jnp.bool_)
    for loss in by_position, jax.grad(total, (0, 1)):
        with jax.set_mesh(mesh):
            program = jax.jit(loss).lower(*arrays).compile().as_text()
        assert program is not None
        computations = re.split(r"\n(?=\S)", program)
        bodies = re.findall(r"body=(%[\w.-]+)", program)
        in_loops = [c for c in computations if c.startswith(tuple(f"{body} " for body in bodies))]
        assert len(in_loops) == len(bodies) > 0
        collective = re.compile(r"(all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute)\S*\(")
        assert collective.search(program), "the head is split"
        assert not any(collective.search(c) for c in in_loops)


def test_a_frozen_head_has_no_gradient() -> None:
    """None is computed either: the product with the hidden states is not in the program."""
    graphdef, params = split(Decoder(CONFIG, jax.random.key(0)))
    hidden, tokens = jnp.ones((2, 21, 32)), jnp.zeros((2, 21), jnp.int32)

    def loss(params: Params, hidden: jax.Array) -> jax.Array:
        return target_nll_sum(bound(graphdef, params), hidden, tokens, tokens == 0, 8)

    def products(of: int | tuple[int, ...]) -> int:
        return str(jax.make_jaxpr(jax.grad(loss, of))(params, hidden)).count("dot_general")

    assert products((0, 1)) == 3
    assert products(0) == products(1) == 2


@pytest.mark.as_in_use
def test_smaller_chunks_take_less_memory_backwards_too() -> None:
    """The unembedding is not kept once for every chunk."""
    graphdef, params = split(Decoder(DecoderConfig(4096, 32, 64, 1, 4, 2, 8, 64), jax.random.key(0)))
    hidden, tokens = jnp.zeros((2, 256, 32)), jnp.zeros((2, 256), jnp.int32)

    def temporary_bytes(chunk: int) -> int:
        def loss(params: Params, hidden: jax.Array) -> jax.Array:
            return target_nll_sum(bound(graphdef, params), hidden, tokens, tokens == 0, chunk)

        compiled = jax.jit(jax.grad(loss, (0, 1))).lower(params, hidden).compile()
        memory = compiled.memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes

    assert temporary_bytes(16) < temporary_bytes(64) < temporary_bytes(512)
