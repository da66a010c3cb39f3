"""Laws of LoRA: what adapters compute, what training changes, and that a base is never there twice."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import Mesh
from support.tiny_model import FAMILIES, write_tiny_model

from middo_jax.config import AdamW, AdaptedMatrix, LoraSettings, MeshSettings, TrainSettings
from middo_jax.data.packing import pack
from middo_jax.data.tokenize import TokenizedExample
from middo_jax.models import hf
from middo_jax.models.checkpoint import restore_params
from middo_jax.models.config import DecoderConfig, Lora
from middo_jax.models.decoder import Decoder, split
from middo_jax.models.lora import (
    from_settings,
    merge_adapters,
    partition,
    with_adapters,
    with_fresh_adapters,
    without_adapters,
)
from middo_jax.models.model import Model, Params, Structure, abstract_model, bound
from middo_jax.models.parameters import LORA_TARGETS, adapters
from middo_jax.parallel.mesh import make_mesh
from middo_jax.rundir import RunError, read_jsonl
from middo_jax.training.hooks import on_metrics
from middo_jax.training.identity import identity
from middo_jax.training.metrics import StepMetrics
from middo_jax.training.optimizer import abstract_opt_state, decayed, make_optimizer
from middo_jax.training.plan import TrainingPlan
from middo_jax.training.sft import train
from middo_jax.training.step import batch_gradient, put_batch

BASE = DecoderConfig(96, 32, 64, 2, 4, 2, 8, 64)
LORA = Lora(4, 8.0, LORA_TARGETS)
PACK, CHUNK = 32, 16
SETTINGS = TrainSettings(
    learning_rate=1e-2,
    batch_size=8,
    num_epochs=2,
    optimizer=AdamW(weight_decay=0.1),
    warmup_ratio=0.2,
    save_every=3,
)


def mesh_of(data: int, fsdp: int, tensor: int) -> Mesh:
    settings = MeshSettings(data=data, fsdp=fsdp, tensor=tensor)
    return make_mesh(settings, jax.devices()[: data * fsdp * tensor])


ONE = mesh_of(1, 1, 1)


def base_model(dtype: str = "float32", seed: int = 0, mesh: Mesh = ONE) -> Model:
    graphdef, params = split(Decoder(BASE, jax.random.key(seed)))
    return Model(BASE, graphdef, jax.tree.map(lambda x: x.astype(dtype), params), mesh)


def with_random_adapters(base: Model, lora: Lora = LORA, size: float = 0.1) -> Model:
    """As after some training: neither A nor B is 0."""
    fresh = with_fresh_adapters(base, lora, seed=5)
    trained, _ = partition(fresh.params, fresh.config)
    keys = iter(jax.random.split(jax.random.key(6), len(jax.tree.leaves(trained))))
    trained = jax.tree.map(lambda x: x + size * jax.random.normal(next(keys), x.shape), trained)
    return with_adapters(without_adapters(fresh), lora, trained)


def logits(model: Model) -> jax.Array:
    """[n, v] of a fixed pack of two segments."""
    return _logits(model.graphdef, model.params)


@jax.jit(static_argnums=0)
def _logits(graphdef: Structure, params: Params) -> jax.Array:
    model = bound(graphdef, params)
    tokens = jax.random.randint(jax.random.key(1), (2, 24), 0, model.config.vocab_size)
    segments = jnp.broadcast_to(jnp.arange(24) // 12, tokens.shape)
    positions = jnp.broadcast_to(jnp.arange(24) % 12, tokens.shape)
    hidden_btd = model.hidden(tokens, segments, positions)
    return model.unembed(hidden_btd.reshape(-1, model.config.hidden_size))


def largest_difference(got: jax.Array, want: jax.Array) -> float:
    """Relative to the largest entry."""
    return float(jnp.abs(got - want).max() / jnp.abs(want).max())


def examples(count: int) -> list[TokenizedExample]:
    rng = np.random.default_rng(0)
    made = []
    for i in range(count):
        length = 4 + (7 * i) % 25
        tokens, is_target = rng.integers(2, 96, length).astype(np.int32), np.arange(length) >= length // 2
        made.append(TokenizedExample(f"id{i}", tokens, is_target, ~is_target, False))
    return made


def fine_tune(
    out_dir: Path,
    mesh: Mesh = ONE,
    on_step: Callable[[StepMetrics], None] | None = None,
    base: Model | None = None,
    lora: Lora = LORA,
    count: int = 40,
    settings: TrainSettings = SETTINGS,
) -> Params:
    base = dataclasses.replace(base or base_model(), mesh=mesh)
    trained = train(
        with_fresh_adapters(base, lora, seed=0),
        TrainingPlan(examples(count), settings, 3, PACK),
        out_dir,
        chunk=CHUNK,
        hooks=[] if on_step is None else [on_metrics(on_step)],
    )
    return trained.params


def buffers(params: Params) -> list[int]:
    """Where each array lies on the first device."""
    return [x.addressable_shards[0].data.unsafe_buffer_pointer() for x in jax.tree.leaves(params)]


def parts(params: Params, lora: Lora = LORA) -> tuple[Params, Params]:
    """(adapters, base)."""
    return partition(params, dataclasses.replace(BASE, lora=lora))


def layers(params: Params) -> dict[str, jax.Array]:
    """The stacked arrays of the layers by name."""
    return {str(path[-1]): param[...] for path, param in params.flat_state() if path[0] == "layers"}


def assert_identical(got: Params, want: Params) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(jax.device_get(a), jax.device_get(b))


@pytest.mark.parametrize(
    ("family", "lora"),
    [("llama3", LORA), ("qwen2", Lora(3, 1.5, ("v_proj", "down_proj"))), ("gemma3", LORA)],
    ids=["llama3", "qwen2", "gemma3"],
)
def test_fresh_adapters_change_nothing_and_merged_ones_compute_the_same(
    tmp_path: Path, family: str, lora: Lora
) -> None:
    base = hf.load(write_tiny_model(tmp_path, **FAMILIES[family]))
    before = logits(base)
    fresh = logits(with_fresh_adapters(base, lora, seed=0))
    # The same sums; the compiler may make them in another order.
    assert largest_difference(fresh, before) <= 1e-6
    adapted = with_random_adapters(base, lora)
    want = logits(adapted)
    assert largest_difference(want, before) > 1e-2
    merged = merge_adapters(adapted)
    assert merged.graphdef == base.graphdef
    assert jax.tree.structure(merged.params) == jax.tree.structure(base.params)
    assert largest_difference(logits(merged), want) <= 1e-5


def test_merging_rounds_once() -> None:
    """The sum is made in float32 and only then cast to what the base is stored in."""
    adapted = with_random_adapters(base_model("bfloat16"))
    layers = adapted.params["layers"]
    w, a, b = (
        np.asarray(layers[name][...], np.float32) for name in ("o_proj", "o_proj_lora_a", "o_proj_lora_b")
    )
    want = (w + LORA.scale * np.einsum("lir,lro->lio", a, b)).astype(jnp.bfloat16)
    merged = merge_adapters(adapted).params["layers"]["o_proj"][...]
    assert merged.dtype == jnp.bfloat16
    # A product that lies between two bfloat16 may be rounded to either.
    assert (np.asarray(merged) != want).mean() < 1e-3


def test_a_model_without_adapters_is_its_own_base_and_its_own_merger() -> None:
    model = base_model()
    assert without_adapters(model) is model
    assert merge_adapters(model) is model


def test_adapters_and_base_are_the_same_arrays() -> None:
    base = base_model()
    adapted = with_fresh_adapters(base, LORA, seed=0)
    again = without_adapters(adapted)
    assert again.graphdef == base.graphdef
    for state in (adapted.params, again.params):
        values = {path: param[...] for path, param in state.flat_state()}
        assert all(values[path] is param[...] for path, param in base.params.flat_state())


@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 8, 1)], ids=str)
def test_fresh_adapters_are_the_same_on_any_mesh(shape: tuple[int, int, int]) -> None:
    mesh = mesh_of(*shape)
    one, many = (parts(with_fresh_adapters(base_model(mesh=m), LORA, seed=7).params)[0] for m in (ONE, mesh))
    assert_identical(many, one)
    placed = {path: param[...] for path, param in many.flat_state()}
    for spec in adapters(dataclasses.replace(BASE, lora=LORA)):
        assert placed[spec.path].sharding.is_equivalent_to(spec.sharding(mesh), 3)
    a = np.asarray(placed["layers", "down_proj_lora_a"])  # uniform within 1 / sqrt(inputs), as PEFT's
    assert np.abs(a).max() == pytest.approx(64**-0.5, rel=0.05)
    assert a.std() == pytest.approx((3 * 64) ** -0.5, rel=0.1)
    other = parts(with_fresh_adapters(base_model(mesh=mesh), LORA, seed=8).params)[0]
    a, b = (layers(of)["q_proj_lora_a"] for of in (other, one))
    assert not np.array_equal(a, b)


def gradient(model: Model) -> Params:
    trained, frozen = partition(model.params, model.config)
    batch = put_batch(pack(examples(9), [[0, 1], [2], [3], [4, 5]], 4, PACK, max_segments=8), 2, ONE)
    step = jax.jit(batch_gradient, static_argnums=(0, 4, 5))
    return step(model.graphdef, trained, frozen, batch, CHUNK, "layer")[2]


def test_gradient_is_that_of_the_merged_weights_by_the_chain_rule() -> None:
    """W' = W + s A B, hence dA = s dW' B^T and dB = s A^T dW'."""
    adapted = with_random_adapters(base_model())
    ours = layers(gradient(adapted))
    trained = layers(parts(jax.tree.map(jnp.copy, adapted.params))[0])
    by_weights = layers(gradient(merge_adapters(adapted)))
    for name in LORA_TARGETS:
        a, b, by_weight = trained[f"{name}_lora_a"], trained[f"{name}_lora_b"], by_weights[name]
        by_a = LORA.scale * jnp.einsum("lio,lro->lir", by_weight, b)
        by_b = LORA.scale * jnp.einsum("lir,lio->lro", a, by_weight)
        assert largest_difference(ours[f"{name}_lora_a"], by_a) <= 1e-4, name
        assert largest_difference(ours[f"{name}_lora_b"], by_b) <= 1e-4, name


def test_training_learns_in_the_adapters_alone(tmp_path: Path) -> None:
    base = base_model("bfloat16")
    before = jax.tree.map(np.array, base.params)
    params = fine_tune(tmp_path, base=base)
    trained, frozen = parts(params)
    assert_identical(frozen, before)
    assert buffers(frozen) == buffers(base.params)
    assert {x.dtype for x in jax.tree.leaves(trained)} == {jnp.dtype("float32")}
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(trained))
    stored = restore_params(tmp_path / "checkpoint", dataclasses.replace(BASE, lora=LORA), ONE)
    assert_identical(stored, trained)
    with pytest.raises(RunError, match="of another model"):
        restore_params(tmp_path / "checkpoint", BASE, ONE)


def test_optimizer_state_is_of_the_adapters_alone() -> None:
    config = dataclasses.replace(BASE, lora=LORA)
    for mesh in (ONE, mesh_of(2, 2, 2)):
        target, frozen = partition(abstract_model(config, mesh).params, config)
        state = abstract_opt_state(make_optimizer(SETTINGS, 10), target, mesh)
        n_adapters = sum(spec.size(config) for spec in adapters(config))
        # Two float32 moments a parameter, two counters of steps, the guard's 64 losses and its verdict.
        n_bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
        assert n_bytes == 8 * n_adapters + 8 + 64 * 4 + 1
        assert jax.tree.map(lambda x: x.sharding, optax.tree.get(state, "mu")) == jax.tree.map(
            lambda x: x.sharding, target
        )
        assert not any("lora" in str(path[-1]) for path, _ in frozen.flat_state())


def test_adapters_are_decayed() -> None:
    trained, _ = parts(with_fresh_adapters(base_model(), LORA, seed=0).params)
    assert all(is_decayed for _, is_decayed in nnx.to_flat_state(decayed(trained)))


class Killed(BaseException):
    """Stands for a kill: nothing that the training could catch."""


def learnt(directory: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what is this machine's."""
    return [{k: v for k, v in row.items() if k != "speed"} for row in read_jsonl(directory / "metrics.jsonl")]


@pytest.mark.parametrize("stop", [2, 4])
def test_killed_and_resumed_is_uninterrupted_bit_for_bit(stop: int, tmp_path: Path) -> None:
    want = fine_tune(tmp_path / "whole")

    def kill(metrics: StepMetrics) -> None:
        if metrics.step == stop:
            raise Killed

    with pytest.raises(Killed):
        fine_tune(tmp_path / "cut", on_step=kill)
    seen: list[int] = []
    got = fine_tune(tmp_path / "cut", on_step=lambda m: seen.append(m.step))
    assert seen[0] == (1 if stop == 2 else 4)
    assert_identical(got, want)
    assert learnt(tmp_path / "cut") == learnt(tmp_path / "whole")
    # Done is done: what was saved, on the base that is given.
    assert_identical(fine_tune(tmp_path / "cut"), want)


def test_a_mesh_trains_like_one_device(tmp_path: Path) -> None:
    settings, mesh = SETTINGS.model_copy(update={"learning_rate": 1e-3}), mesh_of(2, 2, 2)
    one, many = (
        fine_tune(tmp_path / name, mesh, settings=settings) for name, mesh in (("one", ONE), ("many", mesh))
    )
    for a, b in zip(learnt(tmp_path / "one"), learnt(tmp_path / "many"), strict=True):
        assert b == pytest.approx(a, rel=1e-4)
    # Adam turns the rounding of a tiny gradient, and B's are tiny at first, into steps: a hundredth of one.
    for (path, a), (_, b) in zip(parts(many)[0].flat_state(), parts(one)[0].flat_state(), strict=True):
        np.testing.assert_allclose(a[...], b[...], rtol=0, atol=1e-5, err_msg=str(path))


def test_another_base_or_other_adapters_are_another_training(tmp_path: Path) -> None:
    fine_tune(tmp_path)
    for base in (base_model(seed=1), base_model("bfloat16")):
        with pytest.raises(RunError, match="another training"):
            fine_tune(tmp_path, base=base)
    for lora in (Lora(4, 16.0, LORA_TARGETS), Lora(4, 8.0, ("q_proj",))):
        with pytest.raises(RunError, match="another training"):
            fine_tune(tmp_path, lora=lora)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_identity_sees_every_value_but_neither_mesh_nor_kernel(dtype: str) -> None:
    def of(params: Params, config: DecoderConfig = BASE) -> str:
        return identity(Model.of(config, params, ONE), TrainingPlan(examples(2), SETTINGS, 0, PACK))

    params = base_model(dtype).params
    want = of(params)
    assert of(params, dataclasses.replace(BASE, attention="xla")) == want
    assert of(params, dataclasses.replace(BASE, rms_norm_eps=1e-6)) != want
    mesh = mesh_of(2, 2, 2)
    shardings = jax.tree.map(lambda x: x.sharding, abstract_model(BASE, mesh).params)
    assert of(jax.device_put(params, shardings)) == want

    def changed(change: Callable[[jax.Array], jax.Array]) -> Params:
        return nnx.map_state(
            lambda path, param: param.replace(change(param[...])) if path == ("layers", "k_proj") else param,
            params,
        )

    assert of(changed(lambda x: x)) == want
    assert of(changed(lambda x: x.at[1, 3, 5].multiply(1.01))) != want
    assert of(changed(lambda x: x.at[0, :, 2].set(x[0, ::-1, 2]))) != want
    assert of(changed(lambda x: x[::-1])) != want


def test_settings_name_the_matrices_that_there_are() -> None:
    assert AdaptedMatrix.__args__ == LORA_TARGETS
    assert from_settings(LoraSettings()) is None
    assert from_settings(LoraSettings(rank=8)) == Lora(8, 16.0, LORA_TARGETS)
    # Order and repetition make no other model of it.
    some = LoraSettings(rank=2, alpha=3, target_modules=("v_proj", "q_proj", "v_proj"))
    assert from_settings(some) == Lora(2, 3.0, ("q_proj", "v_proj"))
