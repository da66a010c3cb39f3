"""Law: two processes that share a mesh load and export what one process does."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_model import write_tiny_model

TIMEOUT_S = 300

PROGRAM = """
import sys
import jax

directory, out, address, processes, process = sys.argv[1:]
jax.config.update("jax_num_cpu_devices", 8 // int(processes))
if int(processes) > 1:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, int(processes), int(process), initialization_timeout=120)

from middo_jax.config import MeshSettings
from middo_jax.models import hf
from middo_jax.parallel.mesh import make_mesh

_, params, config = hf.load(directory, mesh=make_mesh(MeshSettings(data=1, fsdp=4, tensor=2)))
hf.export(params, config, directory, out, "bfloat16", max_shard_bytes=30_000)
"""


def finish(processes: list[subprocess.Popen[bytes]]) -> None:
    try:
        for process in processes:
            output, _ = process.communicate(timeout=TIMEOUT_S)
            assert process.returncode == 0, output.decode(errors="replace")[-4000:]
    finally:
        for process in processes:
            process.kill()
            process.wait()


@pytest.mark.multiprocess
def test_two_processes_export_what_one_does(tmp_path: Path) -> None:
    directory = write_tiny_model(tmp_path / "model", tie=False)
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}

    def start(out: Path, address: str, processes: int, process: int) -> subprocess.Popen[bytes]:
        arguments = map(str, (directory, out, address, processes, process))
        command = [sys.executable, "-c", PROGRAM, *arguments]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    finish([start(tmp_path / "two", address, 2, process) for process in range(2)])
    finish([start(tmp_path / "one", "", 1, 0)])
    one, two = ({file.name: file.read_bytes() for file in (tmp_path / n).iterdir()} for n in ("one", "two"))
    assert len(one) > 6
    assert two == one
