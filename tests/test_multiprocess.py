"""The law of many hosts: two processes that share a mesh measure what one process measures."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny_model import write_tiny_model

TIMEOUT_S = 300

# Every process writes what it ended up with: all must hold all of it.
PROGRAM = """
import sys
import jax
import numpy as np

directory, out, address, processes, process = sys.argv[1:]
jax.config.update("jax_num_cpu_devices", 8 // int(processes))
if int(processes) > 1:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, int(processes), int(process), initialization_timeout=120)

from middo_jax.config import MeshSettings
from middo_jax.data.tokenize import TokenizedExample
from middo_jax.diagnose.diversity import nearest_neighbours
from middo_jax.diagnose.score import score_examples
from middo_jax.models import hf
from middo_jax.parallel.mesh import make_mesh

assert len(jax.devices()) == 8 and jax.process_count() == int(processes)
rng = np.random.default_rng(0)
examples = []
for i, length in enumerate(rng.integers(4, 120, 24)):
    at = np.arange(length)
    tokens = rng.integers(3, 390, length).astype(np.int32)
    examples.append(TokenizedExample(str(i), tokens, at >= length // 2, at < length // 2, False))
mesh = make_mesh(MeshSettings(data=2, fsdp=2, tensor=2))
graphdef, params, _ = hf.load(directory, mesh=mesh)
scores, _ = score_examples(graphdef, params, examples, mesh=mesh, batch_tokens=1024, chunk=64)
found = nearest_neighbours(scores.embedding_nd, 3, mesh, block=2)
np.savez(out, **scores._asdict(), **found._asdict())
"""


def start(directory: Path, out: Path, address: str, processes: int, process: int) -> subprocess.Popen[bytes]:
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    arguments = [str(directory), str(out), address, str(processes), str(process)]
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def finish(started: list[subprocess.Popen[bytes]]) -> None:
    try:
        for process in started:
            output, _ = process.communicate(timeout=TIMEOUT_S)
            assert process.returncode == 0, output.decode(errors="replace")[-4000:]
    finally:
        for process in started:
            process.kill()
            process.wait()


@pytest.mark.multiprocess
def test_two_processes_measure_what_one_does(tmp_path: Path) -> None:
    directory = write_tiny_model(tmp_path / "model")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    finish([start(directory, tmp_path / f"{i}.npz", address, 2, i) for i in range(2)])
    finish([start(directory, tmp_path / "alone.npz", "", 1, 0)])

    alone = np.load(tmp_path / "alone.npz")
    for name in ("0.npz", "1.npz"):
        shared = np.load(tmp_path / name)
        assert set(shared) == set(alone)
        np.testing.assert_array_equal(shared["n_targets_n"], alone["n_targets_n"])
        np.testing.assert_array_equal(shared["index_nk"], alone["index_nk"])
        for floats in ("loss_n", "embedding_nd", "similarity_nk"):
            assert np.isfinite(shared[floats]).all()
            np.testing.assert_allclose(shared[floats], alone[floats], rtol=1e-5, atol=1e-5)
