"""Folders of earlier versions, or with a spoilt config.yaml, are read or refused with a clear sentence."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from support.command import Middo
from support.loop_fixture import Finished, contents

from middo_jax.config import layers_of, load
from middo_jax.loop import run_loop
from middo_jax.progress import Silent
from middo_jax.report.lineage import trace
from middo_jax.report.status import status
from middo_jax.rundir import (
    RunDir,
    RunError,
    read_jsonl,
    write_json,
)

SETTINGS_BEFORE = Path(__file__).parent / "config" / "settings_before_unions.yaml"
pytest_plugins = ["support.command", "support.loop_fixture"]


def previous_version(run: RunDir) -> None:
    """Turns manifests into those of the version before: files with hashes, the last training's without."""
    for directory in (*run.rounds(), run.final):
        records = directory.stages()
        for record in records.values():
            for name in ("reads", "inputs", "settings", "stats"):
                del record[name]
        for name in [n for n in records["train"]["files"] if "params" in n]:
            del records["train"]["files"][name]
        write_json(directory.manifest, {"stages": records})


def test_a_run_of_the_previous_version_is_read_and_not_continued(
    finished: Finished, middo: Middo, tmp_path: Path
) -> None:
    runs_dir = finished.copy(tmp_path)
    run = RunDir(tmp_path / "run")
    previous_version(run)
    assert status(run)["complete"]
    assert middo("report", run.path)[0] == 0
    sample = read_jsonl(run.final.dataset)[0]["id"]
    assert trace(run, sample)[0]["id"]
    before = contents(tmp_path)
    with pytest.raises(RunError, match=r"was made by an earlier version .*another name \(name="):
        run_loop(load(None, finished.settings(runs_dir=runs_dir)), Silent())
    assert contents(tmp_path) == before
    # What it promised is kept: a file that is gone makes its stage stale.
    run.round(1).refined.unlink()
    assert status(run)["next"] == {"round": "round_01", "stage": "refine"}


def spelt_as_before(run: RunDir) -> None:
    """Turns config.yaml and a record into those of the version before alternatives became unions."""
    old = yaml.safe_load(SETTINGS_BEFORE.read_text(encoding="utf-8"))
    old |= {"name": "run", "rounds": 2}
    run.config.write_text(yaml.safe_dump(old), encoding="utf-8")
    for directory in (*run.rounds(), run.final):
        records = directory.stages()
        trained = records["train"]["settings"]
        for name in [name for name in trained if name.startswith("train.optimizer.")]:
            del trained[name]
        trained |= {"train.optimizer": "adamw", "train.beta1": 0.9, "train.beta2": 0.999}
        write_json(directory.manifest, {"stages": records})


def test_a_run_with_old_spellings_is_read_and_not_continued(
    finished: Finished, middo: Middo, tmp_path: Path
) -> None:
    runs_dir = finished.copy(tmp_path)
    run = RunDir(tmp_path / "run")
    spelt_as_before(run)
    code, out, err = middo("status", run.path)
    assert code == 0, err
    assert "run: complete" in out
    assert middo("report", run.path)[0] == 0
    assert "numbers kept" in run.report.read_text(encoding="utf-8")
    assert middo("trace", run.path, read_jsonl(run.final.dataset)[0]["id"])[0] == 0
    before = contents(tmp_path)
    with pytest.raises(RunError, match=r"earlier version .* names train\.beta1, which is now .*name="):
        run_loop(load(None, finished.settings(runs_dir=runs_dir)), Silent())
    code, _, err = middo("select", run.round(0).path)
    assert code == 1
    assert "config: train.tensorboard is now train.trackers" in err
    assert contents(tmp_path) == before


def test_a_spoilt_config_is_told_by_status_and_written_anew_by_run(
    finished: Finished, tmp_path: Path
) -> None:
    config = load(None, finished.settings(runs_dir=finished.copy(tmp_path)))
    run = RunDir(tmp_path / "run")
    run.config.write_text("seed: [", encoding="utf-8")
    with pytest.raises(RunError, match=r"config\.yaml: not valid YAML"):
        status(run)
    run_loop(config, Silent())
    in_place_of_auto = ["scoring.batch_tokens=2048"]  # as for any CPU
    assert load(run.config) == load(None, [*layers_of(config), *in_place_of_auto])
