"""The law of preemption: told to stop, a training saves, says so by its exit code, and goes on from there."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from support.loop_fixture import write_data
from support.tiny_model import write_tiny_model

from middo_jax.config import MeshSettings
from middo_jax.models.checkpoint import read_metadata, restore_params
from middo_jax.models.config import read_config
from middo_jax.parallel.mesh import make_mesh
from middo_jax.parallel.preemption import EXIT_PREEMPTED, Preempted
from middo_jax.rundir import read_jsonl
from middo_jax.training.stopping import deferred_stops

TIMEOUT_S = 300


def start(root: Path, name: str) -> subprocess.Popen[bytes]:
    settings = (
        "model.dtype=float32",
        "train.batch_size=1",
        "model.max_length=512",
        "train.num_epochs=100",
        "train.save_every=1000",
        "train.param_dtype=bfloat16",
    )
    command = ("train", "--data", root / "data.json", "--model", root / "model", "--out", root / name)
    env = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    return subprocess.Popen(
        [sys.executable, "-m", "middo_jax", *map(str, command), *settings],
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def learnt(out: Path) -> list[dict[str, object]]:
    return [{k: v for k, v in row.items() if k != "speed"} for row in read_jsonl(out / "metrics.jsonl")]


def weights(root: Path, name: str) -> list[np.ndarray]:
    mesh = make_mesh(MeshSettings(data=1, fsdp=1, tensor=1), jax.devices()[:1])
    config = read_config(root / "model")
    return [np.asarray(x) for x in jax.tree.leaves(restore_params(root / name / "checkpoint", config, mesh))]


@pytest.mark.slow
@pytest.mark.multiprocess
def test_preempted_and_resumed_is_uninterrupted(tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "model")
    write_data(tmp_path / "data.json")
    whole = start(tmp_path, "whole")
    assert whole.wait(TIMEOUT_S) == 0
    metrics = tmp_path / "cut" / "metrics.jsonl"
    for signal_number, code, told in (
        (signal.SIGTERM, EXIT_PREEMPTED, "preempted, all is saved; run the same command again to continue"),
        (signal.SIGINT, 130, "interrupted; run the same command again to continue"),
    ):
        process = start(tmp_path, "cut")
        before = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
        deadline = time.monotonic() + TIMEOUT_S
        while process.poll() is None and time.monotonic() < deadline:
            if metrics.exists() and metrics.read_bytes().count(b"\n") >= before + 3:
                break
            time.sleep(0.002)
        process.send_signal(signal_number)
        _, errors = process.communicate(timeout=TIMEOUT_S)
        assert (process.returncode, told in errors.decode()) == (code, True), errors.decode()
        saved = [int(p.name) for p in (tmp_path / "cut" / "checkpoint" / "steps").iterdir()]
        assert saved == [metrics.read_bytes().count(b"\n")]
        assert before < saved[0] < len(learnt(tmp_path / "whole"))
    rest = start(tmp_path, "cut")
    assert rest.wait(TIMEOUT_S) == 0
    assert learnt(tmp_path / "cut") == learnt(tmp_path / "whole")
    left, right = (read_metadata(tmp_path / name / "checkpoint") for name in ("whole", "cut"))
    assert left == right
    for a, b in zip(weights(tmp_path, "cut"), weights(tmp_path, "whole"), strict=True):
        np.testing.assert_array_equal(a, b)


def test_signals_wait_for_the_check_and_handlers_come_back() -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with deferred_stops() as check:
        check(1)
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)  # some schedulers send it twice
        with pytest.raises(Preempted) as raised:
            check(2)
    assert raised.value.code == 75
    with deferred_stops() as check:
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            check(1)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_another_handler_is_left_alone() -> None:
    got: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: got.append(number))
    try:
        with deferred_stops() as check:
            signal.raise_signal(signal.SIGTERM)
            check(1)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert got == [signal.SIGTERM]
