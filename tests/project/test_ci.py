"""The workflow for outsiders is well formed, and calls what the Makefile has with the supported Pythons."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
WORKFLOW = ROOT / ".github" / "workflows" / "ci.yml"


@pytest.fixture(scope="module")
def jobs() -> dict[str, Any]:
    workflow = yaml.safe_load(WORKFLOW.read_text(encoding="utf-8"))
    assert set(workflow) == {
        "name",
        True,
        "permissions",
        "concurrency",
        "jobs",
    }  # YAML 1.1 reads `on` as true
    assert workflow["permissions"] == {"contents": "read"}
    assert set(workflow[True]) == {"push", "pull_request", "schedule"}
    return workflow["jobs"]


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def runs(job: dict[str, Any]) -> list[str]:
    return [step["run"] for step in job["steps"] if "run" in step]


def test_there_is_a_job_for_everything_that_can_break(jobs: dict[str, Any]) -> None:
    assert {name: [words.split()[:2] for words in runs(job)] for name, job in jobs.items()} == {
        "lint": [["make", "lint"]],
        "docs": [["make", "docs"]],
        "test": [["make", "test"]],
        "slow": [["make", "test"]],
        "wheel": [["make", "wheel-smoke"]],
    }


def test_every_job_checks_out_sets_its_python_and_ends_in_time(jobs: dict[str, Any]) -> None:
    for job in jobs.values():
        uses = [step["uses"].partition("@")[0] for step in job["steps"] if "uses" in step]
        assert uses == ["actions/checkout", "actions/setup-python"]
        assert job["runs-on"] == "ubuntu-latest"
        assert 0 < job["timeout-minutes"] <= 360
        for expression in re.findall(r"\$\{\{ matrix\.(\w+) \}\}", yaml.safe_dump(job)):
            assert expression in job["strategy"]["matrix"]


def test_tests_run_on_every_supported_python_with_the_oldest_and_the_newest_jax(
    jobs: dict[str, Any], project: dict[str, Any]
) -> None:
    supported = [c.rpartition(" ")[2] for c in project["classifiers"] if re.search(r"Python :: \d+\.\d+$", c)]
    assert jobs["test"]["strategy"]["matrix"]["python"] == supported
    assert jobs["wheel"]["strategy"]["matrix"]["python"] == supported
    assert project["requires-python"] == f">={supported[0]}"
    (jax,) = [r for r in project["dependencies"] if re.match(r"jax\W", r)]
    oldest, newest = re.fullmatch(r"jax>=([\d.]+),(<[\d.]+)", jax).groups()  # pyright: ignore
    assert jobs["test"]["strategy"]["matrix"]["jax"] == [f"=={oldest}.0", newest]


def make(*words: str) -> str:
    """The commands that make would run."""
    ran = subprocess.run(["make", "-n", "-B", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_make_has_every_target_that_is_called_and_installs_the_wanted_jax(jobs: dict[str, Any]) -> None:
    called = {words.split()[1] for job in jobs.values() for words in runs(job)}
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    called |= set(re.findall(r"^\s*make ([a-z-]+)(?: |$)", ci, re.MULTILINE))
    assert {"lint", "docs", "test", "wheel-smoke"} <= called
    for target in called:
        make(target)
    assert "'jax==0.10.0'" in make("test", "JAX===0.10.0")
    assert "'jax" not in make("test")


def test_the_wheel_is_tried_outside_of_the_clone() -> None:
    commands = make("wheel-smoke", "PYTHON=python9.9")
    assert re.search(r"pip wheel .*--no-deps --wheel-dir dist \.", commands)
    assert re.search(r"^\.ci/wheel_smoke python9\.9 dist/\*\.whl$", commands, re.MULTILINE)
    script = (ROOT / ".ci" / "wheel_smoke").read_text(encoding="utf-8")
    assert "unset PYTHONPATH" in script
    assert 'cd "$place"' in script
