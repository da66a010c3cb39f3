"""Laws of bad steps and of what cannot be trained: nothing of it is kept, errors say what to change."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh
from support.tiny_training import CHUNK, CONFIG, PACK_LENGTH, SETTINGS, example, examples, mesh_of

from middo_jax.config import Adafactor, BadSteps, ConfigError, TrainSettings
from middo_jax.data.tokenize import TokenizedExample
from middo_jax.models.decoder import Decoder, split
from middo_jax.models.model import Model, Params
from middo_jax.rundir import read_jsonl
from middo_jax.training import sft
from middo_jax.training.checks import TrainingDataError
from middo_jax.training.guard import GuardState, guarded
from middo_jax.training.hooks import on_metrics
from middo_jax.training.memory import OutOfMemory, remedies
from middo_jax.training.metrics import StepMetrics, TrainingDiverged, TrainingWrecked
from middo_jax.training.optimizer import learning_rate_schedule
from middo_jax.training.plan import TrainingPlan, plan_epoch

ONE = mesh_of(1, 1, 1)
EPOCH = SETTINGS.model_copy(update={"num_epochs": 1, "save_every": 1})


def broken_model(mesh: Mesh) -> Model:
    """A model that gives NaN wherever token 1 is read."""
    model = Decoder(CONFIG, jax.random.key(0))
    model.embed[...] = model.embed[...].at[1].set(jnp.nan)
    graphdef, params = split(model)
    return Model(CONFIG, graphdef, params, mesh)


def poisoned(tokenized: list[TokenizedExample], indices: set[int]) -> list[TokenizedExample]:
    """The examples, some of them with token 1 in the second place."""
    return [
        TokenizedExample(
            e.id, np.where(np.arange(len(e)) == 1, 1, e.tokens_n), e.is_target_n, e.in_prompt_n, False
        )
        if i in indices
        else e
        for i, e in enumerate(tokenized)
    ]


def fine_tune(
    out_dir: Path,
    tokenized: list[TokenizedExample],
    settings: TrainSettings,
    seen: list[StepMetrics] | None = None,
    mesh: Mesh = ONE,
) -> Params:
    plan = TrainingPlan(tokenized, settings, 3, PACK_LENGTH)
    hooks = [] if seen is None else [on_metrics(seen.append)]
    return sft.train(broken_model(mesh), plan, out_dir, chunk=CHUNK, hooks=hooks).params


def test_a_bad_step_is_left_out_and_the_training_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    tokenized = examples(60)
    plan = plan_epoch(list(map(len, tokenized)), EPOCH, 0, seed=3, pack_length=PACK_LENGTH)
    bad = {i for row in plan[2] for i in row}
    seen: list[StepMetrics] = []
    skipping = EPOCH.model_copy(update={"on_bad_step": BadSteps(action="skip")})
    with caplog.at_level(logging.WARNING):
        params = fine_tune(tmp_path, poisoned(tokenized, bad), skipping, seen)
    assert [m.step for m in seen] == list(range(1, len(plan) + 1))
    assert [m.step for m in seen if m.skipped] == [3]
    assert set(seen[2].skipped) == {tokenized[i].id for i in bad}
    assert "step 3 is left out: loss nan" in caplog.text
    rows = read_jsonl(tmp_path / "metrics.jsonl")
    assert rows[2]["loss"] is None
    assert set(rows[2]["skipped"]) == set(seen[2].skipped)
    assert all("skipped" not in row for row in rows if row["step"] != 3)
    assert len(rows) == len(plan) >= 5
    finite = [bool(np.isfinite(np.asarray(x)).all()) for x in jax.tree.leaves(params)]
    assert finite.count(False) == 1  # the embedding's broken row, which was so from the start
    # The rate follows the number of the step, taken or not.
    schedule = learning_rate_schedule(skipping, len(plan))
    assert [m.learning_rate for m in seen] == pytest.approx([float(schedule(i)) for i in range(len(plan))])


def test_too_many_bad_steps_in_a_row_stop(tmp_path: Path):
    tokenized = examples(60)
    settings = SETTINGS.model_copy(update={"on_bad_step": BadSteps(action="skip"), "num_epochs": 4})
    with pytest.raises(TrainingDiverged, match=r"step 11: .*the 10 steps before it were left out"):
        fine_tune(tmp_path, poisoned(tokenized, set(range(60))), settings)


def test_the_guard_keeps_everything_but_the_count_of_a_bad_step():
    chain = optax.chain(optax.scale_by_adam(), optax.scale_by_learning_rate(lambda _: 0.1))
    optimizer = guarded(chain, spike_factor=2.0)
    params = {"x": jnp.ones(3)}
    state = optimizer.init(params)
    assert isinstance(state, GuardState)
    update = jax.jit(lambda g, s, loss: optimizer.update(g, s, params, loss=loss))
    good = {"x": jnp.arange(3.0)}
    for step in range(8):  # too few before to know what is usual: even a jump is taken
        updates, state = update(good, state, 50.0 if step == 3 else 1.0 + step / 100)
        assert not state.was_bad
    for gradient, loss in (
        (good, 2.2),  # the median is about 1.04
        (good, np.nan),
        ({"x": jnp.array([0.0, np.inf, 0.0])}, 1.0),
    ):
        updates, after = update(gradient, state, loss)
        assert after.was_bad
        np.testing.assert_array_equal(updates["x"], 0.0)
        for a, b in zip(jax.tree.leaves(after.inner[0]), jax.tree.leaves(state.inner[0]), strict=True):
            np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(after.recent_w, state.recent_w)
        assert int(after.inner[-1].count) == int(state.inner[-1].count) + 1
    updates, after = update(good, state, 2.0)
    assert not after.was_bad
    assert np.any(np.asarray(updates["x"]))


def test_a_spike_stops_with_its_size(tmp_path: Path):
    # Only the examples of one late step are about token 95, which till then is never right.
    rng = np.random.default_rng(0)
    tokenized = [
        TokenizedExample(
            f"id{i}", np.full(12, 5 + rng.integers(2), np.int32), np.arange(12) > 1, np.arange(12) < 2, False
        )
        for i in range(200)
    ]
    settings = EPOCH.model_copy(
        update={"learning_rate": 1e-2, "on_bad_step": BadSteps(spike_factor=1.5), "save_every": 50}
    )
    plan = plan_epoch(list(map(len, tokenized)), settings, 0, seed=3, pack_length=PACK_LENGTH)
    assert len(plan) > 10
    odd = {i for row in plan[9] for i in row}
    for i in odd:
        tokenized[i] = example(i, 12)
    with pytest.raises(
        TrainingDiverged, match=r"step 10: .*over 1\.5 times the usual loss .* train\.on_bad_step"
    ):
        fine_tune(tmp_path, tokenized, settings)


def test_a_wrecked_training_is_an_error_at_its_end_also_after_a_restart(tmp_path: Path):
    """An absurd rate in fewer steps than the guard knows a usual loss after."""
    tokenized = examples(40)
    wrecking = EPOCH.model_copy(update={"learning_rate": 30.0, "warmup_ratio": 0.0, "schedule": "constant"})
    for _ in range(2):  # the second start finds all steps done
        with pytest.raises(TrainingWrecked, match=r"its first loss was 4\.\d+, .*train\.learning_rate"):
            fine_tune(tmp_path, tokenized, wrecking)
        assert not (tmp_path / "checkpoint" / "metadata.json").exists()
    allowed = wrecking.model_copy(update={"on_bad_step": BadSteps()})
    fine_tune(tmp_path / "allowed", tokenized, allowed)
    assert (tmp_path / "allowed" / "checkpoint" / "metadata.json").exists()


def test_out_of_memory_says_what_it_needs_and_what_to_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object) -> None:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nmore")

    real = sft.make_train_step

    def exhausted(*args: Any, **more: Any) -> object:
        step = real(*args, **more)

        class Step:
            def lower(self, *arguments: object) -> object:
                self.compiled = step.lower(*arguments).compile()
                return self

            def compile(self) -> object:
                return self

            def memory_analysis(self) -> object:
                return self.compiled.memory_analysis()

            __call__ = fail

        return Step()

    monkeypatch.setattr(sft, "make_train_step", exhausted)
    with pytest.raises(OutOfMemory) as raised:
        fine_tune(tmp_path, examples(20), EPOCH)
    message = str(raised.value)
    assert "does not fit the memory of cpu. It takes 0.00 GiB for parameters, optimizer and batch" in message
    assert (
        "What would lower it, the cheapest first: train.remat=layer; a larger train.gradient_acc" in message
    )
    assert message.endswith("(RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.)")
    monkeypatch.undo()
    fine_tune(tmp_path, examples(20), EPOCH)  # nothing stands in the way of another try


def test_remedies_are_those_that_are_left():
    small = SETTINGS.model_copy(
        update={
            "remat": "layer",
            "batch_size": 8,
            "gradient_accumulation": 8,
            "optimizer": Adafactor(),
            "param_dtype": "bfloat16",
        }
    )
    assert remedies(small, ONE) == [
        "a smaller scoring.unembed_chunk or model.max_length",
        "adapters (lora.rank=16)",
    ]
    assert "mesh.fsdp instead of mesh.data=2" in remedies(small, mesh_of(2, 2, 2))


def test_examples_that_were_all_cut_are_refused(tmp_path: Path):
    cut = [TokenizedExample(e.id, e.tokens_n, e.is_target_n, e.in_prompt_n, True) for e in examples(6)]
    with pytest.raises(TrainingDataError, match=r"all 6 examples are longer than model\.max_length"):
        fine_tune(tmp_path, cut, EPOCH)
    assert not list(tmp_path.iterdir())


def test_less_than_a_batch_is_refused_with_the_batch_that_fits(tmp_path: Path):
    few = [example(0, 20), example(1, 20), example(2, 20)]
    with pytest.raises(ConfigError, match=r"fills 3 of the 8 rows of a batch; set train\.batch_size=3,"):
        fine_tune(tmp_path, few, EPOCH)
    in_parts = EPOCH.model_copy(update={"gradient_accumulation": 2})
    with pytest.raises(ConfigError, match=r"set train\.batch_size=2, lower"):
        fine_tune(tmp_path, few, in_parts)
    in_more = EPOCH.model_copy(update={"gradient_accumulation": 4})
    with pytest.raises(ConfigError, match=r"train\.batch_size=3 with train\.gradient_accumulation=1"):
        fine_tune(tmp_path, few, in_more)
    by_count = EPOCH.model_copy(update={"examples_per_step": 4})
    with pytest.raises(
        ConfigError, match=r"has 3 examples, less than one step of train\.examples_per_step=4"
    ):
        fine_tune(tmp_path, few, by_count)
    assert not list(tmp_path.iterdir())


def test_less_than_the_mesh_is_wide_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING):
        tokenized = [example(0, 20), example(1, 20), untaught(2), untaught(3)]
        fine_tune(tmp_path, tokenized, EPOCH, mesh=mesh_of(8, 1, 1))
    assert "fills 3 of the 8 rows of a batch, and the 8 devices" in caplog.text
    assert "2 of 4 examples have no token to learn, such as id2" in caplog.text


def untaught(index: int) -> TokenizedExample:
    e = example(index, 16)
    return TokenizedExample(e.id, e.tokens_n, np.zeros(16, bool), e.in_prompt_n, False)
