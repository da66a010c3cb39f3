"""Every row of every public file of a finished run is as its schema says; newer formats are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.loop_fixture import Finished
from support.synthetic_run import write_run

from middo_jax.config import load
from middo_jax.loop import run_loop
from middo_jax.progress import Silent
from middo_jax.report.build import page
from middo_jax.report.lineage import trace
from middo_jax.report.status import status
from middo_jax.rundir import RunDir, RunError, read_jsonl, write_json, write_jsonl
from middo_jax.rundir.manifest import fingerprint
from middo_jax.rundir.schemas import SCHEMAS, Schema, faults, schema
from middo_jax.rundir.tables import VERSION, arrow_schema

pytest_plugins = ["support.loop_fixture"]

# What a run of the loop without `train.eval_every`, `evaluate.tasks` and `evaluate.contrast` does not write.
NOT_IN_A_RUN = {
    "contrast_rows.parquet",
    "controls.json",
    "taken_back.jsonl",
    "merged.jsonl",
    "evaluations.jsonl",
    "benchmarks.json",
    "verdicts.jsonl",
    "plan.json",
}
# Files and folders without rows of ours.
OTHERS = {"config.yaml", "report.html", "llm_cache.sqlite", "checkpoint", "huggingface", "train.jsonl"}


def values(path: Path, of: Schema) -> list[Any]:
    """The rows of a JSON lines file, or the one value of a JSON file."""
    return read_jsonl(path) if of.form == "JSON lines" else [json.loads(path.read_text(encoding="utf-8"))]


def test_every_row_of_every_public_file_is_as_declared(finished: Finished) -> None:
    run = finished.run
    found: set[str] = set()
    for folder in (run.path, *(directory.path for directory in (*run.rounds(), run.final))):
        for path in folder.iterdir():
            if path.name in OTHERS or path.name.startswith(("round_", "final")):
                continue
            of = schema(path.name)
            assert of is not None, f"{path.name} has no schema"
            found.add(of.name)
            if of.form == "Parquet":
                written = pq.read_schema(path)
                vectors = [
                    field.type.list_size for field in written if pa.types.is_fixed_size_list(field.type)
                ]
                assert written.equals(arrow_schema(of, *vectors)), path
                assert written.metadata[VERSION] == str(of.version).encode(), path
                continue
            wrong = [fault for value in values(path, of) for fault in faults(value, of.row)]
            assert wrong == [], path
    assert found == {of.name for of in SCHEMAS} - NOT_IN_A_RUN


def test_manifests_name_the_version_of_every_public_file_that_a_stage_wrote(finished: Finished) -> None:
    for directory in (*finished.run.rounds(), finished.run.final):
        for stage, record in directory.stages().items():
            public = {name for name in record["files"] if schema(Path(name).name) is not None}
            assert set(record["versions"]) == public, stage
            assert set(record["versions"].values()) <= {1}


def newer_manifest(run: RunDir) -> None:
    path = run.round(0).manifest
    write_json(path, json.loads(path.read_text(encoding="utf-8")) | {"version": 2})


def newer_rows(run: RunDir) -> None:
    path = run.round(1).manifest
    manifest = json.loads(path.read_text(encoding="utf-8"))
    del manifest["checksum"]
    manifest["stages"]["refine"]["versions"]["refined.jsonl"] = 2
    write_json(path, manifest)


def newer_scores(run: RunDir) -> None:
    path = run.round(0).scores
    table = pq.read_table(path)
    pq.write_table(table.replace_schema_metadata({VERSION: b"2"}), path)


def newer_losses(run: RunDir) -> None:
    table = pq.read_table(run.heldout_rows)
    pq.write_table(table.replace_schema_metadata({VERSION: b"2"}), run.heldout_rows)
    manifest = json.loads(run.final.manifest.read_text(encoding="utf-8"))
    del manifest["checksum"]
    known = manifest["stages"]["evaluate"]["files"]  # else the stage is stale, and its files are not read
    known["../heldout_rows.parquet"] = fingerprint(run.heldout_rows)
    write_json(run.final.manifest, manifest)


def newer_event(run: RunDir) -> None:
    write_jsonl(run.events, [*read_jsonl(run.events), *[{"version": 2, "when": 3}] * 2])


NEWER: dict[str, tuple[Callable[[RunDir], None], str, tuple[str, ...]]] = {
    "manifest": (newer_manifest, "manifest.json", ("status", "report", "trace", "run")),
    "rows": (newer_rows, "refined.jsonl", ("status", "report", "trace", "run")),
    "scores": (newer_scores, "scores.parquet", ("report", "trace")),
    "losses": (newer_losses, "heldout_rows.parquet", ("status", "report")),
    "event": (newer_event, "events.jsonl", ("status", "report", "run")),
}


@pytest.mark.parametrize("kind", NEWER)
def test_a_newer_format_is_refused_with_a_sentence(finished: Finished, tmp_path: Path, kind: str) -> None:
    change, name, refusing = NEWER[kind]
    runs_dir = finished.copy(tmp_path)
    run = RunDir(tmp_path / "run")
    sample = read_jsonl(run.final.dataset)[0]["id"]
    change(run)
    commands: dict[str, Callable[[], object]] = {
        "status": lambda: status(run),
        "report": lambda: page(run),
        "trace": lambda: trace(run, sample),
        "run": lambda: run_loop(load(None, finished.settings(runs_dir=runs_dir)), Silent()),
    }
    sentence = rf"{name} has format version 2, this middo-jax reads up to 1\. A newer .* update this one"
    for command in refusing:
        with pytest.raises(RunError, match=sentence):
            commands[command]()


def test_a_run_without_versions_is_read_and_continued(finished: Finished, tmp_path: Path) -> None:
    """As it was before files had versions."""
    runs_dir = finished.copy(tmp_path)
    run = RunDir(tmp_path / "run")
    for directory in (*run.rounds(), run.final):
        records = directory.stages()
        for record in records.values():
            del record["versions"]
        write_json(directory.manifest, {"stages": records})
    write_jsonl(run.events, [{k: v for k, v in e.items() if k != "version"} for e in read_jsonl(run.events)])
    assert status(run)["complete"]
    assert page(run)
    events = len(read_jsonl(run.events))
    run_loop(load(None, finished.settings(runs_dir=runs_dir)), Silent())
    assert [e["event"] for e in read_jsonl(run.events)[events:]] == ["resume", "report"]


def test_a_table_without_version_is_read(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")  # its tables have no metadata
    assert pq.read_schema(run.round(0).scores).metadata is None
    assert page(run)


@pytest.mark.parametrize(
    ("name", "change", "fault"),
    [
        ("metrics.jsonl", {"los": 1.0}, "los is not declared"),
        ("metrics.jsonl", {"loss": "1.0"}, "loss is a str, not float"),
        ("metrics.jsonl", {"step": True}, "step is a bool, not int"),
        ("metrics.jsonl", {"loss": None, "skipped": ["a"]}, None),
        ("metrics.jsonl", {"speed": {"seconds": 1}}, "speed.mfu is missing"),
        (
            "refined.jsonl",
            {"op": "copy"},
            "op is 'copy', not one of 'simplify', 'rewrite', 'synthesize', 'reanswer', 'complete'",
        ),
        ("refined.jsonl", {"axes": ["quality", 3]}, "axes[1] is a int, not str"),
        ("refined.jsonl", {"scores_before": {"loss_pre": "1"}}, "scores_before.loss_pre is a str, not float"),
    ],
)
def test_a_row_that_is_not_as_declared_is_found(
    finished: Finished, name: str, change: dict[str, Any], fault: str | None
) -> None:
    of = schema(name)
    assert of is not None
    row = read_jsonl(finished.run.round(0) / name)[0]
    found = faults(row | change, of.row)
    assert fault in found if fault else found == []
    if "missing" not in (fault or ""):
        gone = next(iter(row))
        assert f"{gone} is missing" in faults({k: v for k, v in row.items() if k != gone}, of.row)


def test_schemas_of_tables_are_what_the_program_computes_with() -> None:
    from middo_jax.config.axis_table import BUILT_IN, axes
    from middo_jax.signals import select, table
    from middo_jax.signals.judge.rubrics import COLUMNS

    assert set(COLUMNS) < set(table.SCHEMA.names)
    built_in = [row for row in axes() if row.name in BUILT_IN]
    sets, badness = [row.set_name for row in built_in], [f"{row.name}_z" for row in built_in]
    assert [f.name for f in select.schema()][: 1 + 2 * len(built_in)] == ["id", *sets, *badness]
    assert table.SCHEMA.field("knn_sims").type == pa.list_(pa.float32())
