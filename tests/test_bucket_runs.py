"""Runs in a bucket: as on a disk, on any machine, and after a kill at any moment."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.bucket_servers import of_s3
from support.command import Middo
from support.loop_fixture import Finished, contents, fake_refiner, settings

from middo_jax import api
from middo_jax.buckets import Place
from middo_jax.buckets.mirror import Mirror
from middo_jax.buckets.names import LOCK
from middo_jax.buckets.store import Store
from middo_jax.config import load
from middo_jax.rundir import RunDir

pytest_plugins = ["support.bucket_servers", "support.command", "support.loop_fixture"]
pytestmark = pytest.mark.usefixtures("own_copies")

# What says when, where and how fast.
OF_THIS_RUN = ("config.yaml", "events.jsonl", "manifest.json", "report.html", "llm_cache.sqlite")


def place_of(url: str) -> Place:
    place = Place.of(url)
    assert place is not None
    return place


def upload(run: RunDir, url: str, tmp_path: Path) -> Store:
    """Puts a copy of a run's folder into the bucket, as the program would."""
    mirror = Mirror(place_of(url), tmp_path / "upload")
    mirror.pull()
    for name, content in contents(run.path).items():
        (mirror.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (mirror.folder / name).write_bytes(content)
    mirror.push()
    return mirror.store


def objects(store: Store, tmp_path: Path) -> dict[str, bytes]:
    copy = Mirror(store.place, tmp_path / f"look-{time.monotonic_ns()}")
    copy.pull()
    return contents(copy.folder)


def results(files: dict[str, bytes]) -> dict[str, bytes]:
    """What has to be equal. Training's speeds are the machine's; Orbax writes times into its files."""
    found = {}
    for name, content in files.items():
        if Path(name).name in OF_THIS_RUN or "/checkpoint/" in name:
            continue
        if name.endswith("metrics.jsonl"):
            rows = [json.loads(line) for line in content.splitlines()]
            content = json.dumps([{k: v for k, v in row.items() if k != "speed"} for row in rows]).encode()
        found[name] = content
    return found


def test_a_run_goes_on_on_another_machine_and_reads_weights_only_where_it_needs_them(
    finished: Finished, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = upload(finished.run, f"{bucket}/run", tmp_path)
    for name in ("heldout_losses.json", "heldout_rows.parquet"):
        store.remove(name)
    done = api.run(load(None, finished.settings(runs_dir=bucket)))
    assert done.facts["next"] is None
    weights = [path.parents[2].name for path in done.path.glob("*/checkpoint/params/manifest.ocdbt")]
    assert sorted(weights) == ["final", "round_00", "round_01"]  # evaluated anew
    assert not list(done.path.glob("final/huggingface/*.safetensors"))
    now = objects(store, tmp_path)
    assert results(now) == results(contents(finished.run.path))
    assert LOCK not in now
    events = [json.loads(line)["event"] for line in now["events.jsonl"].splitlines()]
    assert events[-4:] == ["resume", "start", "done", "report"]


def test_commands_on_a_run_in_a_bucket(finished: Finished, s3: str, middo: Middo, tmp_path: Path) -> None:
    url = f"{s3}/run"
    store = upload(finished.run, url, tmp_path)
    code, out, err = middo("status", url, "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["path"] == url
    assert json.loads(out)["next"] is None
    assert json.loads(out)["rounds"] == json.loads(middo("status", finished.run.path, "--json")[1])["rounds"]
    store.remove("report.html")
    assert middo("report", url)[:2] == (0, f"{url}/report.html\n")
    assert (store.read("report.html") or "").startswith("<!doctype html>")
    sample = json.loads(finished.run.final.dataset.read_text().splitlines()[0])["id"]
    assert middo("trace", url, sample)[0] == 0
    code, out, err = middo("export-data", url, tmp_path / "better")
    assert (code, (tmp_path / "better" / "train.jsonl").exists()) == (0, True), err
    assert "buckets/read" not in "".join(objects(store, tmp_path))
    # Weights that nothing needs are listed with their size, and removed there.
    size = sum(
        len(data)
        for name, data in contents(finished.run.path).items()
        if name.startswith("round_00/checkpoint/")
    )
    code, out, err = middo("clean", url, "--json")
    row = next(row for row in json.loads(out)["paths"] if row["path"].endswith("round_00/checkpoint"))
    assert (row["path"], row["size"]) == (f"{url}/round_00/checkpoint", size)
    assert middo("clean", url, "--yes")[0] == 0
    left = [name for name in store.list() if "/checkpoint/" in name]
    assert {name.partition("/")[0] for name in left} == {"final"}
    assert f"middo clean {url} --yes" not in middo("clean", url)[1]
    code, out, err = middo("rollback", url, 0, "--yes")
    assert (code, f"{url}: as it was after round_00" in out) == (0, True), err
    now = store.list()
    assert not [name for name in now if name.startswith(("final/", "round_01/"))]
    aside = [name.partition("/")[2] for name in now if name.startswith("rolled-back-")]
    assert {"final/dataset.jsonl", "final/huggingface/model.safetensors"} <= {*aside}  # with their weights
    assert LOCK not in now


def test_a_run_that_another_process_writes_is_refused(
    finished: Finished, s3: str, middo: Middo, tmp_path: Path
) -> None:
    store = upload(finished.run, f"{s3}/run", tmp_path)
    from middo_jax.buckets.lease import leased

    with leased(store, lambda line: None):
        assert middo("status", f"{s3}/run")[0] == 0
        code, _, err = middo("clean", f"{s3}/run", "--yes")
        assert code == 1
        assert f"{s3}/run is locked by" in err


def test_a_missing_run_and_a_missing_bucket_are_named(s3: str, middo: Middo) -> None:
    assert f"{s3}/none: there is no such folder in the bucket" in middo("status", f"{s3}/none")[2]
    assert "there is no bucket 'no-such-bucket'" in middo("status", "s3://no-such-bucket/runs/a")[2]


def test_training_scoring_and_exporting_into_a_bucket(s3: str, middo: Middo, tmp_path: Path) -> None:
    settings(tmp_path)  # writes the model and the data
    store = Store(place_of(s3))
    for name, content in contents(tmp_path / "model").items():
        (tmp_path / "file").write_bytes(content)
        store.put(tmp_path / "file", f"model/{name}")
    store.put(tmp_path / "data.json", "data.json")
    named = ["--data", f"{s3}/data.json", "--model", f"{s3}/model"]
    small = [
        "model.dtype=float32",
        "model.max_length=256",
        "train.batch_size=8",
        "data.limit=8",
        "mesh.fsdp=1",
        "mesh.data=8",
    ]
    code, out, err = middo("train", *named, "--out", f"{s3}/tuned", *small)
    assert (code, out) == (0, f"{s3}/tuned/checkpoint\n"), err
    assert "tuned/checkpoint/metadata.json" in store.list()
    # On another machine, which has no copy of the base.
    os.rename(tmp_path / "cache", tmp_path / "of-another-machine")
    code, out, err = middo("export", f"{s3}/tuned/checkpoint", f"{s3}/exported")
    assert (code, out) == (0, f"{s3}/exported\n"), err
    assert "exported/model.safetensors" in store.list()
    code, out, err = middo("export", f"{s3}/tuned/checkpoint", f"{s3}/exported")
    assert code == 1
    assert f"middo: {s3}/exported exists and is not an empty directory" in err  # not the path of its copy
    code, out, err = middo("export", f"{s3}/model", tmp_path / "no-checkpoint")
    assert (code, f"middo: {s3}/model: no finished checkpoint there" in err) == (1, True), err
    assert not [name for name in store.list() if LOCK in name]


@pytest.fixture(scope="module")
def refiner() -> Iterator[str]:
    with fake_refiner(seconds=0.02) as (url, _):
        yield url


def start(config: Path, cache: Path, s3_url: str, *job: str, devices: int = 4) -> subprocess.Popen[str]:
    """`middo run CONFIG` as a process with its own copies of buckets, as on a machine of its own."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("OPENAI_")}
    env |= of_s3(s3_url) | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "XDG_CACHE_HOME": str(cache),
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "-m", "middo_jax", *job, "run", str(config)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def end(*processes: subprocess.Popen[str]) -> list[int]:
    try:
        outputs = [process.communicate(timeout=500)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    print(*outputs, sep="\n---\n")  # shown where a test fails
    return [process.returncode for process in processes]


def write_config(root: Path, path: Path, refiner: str, runs_dir: str, **more: Any) -> Path:
    chosen = {
        "train__batch_size": 4,
        "train__num_epochs": 3,
        "train__save_every": 2,
        "refine__accept": "measured",
    }
    small = settings(root, refiner, runs_dir=runs_dir, **chosen, **more)
    path.write_text(load(None, small).to_yaml(), encoding="utf-8")
    return path


@pytest.mark.slow
@pytest.mark.multiprocess
def test_killed_and_continued_on_other_machines_a_run_ends_like_an_unbroken_one(
    s3: str, s3_url: str, refiner: str, tmp_path: Path
) -> None:
    alone = write_config(tmp_path, tmp_path / "alone.yaml", refiner, str(tmp_path / "runs"))
    assert end(start(alone, tmp_path / "none", s3_url)) == [0]
    config, store = write_config(tmp_path, tmp_path / "run.yaml", refiner, s3), Store(place_of(f"{s3}/run"))
    # Each machine is killed once the bucket has this.
    for number, name in enumerate(
        (
            "config.yaml",
            "round_00/metrics.jsonl",
            "round_00/checkpoint/metadata.json",
            "round_00/refined.jsonl",
        )
    ):
        process = start(config, tmp_path / f"machine-{number}", s3_url)
        waited = time.monotonic() + 300
        while name not in store.list() and process.poll() is None and time.monotonic() < waited:
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        assert end(process) == [-signal.SIGKILL]
        store.remove(LOCK)  # its host is gone; a scheduler waits until the lock has expired
    assert end(start(config, tmp_path / "last-machine", s3_url)) == [0]
    assert results(objects(store, tmp_path)) == results(contents(tmp_path / "runs" / "run"))


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_processes_without_a_shared_disk_give_what_one_gives(
    s3: str, s3_url: str, refiner: str, tmp_path: Path, lora: bool
) -> None:
    more = {"lora__rank": 4} if lora else {}
    alone = write_config(tmp_path, tmp_path / "alone.yaml", refiner, str(tmp_path / "runs"), **more)
    assert end(start(alone, tmp_path / "none", s3_url)) == [0]
    config = write_config(tmp_path, tmp_path / "run.yaml", refiner, s3, **more)
    store = Store(place_of(f"{s3}/run"))
    # Preempted in training, continued by as many, and by one on a third machine.
    started = job(config, tmp_path / "first", s3_url)
    wait_for(store, "round_00/checkpoint/steps/", started)
    started[1].send_signal(signal.SIGTERM)
    assert end(*started) == [75, 75]
    started = job(config, tmp_path / "second", s3_url)
    wait_for(store, "round_00/scores.parquet", started)
    started[0].send_signal(signal.SIGTERM)
    assert end(*started) == [75, 75]
    assert end(start(config, tmp_path / "third", s3_url)) == [0]
    ours, theirs = results(objects(store, tmp_path)), results(contents(tmp_path / "runs" / "run"))
    assert ours.keys() == theirs.keys()
    for name in ("round_00/dataset.jsonl", "heldout.jsonl", "round_00/requests.jsonl"):
        assert ours[name] == theirs[name]
    losses = [json.loads(files["heldout_losses.json"])["models"] for files in (ours, theirs)]
    for one, two in zip(*losses, strict=True):
        assert one["loss"] == pytest.approx(two["loss"], abs=1e-3)


def job(config: Path, caches: Path, s3_url: str) -> list[subprocess.Popen[str]]:
    """Two processes, each on a machine of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    return [
        start(
            config,
            caches / str(process),
            s3_url,
            *("--coordinator", address, "--processes", "2", "--process", str(process)),
            devices=2,
        )
        for process in range(2)
    ]


def wait_for(store: Store, name: str, processes: list[subprocess.Popen[str]]) -> None:
    waited = time.monotonic() + 300
    while time.monotonic() < waited and all(process.poll() is None for process in processes):
        if any(found.startswith(name) for found in store.list()):
            return
        time.sleep(0.1)
