"""The law of a job: any number of processes gives the datasets, scores, selections and models of one."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.loop_fixture import contents, fake_refiner, settings
from support.two_hosts import ADDRESSES, NAMES, TwoHosts, two_hosts, why_not

from middo_jax.config import load
from middo_jax.parallel.preemption import EXIT_PREEMPTED
from middo_jax.rundir import RunDir, read_jsonl
from middo_jax.rundir.chain import chain
from middo_jax.rundir.events import read_events

DEVICES = 4  # of all processes together
TIMEOUT_S = 900  # of a job; one of four processes takes about two minutes on two idle cores
ENDED_AFTER_S = 120  # when one was killed; the others find that out within 25 s and have 20 s to end
EQUAL = ("dataset.jsonl", "heldout.jsonl", "rejected.jsonl", "requests.jsonl")

pytestmark = pytest.mark.multiprocess


@pytest.fixture(scope="module", autouse=True)
def programs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """All jobs of this module share their compiled programs, also those that take less than a second."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path_factory.mktemp("programs")))
        environment.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        yield


class Ended(NamedTuple):
    code: int
    output: str


def start(processes: int, *arguments: str, hosts: TwoHosts | None = None) -> list[subprocess.Popen[str]]:
    """The processes of `middo ARGUMENTS`, each with its share of the devices, or on its own host."""
    address = f"{ADDRESSES[0]}:8476"
    if hosts is None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
    started = []
    for process in range(processes):
        inside = () if hosts is None else hosts.inside(process)
        job = ["--coordinator", address, "--processes", str(processes), "--process", str(process)]
        started.append(
            subprocess.Popen(
                [*inside, sys.executable, "-m", "middo_jax", *(job if processes > 1 else ()), *arguments],
                env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(DEVICES // processes)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    return started


def end(started: list[subprocess.Popen[str]]) -> list[Ended]:
    try:
        outputs = [process.communicate(timeout=TIMEOUT_S)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    print(*outputs, sep="\n---\n")  # shown where a test fails
    return [Ended(process.returncode, output) for process, output in zip(started, outputs, strict=True)]


def wait_for(is_so: Callable[[], bool], started: list[subprocess.Popen[str]]) -> None:
    """Returns once it is so; fails if a process ends before, or if it takes too long."""
    deadline = time.monotonic() + TIMEOUT_S
    while not is_so():
        if time.monotonic() > deadline or any(process.poll() is not None for process in started):
            for process in started:
                process.kill()
            print(*(process.communicate()[0] for process in started), sep="\n---\n")
            raise AssertionError("it has not come to the awaited point")
        time.sleep(0.05)


def within(run: RunDir, stage: str) -> Callable[[], bool]:
    """Whether a stage, FOLDER/NAME, begins after this call, and a training makes a step; to be called."""

    def times_begun() -> int:
        rows = read_events(run.events).rows
        return sum(row["event"] == "start" and f"{row['round']}/{row['stage']}" == stage for row in rows)

    before, since = times_begun(), time.time()
    folder, _, name = stage.partition("/")
    metrics = run.path / folder / "metrics.jsonl"

    def is_within() -> bool:
        has_step = name != "train" or (metrics.exists() and metrics.stat().st_mtime > since)
        return times_begun() > before and has_step

    return is_within


class Loop(NamedTuple):
    """A refiner, a dataset and settings for several runs, and the run of one process."""

    root: Path
    url: str | None
    alone: RunDir
    more: Mapping[str, Any]

    def command(self, runs: Path) -> tuple[str, str]:
        """The arguments of a run below `runs`."""
        runs.mkdir(exist_ok=True)
        given = {
            "runs_dir": runs,
            "train__batch_size": 4,
            "refine__accept": "measured",
            "hosts__stall_timeout": 120,
            "stop__patience": 1,  # process 0 decides which stages are left
            "controls": "[random]",
        }
        chosen = settings(self.root, self.url, **{**given, **self.more})
        (runs / "config.yaml").write_text(load(None, chosen).to_yaml(), encoding="utf-8")
        return "run", str(runs / "config.yaml")

    def up_to(self, runs: Path, stage: str) -> tuple[str, str]:
        """The same, where one process has done all that precedes a stage, FOLDER/NAME."""
        command = self.command(runs)
        run = RunDir(runs / "run")
        shutil.copytree(self.alone.path, run.path)
        links = chain(run, load(Path(command[1])))
        first = [link.where.replace(" ", "/") for link in links].index(stage)
        for link in links[first:]:
            link.folder.forget(link.name)
            for path in (*link.writes, *link.may_write):
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)
            if link.name == "refine":
                for path in run.path.glob(f"{run.llm_cache.name}*"):
                    path.unlink()
        return command


def run_alone(root: Path, url: str | None, **more: Any) -> Loop:
    made = Loop(root, url, RunDir(root / "alone" / "run"), more)
    [ended] = end(start(1, *made.command(root / "alone")))
    assert ended.code == 0
    return made


@pytest.fixture(scope="module")
def loop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loop]:
    with fake_refiner(seconds=0.05) as (url, _):
        yield run_alone(tmp_path_factory.mktemp("hosts"), url)


def assert_equal(run: RunDir, alone: RunDir) -> None:
    """Equal bytes of data, requests and answers; the same selection; scores and losses within tolerance."""
    ours, theirs = contents(run.path, *EQUAL), contents(alone.path, *EQUAL)
    assert ours.keys() == theirs.keys()
    first = [name for name in theirs if "final" not in name]  # later ones have scores in their lineage
    assert [name for name in first if ours[name] != theirs[name]] == []
    mine, other = (pq.read_table(r.round(0).scores) for r in (run, alone))
    assert mine["id"].to_pylist() == other["id"].to_pylist()
    floats = [field.name for field in mine.schema if pa.types.is_floating(field.type)]
    assert {"loss_pre", "loss_post", "knn_mean_sim", "quality"} <= set(floats)
    for column in floats:
        one, two = (np.asarray(table[column].to_pylist(), float) for table in (mine, other))
        np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-4)
    chosen = [json.loads(r.round(0).selection.read_text())["axes"] for r in (run, alone)]
    assert len({json.dumps({axis: facts["ids"] for axis, facts in axes.items()}) for axes in chosen}) == 1
    judged = [[(row["task_id"], row["gate"]) for row in read_jsonl(r.round(0).refined)] for r in (run, alone)]
    assert judged[0] == judged[1]
    texts = [[json.loads(line)["id"] for line in r.final.dataset.open()] for r in (run, alone)]
    assert texts[0] == texts[1]
    arms = [json.loads(r.controls.read_text())["arms"] if r.controls.exists() else [] for r in (run, alone)]
    for one, two in zip(*arms, strict=True):
        assert one["losses"] == pytest.approx(two["losses"], abs=1e-3)
        assert (one["tasks"], one["accepted"]) == (two["tasks"], two["accepted"])
    losses = [json.loads(r.heldout_losses.read_text())["models"] for r in (run, alone)]
    for one, two in zip(*losses, strict=True):
        assert one["loss"] == pytest.approx(two["loss"], abs=1e-3)


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_job_gives_what_one_process_gives(loop: Loop, tmp_path: Path, processes: int) -> None:
    ended = end(start(processes, *loop.command(tmp_path)))
    assert [e.code for e in ended] == [0] * processes
    assert_equal(RunDir(tmp_path / "run"), loop.alone)
    assert all("report.html" not in e.output for e in ended[1:])  # process 0 alone speaks


@pytest.mark.slow
def test_preempted_by_a_sigterm_to_any_process_and_continued_by_fewer(loop: Loop, tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    started = start(2, *loop.command(tmp_path))
    wait_for(run.round(0).scores.exists, started)
    started[1].send_signal(signal.SIGTERM)
    assert [e.code for e in end(started)] == [EXIT_PREEMPTED] * 2
    [ended] = end(start(1, *loop.command(tmp_path)))
    assert ended.code == 0
    assert_equal(run, loop.alone)


@pytest.mark.slow
def test_where_a_process_is_killed_the_others_end_and_say_so(loop: Loop, tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    started = start(2, *loop.command(tmp_path))
    wait_for((run.round(0).path / "checkpoint" / "metadata.json").exists, started)
    started[1].kill()
    killed = time.monotonic()
    ended = end(started)
    assert ended[0].code == EXIT_PREEMPTED  # so that a scheduler starts all again
    assert time.monotonic() - killed < ENDED_AFTER_S
    assert "process 1" in ended[0].output
    assert all(e.code == 0 for e in end(start(2, *loop.command(tmp_path))))
    assert_equal(run, loop.alone)


def test_other_settings_on_one_host_are_named(loop: Loop, tmp_path: Path) -> None:
    started = start(2, *loop.command(tmp_path))
    started[1].kill()
    started[1].wait()
    # The second process again, with another seed.
    arguments = [str(a) for a in started[1].args]  # type: ignore[union-attr]
    started[1] = subprocess.Popen(
        [*arguments, "seed=4"],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(DEVICES // 2)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    for e in end(started):
        assert e.code == 1
        assert "the processes differ in settings: process 0 on " in e.output
    assert not (tmp_path / "run" / "config.yaml").exists()


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loop]:
    """As `loop`, with LoRA adapters in the place of full fine-tuning, raw prompts and further readings."""
    more = {
        "lora__rank": 4,
        "controls": "[]",
        "diversity__text": "raw",
        "scoring__readings": "[prompt_nll, ifd, pmi, reverse_ifd]",
    }
    with fake_refiner(seconds=0.05) as (url, _):
        yield run_alone(tmp_path_factory.mktemp("adapters"), url, **more)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_a_job_that_trains_adapters_gives_what_one_process_gives(
    adapters: Loop, tmp_path: Path, processes: int
) -> None:
    ended = end(start(processes, *adapters.command(tmp_path)))
    assert [e.code for e in ended] == [0] * processes
    assert_equal(RunDir(tmp_path / "run"), adapters.alone)


@pytest.mark.slow
def test_without_an_endpoint_every_process_serves_the_refiner(tmp_path: Path) -> None:
    """The answers are the same, whichever process gives them and on however many devices."""
    made = run_alone(tmp_path, None, controls="[]")
    ended = end(start(2, *made.command(tmp_path / "two")))
    assert [e.code for e in ended] == [0, 0]
    assert "the refiner is served by 2 of 2 processes" in ended[0].output
    assert "away" not in ended[0].output
    assert_equal(RunDir(tmp_path / "two" / "run"), made.alone)


@pytest.fixture(scope="module")
def patient(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loop]:
    """A loop whose stages take long enough to be interrupted, and which saves in them."""
    longer = {"refine__concurrency": 1, "train__num_epochs": 3, "train__save_every": 2}
    with fake_refiner(seconds=0.5) as (url, _):
        yield run_alone(tmp_path_factory.mktemp("patient"), url, controls="[]", **longer)


STAGES = ("round_00/train", "round_00/score", "round_00/refine", "round_01/train", "final/evaluate")


@pytest.mark.slow
@pytest.mark.parametrize("stage", [*STAGES, "final/export"])
def test_where_one_of_four_is_killed_in_a_stage_the_job_ends_and_resumes(
    patient: Loop, tmp_path: Path, stage: str
) -> None:
    run, command = RunDir(tmp_path / "run"), patient.up_to(tmp_path, stage)
    is_in = within(run, stage)
    started = start(4, *command)
    wait_for(is_in, started)
    started[2].kill()
    killed = time.monotonic()
    ended = end(started)
    assert time.monotonic() - killed < ENDED_AFTER_S
    others = {e.code for number, e in enumerate(ended) if number != 2}
    assert others <= {EXIT_PREEMPTED, -signal.SIGABRT}  # JAX aborts where process 0 ends first
    assert any("process 2" in e.output for e in ended)
    assert all(e.code == 0 for e in end(start(4, *command)))
    assert_equal(run, patient.alone)


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_a_job_of_four_is_continued_by_two_and_by_one(patient: Loop, tmp_path: Path, stage: str) -> None:
    run, command = RunDir(tmp_path / "run"), patient.up_to(tmp_path, stage)
    for processes in (4, 2):
        is_in = within(run, stage)
        started = start(processes, *command)
        wait_for(is_in, started)
        started[-1].send_signal(signal.SIGTERM)
        assert [e.code for e in end(started)] == [EXIT_PREEMPTED] * processes
    [ended] = end(start(1, *command))
    assert ended.code == 0
    assert_equal(run, patient.alone)


@pytest.mark.slow
def test_where_one_host_is_cut_off_both_end_and_the_job_resumes(tmp_path: Path) -> None:
    if reason := why_not():
        pytest.skip(reason)
    longer = {"train__num_epochs": 3, "train__save_every": 2}
    made = run_alone(tmp_path, None, controls="[]", **longer)
    runs = tmp_path / "two"
    run = RunDir(runs / "run")
    with two_hosts(tmp_path) as hosts:
        is_in = within(run, "round_00/train")
        started = start(2, *made.command(runs), hosts=hosts)
        wait_for(is_in, started)
        hosts.cut()
        cut = time.monotonic()
        first, second = end(started)
        assert time.monotonic() - cut < ENDED_AFTER_S
        assert first.code == EXIT_PREEMPTED
        assert f"process 1 on {NAMES[1]} has sent no heartbeat" in first.output
        assert second.code in (EXIT_PREEMPTED, -signal.SIGABRT)
        assert "process 0, which coordinates, cannot be reached" in second.output
        hosts.join()
        assert [e.code for e in end(start(2, *made.command(runs), hosts=hosts))] == [0, 0]
    assert_equal(run, made.alone)
