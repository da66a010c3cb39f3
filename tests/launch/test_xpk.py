"""launch/xpk.sh: what it calls, and that no workload is left behind."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from support.launching import Cloud

ARGUMENTS = [
    *("--name", "mine", "--cluster", "pod", "--zone", "z", "--type", "v6e-64"),
    *("--image", "i", "--runs", "gs://b/runs", "--yes"),
]
CREATE, WAIT, COPY, DELETE = "workload create", "--wait-for-job-completion", "rsync", "workload delete"
RUN = ["configs/mine.yaml", "rounds=2"]


def steps(cloud: Cloud) -> list[str]:
    lines = [" ".join(call) for call in cloud.calls]
    return [next(word for word in (CREATE, WAIT, COPY, DELETE) if word in line) for line in lines]


def test_a_workload_is_created_waited_for_copied_and_deleted(tmp_path: Path) -> None:
    cloud = Cloud(tmp_path)
    code, output = cloud.run("xpk.sh", *ARGUMENTS, "--slices", "2", "--price", "2", *RUN)
    assert code == 0, output
    assert steps(cloud) == [CREATE, WAIT, COPY, DELETE]
    assert not cloud.left_behind
    assert "128 chips x 2 per chip and hour = 256.00" in output
    create = cloud.calls[0]
    assert {"--restart-on-exit-codes=75", "--max-restarts=50", "--num-slices=2"} <= set(create)
    assert "--command=exec middo run configs/mine.yaml rounds=2 name=mine runs_dir=gs://b/runs" in create


def test_a_key_is_in_no_command(tmp_path: Path) -> None:
    cloud = Cloud(tmp_path)
    _, output = cloud.run("xpk.sh", *ARGUMENTS, "--env", "KEY", *RUN, KEY="very-secret")
    assert "very-secret" not in output
    assert not any("very-secret" in word for call in cloud.calls for word in call)
    assert (cloud.folder / "environment").read_text().splitlines() == ["JAX_COORDINATOR_PORT=8476", "KEY"]


def test_a_workload_that_failed_is_copied_and_deleted(tmp_path: Path) -> None:
    cloud = Cloud(tmp_path, wait=125)
    code, output = cloud.run("xpk.sh", *ARGUMENTS, *RUN)
    assert code == 1
    assert "did not complete" in output
    assert steps(cloud) == [CREATE, WAIT, COPY, DELETE]
    assert not cloud.left_behind


@pytest.mark.parametrize(
    ("refused", "expected", "code"),
    [
        (CREATE, [CREATE, DELETE], 1),
        (WAIT, [CREATE, WAIT, WAIT, COPY, DELETE], 0),
        (DELETE, [CREATE, WAIT, COPY, DELETE, DELETE], 0),
    ],
    ids=["create", "wait", "delete"],
)
def test_what_fails_once(tmp_path: Path, refused: str, expected: list[str], code: int) -> None:
    cloud = Cloud(tmp_path, refuse={refused: {"times": 1, "code": 1, "message": "no connection"}})
    got, output = cloud.run("xpk.sh", *ARGUMENTS, *RUN)
    assert got == code, output
    assert steps(cloud) == expected
    assert not cloud.left_behind


@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("where", [CREATE, WAIT])
def test_a_signal_deletes_the_workload(tmp_path: Path, where: str, by: signal.Signals) -> None:
    cloud = Cloud(tmp_path, block=[where])
    code, output = cloud.interrupt("xpk.sh", *ARGUMENTS, *RUN, by=by)
    assert code == 128 + by, output
    assert steps(cloud)[-1] == DELETE
    assert not cloud.left_behind


def test_a_dry_run_calls_nothing_and_shows_every_command(tmp_path: Path) -> None:
    cloud = Cloud(tmp_path)
    code, output = cloud.run("xpk.sh", *ARGUMENTS, "--dry-run", *RUN)
    assert code == 0, output
    assert cloud.calls == []
    shown = [line for line in output.splitlines() if line.startswith("+ ")]
    for word, line in zip((CREATE, WAIT, COPY, DELETE), shown, strict=True):
        assert word in line


def test_nothing_is_created_without_a_yes(tmp_path: Path) -> None:
    cloud = Cloud(tmp_path)
    code, output = cloud.run("xpk.sh", *ARGUMENTS[:-1], *RUN, answer="\n")
    assert code == 1
    assert "nothing was created" in output
    assert cloud.calls == []
