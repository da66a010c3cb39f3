"""Laws of training: how a batch is cut, spread or recomputed changes nothing that is learnt."""

from __future__ import annotations

import json
import math
import signal
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import Mesh

from middo_jax.config import AdamW, ConfigError, MeshSettings, TrainSettings
from middo_jax.data.packing import pack
from middo_jax.data.tokenize import TokenizedExample
from middo_jax.evaluation.heldout import HeldoutLoss, row_losses, total
from middo_jax.models.attention import QUERY_BLOCK
from middo_jax.models.config import DecoderConfig
from middo_jax.models.decoder import Decoder, Remat, split
from middo_jax.models.model import Model, Params, Structure, abstract_model
from middo_jax.parallel.mesh import make_mesh
from middo_jax.passes.losses import score_examples
from middo_jax.rundir import RunError, read_jsonl
from middo_jax.training.checks import TrainingDataError
from middo_jax.training.hooks import on_metrics
from middo_jax.training.metrics import StepMetrics, TrainingDiverged
from middo_jax.training.optimizer import abstract_opt_state, decayed, learning_rate_schedule, make_optimizer
from middo_jax.training.plan import TrainingPlan, plan_epoch
from middo_jax.training.sft import train
from middo_jax.training.step import batch_gradient, put_batch

CONFIG = DecoderConfig(96, 32, 64, 2, 4, 2, 8, 64)
PACK = 32
CHUNK = 16
SETTINGS = TrainSettings(
    learning_rate=1e-2,
    batch_size=8,
    num_epochs=2,
    optimizer=AdamW(weight_decay=0.1),
    warmup_ratio=0.2,
    remat="none",
    save_every=3,
)


def example(index: int, length: int) -> TokenizedExample:
    rng = np.random.default_rng(index)
    tokens_n = rng.integers(2, CONFIG.vocab_size, length).astype(np.int32)
    is_target_n = np.arange(length) >= length // 2
    return TokenizedExample(f"id{index}", tokens_n, is_target_n, ~is_target_n, False)


def examples(count: int) -> list[TokenizedExample]:
    return [example(i, 4 + (7 * i) % 25) for i in range(count)]


def mesh_of(data: int, fsdp: int, tensor: int) -> Mesh:
    settings = MeshSettings(data=data, fsdp=fsdp, tensor=tensor)
    return make_mesh(settings, jax.devices()[: data * fsdp * tensor])


ONE = mesh_of(1, 1, 1)


def fresh() -> tuple[Structure, Params]:
    return split(Decoder(CONFIG, jax.random.key(0)))


def fine_tune(
    out_dir: Path,
    tokenized: Sequence[TokenizedExample],
    settings: TrainSettings = SETTINGS,
    mesh: Mesh = ONE,
    on_step: Callable[[StepMetrics], None] | None = None,
    params: Params | None = None,
    seed: int = 3,
) -> Params:
    graphdef, start = fresh()
    trained = train(
        Model(CONFIG, graphdef, start if params is None else params, mesh),
        TrainingPlan(tokenized, settings, seed, PACK),
        out_dir,
        chunk=CHUNK,
        hooks=[] if on_step is None else [on_metrics(on_step)],
    )
    return trained.params


def gradient(
    rows: list[list[int]], tokenized: Sequence[TokenizedExample], batch: int, parts: int, remat: Remat
):
    graphdef, params = fresh()
    on_mesh = put_batch(pack(tokenized, rows, batch, PACK, max_segments=8), parts, ONE)
    step = jax.jit(batch_gradient, static_argnums=(0, 4, 5))
    return step(graphdef, params, Params({}), on_mesh, CHUNK, remat)


def array(state: Any, *path: str) -> np.ndarray:
    """One parameter of a State, or of an update with its structure."""
    return np.asarray(dict(nnx.to_flat_state(state))[path][...])


def assert_close(got: Params, want: Params, relative: float) -> None:
    """Largest difference of each parameter, relative to its largest entry."""
    for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
        error = float(np.abs(jax.device_get(a) - jax.device_get(b)).max())
        assert error <= relative * float(np.abs(b).max()), jax.tree_util.keystr(path)


def assert_identical(got: Params, want: Params) -> None:
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(jax.device_get(a), jax.device_get(b))


def test_passing_over_what_no_example_reaches_changes_no_gradient():
    graphdef, params = fresh()
    tokenized = examples(40)
    rows = [list(range(20)), list(range(20, 40))]
    length, longest = 3 * QUERY_BLOCK, max(map(len, tokenized))
    assert 2 * QUERY_BLOCK < sum(map(len, tokenized[:20])) <= length
    batch = put_batch(pack(tokenized, rows, 2, length, max_segments=20), 1, ONE)
    step = jax.jit(batch_gradient, static_argnums=(0, 4, 5, 6))
    (near, _, got), (whole, _, want) = (
        step(graphdef, params, Params({}), batch, CHUNK, "dots", reach) for reach in (longest, None)
    )
    assert float(near) == pytest.approx(float(whole), rel=1e-6)
    assert_close(got, want, 1e-5)


def test_accumulated_micro_batches_are_one_batch():
    # Rows with very different numbers of targets, and one without any: weighting shows.
    tokenized = examples(9)
    rows = [[0, 1], [2], [3], [4, 5], [6], [7], [8]]
    loss, n_targets, want = gradient(rows, tokenized, batch=8, parts=1, remat="none")
    for parts in (2, 4, 8):
        other, n_other, got = gradient(rows, tokenized, batch=8, parts=parts, remat="none")
        assert int(n_other) == int(n_targets)
        assert float(other) == pytest.approx(float(loss), rel=1e-5)
        assert_close(got, want, 1e-5)


def test_gradient_of_a_pack_is_the_sum_over_its_examples():
    tokenized = examples(7)
    loss, n_targets, packed = gradient(
        [[0, 1, 4], [2, 5], [3], [6]], tokenized, batch=4, parts=1, remat="none"
    )
    alone = [gradient([[i]], tokenized, batch=1, parts=1, remat="none") for i in range(7)]
    assert int(n_targets) == sum(int(n) for _, n, _ in alone)
    assert float(loss * n_targets) == pytest.approx(sum(float(one * n) for one, n, _ in alone), rel=1e-5)
    summed = jax.tree.map(
        lambda *g: sum(g), *(jax.tree.map(lambda g, n=n: g * n, one) for _, n, one in alone)
    )
    assert_close(jax.tree.map(lambda g: g * n_targets, packed), summed, 1e-4)


@pytest.mark.parametrize("remat", ["dots", "layer"])
def test_remat_changes_nothing(remat: Remat):
    tokenized = examples(9)
    rows = [[0, 1], [2], [3], [4, 5]]
    loss, _, want = gradient(rows, tokenized, batch=4, parts=1, remat="none")
    again, _, got = gradient(rows, tokenized, batch=4, parts=1, remat=remat)
    assert float(again) == pytest.approx(float(loss), rel=1e-6)
    assert_close(got, want, 1e-5)


def test_loss_falls_on_learnable_data(tmp_path: Path):
    # Each token is followed by its successor: all of it can be learnt, none of it is known.
    rng = np.random.default_rng(0)

    def counting(index: int) -> TokenizedExample:
        tokens_n = (rng.integers(95) + np.arange(12)).astype(np.int32) % 95 + 1
        return TokenizedExample(f"id{index}", tokens_n, np.arange(12) >= 2, np.arange(12) < 2, False)

    tokenized = [counting(i) for i in range(160)]
    seen: list[StepMetrics] = []
    settings = SETTINGS.model_copy(update={"num_epochs": 6, "optimizer": AdamW()})
    params = fine_tune(tmp_path, tokenized[:128], settings, on_step=seen.append)
    assert seen[0].loss == pytest.approx(math.log(96), rel=0.05)
    assert seen[-1].loss < seen[0].loss / 4
    assert [m.step for m in seen] == list(range(1, seen[-1].total_steps + 1))
    assert all(m.speed.tokens_per_second > 0 for m in seen)

    def heldout(mesh: Mesh, batch_tokens: int) -> HeldoutLoss:
        shapes = abstract_model(CONFIG, mesh)
        placed = jax.tree.map(lambda x, to: jax.device_put(x, to.sharding), params, shapes.params)
        model = shapes.with_params(placed)
        scores, _ = score_examples(model, tokenized[128:], batch_tokens=batch_tokens, chunk=CHUNK)
        return total(row_losses([e.id for e in tokenized[128:]], scores.loss_n, scores.n_targets_n))

    loss, n_target_tokens, n, by_source = heldout(ONE, batch_tokens=64)
    assert (n_target_tokens, n, by_source) == (32 * 10, 32, {})
    assert loss < seen[0].loss / 4
    # How the held-out examples are packed and spread changes nothing.
    assert heldout(mesh_of(2, 2, 2), batch_tokens=1)[0] == pytest.approx(loss, rel=1e-5)


def test_every_example_once_an_epoch():
    tokenized = examples(57)
    orders = []
    for epoch in range(3):
        steps = plan_epoch(list(map(len, tokenized)), SETTINGS, epoch, seed=7, pack_length=PACK)
        assert all(len(rows) == SETTINGS.batch_size for rows in steps[:-1])
        assert 0 < len(steps[-1]) <= SETTINGS.batch_size
        assert all(sum(len(tokenized[i]) for i in row) <= PACK for rows in steps for row in rows)
        order = [i for rows in steps for row in rows for i in row]
        assert Counter(order) == Counter(range(57))
        assert steps == plan_epoch(list(map(len, tokenized)), SETTINGS, epoch, seed=7, pack_length=PACK)
        orders.append(order)
    assert orders[0] != orders[1] != orders[2]
    other = plan_epoch(list(map(len, tokenized)), SETTINGS, 0, seed=8, pack_length=PACK)
    assert [i for rows in other for row in rows for i in row] != orders[0]


def test_the_step_sees_every_target_once(tmp_path: Path):
    tokenized = examples(41)
    fine_tune(tmp_path, tokenized)
    wanted = sum(int(e.is_target_n[1:].sum()) for e in tokenized)
    rows = read_jsonl(tmp_path / "metrics.jsonl")
    for epoch in range(2):
        assert sum(row["n_target_tokens"] for row in rows if row["epoch"] == epoch) == wanted


def learnt(directory: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what is this machine's."""
    return [{k: v for k, v in row.items() if k != "speed"} for row in read_jsonl(directory / "metrics.jsonl")]


class Killed(BaseException):
    """Stands for a kill: nothing that the training could catch."""


@pytest.mark.parametrize("stop", [1, 3, 4, 8])
def test_killed_and_resumed_is_uninterrupted_bit_for_bit(stop: int, tmp_path: Path):
    tokenized = examples(60)
    want = fine_tune(tmp_path / "whole", tokenized)
    steps = len(read_jsonl(tmp_path / "whole" / "metrics.jsonl"))
    assert steps >= 9

    def kill(metrics: StepMetrics) -> None:
        if metrics.step == stop:
            raise Killed

    with pytest.raises(Killed):
        fine_tune(tmp_path / "cut", tokenized, on_step=kill)
    # A line cut short by the kill.
    with (tmp_path / "cut" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 99, "lo')
    seen: list[int] = []
    got = fine_tune(tmp_path / "cut", tokenized, on_step=lambda m: seen.append(m.step))
    assert_identical(got, want)
    assert learnt(tmp_path / "cut") == learnt(tmp_path / "whole")
    # Steps 3 and 6 are saved, once the caller has been told of them.
    assert seen == list(range((stop - 1) // 3 * 3 + 1, steps + 1))


@pytest.mark.parametrize("to_go", [1, 5])
def test_interrupt_saves_the_current_step(to_go: int, tmp_path: Path):
    tokenized = examples(60)
    want = fine_tune(tmp_path / "whole", tokenized)
    last = len(read_jsonl(tmp_path / "whole" / "metrics.jsonl"))

    def interrupt(metrics: StepMetrics) -> None:
        if metrics.step == last - to_go:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        fine_tune(tmp_path / "cut", tokenized, on_step=interrupt)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    # The next step was under way when this one was read.
    done = [row["step"] for row in read_jsonl(tmp_path / "cut" / "metrics.jsonl")]
    assert done == list(range(1, last - to_go + 2))
    seen: list[int] = []
    got = fine_tune(tmp_path / "cut", tokenized, on_step=lambda m: seen.append(m.step))
    assert [*done, *seen] == list(range(1, last + 1))
    assert_identical(got, want)


def test_done_is_done(tmp_path: Path):
    tokenized = examples(20)
    want = fine_tune(tmp_path, tokenized)
    assert sorted(p.name for p in (tmp_path / "checkpoint").iterdir()) == ["metadata.json", "params"]
    metrics = (tmp_path / "metrics.jsonl").read_bytes()
    seen: list[StepMetrics] = []
    assert_identical(fine_tune(tmp_path, tokenized, on_step=seen.append), want)
    assert not seen
    assert (tmp_path / "metrics.jsonl").read_bytes() == metrics


def test_another_training_is_not_continued(tmp_path: Path):
    tokenized = examples(40)

    def kill(metrics: StepMetrics) -> None:
        if metrics.step == 4:
            raise Killed

    with pytest.raises(Killed):
        fine_tune(tmp_path, tokenized, on_step=kill)
    with pytest.raises(RunError, match="another training"):
        fine_tune(tmp_path, tokenized[:-1])
    with pytest.raises(RunError, match="another training"):
        fine_tune(tmp_path, tokenized, seed=4)
    # What changes speed only may change.
    fine_tune(tmp_path, tokenized, SETTINGS.model_copy(update={"remat": "layer", "save_every": 2}))
    with pytest.raises(RunError, match="another training"):
        fine_tune(tmp_path, tokenized[:-1])


def test_nan_stops_with_step_and_ids_and_keeps_the_last_checkpoint(tmp_path: Path):
    tokenized = examples(60)
    settings = SETTINGS.model_copy(update={"num_epochs": 1, "save_every": 1})
    rows = plan_epoch(list(map(len, tokenized)), settings, 0, seed=3, pack_length=PACK)
    # Only the examples of step 3 hold token 1, whose embedding is broken.
    broken = {i for row in rows[2] for i in row}
    poisoned = [
        TokenizedExample(
            e.id, np.where(np.arange(len(e)) == 1, 1, e.tokens_n), *(e.is_target_n, e.in_prompt_n), False
        )
        if i in broken
        else e
        for i, e in enumerate(tokenized)
    ]
    model = Decoder(CONFIG, jax.random.key(0))
    model.embed[...] = model.embed[...].at[1].set(jnp.nan)
    params = split(model)[1]
    with pytest.raises(TrainingDiverged, match="step 3: loss nan") as raised:
        fine_tune(tmp_path, poisoned, settings, params=params)
    assert raised.value.step == 3
    assert set(raised.value.ids) == {tokenized[i].id for i in broken}
    assert [p.name for p in (tmp_path / "checkpoint" / "steps").iterdir()] == ["2"]
    assert [row["step"] for row in read_jsonl(tmp_path / "metrics.jsonl")] == [1, 2]


def test_what_cannot_be_trained_on_is_said_before_compiling(tmp_path: Path):
    untaught = [
        TokenizedExample(e.id, e.tokens_n, e.is_target_n & False, e.in_prompt_n, False) for e in examples(4)
    ]
    foreign = TokenizedExample(
        "far", np.array([3, 96], np.int32), np.array([False, True]), np.zeros(2, bool), False
    )
    uneven = SETTINGS.model_copy(update={"batch_size": 12, "gradient_accumulation": 2})
    with pytest.raises(TrainingDataError, match="no examples"):
        fine_tune(tmp_path, [])
    with pytest.raises(TrainingDataError, match="none of the 4 examples has a token to learn"):
        fine_tune(tmp_path, untaught)
    with pytest.raises(
        ConfigError, match=r"1 of 5 examples are longer than model.max_length=32 .*id77, has 33"
    ):
        fine_tune(tmp_path, [*examples(4), example(77, 33)])
    with pytest.raises(TrainingDataError, match="example far has token 96"):
        fine_tune(tmp_path, [*examples(4), foreign])
    with pytest.raises(
        ConfigError, match=r"batch_size=12 .*gradient_accumulation=2 times the 4 .*; 16 would fit"
    ):
        fine_tune(tmp_path, examples(4), uneven, mesh_of(2, 2, 2))
    assert not list(tmp_path.iterdir())


def test_schedules():
    def rates(**update: object) -> list[float]:
        settings = SETTINGS.model_copy(update={"learning_rate": 1.0, "warmup_ratio": 0.2, **update})
        schedule = learning_rate_schedule(settings, 10)
        return [float(schedule(step)) for step in range(10)]

    assert rates(schedule="constant") == pytest.approx([0.5] + [1.0] * 9)
    assert rates(schedule="linear") == pytest.approx([0.5, 1.0] + [1 - i / 8 for i in range(8)])
    cosine = [0.5 * (1 + math.cos(math.pi * i / 8)) for i in range(8)]
    assert rates(schedule="cosine") == pytest.approx([0.5, 1.0, *cosine], abs=1e-6)
    assert rates(schedule="cosine", warmup_ratio=0.0)[0] == 1.0


def test_optimizer_is_clipped_adamw_and_decays_matrices_only():
    _, params = fresh()
    settings = SETTINGS.model_copy(update={"schedule": "constant", "warmup_ratio": 0.0, "max_grad_norm": 0.5})
    optimizer = make_optimizer(settings, 10)
    assert {path for path, is_decayed in nnx.to_flat_state(decayed(params)) if not is_decayed} == {
        ("embed",),
        ("final_norm",),
        ("layers", "attention_norm"),
        ("layers", "mlp_norm"),
    }
    # The first Adam step of any gradient is its sign; without a gradient only decay is left.
    ones = jax.tree.map(jnp.ones_like, params)
    updates, _ = optimizer.update(ones, optimizer.init(params), params)
    lr, decay = settings.learning_rate, settings.optimizer.weight_decay
    matrix, norm = array(params, "layers", "q_proj"), array(params, "final_norm")
    np.testing.assert_allclose(array(updates, "layers", "q_proj"), -lr * (1 + decay * matrix), rtol=1e-4)
    np.testing.assert_allclose(array(updates, "final_norm"), -lr * np.ones_like(norm), rtol=1e-4)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    np.testing.assert_allclose(array(updates, "layers", "q_proj"), -lr * decay * matrix, rtol=1e-6)
    assert not np.any(array(updates, "embed"))
    clipped, _ = optax.clip_by_global_norm(0.5).update(ones, optax.EmptyState())
    moments = optax.tree.get(optimizer.update(ones, optimizer.init(params), params)[1], "mu")
    assert float(optax.tree.norm(moments)) == pytest.approx(0.1 * float(optax.tree.norm(clipped)), rel=1e-4)


def test_optimizer_state_lies_where_its_parameters_do():
    mesh = mesh_of(2, 2, 2)
    params = abstract_model(CONFIG, mesh).params
    opt_state = abstract_opt_state(make_optimizer(SETTINGS, 10), params, mesh)
    for moment in ("mu", "nu"):
        assert jax.tree.map(lambda x: x.sharding, optax.tree.get(opt_state, moment)) == jax.tree.map(
            lambda x: x.sharding, params
        )


def test_metrics_are_json_of_what_was_told(tmp_path: Path):
    seen: list[StepMetrics] = []
    fine_tune(tmp_path, examples(20), on_step=seen.append)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [metrics.row() for metrics in seen]
    learnt = {"step", "epoch", "loss", "n_target_tokens", "grad_norm", "learning_rate"}
    assert set(seen[0].row()) == learnt | {"speed"}
    assert seen[0].learning_rate == pytest.approx(
        SETTINGS.learning_rate / math.ceil(0.2 * seen[0].total_steps)
    )
