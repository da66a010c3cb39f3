"""README.md says what the recorded run of the quickstart did, and the record is of the program as it is."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from support.synthetic_run import write_run

from middo_jax.config import load
from middo_jax.report.effects import effect_lines
from middo_jax.report.status import FINAL_STAGES, ROUND_STAGES
from middo_jax.rundir import RunDir
from middo_jax.stages import recorded_line
from middo_jax.version import __version__

ROOT = Path(__file__).parents[2]
LOG = """\
.venv/bin/python -m middo_jax.models.gguf demo models/SmolLM2-135M-Instruct
.venv/bin/middo run configs/quickstart.yaml
[1/2] round_00 train
  train: 7/11 steps in 16s, 9s left loss 2.273
  rewrites: 1/11 samples in 16s 1 to be judged
  train: 11/11 steps in 48s loss 2.718
done in 48s
effect of the rounds
runs/quickstart/report.html
	User time (seconds): 400.5
	System time (seconds): 35.25
	Elapsed (wall clock) time (h:mm:ss or m:ss): 1:10:58.78
	Maximum resident set size (kbytes): 4561632
"""


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_readme", ROOT / "docs" / "make_readme.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def facts(script: ModuleType) -> dict[str, Any]:
    return json.loads(script.RECORD.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def readme(script: ModuleType) -> str:
    return script.README.read_text(encoding="utf-8")


def section(text: str, title: str) -> str:
    return text.split(f"## {title}\n")[1].split("\n## ")[0]


# README and record


def test_the_readme_is_what_its_script_makes_of_the_record(
    script: ModuleType, facts: dict[str, Any], readme: str
) -> None:
    assert set(re.findall(r"<!-- quickstart: (\w+) -->", readme)) == {"transcript", "measured"}
    assert script.fill(readme, facts) == readme
    other = facts | {"rewrites": {"accepted": 6, "tried": 21}}
    assert script.fill(readme, other) != readme
    other = facts | {"transcript": facts["transcript"][1:]}
    assert script.fill(readme, other) != readme


def test_the_picture_is_of_the_recorded_run(script: ModuleType, facts: dict[str, Any]) -> None:
    assert hashlib.sha256(script.PICTURE.read_bytes()).hexdigest() == facts["picture"]


def test_the_record_is_of_the_settings_and_data_that_ship(script: ModuleType, facts: dict[str, Any]) -> None:
    assert facts["inputs"] == script.inputs(), (
        "the quickstart has changed: record it again, docs/make_readme.py"
    )


def test_the_recorded_transcript_is_what_the_program_prints(
    facts: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its first line, its stages and its last lines; a change of any needs a new record."""
    monkeypatch.chdir(ROOT)
    assert facts["transcript"][0].startswith(f"middo-jax {__version__} on ")
    recorded = recorded_line(load(ROOT / "configs" / "quickstart.yaml"))
    assert recorded is not None
    assert facts["transcript"][0].endswith(f"; {recorded}")
    assert not [line for line in facts["transcript"] if line.startswith("warning: ")]
    stages = [f"round_00 {s}" for s in ROUND_STAGES] + [f"final {s}" for s in FINAL_STAGES]
    shown = [line for line in facts["transcript"] if line.startswith("[")]
    assert shown == [f"[{i}/{len(stages)}] {stage}" for i, stage in enumerate(stages, 1)]
    assert facts["transcript"][-3:-1] == effect_lines(facts["effects"])
    assert facts["transcript"][-1] == "runs/quickstart/report.html"
    assert not re.search(r"20\d\d-\d\d-\d\d", json.dumps(facts))


def test_the_settings_table_has_the_values_of_the_quickstart(script: ModuleType, readme: str) -> None:
    settings = yaml.safe_load(script.CONFIG.read_text(encoding="utf-8"))
    rows = re.findall(
        r"^\| (`.*?`) \| (.*?) \|", section(readme, "What the quickstart's settings mean"), re.MULTILINE
    )
    assert len(rows) > 10
    for names, shown in rows:
        for name in re.findall(r"`([a-z_.]+)`", names):
            value = settings
            for part in name.split("."):
                value = value[part]
            assert yaml.safe_load(shown) == value or float(shown) == value, name


def test_numbers_of_what_is_checked_are_those_of_the_benchmarks(readme: str) -> None:
    text = section(readme, "What is checked").split("\n\n")[0]
    benchmarks = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    numbers = re.findall(r"(?<![\w.])\d+(?:\.\d+)?(?:e-\d+)?(?![\w])", text)
    assert len(numbers) >= 5
    assert [n for n in numbers if not re.search(rf"(?<![\d.]){re.escape(n)}(?!\d)", benchmarks)] == []


# The script


def test_a_transcript_keeps_finished_work_and_wraps_long_lines(
    script: ModuleType, facts: dict[str, Any]
) -> None:
    found = script.transcript(LOG.replace("loss 2.718", f"loss 2.718, {'grad norm 3.7, ' * 10}end"))
    assert [line.split(":")[0] for line in found] == [
        "[1/2] round_00 train",
        "  train",
        "done in 48s",
        "effect of the rounds",
        "runs/quickstart/report.html",
    ]
    text = script.fill("<!-- quickstart: transcript -->\n\n<!-- end -->", facts | {"transcript": found})
    assert max(map(len, text.splitlines())) <= script.LINE
    assert " ".join(text.split()).count("grad norm 3.7,") == 10


@pytest.mark.parametrize(
    "log",
    [
        LOG.replace("[1/2] round_00 train", "[1/2] round_00 train: done before"),
        LOG + LOG,
        LOG.replace("runs/quickstart/report.html\n", ""),
        "",
    ],
)
def test_a_log_that_is_not_of_one_whole_run_is_refused(script: ModuleType, log: str) -> None:
    with pytest.raises(ValueError, match="the log"):
        script.transcript(log)


def test_a_record_is_made_from_the_folder_and_the_log(script: ModuleType, tmp_path: Path) -> None:
    run = write_run(tmp_path / "demo", n_rows=60)
    facts = script.record(run, LOG, "shared with other work")
    assert facts["rows"]["in"] == 60
    assert facts["rows"]["held_out"] == 20
    assert (facts["loop"], facts["seconds"], facts["peak_gb"]) == ("48s", pytest.approx(4258.78), 4.7)
    assert facts["cpu_seconds"] == pytest.approx(435.75)
    assert facts["effects"]["rounds"]["change"] == pytest.approx(-0.121)
    text = " ".join(script.fill("<!-- quickstart: measured -->\n\n<!-- end -->", facts).split())
    assert "(shared with other work)" in text
    assert "by -0.1210 nats per token (from 1.7020 to 1.5810), with a 95 % interval from -0." in text
    assert "this run shows a final model that is better." in text


def test_a_run_without_intervals_or_an_end_is_not_recorded(script: ModuleType, tmp_path: Path) -> None:
    run = write_run(tmp_path / "demo", n_rows=60)
    run.heldout_rows.unlink()
    with pytest.raises(ValueError, match="has no interval"):
        script.record(run, LOG)
    run.heldout_losses.unlink()
    (run.final / "manifest.json").unlink()
    with pytest.raises(ValueError, match="not complete"):
        script.record(RunDir(run.path), LOG)
