"""launch/slurm.sbatch: its header, what it submits, and what it does inside a job."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from support.launching import ROOT, Cloud

# Options of sbatch that the header may use.
KNOWN = {
    *("job-name", "nodes", "ntasks-per-node", "gpus-per-node", "mem", "exclusive", "time"),
    *("signal", "requeue", "open-mode", "output"),
}
JOB = {"SLURM_JOB_ID": "42", "MIDDO": "middo"}


def programs(cloud: Cloud) -> list[str]:
    return [call[0] for call in cloud.calls]


def header() -> dict[str, str]:
    """Slurm reads the lines that begin with #SBATCH before the first command."""
    options = {}
    for line in (ROOT / "launch" / "slurm.sbatch").read_text().splitlines():
        if line and not line.startswith("#"):
            break
        if found := re.fullmatch(r"#SBATCH --([a-z-]+)(?:=(\S+))?", line):
            options[found[1]] = found[2] or ""
        else:
            assert not line.startswith("#SBATCH"), line
    return options


def test_the_header_asks_for_a_signal_in_time_and_to_be_queued_again() -> None:
    options = header()
    assert options.keys() <= KNOWN
    assert options["signal"] == "B:TERM@300"
    assert {"requeue", "exclusive"} <= options.keys()
    assert options["ntasks-per-node"] == "1"
    assert options["open-mode"] == "append"  # the log of the first start must survive the second


def test_on_a_login_node_it_submits_itself_with_its_price(tmp_path: Path) -> None:
    cloud = Cloud(tmp_path)
    code, output = cloud.run(
        "slurm.sbatch",
        *["--nodes", "2", "--gpus", "8", "--price", "2.5", "--partition", "fast", "mine.yaml", "rounds=2"],
        answer="y\n",
    )
    assert code == 0, output
    assert "2 x 8 GPUs x 2.5 per GPU and hour = 40.00 per hour" in output
    [call] = cloud.calls
    assert call[:5] == ["sbatch", "--nodes=2", "--gpus-per-node=8", "--time=24:00:00", "--partition=fast"]
    assert call[5:] == ["launch/slurm.sbatch", "--nodes", "2", "--gpus", "8", "mine.yaml", "rounds=2"]


def test_nothing_is_submitted_without_a_yes(tmp_path: Path) -> None:
    cloud = Cloud(tmp_path)
    code, output = cloud.run("slurm.sbatch", "mine.yaml", answer="n\n")
    assert code == 1
    assert "nothing was submitted" in output
    assert cloud.calls == []


def test_a_dry_run_calls_nothing_and_shows_the_split_of_the_gpus(tmp_path: Path) -> None:
    cloud = Cloud(tmp_path)
    code, output = cloud.run(
        "slurm.sbatch", "--dry-run", "--refiner", "R", "--refiner-gpus", "0,5", "mine.yaml"
    )
    assert code == 0, output
    assert cloud.calls == []
    assert "'--gpus' '0,5'" in output
    assert "export CUDA_VISIBLE_DEVICES=1,2,3,4,6,7; exec" in output
    assert "'refine.base_url=http://127.0.0.1:8000/v1' 'refine.model=R'" in output


def test_inside_a_job_the_step_runs_and_its_exit_code_is_the_job_s(tmp_path: Path) -> None:
    cloud = Cloud(tmp_path, codes={"srun": 3})
    code, output = cloud.run("slurm.sbatch", "mine.yaml", "rounds=2", SLURM_CPUS_ON_NODE="96", **JOB)
    assert code == 3, output
    assert programs(cloud) == ["srun"]
    assert "--cpus-per-task=96" in cloud.calls[0]  # else the step gets one
    assert cloud.calls[0][-3:] == ["middo", "mine.yaml", "rounds=2"]


@pytest.mark.parametrize(("restarts", "queued"), [("", True), ("49", True), ("50", False)])
def test_75_queues_the_job_again_until_the_limit(tmp_path: Path, restarts: str, queued: bool) -> None:
    cloud = Cloud(tmp_path, codes={"srun": 75})
    environment = JOB | ({"SLURM_RESTART_COUNT": restarts} if restarts else {})
    code, output = cloud.run("slurm.sbatch", "mine.yaml", **environment)
    assert code == (0 if queued else 75), output
    assert cloud.calls[1:] == ([["scontrol", "requeue", "42"]] if queued else [])


def test_sigterm_reaches_the_tasks_by_scancel_and_the_job_is_queued_again(tmp_path: Path) -> None:
    """srun must not get the signal: it would kill its tasks. Here scancel ends the step, as a save does."""
    cloud = Cloud(tmp_path)
    programs = tmp_path / "programs"
    mark = tmp_path / "told"
    (programs / "srun").write_text(
        f"#!/bin/bash\ntrap 'touch {tmp_path}/killed; exit 143' TERM\ntouch {cloud.folder}/blocked\n"
        f"until [ -e {mark} ]; do sleep 0.05; done\nexit 75\n"
    )
    (programs / "scancel").write_text(f'#!/bin/bash\necho "$@" > {mark}\n')
    (programs / "scontrol").write_text(f'#!/bin/bash\necho "$@" > {tmp_path}/queued\n')
    process = cloud.start("slurm.sbatch", "mine.yaml", **JOB)
    try:
        deadline = time.monotonic() + 30
        while not (cloud.folder / "blocked").exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGTERM)
        output, _ = process.communicate(timeout=30)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == 0, output
    assert mark.read_text() == "--signal=TERM 42\n"
    assert (tmp_path / "queued").read_text() == "requeue 42\n"
    assert not (tmp_path / "killed").exists()


def test_a_refiner_needs_one_node(tmp_path: Path) -> None:
    code, output = Cloud(tmp_path).run("slurm.sbatch", "--nodes", "2", "--refiner", "R", "mine.yaml")
    assert code == 2
    assert "with one node only" in output
