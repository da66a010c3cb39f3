"""launch/tpu_vm.sh: what it calls, in which order, and that no slice is left behind."""

from __future__ import annotations

import re
import signal
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest
from support.launching import Cloud

ARGUMENTS = [
    *("--name", "mine", "--zone", "us-west4-a", "--type", "v5litepod-16"),
    *("--runs", "gs://b/runs", "--poll", "0.02", "--yes"),
]
ACTIVE = ["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]
INSTALLED = ["state", "create", "state", "send", "install"]
RUN = ["start", "follow", "ask"]
DELETED = ["delete", "state"]
LOST = ["state"]  # SUSPENDED: the slice itself is not looked at any more


def run(cloud: Cloud, *more: str, config: tuple[str, ...] = ("mine.yaml",)) -> tuple[int, str]:
    return cloud.run("tpu_vm.sh", *ARGUMENTS, *more, *config)


def test_a_run_is_installed_followed_copied_and_its_slice_deleted(tmp_path: Path) -> None:
    cloud = Cloud(tmp_path, slices=[ACTIVE], runs=[{"exit": 0}])
    code, output = run(cloud, "--price", "1.5", config=("mine.yaml", "rounds=2"))
    assert code == 0, output
    assert cloud.verbs == [*INSTALLED, *RUN, "copy", *DELETED]
    assert not cloud.left_behind
    assert "16 chips x 1.5 per chip and hour = 24.00 per hour" in output
    assert "log of start 1" in output
    for state in ACTIVE:
        assert f"mine: {state} after" in output
    create = next(call for call in cloud.calls if "create" in call)
    assert {"--accelerator-type=v5litepod-16", "--runtime-version=v2-alpha-tpuv5-lite", "--spot"} <= set(
        create
    )
    assert [call[-2:] for call in cloud.calls if "rsync" in call] == [["gs://b/runs/mine", "runs/mine"]]


@pytest.mark.parametrize(
    ("options", "wanted", "unwanted"),
    [
        (["--capacity", "reserved"], "--reserved", "--spot"),
        (["--capacity", "on-demand"], "--zone=us-west4-a", "--spot"),
        (["--type", "v6e-64"], "--runtime-version=v2-alpha-tpuv6e", "--reserved"),
        (["--type", "v5p-128", "--project", "p"], "--project=p", "--reserved"),
    ],
)
def test_capacity_type_and_project_reach_the_request(
    tmp_path: Path, options: list[str], wanted: str, unwanted: str
) -> None:
    cloud = Cloud(tmp_path, slices=[["ACTIVE"]], runs=[{"exit": 0}])
    assert run(cloud, *options)[0] == 0
    create = next(call for call in cloud.calls if "create" in call)
    assert wanted in create
    assert unwanted not in create


@pytest.mark.parametrize(
    ("type_", "chips"), [("v5litepod-16", 16), ("v6e-64", 64), ("v5p-128", 64), ("v4-8", 4)]
)
def test_chips_are_counted_from_the_type(tmp_path: Path, type_: str, chips: int) -> None:
    """v5e and v6e count chips, the others TensorCores."""
    _, output = run(Cloud(tmp_path), "--type", type_, "--price", "1", "--dry-run")
    assert f"{chips} chips x 1 per chip and hour = {chips}.00" in output


def test_what_is_sent_has_tracked_and_named_files_and_the_keys_and_no_command_shows_them(
    tmp_path: Path,
) -> None:
    cloud = Cloud(tmp_path, slices=[["ACTIVE"]], runs=[{"exit": 0}])
    kept = cloud.folder / "sent.tar.gz"
    (cloud.clone / "data.jsonl").write_text("{}\n")
    (cloud.clone / "untracked").write_text("")
    secret = "a key's $(value)"
    code, output = cloud.run(
        "tpu_vm.sh", *ARGUMENTS, "--send", "data.jsonl", "--env", "KEY", "mine.yaml", "a='b c'", KEY=secret
    )
    assert code == 0, output
    with tarfile.open(kept) as archive:
        names = archive.getnames()
        how: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # not in 3.11.2
        archive.extractall(tmp_path / "host", **how)
    assert {"mine.yaml", "data.jsonl", "launch/tpu_vm.sh", "run.sh", "run.env"} <= set(names)
    assert "untracked" not in names
    assert kept.stat().st_mode & 0o077 == 0
    assert secret not in output
    assert not any(secret in word for call in cloud.calls for word in call)
    # run.sh, as a host runs it, with a program in place of middo
    host = tmp_path / "host"
    program = host / ".venv" / "bin" / "middo"
    program.parent.mkdir(parents=True)
    program.write_text('#!/bin/bash\nprintf "%s\\n" "$JAX_COORDINATOR_PORT" "$KEY" "$@"\nexit 75\n')
    program.chmod(0o755)
    ran = subprocess.run(["bash", "run.sh"], cwd=host, capture_output=True, text=True, check=True)
    words = ["run", "mine.yaml", "name=mine", "runs_dir=gs://b/runs", "a='b c'"]
    assert ran.stdout.splitlines() == ["8476", secret, *words]
    assert (host / "run.exit").read_text() == "75\n"


def test_a_preempted_slice_is_deleted_and_requested_again_and_the_run_resumed(tmp_path: Path) -> None:
    cloud = Cloud(tmp_path, slices=[ACTIVE, ["ACTIVE"]], runs=[{"events": ["preempted"]}, {"exit": 0}])
    code, output = run(cloud)
    assert code == 0, output
    again = INSTALLED[1:]
    assert cloud.verbs == [*INSTALLED, *RUN, *LOST, *DELETED, *again, *RUN, "copy", *DELETED]
    assert "start 1 of 20" in output
    assert not cloud.left_behind


def test_a_run_that_saved_on_a_slice_that_stays_is_started_there_again(tmp_path: Path) -> None:
    cloud = Cloud(tmp_path, slices=[["ACTIVE"]], runs=[{"exit": 75}, {"exit": 0}])
    code, output = run(cloud)
    assert code == 0, output
    assert cloud.verbs == [*INSTALLED, *RUN, "state", "host", "end", *RUN, "copy", *DELETED]
    assert not cloud.left_behind


def test_a_broken_connection_is_made_again(tmp_path: Path) -> None:
    cloud = Cloud(tmp_path, slices=[["ACTIVE"]], runs=[{"events": ["ssh lost", "ssh lost"], "exit": 0}])
    code, output = run(cloud)
    assert code == 0, output
    assert cloud.verbs == [
        *INSTALLED,
        "start",
        "follow",
        "ask",
        "follow",
        "ask",
        "follow",
        "ask",
        "copy",
        *DELETED,
    ]
    follows = [call[-1][-2:] for call in cloud.calls if "-F run.log" in call[-1]]
    assert follows == ["+1", "20", "20"]


def test_an_error_of_the_run_is_final_and_is_the_exit_code(tmp_path: Path) -> None:
    cloud = Cloud(tmp_path, slices=[["ACTIVE"]], runs=[{"exit": 3}])
    code, output = run(cloud)
    assert code == 3, output
    assert cloud.verbs == [*INSTALLED, *RUN, "state", "host", "copy", *DELETED]
    assert not cloud.left_behind


def test_restarts_have_an_end(tmp_path: Path) -> None:
    cloud = Cloud(tmp_path, slices=[["ACTIVE"]], runs=[{"exit": 75}] * 3)
    code, output = run(cloud, "--max-restarts", "2")
    assert code == 75
    assert cloud.verbs.count("start") == 3
    assert "started again 2 times already" in output
    assert not cloud.left_behind


@pytest.mark.parametrize(
    ("scenario", "verbs", "says"),
    [
        (
            {
                "refuse": {
                    "queued-resources create": {"times": 1, "code": 1, "message": "Quota limit exceeded"}
                }
            },
            ["state", "create", *DELETED],
            "Quota limit exceeded",
        ),
        (
            {"slices": [["PROVISIONING", "FAILED"]]},
            ["state", "create", "state", *DELETED],
            "no more capacity",
        ),
        (
            {
                "slices": [["ACTIVE"]],
                "refuse": {"uv pip": {"times": 1, "code": 1, "message": "no such package"}},
            },
            [*INSTALLED, "state", "host", *DELETED],
            "installing failed",
        ),
        (
            {"slices": [["ACTIVE"]], "refuse": {" scp ": {"times": 1, "code": 255, "message": "no key"}}},
            ["state", "create", "state", "send", "state", "host", *DELETED],
            "installing failed",
        ),
    ],
    ids=["quota", "capacity", "install", "send"],
)
def test_a_failure_on_the_way_deletes_what_there_is(
    tmp_path: Path, scenario: dict[str, object], verbs: list[str], says: str
) -> None:
    cloud = Cloud(tmp_path, **scenario)
    code, output = run(cloud)
    assert code == 1
    assert says in output
    assert cloud.verbs == verbs
    assert not cloud.left_behind


def test_a_slice_that_never_comes_is_given_up(tmp_path: Path) -> None:
    cloud = Cloud(tmp_path, slices=[["WAITING_FOR_RESOURCES"]])
    code, output = run(cloud, "--wait-timeout", "1")
    assert code == 1
    assert "no slice within --wait-timeout 1 s" in output
    assert not cloud.left_behind


def test_deleting_is_tried_until_the_slice_is_gone(tmp_path: Path) -> None:
    refusal = {"times": 2, "code": 1, "message": "UNAVAILABLE"}
    cloud = Cloud(
        tmp_path, slices=[["ACTIVE"]], runs=[{"exit": 0}], refuse={"queued-resources delete": refusal}
    )
    code, output = run(cloud)
    assert code == 0, output
    assert cloud.verbs[-6:] == DELETED * 3
    assert not cloud.left_behind


def test_a_slice_that_cannot_be_deleted_is_said_loudly(tmp_path: Path) -> None:
    refusal = {"times": 99, "code": 1, "message": "UNAVAILABLE"}
    cloud = Cloud(
        tmp_path, slices=[["ACTIVE"]], runs=[{"exit": 0}], refuse={"queued-resources delete": refusal}
    )
    code, output = run(cloud)
    assert code == 1
    assert cloud.left_behind == ["slice"]
    assert "NOT DELETED" in output
    assert re.search(r"\+ gcloud compute tpus queued-resources delete mine .*--force", output)


@pytest.mark.parametrize(
    ("where", "by"),
    [
        ("queued-resources create", signal.SIGINT),
        ("queued-resources create", signal.SIGTERM),
        ("uv pip", signal.SIGTERM),
        ("-F run.log", signal.SIGINT),
        ("-F run.log", signal.SIGTERM),
        ("-F run.log", signal.SIGHUP),
    ],
)
def test_a_signal_deletes_the_slice(tmp_path: Path, where: str, by: signal.Signals) -> None:
    cloud = Cloud(tmp_path, slices=[["ACTIVE"]], runs=[{"exit": 0}], block=[where])
    code, output = cloud.interrupt("tpu_vm.sh", *ARGUMENTS, "mine.yaml", by=by)
    assert code == 128 + by, output
    ended = ["end"] if where == "-F run.log" else []
    assert cloud.verbs[-len(ended) - 2 :] == [*ended, *DELETED]
    assert not cloud.left_behind


def test_ctrl_c_reaches_the_whole_group_and_the_slice_is_deleted_all_the_same(tmp_path: Path) -> None:
    cloud = Cloud(tmp_path, slices=[["ACTIVE"]], runs=[{"exit": 0}], block=["-F run.log"])
    code, output = cloud.interrupt("tpu_vm.sh", *ARGUMENTS, "mine.yaml", by=signal.SIGINT, group=True)
    assert code == 130, output
    assert not cloud.left_behind


def test_a_dry_run_calls_nothing_and_shows_every_command(tmp_path: Path) -> None:
    cloud = Cloud(tmp_path)
    code, output = cloud.run("tpu_vm.sh", *ARGUMENTS, "--dry-run", "--env", "KEY", "mine.yaml", KEY="secret")
    assert code == 0, output
    assert cloud.calls == []
    shown = [line for line in output.splitlines() if line.startswith("+ gcloud")]
    words = ["describe", "create", "describe", " scp ", "uv pip", "nohup", "-F run.log", "run.exit ]"]
    for word, line in zip([*words, "rsync", "delete", "describe"], shown, strict=True):
        assert word in line
    assert "secret" not in output
    assert not (cloud.clone / "runs").exists()


def test_nothing_is_created_without_a_yes(tmp_path: Path) -> None:
    cloud = Cloud(tmp_path, slices=[["ACTIVE"]], runs=[{"exit": 0}])
    arguments = [word for word in ARGUMENTS if word != "--yes"]
    code, output = cloud.run("tpu_vm.sh", *arguments, "mine.yaml", answer="n\n")
    assert code == 1
    assert "nothing was created" in output
    assert cloud.verbs == ["state"]
    assert cloud.run("tpu_vm.sh", *arguments, "mine.yaml", answer="y\n")[0] == 0


def test_a_slice_of_that_name_that_exists_is_left_alone(tmp_path: Path) -> None:
    cloud = Cloud(tmp_path, slices=[["ACTIVE"]])
    (cloud.folder / "state.json").write_text('{"slice": ["ACTIVE"]}')
    code, output = run(cloud)
    assert code == 2
    assert "exists already" in output
    assert cloud.verbs == ["state"]
    assert cloud.left_behind == ["slice"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--runs", "runs"], "--runs runs: has to be a folder in a bucket"),
        (["--name", "My_Run"], "--name My_Run: lower case"),
        (["--capacity", "cheap"], "--capacity cheap: spot, on-demand or reserved"),
        (["--type", "v9-8"], "--type v9-8: unknown here"),
        (["--price", "much"], "--price much: not a number"),
        (["--env", "NO_SUCH_VARIABLE"], "the variable is not set"),
        (["--send", "nothing.jsonl"], "nothing.jsonl: no such file in this clone"),
        (["--nmae", "x"], "unknown option --nmae"),
    ],
)
def test_a_wrong_command_line_calls_nothing(tmp_path: Path, arguments: list[str], says: str) -> None:
    cloud = Cloud(tmp_path)
    code, output = run(cloud, *arguments)
    assert code == 2
    assert says in output
    assert cloud.calls == []
