"""Law: two processes that share a mesh load and export what one process does."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.processes import run_together
from support.tiny_model import write_tiny_model

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

model = hf.load(directory, mesh=make_mesh(MeshSettings(data=1, fsdp=4, tensor=2)))
hf.export(model, directory, out, "bfloat16", max_shard_bytes=30_000)
"""


@pytest.mark.multiprocess
def test_two_processes_export_what_one_does(tmp_path: Path) -> None:
    directory = write_tiny_model(tmp_path / "model", tie=False)
    run_together(2, lambda _: ["-c", PROGRAM, directory, tmp_path / "two"])
    run_together(1, lambda _: ["-c", PROGRAM, directory, tmp_path / "one"])
    one, two = ({file.name: file.read_bytes() for file in (tmp_path / n).iterdir()} for n in ("one", "two"))
    assert len(one) > 6
    assert two == one
