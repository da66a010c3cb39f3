"""Joins the other processes of a job, found in the environment or given, before any JAX backend is used.

JAX detects most clusters by itself. This module adds what JAX leaves to the user: variables for any
scheduler, all GPUs of a node for a single task, a timeout long enough for cold pods, and messages.
"""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import importlib.util
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from middo_jax.buckets.working import writes_pieces
from middo_jax.config import HostsSettings
from middo_jax.parallel.preemption import Preempted
from middo_jax.parallel.roll_call import RollCall
from middo_jax.progress import Progress, duration, in_job
from middo_jax.rundir import RunError
from middo_jax.rundir.files import only_read

HEARTBEAT_TIMEOUT_S = 60  # longer than `watch.Watch` takes, whose message is more precise
SAY_AFTER_S = 30.0
LOCKFILE = Path("/tmp/libtpu_lockfile")

_GIVEN = {"coordinator": "--coordinator", "processes": "--processes", "process": "--process"}


@dataclasses.dataclass(frozen=True)
class Job:
    """How this process joins others. JAX finds a field that is None in the cluster's environment.

    Attributes:
      source: where these values come from, for messages.
      coordinator: host:port of process 0.
      processes: number of processes.
      process: index of this process.
      local_devices: indices of this host's GPUs that this process uses; None: JAX's choice.
    """

    source: str
    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None
    local_devices: tuple[int, ...] | None = None


def find_job(
    environment: Mapping[str, str],
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
) -> Job | None:
    """The job that this process belongs to; None if it runs alone.

    The options override JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID. These variables
    override a scheduler's: Slurm, Open MPI, an Indexed Job of Kubernetes, Cloud TPU and GKE.

    Args:
      environment: `os.environ`.
      coordinator: value of `--coordinator`, host:port.
      processes: value of `--processes`.
      process: value of `--process`, from 0.

    Raises:
      RunError: a job is specified only in part, or its numbers are invalid.
    """
    named = {"coordinator": coordinator, "processes": processes, "process": process}
    scheduler = _scheduler(environment)
    if any(value is not None for value in named.values()):
        return _complete("the options", named, scheduler)
    if "JAX_COORDINATOR_ADDRESS" in environment:
        ours = {
            "coordinator": environment["JAX_COORDINATOR_ADDRESS"],
            "processes": _integer(environment, "JAX_NUM_PROCESSES"),
            "process": _integer(environment, "JAX_PROCESS_ID"),
        }
        return _complete("JAX's variables", ours, scheduler)
    if scheduler is None or scheduler.processes == 1:
        return None
    if scheduler.source == "Open MPI" and "OMPI_MCA_orte_hnp_uri" not in environment:
        raise RunError(
            "Open MPI 5 does not say on which host rank 0 runs: give --coordinator HOST:PORT, or set "
            "JAX_COORDINATOR_ADDRESS, with that host"
        )
    if scheduler.source == "Kubernetes" and importlib.util.find_spec("kubernetes") is None:
        raise RunError(
            "an Indexed Job of Kubernetes: set JAX_COORDINATOR_ADDRESS (JOB-0.SERVICE:8476) and "
            "JAX_NUM_PROCESSES in the pod's environment, or install the package `kubernetes`"
        )
    return scheduler


def _complete(source: str, named: Mapping[str, str | int | None], scheduler: Job | None) -> Job:
    """The job, with missing numbers taken from the scheduler, if there is one."""
    known = dict(named)
    for name in ("processes", "process"):
        if known[name] is None and scheduler is not None:
            known[name] = getattr(scheduler, name)
    missing = [_GIVEN[name] for name, value in known.items() if value is None]
    if missing:
        raise RunError(
            f"{source} specify a job of several processes, but {' and '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} missing (JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, "
            "JAX_PROCESS_ID work as well)"
        )
    coordinator, processes, process = str(known["coordinator"]), known["processes"], known["process"]
    assert isinstance(processes, int)
    assert isinstance(process, int)
    if not 0 <= process < processes:
        raise RunError(f"{source}: process {process} of {processes}; processes count from 0")
    if not re.fullmatch(r".+:\d+", coordinator):
        raise RunError(f"{source}: the coordinator {coordinator!r} is not HOST:PORT")
    devices = None if scheduler is None else scheduler.local_devices
    return Job(source, coordinator, processes, process, devices)


def _scheduler(environment: Mapping[str, str]) -> Job | None:
    """The job according to a scheduler's variables; `processes` is 1 for a job of one process."""
    slurm = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
    if all(name in environment for name in slurm):
        return Job(
            "Slurm",
            processes=_integer(environment, "SLURM_NTASKS"),
            process=_integer(environment, "SLURM_PROCID"),
            local_devices=_gpus_of_task(environment),
        )
    if "OMPI_COMM_WORLD_SIZE" in environment:
        return Job(
            "Open MPI",
            processes=_integer(environment, "OMPI_COMM_WORLD_SIZE"),
            process=_integer(environment, "OMPI_COMM_WORLD_RANK"),
        )
    if _on_tpu(environment):
        hosts = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES")
        alone = hosts is not None and "," not in hosts and environment.get("MEGASCALE_NUM_SLICES", "1") == "1"
        return Job("Cloud TPU", processes=1 if alone else None)
    if "KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment:
        return Job("Kubernetes", process=_integer(environment, "JOB_COMPLETION_INDEX"))
    return None


def _on_tpu(environment: Mapping[str, str]) -> bool:
    if environment.get("JAX_PLATFORMS", "tpu").split(",")[0] not in ("", "tpu"):
        return False
    has_chips = bool(glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*"))
    return has_chips and importlib.util.find_spec("libtpu") is not None


def _gpus_of_task(environment: Mapping[str, str]) -> tuple[int, ...] | None:
    """The GPUs of a Slurm task, of which JAX would use only one; None if they cannot be determined.

    Indices refer to CUDA_VISIBLE_DEVICES, where Slurm sets it.
    """
    tasks = re.match(r"\d+", environment.get("SLURM_STEP_TASKS_PER_NODE", ""))
    of_node = re.search(r"\d+$", environment.get("SLURM_GPUS_ON_NODE", ""))
    visible = len([gpu for gpu in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu])
    n_gpus = int(of_node.group()) if of_node else visible
    if tasks is None or not n_gpus:
        return None
    if visible and visible < n_gpus:
        return tuple(range(visible))  # Slurm already restricts each task to its own share
    share, rest = divmod(n_gpus, int(tasks.group()))
    if not share or rest:
        return None
    first = int(environment["SLURM_LOCALID"]) * share
    return tuple(range(first, first + share))


def _integer(environment: Mapping[str, str], name: str) -> int | None:
    text = environment.get(name)
    if text is None:
        return None
    if not text.isdigit():
        raise RunError(f"${name} is {text!r}, which is not a number")
    return int(text)


def start(job: Job, progress: Progress, shared: str | Path, timeout_s: float) -> None:
    """Joins the other processes. Must be called before any use of JAX's devices.

    Args:
      job: as returned by `find_job`.
      progress: reports after half a minute which processes are missing.
      shared: folder, or URL of one in a bucket, that all hosts share; each process records its arrival there.
      timeout_s: how long to wait for all processes.

    Raises:
      RunError: the devices are in use, or not all hosts arrived in time.
    """
    import jax  # imported late: `middo select` and `--help` do not need JAX

    _check_lockfile(job)
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    began = time.monotonic()
    where = job.coordinator or f"{job.source}'s first host"
    with (
        RollCall(shared, job.coordinator or "", job.process) as roll,
        _waiting(progress, job, roll, timeout_s),
    ):
        progress.say(f"joining {where} as {_who(job)} (according to {job.source})")
        try:
            jax.distributed.initialize(
                job.coordinator,
                job.processes,
                job.process,
                None if job.local_devices is None else list(job.local_devices),
                initialization_timeout=int(timeout_s),
                heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT_S,
            )
        except (RuntimeError, ValueError, OSError) as error:
            raise RunError(f"could not join {where}: {error}") from error
    progress.say(
        f"process {jax.process_index()} of {jax.process_count()} on {socket.gethostname()}: all have joined "
        f"after {duration(time.monotonic() - began)}"
    )


@contextlib.contextmanager
def joined(
    job: Job | None,
    progress: Progress,
    shared: str | Path,
    settings: HostsSettings,
    on_error: Callable[[BaseException], None],
) -> Iterator[None]:
    """Runs the block in this process as one of a job's; without a job, just runs it.

    Process 0 writes files and prints for the user. All processes watch each other; if one fails, all end.

    Args:
      job: as returned by `find_job`.
      progress: reports which processes are missing.
      shared: folder, or URL of one in a bucket, that all hosts share.
      settings: how long to wait for others.
      on_error: reports an error of this process to the user; the process ends right after it.
    """
    if job is None:
        yield
        return
    start(job, progress, shared, settings.start_timeout)
    # imported late: one process alone does not need it, and some commands do not need JAX
    import jax

    from middo_jax.parallel import coordination, watch

    in_job(coordination.is_first(), watch.advanced)
    writes_pieces()
    if not coordination.is_first():
        only_read(jax.process_index())
    watch.Watch(settings.stall_timeout).start()
    try:
        coordination.check_shared(shared)
        yield
        # JAX's own exit waits for the others too, but only for five minutes.
        coordination.barrier("end")
    except Preempted:  # all processes are preempted
        coordination.tell_good_end()
        raise
    except BaseException as error:
        on_error(error)
        coordination.leave(error)
    coordination.tell_good_end()


def _who(job: Job) -> str:
    of = "" if job.processes is None else f" of {job.processes}"
    return "one of its processes" if job.process is None else f"process {job.process}{of}"


def _check_lockfile(job: Job) -> None:
    """Raises RunError if a TPU's lock file exists: JAX would wait, or fall back to the CPU."""
    if job.source != "Cloud TPU" or not LOCKFILE.exists():
        return
    holders = _processes_with_chips()
    if holders:
        raise RunError(
            f"this host's TPU is in use by process {', '.join(map(str, holders))}; end it, or run elsewhere"
        )
    raise RunError(
        f"{LOCKFILE} exists, but no process uses the TPU: an earlier one left it; `sudo rm {LOCKFILE}` and "
        "start again"
    )


def _processes_with_chips() -> list[int]:
    found = set()
    for link in glob.glob("/proc/[0-9]*/fd/*"):
        try:
            target = os.readlink(link)
        except OSError:  # another user's process, or ended
            continue
        if target.startswith(("/dev/accel", "/dev/vfio/")):
            found.add(int(link.split("/")[2]))
    return sorted(found)


class _waiting:
    """Reports after half a minute, and then every minute, which processes are missing."""

    def __init__(self, progress: Progress, job: Job, roll: RollCall, timeout_s: float) -> None:
        self._progress, self._job, self._roll, self._timeout_s = progress, job, roll, timeout_s
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._tell, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _tell(self) -> None:
        began, wait_s = time.monotonic(), SAY_AFTER_S
        while not self._done.wait(wait_s):
            left = duration(max(0, self._timeout_s - (time.monotonic() - began)))
            self._progress.say(f"{self._roll.missing(self._job.processes)}; waiting for up to {left} more")
            wait_s = 60.0
