"""The table of faults: every file and folder of a finished run, every setting, the model and the data.

Each case is one copy of the finished run, one fault and one start. It passes if

- the run ends like a fresh one with what is there now, or refuses with a sentence that names the file, and
  ends so after `--repair`; and
- exactly those stages were redone that the fault requires, by the list below, and that the chain announced.
"""

from __future__ import annotations

import fnmatch
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import load_file, save_file

from benchmarks.fault_settings import CHANGES, Change, base_of, override
from benchmarks.fault_world import FAULTS, FOLDER_FAULTS, Again, World, differences, files, folders
from middo_jax.rundir import RunDir

from support.tiny_model import write_tiny_model  # isort: skip

# Who makes a file, by hand: the first pattern that fits. `*` is the name of the folder of the round.
MAKERS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("config.yaml", ()),
    ("events.jsonl", ()),
    ("report.html", ()),
    ("llm_cache.sqlite*", ()),
    ("heldout.jsonl", ("round_00 prepare",)),
    ("rejected.jsonl", ("round_00 prepare",)),
    ("heldout_losses.json", ("final evaluate",)),
    ("heldout_rows.parquet", ("final evaluate",)),
    ("*/dataset.jsonl", ("* prepare",)),
    ("*/checkpoint*", ("* train",)),
    ("*/metrics.jsonl", ("* train",)),
    ("*/evaluations.jsonl", ("* train",)),
    ("*/scores.parquet", ("* score", "* select")),  # a selection is of the scores that are replaced
    ("*/embeddings.parquet", ("* score", "* select")),
    ("*/selection.*", ("* select",)),
    ("*/requests.jsonl", ("* refine",)),
    ("*/refined.jsonl", ("* refine",)),
    ("*/candidates.jsonl", ("* refine",)),
    ("*/dropped.jsonl", ("* merge",)),
    ("final/huggingface*", ("final export",)),
    ("final/manifest.json", ("final prepare", "final train", "final evaluate", "final export")),
    ("*/manifest.json", tuple(f"* {s}" for s in ("prepare", "train", "score", "select", "refine", "merge"))),
)
BASE_FILES = ("model.safetensors", "config.json", "generation_config.json", "tokenizer_config.json")


class Case(NamedTuple):
    """A row of the table.

    Attributes:
      name: such as `flip round_00/scores.parquet`.
      check: runs it, and returns what broke, one line each.
    """

    name: str
    check: Callable[[], list[str]]


def expected(name: str) -> list[str]:
    """The stages that the loss of a file, or of a folder, requires, in order."""
    if name in ("round_00", "final"):
        return expected(f"{name}/manifest.json")
    for pattern, stages in MAKERS:
        if fnmatch.fnmatch(name, pattern):
            return [stage.replace("*", name.split("/")[0]) for stage in stages]
    raise LookupError(f"{name}: no stage is known to make it; add it to MAKERS")


def cases(world: World) -> Iterator[Case]:
    """All rows of the table."""
    for name in files(world.finished):
        for fault in FAULTS:
            yield Case(f"{fault} {name}", lambda n=name, f=fault: file_case(world, n, FAULTS[f]))
    for name in folders(world.finished):
        for fault in FOLDER_FAULTS:
            yield Case(f"{fault} {name}/", lambda n=name, f=fault: file_case(world, n, FOLDER_FAULTS[f]))
    for name, change in CHANGES.items():
        yield Case(f"set {name}={change.value}", lambda n=name, c=change: setting_case(world, n, c))
    for name in BASE_FILES:
        yield Case(f"replace model/{name}", lambda n=name: input_case(world, n))
    yield Case("replace data.json", lambda: input_case(world, "data.json"))
    yield Case("rename the run's folder", lambda: moved_case(world))


def file_case(world: World, name: str, fault: Callable[[Path], None]) -> list[str]:
    """One file or folder of a copy is broken; the same settings run again."""
    run = world.copy("broken")
    before = world.results(run)
    fault(run.path / name)
    again = world.run(run)
    broken: list[str] = []
    wanted = expected(name)
    is_removed = not (run.path / name).exists() and name == "round_00/checkpoint"
    if again.error is not None:
        said = str(again.error)
        if not any(
            part in said for part in (name, Path(name).name, str(run.path / name.split("/checkpoint")[0]))
        ):
            broken.append(f"the error does not name the file: {said}")
        if "\n" in said.strip() or "Traceback" in said:
            broken.append(f"the error is not one sentence: {said}")
        if "repair" not in said:
            broken.append(f"the error says no way on: {said}")
        again = world.run(run, repair=True)
        if again.error is not None:
            return [*broken, f"--repair fails: {type(again.error).__name__}: {again.error}"]
        wanted = expected(name.split("/checkpoint")[0] + "/checkpoint") if "/checkpoint" in name else wanted
    if is_removed:
        wanted = []
        before.pop("round_00/checkpoint", None)
        before.pop("round_00/checkpoint/best", None)
    if again.redone != wanted:
        broken.append(f"redone: {again.redone}, wanted: {wanted}")
    is_announced = not again.repaired and again.stale is not None
    if is_announced and not set(again.redone) <= {*(again.stale or {}), *_selects(again)}:
        broken.append(f"redone: {again.redone}, announced: {sorted(again.stale or {})}")
    return broken + differences(world.results(run), before)


def _selects(again: Again) -> set[str]:
    """A selection falls with its scores, and with a new folder of results."""
    return {stage.replace(" score", " select") for stage in again.redone}


def setting_case(world: World, name: str, change: Change) -> list[str]:
    """One setting is changed; the run must end like a fresh one, and nothing else may be redone."""
    more = override(name, change, str(world.root), world.url)
    base = base_of(change)
    other_inputs(world)
    if base:
        source = RunDir(world.root / "runs" / ("base_" + "_".join(base)))
        if not source.final.manifest.exists() and (error := world.run(source, **base).error) is not None:
            return [f"the run before the change: {error}"]
        run = world.copy("changed", source)
    else:
        run = world.copy("changed")
    before = world.results(run)
    if change.stages is None:
        more = {"runs_dir": str(world.root / "others"), **more}
        shutil.rmtree(world.root / "others", ignore_errors=True)
        again = world.run(run, **more)
        wrote = sorted(p.name for p in (world.root / "others").iterdir())
        found = [] if again.error is None and len(wrote) == 1 else [f"{again.error}, {wrote}"]
        return found + differences(world.results(run), before)
    again = world.run(run, **base, **more)
    if again.error is not None:
        return [f"{type(again.error).__name__}: {again.error}"]
    own = {w for w, why in (again.stale or {}).items() if not why.startswith("follows ")}
    wanted = _stale_by(world, name, change)
    broken = [] if own == wanted else [f"stale: {sorted(own)}, wanted: {sorted(wanted)}"]
    if not set(again.redone) <= {*(again.stale or {}), *_selects(again)}:
        broken.append(f"redone: {again.redone}, announced: {sorted(again.stale or {})}")
    if not own <= set(again.redone):
        broken.append(f"stale and not redone: {sorted(own - set(again.redone))}")
    if not change.stages:
        return broken + differences(world.results(run), before)
    fresh = RunDir(world.root / "runs" / "fresh")
    shutil.rmtree(fresh.path, ignore_errors=True)
    if (error := world.run(fresh, **base, **more).error) is not None:
        return [*broken, f"a fresh run fails: {error}"]
    return broken + differences(world.results(run), world.results(fresh))


def _stale_by(world: World, name: str, change: Change) -> set[str]:
    """The stages of a change with their folders."""
    found = set[str]()
    for stage in change.stages or ():
        if stage == "prepare":
            found.add("round_00 prepare")
        elif stage == "follow":
            found.add("final prepare")
        elif stage in ("evaluate", "export"):
            found.add(f"final {stage}")
        else:
            found.add(f"round_00 {stage}")
            if stage == "train":
                found.add("final train")
    if name == "rounds":
        found |= {f"round_01 {s}" for s in ("prepare", "train", "score", "select", "refine", "merge")}
    return found


def other_inputs(world: World) -> None:
    """Makes the model and the data that settings change to, if they are not there."""
    if not (world.root / "other_model").exists():
        write_tiny_model(world.root / "other_model", seed=1)
        shutil.copyfile(world.root / "data.json", world.root / "other.json")
        rows = json.loads((world.root / "other.json").read_text(encoding="utf-8"))
        (world.root / "other.json").write_text(json.dumps(rows[1:]), encoding="utf-8")


def input_case(world: World, name: str) -> list[str]:
    """The base model or the data is another one at the same place; a fresh run says what must come out."""
    path = world.root / (name if name == "data.json" else f"model/{name}")
    kept = path.read_bytes() if path.exists() else None
    run = world.copy("changed")
    try:
        replace(path)
        again = world.run(run)
        if again.error is not None:
            return [f"{type(again.error).__name__}: {again.error}"]
        fresh = RunDir(world.root / "runs" / "fresh")
        shutil.rmtree(fresh.path, ignore_errors=True)
        if (error := world.run(fresh).error) is not None:
            return [f"a fresh run fails: {error}"]
        wanted = {"data.json": "round_00 prepare", "model.safetensors": "round_00 train"}.get(
            name, "final export"
        )
        broken = [] if wanted in again.redone else [f"redone: {again.redone}, without {wanted}"]
        return broken + differences(world.results(run), world.results(fresh))
    finally:
        path.unlink() if kept is None else path.write_bytes(kept)


def replace(path: Path) -> None:
    """Puts another file of the same kind at the place of one of the model's or the data."""
    if path.suffix == ".safetensors":
        tensors = load_file(path)
        save_file({k: np.flip(v).copy() for k, v in tensors.items()}, path, {"format": "pt"})
    elif path.name == "data.json":
        rows = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps([*rows[2:], rows[0] | {"output": "Nobody knows."}]), encoding="utf-8")
    else:
        fields: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        path.write_text(
            json.dumps(fields | {"a_note": "another", "transformers_version": "9.9.9"}), encoding="utf-8"
        )


def moved_case(world: World) -> list[str]:
    """The whole project is moved: run, model and data; nothing is redone, and a later change still works."""
    moved = World(world.root.with_name(world.root.name + "_moved"), world.url, world.answers, world.own)
    shutil.rmtree(moved.root, ignore_errors=True)
    shutil.copytree(world.root, moved.root, ignore=shutil.ignore_patterns("runs", "others"))
    shutil.copytree(world.finished.path, moved.finished.path)
    aside = world.root.with_name(world.root.name + "_away")
    world.root.rename(aside)
    try:
        again = moved.run(moved.finished)
        broken = (
            [] if again.error is None and not again.redone else [f"{again.error}, redone: {again.redone}"]
        )
        (moved.finished.final / "huggingface" / "model.safetensors").unlink()
        again = moved.run(moved.finished)
        if again.error is not None or again.redone != ["final export"]:
            broken.append(f"after the loss of the export: {again.error}, redone: {again.redone}")
        return broken
    finally:
        aside.rename(world.root)
        shutil.rmtree(moved.root, ignore_errors=True)
