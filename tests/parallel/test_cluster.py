"""Which job a process belongs to: the options, JAX's variables, then what schedulers set."""

from __future__ import annotations

from pathlib import Path

import pytest

from middo_jax.parallel import cluster
from middo_jax.parallel.cluster import Job, find_job
from middo_jax.parallel.roll_call import RollCall
from middo_jax.rundir import RunError

SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}
JAX = {"JAX_COORDINATOR_ADDRESS": "10.0.0.1:8476", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "2"}


def test_alone() -> None:
    assert find_job({}) is None
    assert find_job(SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}) is None
    assert find_job({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}) is None  # a pod, not an Indexed Job


def test_options_win_over_variables_and_these_over_a_scheduler() -> None:
    assert find_job(SLURM | JAX, "a:1", 3, 0) == Job("the options", "a:1", 3, 0)
    assert find_job(SLURM | JAX) == Job("JAX's variables", "10.0.0.1:8476", 4, 2)
    assert find_job(SLURM) == Job("Slurm", None, 2, 1)


def test_numbers_that_are_not_named_are_the_schedulers() -> None:
    assert find_job(SLURM, "a:1") == Job("the options", "a:1", 2, 1)
    mpi = {"OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_RANK": "5"}
    assert find_job(mpi | {"JAX_COORDINATOR_ADDRESS": "a:1"}) == Job("JAX's variables", "a:1", 8, 5)
    indexed = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "3"}
    named = {"JAX_COORDINATOR_ADDRESS": "job-0.pods:8476", "JAX_NUM_PROCESSES": "4"}
    assert find_job(indexed | named) == Job("JAX's variables", "job-0.pods:8476", 4, 3)


@pytest.mark.parametrize(
    ("environment", "options", "message"),
    [
        ({}, ("a:1", None, None), "--processes and --process are missing"),
        ({}, (None, 2, 0), "--coordinator is missing"),
        ({}, ("a:1", 2, 2), "process 2 of 2; processes count from 0"),
        ({}, ("a", 2, 1), "'a' is not HOST:PORT"),
        (JAX | {"JAX_NUM_PROCESSES": "four"}, (), "JAX_NUM_PROCESSES is 'four'"),
        ({"OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_RANK": "5"}, (), "Open MPI 5 does not say"),
        ({"KUBERNETES_SERVICE_HOST": "h", "JOB_COMPLETION_INDEX": "0"}, (), "set JAX_COORDINATOR_ADDRESS"),
    ],
)
def test_what_cannot_be_joined_says_what_to_give(
    environment: dict[str, str], options: tuple[object, ...], message: str
) -> None:
    with pytest.raises(RunError, match=message):
        find_job(environment, *options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("variables", "devices"),
    [
        ({}, None),
        ({"SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_GPUS_ON_NODE": "8"}, tuple(range(8))),
        ({"SLURM_STEP_TASKS_PER_NODE": "1(x2)", "CUDA_VISIBLE_DEVICES": "0,1,2,3"}, (0, 1, 2, 3)),
        ({"SLURM_STEP_TASKS_PER_NODE": "8(x2)", "SLURM_GPUS_ON_NODE": "8", "SLURM_LOCALID": "5"}, (5,)),
        (
            {"SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_GPUS_ON_NODE": "8", "SLURM_LOCALID": "1"},
            (4, 5, 6, 7),
        ),
        # Each task is shown its own two of eight.
        (
            {
                "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
                "SLURM_GPUS_ON_NODE": "8",
                "CUDA_VISIBLE_DEVICES": "0,1",
                "SLURM_LOCALID": "3",
            },
            (0, 1),
        ),
        ({"SLURM_STEP_TASKS_PER_NODE": "3", "SLURM_GPUS_ON_NODE": "8"}, None),  # no even share: JAX's choice
    ],
)
def test_a_task_of_slurm_uses_all_gpus_of_its_node_that_are_its_own(
    variables: dict[str, str], devices: tuple[int, ...] | None
) -> None:
    job = find_job(SLURM | variables)
    assert job is not None
    assert job.local_devices == devices


def test_a_tpu_host_with_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "_on_tpu", lambda environment: True)
    assert find_job({"TPU_WORKER_HOSTNAMES": "a"}) is None
    assert find_job({"TPU_WORKER_HOSTNAMES": "a,b"}) == Job("Cloud TPU")
    assert find_job({"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}) == Job("Cloud TPU")
    assert find_job({}) == Job("Cloud TPU")  # a TPU VM: its metadata say how many there are


def test_a_lock_file_that_was_left_behind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    lock = tmp_path / "libtpu_lockfile"
    lock.touch()
    monkeypatch.setattr(cluster, "LOCKFILE", lock)
    with pytest.raises(RunError, match="no process uses the TPU"):
        cluster._check_lockfile(Job("Cloud TPU"))
    monkeypatch.setattr(cluster, "_processes_with_chips", lambda: [42])
    with pytest.raises(RunError, match="in use by process 42"):
        cluster._check_lockfile(Job("Cloud TPU"))
    cluster._check_lockfile(Job("Slurm"))


def test_the_roll_call_names_who_is_missing(tmp_path: Path) -> None:
    with RollCall(tmp_path, "a:1", 0) as roll, RollCall(tmp_path, "a:1", 2), RollCall(tmp_path, "b:1", 1):
        assert roll.missing(4).startswith("process 1, 3 of 4 has not arrived (here: 0 on ")
        assert "2 on " in roll.missing(None)
    assert list(tmp_path.iterdir()) == []


def test_processes_of_two_hosts_with_one_pid_are_two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In containers every process may have pid 1."""
    monkeypatch.setattr("socket.gethostname", lambda: "a/b")
    first = RollCall(tmp_path, "a:1", None)
    with first as roll:
        monkeypatch.setattr("socket.gethostname", lambda: "c")
        with RollCall(tmp_path, "a:1", None):
            assert len(roll.arrived()) == 2
    assert list(tmp_path.iterdir()) == []
