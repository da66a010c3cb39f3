"""Programs are those that run, and counted right; plans for a slice that is not there; and the command."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from middo_jax.config import Config, ConfigError, load
from middo_jax.models.config import DecoderConfig
from middo_jax.parallel.mesh import one_device
from middo_jax.planning import amounts, hlo
from middo_jax.planning.chips import Chip, Slices
from middo_jax.planning.compiling import PlanError, compile_program, devices_of
from middo_jax.planning.forecast import PlanRequest
from middo_jax.planning.programs import (
    BatchShape,
    Program,
    engine,
    export,
    neighbours,
    rating,
    scoring,
    training,
)
from middo_jax.planning.search import candidate_meshes
from middo_jax.rundir import RunDir
from middo_jax.rundir.plan_rows import PlanFile
from middo_jax.rundir.schemas import faults

CPU = Chip("cpu", 1e11, 1e10, float("inf"), matmul_tile=1)
TINY = DecoderConfig(512, 128, 256, 2, 4, 2, 32, 256, attention="xla", dtype="float32")


def settings(**more: object) -> Config:
    """Settings of a small job."""
    named = {"model.path": "none", "data.path": "none", "model.dtype": "float32", "model.max_length": 128}
    return load(None, [{**named, "train.batch_size": 4, "scoring.unembed_chunk": 64, **more}])


def flops_of(program: Program) -> float:
    """FLOPs of one run, compiled for this CPU."""
    cost = compile_program(program, one_device(), CPU, None).cost
    assert cost is not None
    assert not cost.notes
    assert cost.seconds > 0
    return cost.flops


def by_hand(config: DecoderConfig, rows: BatchShape, chunk: int) -> tuple[float, float, float]:
    """FLOPs of a forward pass: the layers' matrices, attention in one block of queries, and the head."""
    d, f, e = config.hidden_size, config.intermediate_size, config.head_dim
    matrices = 2 * d * config.num_heads * e + 2 * d * config.num_kv_heads * e + 3 * d * f
    tokens = rows.batch * rows.length
    attention = 4 * config.num_heads * e * rows.batch * rows.length**2
    chunks = -(-tokens * rows.target_share // chunk)
    return (
        2.0 * tokens * matrices * config.num_layers,
        float(attention * config.num_layers),
        2.0 * chunks * chunk * d * config.vocab_size,
    )


def test_flops_of_scoring_and_training_are_those_by_hand() -> None:
    rows, config = BatchShape(4, 128, 128, 0.5), settings()
    dense, attention, head = by_hand(TINY, rows, 64)
    sums = 2.0 * 4 * 128 * (128 // 8) * TINY.hidden_size  # of the prompts' hidden states, per segment
    scored = flops_of(scoring(config, TINY, one_device(), rows, 1.0))
    assert scored == pytest.approx(dense + attention + head + sums, rel=0.01)
    # Backward is two forwards, and the layers are recomputed but for their last product, which no gradient
    # needs; the head's gradient takes two more products.
    last = 2.0 * 4 * 128 * TINY.intermediate_size * TINY.hidden_size * TINY.num_layers
    stepped = flops_of(training(config, TINY, one_device(), 0.5, 1.0))
    assert stepped == pytest.approx(4 * (dense + attention) - last + 3 * head, rel=0.01)


def test_conditions_give_the_counts_that_the_compiler_writes() -> None:
    step = training(settings(**{"train.gradient_accumulation": 2}), TINY, one_device(), 0.5, 1.0)
    module = hlo.parse(step.lower().compile().as_text() or "")
    read = [
        (hlo.count_by_condition(module, inside, one), hlo.trip_count(module, inside, one))
        for inside in module.computations.values()
        for one in inside.instructions.values()
        if one.opcode == "while" and '"known_trip_count"' in one.attributes
    ]
    assert sum(by_condition is not None for by_condition, _ in read) >= 4
    assert all(by_condition in (None, written) for by_condition, written in read)


def test_micro_batches_multiply() -> None:
    whole = flops_of(training(settings(), TINY, one_device(), 0.5, 1.0))
    parts = flops_of(training(settings(**{"train.gradient_accumulation": 2}), TINY, one_device(), 0.5, 1.0))
    assert parts == pytest.approx(whole, rel=0.01)


def test_every_stage_has_programs_that_compile() -> None:
    config, mesh = settings(**{"serve.max_context": 256}), one_device()
    rows = BatchShape(2, 256, 128, 0.0)
    dense, *_ = by_hand(TINY, rows, 64)
    assert flops_of(rating(config, TINY, mesh, rows, 16, 1.0)) > dense
    prefill, decode = engine(config, TINY, mesh, 128, 1.0, 1.0)
    one_token, *_ = by_hand(TINY, BatchShape(8, 1, 1, 0.0), 64)
    assert flops_of(decode) > one_token
    assert flops_of(prefill) > 128 / 8 * one_token
    [products] = neighbours(256, 64, 2, mesh)
    assert flops_of(products) == pytest.approx(2 * 256 * 256 * 64)
    assert len(export(TINY, mesh, "float32")) == 12


def test_amounts_scale_with_rows() -> None:
    config = settings(**{"scoring.batch_tokens": 4096})
    small, large = (amounts.Amounts.assumed(n, 60, 128) for n in (20_000, 2_000_000))
    assert large.tokens == pytest.approx(100 * small.tokens, rel=0.01)
    steps = [amounts.training_steps(each, config) for each in (small, large)]
    assert steps[1] == pytest.approx(100 * steps[0], rel=0.01)
    counts = [sum(b.count for b in amounts.scoring_batches(each, config, 4)) for each in (small, large)]
    assert counts[1] == pytest.approx(100 * counts[0], rel=0.01)


def test_lengths_of_the_data_are_used() -> None:
    given = amounts.Amounts.of_lengths(np.asarray([10, 20, 30]), 24, "rows.json")
    assert (given.rows, given.tokens, given.target_share) == (3, 60, 0.4)


def test_meshes_divide_the_batch_and_the_heads() -> None:
    slices = Slices.parse("v5e:4x4x2")
    found = candidate_meshes(slices, TINY, settings(**{"train.batch_size": 16}))
    assert found == [(2, 8, 2)]  # 32 rows would be needed without tensor; 2 key/value heads allow no more


@pytest.mark.parametrize(
    ("mesh", "stages", "message"),
    [("1,2", None, "DATA,FSDP,TENSOR"), ("1,0,2", None, "DATA,FSDP"), (None, ["trian"], "none of train")],
)
def test_wrong_options_are_errors(mesh: str | None, stages: list[str] | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PlanRequest.parse("v5e:2x2", mesh, stages, None)


@pytest.mark.tpu_compile
def test_the_command_plans_a_slice(tmp_path: Path) -> None:
    pytest.importorskip("libtpu")
    model = {
        "model_type": "llama",
        "vocab_size": 512,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "max_position_embeddings": 2048,
    }
    (tmp_path / "config.json").write_text(json.dumps(model), encoding="utf-8")
    config = tmp_path / "run.yaml"
    config.write_text(f"model: {{path: {tmp_path}}}\ndata: {{path: none}}\n", encoding="utf-8")
    command = ["plan", str(config), "--topology", "v5e:2x2", "--mesh", "1,2,2", "--stages", "train,score"]
    command += ["--rows", "1000", "--tokens", "80", "--save"]
    settings = ["model.max_length=512", f"runs_dir={tmp_path}", "train.gradient_accumulation=auto"]
    settings += ["train.batch_size=8"]
    done = subprocess.run(
        [sys.executable, "-m", "middo_jax", *command, "--price", "1.2", "--json", *settings],
        env=dict(os.environ),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    plan = json.loads(done.stdout)
    assert faults(plan, PlanFile) == []
    assert json.loads(RunDir(tmp_path / "run").plan.read_text(encoding="utf-8")) == plan
    assert plan["fits"]
    assert plan["chosen"] == ["train.gradient_accumulation=1", f"scoring.batch_tokens={2 * 16_384}"]
    assert [stage["stage"] for stage in plan["stages"]] == ["train", "score"]
    assert plan["usd"] == pytest.approx(plan["hours"] * 4 * 1.2)
    for stage in plan["stages"]:
        assert stage["notes"] == []
        assert 0 < stage["used_gib"] < stage["usable_gib"]
    train = plan["stages"][0]
    # A small part of the chip's memory: parameters and two moments, split over the devices.
    assert train["memory_gib"]["optimizer"] == pytest.approx(2 * train["memory_gib"]["parameters"], rel=0.01)
    assert sum(each["bytes"] for each in train["network"]) > 0


def test_without_the_compiler_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(PlanError, match=r"pip install 'middo-jax\[tpu\]'"):
        devices_of(Slices.parse("v5e:2x2"))


MESHES = """
import json, sys
from middo_jax.planning.chips import Slices
from middo_jax.planning.compiling import mesh_of
for topology, shape in json.loads(sys.argv[1]):
    mesh = mesh_of(Slices.parse(topology), tuple(shape))
    slices = [getattr(device, "slice_index", None) for device in mesh.devices[:, 0, 0]]
    print(json.dumps([topology, list(mesh.devices.shape), slices]))
"""


@pytest.mark.tpu_compile
def test_meshes_of_slices_as_they_are_rented() -> None:
    """Parts of an axis of the network, several slices, and a v4, whose two cores are one device."""
    pytest.importorskip("libtpu")
    wanted = [
        ["v6e:4x8", [1, 8, 4], [None]],
        ["v5p:4x4x4", [1, 32, 2], [None]],
        ["v4:2x2x2", [1, 4, 2], [None]],
        ["v5e:4x4x2", [2, 8, 2], [0, 1]],
    ]
    done = subprocess.run(
        [sys.executable, "-c", MESHES, json.dumps([row[:2] for row in wanted])],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")] == wanted
