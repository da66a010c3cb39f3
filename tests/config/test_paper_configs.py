"""The paper's configs: every combination of their parts parses and says what was published."""

from __future__ import annotations

from pathlib import Path

import pytest

from middo_jax.config import Config, ConfigError, load

PAPER = Path(__file__).parents[2] / "configs" / "paper"
LEARNING_RATES = {"llama-3.1-8b": 2e-5, "mistral-7b-v0.3": 1e-5}
DATASETS = ("alpaca", "alpaca-4o-mini", "wizardlm")
CHIPS = {"v5e-64": 64, "v5p-32": 16, "v6e-32": 32, "h100-8": 8}


def paper_config(model: str, dataset: str, hardware: str) -> Config:
    parts = [PAPER / "models" / model, PAPER / "data" / dataset, PAPER / "hardware" / hardware]
    return load(PAPER / "published.yaml", [f"{part}.yaml" for part in parts])


@pytest.mark.parametrize("hardware", CHIPS)
@pytest.mark.parametrize("dataset", DATASETS)
@pytest.mark.parametrize("model", LEARNING_RATES)
def test_the_published_training(model: str, dataset: str, hardware: str):
    config = paper_config(model, dataset, hardware)
    train = config.train
    assert train.examples_per_step == 4 * 8 * 8  # a device, accumulated, devices
    assert train.learning_rate == LEARNING_RATES[model]
    assert (train.num_epochs, train.schedule, train.warmup_ratio) == (1, "cosine", 0.03)
    assert (config.model.max_length, config.model.dtype, config.lora.rank) == (4096, "bfloat16", None)
    assert (config.refine.model, config.refine.temperature) == ("gpt-4o-mini", 1.0)
    assert not config.refine.show_response
    assert (config.refine.accept, config.refine.growth, config.refine.max_attempts) == ("none", "free", 1)
    # It runs there: the mesh is of these devices, and every micro-batch spreads evenly over it.
    mesh = config.mesh
    assert mesh.tensor != "auto"
    assert train.gradient_accumulation != "auto"
    assert mesh.data * mesh.fsdp * mesh.tensor == CHIPS[hardware]
    assert 8 % mesh.tensor == 0  # kv heads
    assert train.batch_size % (train.gradient_accumulation * mesh.data * mesh.fsdp) == 0


def test_every_part_is_tried():
    parts = {path.relative_to(PAPER).with_suffix("").as_posix() for path in PAPER.glob("*/*.yaml")}
    assert parts == {
        *(f"models/{name}" for name in LEARNING_RATES),
        *(f"data/{name}" for name in DATASETS),
        *(f"hardware/{name}" for name in CHIPS),
        "tasks/hellaswag_generative",
    }


def test_all_eight_benchmarks_are_named_and_no_code_is_run_unasked():
    config = load(PAPER / "published.yaml", ["model.path=m", "data.path=d", str(PAPER / "evaluation.yaml")])
    eight = ("mmlu", "ifeval", "gsm8k", "minerva_math", "humaneval", "mbpp", "hellaswag", "gpqa")
    assert len(config.evaluate.tasks) == len(eight)
    for name, task in zip(eight, config.evaluate.tasks, strict=True):
        assert task.startswith(name)
    assert (PAPER / str(config.evaluate.include_path)).is_dir()
    assert not config.evaluate.allow_code


def test_of_files_and_settings_the_last_wins(tmp_path: Path):
    for name, text in {
        "a": "model: {path: m, max_length: 64}\ndata: {path: d}\ntrain: {batch_size: 4}",
        "b": "model: {path: n}\ntrain: {batch_size: 8, num_epochs: 2}",
        "list": "[1]",
    }.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    config = load(tmp_path / "a.yaml", ["train.batch_size=5", str(tmp_path / "b.yaml"), "train.num_epochs=3"])
    assert (config.model.path, config.model.max_length, config.data.path) == ("n", 64, "d")
    assert (config.train.batch_size, config.train.num_epochs) == (8, 3)
    with pytest.raises(ConfigError, match=r"cannot read .*c\.yaml"):
        load(tmp_path / "a.yaml", [str(tmp_path / "c.yaml")])
    with pytest.raises(ConfigError, match=r"list\.yaml must hold settings"):
        load(tmp_path / "a.yaml", [str(tmp_path / "list.yaml")])
