"""What a training shows: FLOPs by their formula, MFU, one line a step, TensorBoard, Weights & Biases."""

from __future__ import annotations

import dataclasses
import struct
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from support.tiny_training import CONFIG, SETTINGS, Killed, examples, fine_tune, kill_at, mesh_of

from middo_jax.config import ConfigError, WandB
from middo_jax.models.config import LayerKind, Lora
from middo_jax.rundir import read_jsonl
from middo_jax.training.flops import peak_flops, training_flops
from middo_jax.training.metrics import Speed, StepMetrics

ONE = mesh_of(1, 1, 1)
SHORT = SETTINGS.model_copy(update={"num_epochs": 2})
# Of CONFIG: two layers; q and o 32 x 32, k and v 32 x 16, gate, up and down 32 x 64.
MATRICES = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64)
HEAD = 96 * 32


def test_flops_are_those_of_the_formula() -> None:
    # Two examples of 3 and 2 tokens: 6 + 3 pairs of positions that see each other, in each of two layers.
    attention = 12 * 4 * 8 * 2 * (6 + 3)
    assert training_flops(CONFIG, [3, 2], 4) == 5 * 6 * MATRICES + 4 * 6 * HEAD + attention
    # A window of two in one of the layers: 5 + 3 pairs there.
    kinds = dataclasses.replace(CONFIG, kinds=(LayerKind(), LayerKind(window=2)), kind_of_layer=(0, 1))
    narrower = training_flops(CONFIG, [3, 2], 4) - training_flops(kinds, [3, 2], 4)
    assert narrower == 12 * 4 * 8 * 1
    # Frozen matrices and head have no gradient of their own; adapters have: 3 x (32 + 32) for q of rank 3.
    adapted = dataclasses.replace(CONFIG, lora=Lora(3, 8.0, ("q_proj",)))
    adapters = 2 * 3 * (32 + 32)
    assert training_flops(adapted, [3, 2], 4) == 5 * (4 * MATRICES + 6 * adapters) + 4 * 4 * HEAD + attention


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v6 lite", 918e12),
        ("TPU7x", 1153.5e12),
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("cpu", None),
        ("NVIDIA L400", None),
        ("TPU v5x", None),
    ],
)
def test_peaks_go_by_whole_words(kind: str, peak: float | None) -> None:
    assert peak_flops(kind) == peak


def test_a_step_shows_its_speed(tmp_path: Path) -> None:
    seen: list[StepMetrics] = []
    fine_tune(tmp_path, examples(40), mesh_of(2, 2, 2), SHORT, seen.append)
    rows = read_jsonl(tmp_path / "metrics.jsonl")
    assert [row["speed"] for row in rows] == [dataclasses.asdict(m.speed) for m in seen]
    for metrics in seen:
        speed = metrics.speed
        assert speed.tokens_per_second == pytest.approx(8 * speed.tokens_per_second_device)
        assert 0 <= speed.waited_for_data <= 1
        assert (speed.mfu, speed.memory_bytes) == (None, None)  # a CPU says neither
        assert "MFU not known for this device" in metrics.note()
    assert seen[-1].speed.seconds_left == 0


def test_the_live_line() -> None:
    speed = Speed(2.0, 8000.0, 2000.0, 0.4123, 0.001, 3 * 2**30, 16 * 2**30, 60.0)
    metrics = StepMetrics(7, 100, 0, 1.2345, 512, 0.8765, 2e-5, (), speed)
    assert metrics.note() == (
        "loss 1.234, grad norm 0.876, lr 2.00e-05, 2,000 tokens/s per device, MFU 41.2%, data wait 0.1%, "
        "memory 3.0 of 16.0 GiB"
    )
    left_out = dataclasses.replace(metrics, loss=float("nan"), skipped=("a",))
    assert left_out.note().startswith("step left out, loss nan")
    assert left_out.row()["loss"] is None
    assert "train/loss" not in left_out.scalars()
    assert metrics.scalars()["speed/mfu"] == 0.4123


def events(directory: Path) -> dict[str, list[tuple[int, float]]]:
    """Scalars of the event files: a record is its length, a checksum, the bytes, a checksum."""
    from tensorboardX.proto import event_pb2

    event_type: Any = vars(event_pb2)["Event"]  # made as the module is imported, so that no stub has it
    found: dict[str, list[tuple[int, float]]] = {}
    for file in sorted(directory.glob("events.*")):
        data, at = file.read_bytes(), 0
        while at < len(data):
            (size,) = struct.unpack_from("<Q", data, at)
            event = event_type.FromString(data[at + 12 : at + 12 + size])
            at += 12 + size + 4
            for value in event.summary.value:
                found.setdefault(value.tag, []).append((event.step, value.simple_value))
    return found


def test_tensorboard_shows_each_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writing = pytest.importorskip("tensorboardX.event_file_writer")
    # Stopped and resumed within a second, which is as finely as its files are named.
    monkeypatch.setattr(writing, "time", SimpleNamespace(time=lambda: 1.8e9))
    settings = SHORT.model_copy(update={"trackers": ("tensorboard",), "save_every": 2})
    with pytest.raises(Killed):
        fine_tune(tmp_path, examples(40), ONE, settings, kill_at(3))
    fine_tune(tmp_path, examples(40), ONE, settings)
    losses = events(tmp_path / "tensorboard")["train/loss"]
    rows = read_jsonl(tmp_path / "metrics.jsonl")
    # Step 3 is there twice: the second file tells TensorBoard to forget the first.
    assert dict(losses) == pytest.approx({row["step"]: row["loss"] for row in rows}, rel=1e-6)
    assert "speed/tokens_per_second_device" in events(tmp_path / "tensorboard")


def test_wandb_goes_on_as_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def init(**given: Any) -> Any:
        calls.append(given)
        return SimpleNamespace(
            log=lambda scalars, step: calls.append((step, scalars["train/loss"])),
            finish=lambda: calls.append("finish"),
        )

    fake = ModuleType("wandb")
    fake.__dict__["init"] = init
    monkeypatch.setitem(sys.modules, "wandb", fake)
    settings = SHORT.model_copy(update={"trackers": (WandB(wandb="mine"),), "save_every": 2})
    with pytest.raises(Killed):
        fine_tune(tmp_path, examples(40), ONE, settings, kill_at(3))
    fine_tune(tmp_path, examples(40), ONE, settings)
    first, second = (call for call in calls if isinstance(call, dict))
    assert (first["project"], first["id"], first["resume"]) == ("mine", second["id"], "allow")
    assert calls.count("finish") == 2
    shown = {call[0]: call[1] for call in calls if isinstance(call, tuple)}
    assert shown == {row["step"]: row["loss"] for row in read_jsonl(tmp_path / "metrics.jsonl")}


@pytest.mark.parametrize(
    ("tracker", "package", "extra"),
    [("tensorboard", "tensorboardX", "tensorboard"), (WandB(wandb="mine"), "wandb", "wandb")],
)
def test_a_missing_package_is_said_before_anything_starts(
    tracker: str | WandB, package: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        ConfigError, match=rf'needs the package {package}: pip install "middo-jax\[{extra}\]"'
    ):
        fine_tune(tmp_path, examples(20), ONE, SHORT.model_copy(update={"trackers": (tracker,)}))
    assert not list(tmp_path.iterdir())
