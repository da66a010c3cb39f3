"""A run that is killed or interrupted at every stage ends with the bytes of an unbroken one."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.loop_fixture import contents, fake_refiner, settings

from middo_jax.config import load
from middo_jax.rundir import RunDir

CONCURRENCY = 2
STEPS = [
    ("round_00", "train"),
    ("round_00", "score"),
    ("round_00", "select"),
    ("round_00", "refine"),
    ("round_00", "merge"),
    ("final", "train"),
    ("final", "evaluate"),
    ("final", "export"),
]
# Stages by their place in STEPS; -1 is the reading of the data, before the first.
BREAKS = [
    (-1, signal.SIGKILL),
    (0, signal.SIGKILL),
    (0, signal.SIGINT),
    (1, signal.SIGKILL),
    (2, signal.SIGKILL),
    (3, signal.SIGKILL),
    (3, signal.SIGINT),
    (4, signal.SIGKILL),
    (5, signal.SIGKILL),
    (5, signal.SIGTERM),
    (6, signal.SIGKILL),
    (7, signal.SIGKILL),
]
# What says when, where and how fast; all else must be equal.
OF_THIS_RUN = ("config.yaml", "events.jsonl", "manifest.json", "report.html")


@contextlib.contextmanager
def started(config: Path, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """`middo run CONFIG` as a process, with its output in a file; it never outlives the block."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("OPENAI_")}
    env |= {
        "JAX_PLATFORMS": "cpu",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",  # restarts are quick
        "HF_HUB_OFFLINE": "1",
    }
    with log.open("ab") as out:
        command = [sys.executable, "-m", "middo_jax", "run", str(config)]
        process = subprocess.Popen(command, stdout=out, stderr=out, env=env)
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def run_to_end(config: Path, log: Path) -> None:
    with started(config, log) as process:
        assert process.wait() == 0, log.read_text(encoding="utf-8")


def wait_for(process: subprocess.Popen[bytes], happened: Callable[[], bool]) -> None:
    """Returns once it has, or the process has ended."""
    while process.poll() is None and not happened():
        time.sleep(0.002)


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def latest_start(run: RunDir, skip: int) -> int:
    """Place in STEPS of the stage last begun, by the events after the first `skip`; -2 if there is none."""
    events = run.events.read_bytes().splitlines()[skip:] if run.events.exists() else []
    places = [STEPS.index((e["round"], e["stage"])) for e in map(json.loads, events) if e["event"] == "start"]
    return max(places, default=-2)


def is_under_way(run: RunDir, place: int, rng: random.Random, bodies: list[Any]) -> Callable[[], bool]:
    """Tells whether a newly started process is somewhere inside a stage, or already past it."""
    folder, stage = STEPS[place] if place >= 0 else ("round_00", "prepare")
    metrics = run.path / folder / "metrics.jsonl"
    events_before, asked_before, steps_before = lines(run.events), len(bodies), lines(metrics)
    pause, count = rng.uniform(0.0, 0.3), rng.randint(1, 5)
    begun: list[float] = []

    def under_way() -> bool:
        latest = latest_start(run, events_before) if place >= 0 else (-1 if run.config.exists() else -2)
        if latest != place:
            return latest > place
        if stage == "train":
            return lines(metrics) >= steps_before + count
        if stage == "refine":  # at first while it asks, then while it asks again what was not accepted
            asks_again = not asked_before or lines(run.path / folder / "candidates.jsonl")
            return bool(asks_again) and len(bodies) >= asked_before + count
        begun.append(time.monotonic())
        return begun[-1] - begun[0] >= pause

    return under_way


def _learnt(metrics: bytes) -> bytes:
    """A training's metrics without its speeds, which are the machine's."""
    rows = [json.loads(line) for line in metrics.splitlines()]
    return "\n".join(json.dumps({k: v for k, v in row.items() if k != "speed"}) for row in rows).encode()


def results(run: RunDir) -> dict[str, bytes]:
    return {
        name: _learnt(data) if name.endswith("metrics.jsonl") else data
        for name, data in contents(run.path).items()
        if Path(name).name not in OF_THIS_RUN
        and "/checkpoint/" not in name
        and not name.startswith("llm_cache")
        and not any(part.startswith(".") for part in Path(name).parts)  # of a write that was cut short
    }


@pytest.mark.slow
@pytest.mark.multiprocess
def test_broken_at_every_stage_a_run_ends_like_an_unbroken_one(tmp_path: Path) -> None:
    rng = random.Random(5)
    with fake_refiner(seconds=0.03) as (url, bodies):

        def config(name: str) -> Path:
            path = tmp_path / f"{name}.yaml"
            small = settings(
                tmp_path,
                url,
                name=name,
                refine__concurrency=CONCURRENCY,
                train__batch_size=1,
                train__num_epochs=10,
                train__save_every=2,
                train__start_from="previous",
                refine__accept="measured",
            )
            path.write_text(load(None, small).to_yaml(), encoding="utf-8")
            return path

        unbroken, broken = RunDir(tmp_path / "runs" / "unbroken"), RunDir(tmp_path / "runs" / "broken")
        run_to_end(config("unbroken"), tmp_path / "unbroken.log")
        asked_unbroken = [json.dumps(body) for body in bodies]
        bodies.clear()

        again, log = config("broken"), tmp_path / "broken.log"
        for place, how in BREAKS:
            with started(again, log) as process:
                wait_for(process, is_under_way(broken, place, rng, bodies))
                process.send_signal(how)
                code = process.wait()
            # The last stages take so little that they may be over before they can be killed.
            allowed = {signal.SIGINT: (130,), signal.SIGTERM: (75,), signal.SIGKILL: (-signal.SIGKILL, 0)}
            assert code in allowed[how], log.read_text(encoding="utf-8")
            if how in (signal.SIGINT, signal.SIGTERM):
                assert "run the same command again to continue" in log.read_text(encoding="utf-8")
            if (place, how) == (0, signal.SIGINT):
                saved = [int(p.name) for p in (broken.round(0).checkpoint / "steps").iterdir()]
                assert saved == [lines(broken.round(0).metrics)]  # no step is done twice
        run_to_end(again, log)

    got, wanted = results(broken), results(unbroken)
    assert got.keys() == wanted.keys()
    assert [name for name in wanted if got[name] != wanted[name]] == []
    names = ("dataset", "metrics", "refined", "requests", "candidates")
    for name in (*(f"{name}.jsonl" for name in names), "selection.json"):
        assert wanted[f"round_00/{name}"]
    assert {"final/dataset.jsonl", "final/huggingface/model.safetensors", "heldout_losses.json"} <= got.keys()

    # Only requests in flight when the process died are paid for again.
    paid = Counter(json.dumps(body) for body in bodies)
    assert paid.keys() == set(asked_unbroken)
    breaks_in_refine = sum(place == STEPS.index(("round_00", "refine")) for place, _ in BREAKS)
    assert paid.total() <= len(asked_unbroken) + breaks_in_refine * CONCURRENCY
    assert len(asked_unbroken) == len(set(asked_unbroken))

    check_events(broken)


def check_events(broken: RunDir) -> None:
    """Stages are begun in order, some of them more than once."""
    events = [json.loads(line) for line in broken.events.read_text(encoding="utf-8").splitlines()]
    begun = [(e["round"], e["stage"]) for e in events if e["event"] == "start"]
    assert list(dict.fromkeys(begun)) == STEPS
    assert all(a <= b for a, b in itertools.pairwise(STEPS.index(step) for step in begun))
    assert sum(e["event"] == "resume" for e in events) >= len(BREAKS) - 1
