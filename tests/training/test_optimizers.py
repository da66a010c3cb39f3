"""Laws of the low-memory choices: a factored moment, weights in bfloat16 that round by chance."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec
from support.tiny_training import (
    CHUNK,
    CONFIG,
    PACK_LENGTH,
    SETTINGS,
    Killed,
    examples,
    fresh_model,
    kill_at,
    mesh_of,
)

from middo_jax.config import Adafactor, AdamW, TrainSettings
from middo_jax.models.config import DecoderConfig
from middo_jax.models.model import Params, abstract_model
from middo_jax.parallel.mesh import named_sharding
from middo_jax.training.hooks import on_metrics
from middo_jax.training.metrics import StepMetrics
from middo_jax.training.optimizer import abstract_opt_state, make_optimizer
from middo_jax.training.plan import TrainingPlan
from middo_jax.training.rounding import stochastic_round
from middo_jax.training.sft import train

ONE = mesh_of(1, 1, 1)
# Wide enough that Adafactor factors: 128 and more.
WIDE = DecoderConfig(256, 128, 256, 2, 4, 4, 32, 64)


def fine_tune(
    out_dir: Path,
    settings: TrainSettings,
    config: DecoderConfig = CONFIG,
    mesh: jax.sharding.Mesh = ONE,
    on_step: Callable[[StepMetrics], None] | None = None,
) -> Params:
    model = fresh_model(mesh, config)
    # All start from numbers that bfloat16 holds too.
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), model.params)
    plan = TrainingPlan(examples(40), settings, 3, PACK_LENGTH)
    hooks = [] if on_step is None else [on_metrics(on_step)]
    return train(model.with_params(params), plan, out_dir, chunk=CHUNK, hooks=hooks).params


def flat(params: Params) -> np.ndarray:
    return np.concatenate([np.asarray(x, np.float32).ravel() for x in jax.tree.leaves(params)])


def test_rounding_by_chance_is_right_on_average() -> None:
    rng = np.random.default_rng(0)
    x = jnp.asarray(np.concatenate([rng.normal(size=200), 1e-3 * rng.normal(size=200)]), jnp.float32)
    keys = jax.random.split(jax.random.key(1), 4000)
    rounded = jax.vmap(lambda key: stochastic_round(x, key))(keys)
    assert rounded.dtype == jnp.bfloat16
    wide = np.asarray(rounded, np.float64)
    # Only the two neighbours occur.
    low, high = wide.min(0), wide.max(0)
    gap = 2.0 ** (np.floor(np.log2(np.abs(np.asarray(x)))) - 7)
    assert np.all((high - low) <= gap * 1.0001)
    assert np.all((low <= np.asarray(x)) & (np.asarray(x) <= high))
    # Of 400 means over 4000 draws none is five standard errors off, and all together are not either.
    error = (wide.mean(0) - np.asarray(x, np.float64)) / (gap / 2 / np.sqrt(len(keys)))
    assert np.abs(error).max() < 5
    assert abs(error.mean()) < 5 / np.sqrt(len(error))


def test_what_bfloat16_holds_is_not_rounded() -> None:
    exact = jnp.array([0.0, 1.0, -2.5, 3.140625, jnp.inf, -jnp.inf, jnp.nan, 1e-40], jnp.float32)
    exact = exact.astype(jnp.bfloat16).astype(jnp.float32)
    for i in range(20):
        rounded = stochastic_round(exact, jax.random.key(i))
        np.testing.assert_array_equal(rounded.astype(jnp.float32), exact)


def test_rounding_is_the_same_on_any_mesh() -> None:
    mesh, key = mesh_of(2, 2, 2), jax.random.key(0)
    x = jax.random.normal(jax.random.key(1), (16, 32))
    spread = jax.device_put(x, named_sharding(mesh, "embed", "mlp"))
    np.testing.assert_array_equal(jax.jit(stochastic_round)(x, key), jax.jit(stochastic_round)(spread, key))


def test_small_steps_add_up_in_bfloat16_since_it_is_rounded_by_chance(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A rate far under half of a weight's last place: 0.02 is one of 1/12800 in bfloat16.
    slow = SETTINGS.model_copy(
        update={
            "learning_rate": 2e-6,
            "schedule": "constant",
            "warmup_ratio": 0.0,
            "optimizer": AdamW(),
            "num_epochs": 10,
            "save_every": 1000,
        }
    )
    halves = slow.model_copy(update={"param_dtype": "bfloat16"})
    start = fresh_model(ONE).params
    began = flat(jax.tree.map(lambda x: x.astype(jnp.bfloat16), start))
    # Norms start at 1, where a place is 1/128: nothing but chance could move them.
    moved = flat(fine_tune(tmp_path / "float32", slow)) - began
    by_chance = fine_tune(tmp_path / "by_chance", halves)
    assert {x.dtype for x in jax.tree.leaves(by_chance)} == {jnp.dtype(jnp.bfloat16)}
    monkeypatch.setattr("middo_jax.training.step.stochastic_round", lambda x, _: x.astype(jnp.bfloat16))
    to_nearest = fine_tune(tmp_path / "to_nearest", halves)

    def share(params: Params) -> float:
        """How far along the way of the float32 training."""
        return float((flat(params) - began) @ moved / (moved @ moved))

    assert share(by_chance) == pytest.approx(1, abs=0.1)
    assert abs(share(to_nearest)) < 0.3


@pytest.mark.parametrize("optimizer", [AdamW(), Adafactor()], ids=lambda optimizer: optimizer.name)
def test_in_bfloat16_killed_and_resumed_is_uninterrupted(
    optimizer: AdamW | Adafactor, tmp_path: Path
) -> None:
    settings = SETTINGS.model_copy(
        update={"param_dtype": "bfloat16", "optimizer": optimizer, "num_epochs": 2, "save_every": 3}
    )
    want = fine_tune(tmp_path / "whole", settings)
    with pytest.raises(Killed):
        fine_tune(tmp_path / "cut", settings, on_step=kill_at(5))
    np.testing.assert_array_equal(flat(fine_tune(tmp_path / "cut", settings)), flat(want))


def test_adafactor_keeps_next_to_nothing_and_learns(tmp_path: Path) -> None:
    mesh = mesh_of(2, 2, 2)
    settings = SETTINGS.model_copy(update={"optimizer": Adafactor(), "learning_rate": 3e-3, "num_epochs": 3})
    params = abstract_model(WIDE, mesh).params
    state = abstract_opt_state(make_optimizer(settings, 10), params, mesh)
    size = sum(x.size for x in jax.tree.leaves(params))
    assert sum(x.size for x in jax.tree.leaves(state)) < size / 40
    assert sum(x.size for x in jax.tree.leaves(jax.eval_shape(optax.adam(1.0).init, params))) > 2 * size
    # What is left of a parameter's axes lies as it does there.
    factored = dict(nnx.to_flat_state(optax.tree.get(state, "v_row")))["layers", "down_proj"]
    matrix = dict(nnx.to_flat_state(params))["layers", "down_proj"]
    assert matrix.sharding.spec == PartitionSpec(None, ("tensor",), ("fsdp",))
    assert (factored.shape, factored.sharding.spec) == ((2, 128), PartitionSpec(None, ("fsdp",)))
    one: list[StepMetrics] = []
    many: list[StepMetrics] = []
    fine_tune(tmp_path / "one", settings, WIDE, ONE, on_step=one.append)
    fine_tune(tmp_path / "many", settings, WIDE, mesh, on_step=many.append)
    assert [m.loss for m in many] == pytest.approx([m.loss for m in one], rel=1e-4)
    assert one[-1].loss < one[0].loss - 0.1


def test_moments_are_float32_whatever_is_trained() -> None:
    params = abstract_model(CONFIG, ONE, "bfloat16").params
    for chosen in (AdamW(), Adafactor()):
        optimizer = make_optimizer(SETTINGS.model_copy(update={"optimizer": chosen}), 10)
        state = abstract_opt_state(optimizer, params, ONE)
        assert {str(x.dtype) for x in jax.tree.leaves(state)} == {"float32", "int32", "bool"}
