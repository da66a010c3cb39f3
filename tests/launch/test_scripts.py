"""What all scripts of launch/ have in common."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.launching import ROOT

LAUNCH = ROOT / "launch"
SCRIPTS = sorted(path.name for path in LAUNCH.iterdir() if path.suffix in (".sh", ".sbatch"))
RUN = [name for name in SCRIPTS if name != "common.sh"]
SHELLCHECK = shutil.which("shellcheck", path=str(Path(sys.executable).parent)) or shutil.which("shellcheck")


@pytest.mark.skipif(SHELLCHECK is None, reason="shellcheck is missing: install the dev extra")
def test_shellcheck_has_nothing_to_say() -> None:
    assert SHELLCHECK is not None
    checked = subprocess.run(
        [SHELLCHECK, "--external-sources", *SCRIPTS], cwd=LAUNCH, capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize("script", RUN)
def test_a_script_stops_at_errors_and_can_be_run(script: str) -> None:
    text = (LAUNCH / script).read_text()
    assert text.startswith("#!/usr/bin/env bash\n")
    assert "\nset -euo pipefail\n" in text
    assert (LAUNCH / script).stat().st_mode & 0o111


@pytest.mark.parametrize("script", RUN)
def test_help_has_an_example_and_names_every_option(script: str) -> None:
    shown = subprocess.run(
        ["bash", str(LAUNCH / script), "--help"], capture_output=True, text=True, check=True
    ).stdout
    assert f"\nExample:\n  launch/{script} " in shown
    options = re.findall(r"^ {4}((?:--[a-z-]+(?: \| )?)+)\)", (LAUNCH / script).read_text(), re.MULTILINE)
    for option in re.findall(r"--[a-z-]+", " ".join(options)):
        assert option in shown, option


@pytest.mark.parametrize("page", ["launch/README.md", "docs/pods.md"])
def test_pages_name_files_and_options_that_exist(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for name in re.findall(r"launch/([\w.]+\w)", text):
        assert (LAUNCH / name).exists(), name
    for command in re.findall(r"^launch/(\w+\.(?:sh|sbatch))((?:.*\\\n)*.*)$", text, re.MULTILINE):
        shown = (LAUNCH / command[0]).read_text()
        for option in re.findall(r"(?<!\S)--[a-z-]+", command[1].split(" -- ")[0]):
            assert option in shown, f"{command[0]} {option}"
