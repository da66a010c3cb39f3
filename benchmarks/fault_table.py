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

from benchmarks.fault_settings import ADDED, CHANGES, Change, base_of, override
from benchmarks.fault_world import FAULTS, FOLDER_FAULTS, Again, World, differences, files, folders
from middo_jax.report.status import status
from middo_jax.rundir import RunDir

from support.local_tasks import write_local_tasks  # isort: skip
from support.tiny_model import CHAT_TEMPLATE, write_tiny_model  # isort: skip

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
    ("final/train.jsonl", ("final prepare",)),
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
# Files of the base model and the data -> the stages that another file there makes stale by itself.
OF_THE_TOKENIZER = ("prepare", "train", "score", "refine", "evaluate", "export")
INPUTS: dict[str, tuple[str, ...]] = {
    "model/model.safetensors": ("train", "score", "evaluate"),
    "model/config.json": OF_THE_TOKENIZER,
    "model/generation_config.json": OF_THE_TOKENIZER,
    "model/tokenizer_config.json": OF_THE_TOKENIZER,
    "model/tokenizer.json": OF_THE_TOKENIZER,
    "model/chat_template.jinja": OF_THE_TOKENIZER,
    "data.json": ("prepare",),
}


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
        is_empty = (world.finished.path / name).stat().st_size == 0
        for fault in FAULTS:
            if is_empty and fault in ("empty", "truncate"):
                continue  # it stays as it is
            yield Case(f"{fault} {name}", lambda n=name, f=fault: file_case(world, n, FAULTS[f]))
    for name in folders(world.finished):
        for fault in FOLDER_FAULTS:
            yield Case(f"{fault} {name}/", lambda n=name, f=fault: file_case(world, n, FOLDER_FAULTS[f]))
    for name, change in CHANGES.items():
        yield Case(f"set {name}={change.value}", lambda n=name, c=change: setting_case(world, n, c))
    for name in INPUTS:
        yield Case(f"replace {name}", lambda n=name: input_case(world, n))
    yield Case("rename the run's folder", lambda: moved_case(world))


def file_case(
    world: World,
    name: str,
    fault: Callable[[Path], None],
    made_by: Callable[[str], list[str]] = expected,
) -> list[str]:
    """One file or folder of a copy is broken; the same settings run again. `made_by`: see `expected`."""
    run = world.copy("broken")
    before = world.results(run)
    fault(run.path / name)
    is_removed = not (run.path / name).exists() and name == "round_00/checkpoint"
    again = world.run(run)
    broken: list[str] = []
    wanted = made_by(name)
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
        wanted = made_by(name.split("/checkpoint")[0] + "/checkpoint") if "/checkpoint" in name else wanted
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
    base = base_of(change, str(world.root), world.url)
    other_inputs(world)
    if base:
        source = RunDir(world.root / "runs" / ("base_" + "_".join(base)))
        if (error := world.run(source, **base).error) is not None:
            return [f"the run before the change: {error}"]
        run = world.copy("changed", source)
    else:
        run = world.copy("changed")
    if change.stages is None:
        before = world.results(run)
        more = {"runs_dir": str(world.root / "others"), **more}
        shutil.rmtree(world.root / "others", ignore_errors=True)
        again = world.run(run, **more)
        wrote = sorted(p.name for p in (world.root / "others").iterdir())
        found = [] if again.error is None and len(wrote) == 1 else [f"{again.error}, {wrote}"]
        return found + differences(world.results(run), before)
    stages = stale_by(run, change.stages)
    stages |= ADDED.get(name, set())
    found = _changed_case(world, run, stages, change.adds, **{**base, **more})
    return [line for line in found if line.partition(" ")[0] not in change.keeps]


def _changed_case(world: World, run: RunDir, wanted: set[str], adds: bool = False, **more: Any) -> list[str]:
    """A run after a change: it announces what is stale, redoes what is needed, and ends like a fresh one.

    Args:
      world: whose inputs may have changed.
      run: before the change.
      wanted: the stages that the change makes stale by itself.
      adds: whether there are more files afterwards.
      more: settings after the change.
    """
    before, records = world.results(run), records_of(run)
    again = world.run(run, **more)
    if again.error is not None:
        return [f"{type(again.error).__name__}: {again.error}"]
    stale = again.stale or {}
    own = {where for where, why in stale.items() if not why.is_forecast}
    broken = [] if own == wanted else [f"stale: {sorted(own)}, wanted: {sorted(wanted)}"]
    if not set(again.redone) <= {*stale, *_selects(again)}:
        broken.append(f"redone: {again.redone}, announced: {sorted(stale)}")
    if not own <= set(again.redone):
        broken.append(f"stale and not redone: {sorted(own - set(again.redone))}")
    after = records_of(run)
    needless = [w for w in again.redone if w not in own | _selects(again) and records.get(w) == after.get(w)]
    broken += [f"redone, although all that it reads is the same: {where}" for where in needless]
    if not wanted and not adds:
        return broken + differences(world.results(run), before)
    fresh = RunDir(world.root / "runs" / "fresh")
    shutil.rmtree(fresh.path, ignore_errors=True)
    if (error := world.run(fresh, **more).error) is not None:
        return [*broken, f"a fresh run fails: {error}"]
    return broken + differences(world.results(run), world.results(fresh))


def records_of(run: RunDir) -> dict[str, Any]:
    """What each finished stage read: hashes of files within the run, and of inputs by role."""
    return {
        f"{here.path.name} {stage}": (of["reads"], {role: i["hash"] for role, i in of["inputs"].items()})
        for here in (*run.rounds(), run.final)
        for stage, of in here.stages().items()
    }


def stale_by(run: RunDir, stages: tuple[str, ...]) -> set[str]:
    """The stages of a change with their folders."""
    first, *later = [here.path.name for here in run.rounds()]
    folders = {"prepare": [first], "follow": [*later, "final"], "evaluate": ["final"], "export": ["final"]}
    folders |= {key: [first, *later, "final"] for key in ("train", "benchmark")}
    return {
        f"{folder} {'prepare' if stage == 'follow' else stage}"
        for stage in stages
        for folder in folders.get(stage, [first, *later])
    }


def other_inputs(world: World) -> None:
    """Makes the model and the data that settings change to, if they are not there."""
    if not (world.root / "numbered.json").exists():
        (world.root / "words.yaml").write_text("simplify: {instruction: Make it easy.}", encoding="utf-8")
        (world.root / "rubric.yaml").write_text("opening: Rate it from 0 to 10.", encoding="utf-8")
        write_tiny_model(world.root / "other_model", seed=1)
        rows = json.loads((world.root / "data.json").read_text(encoding="utf-8"))
        (world.root / "other.json").write_text(json.dumps(rows[1:]), encoding="utf-8")
        (world.root / "own_heldout.json").write_text(json.dumps(rows[:3]), encoding="utf-8")
        for name in ("tasks", "other_tasks"):
            write_local_tasks(world.root / name)
        numbered = [row | {"number": n} for n, row in enumerate(rows)]
        (world.root / "numbered.json").write_text(json.dumps(numbered), encoding="utf-8")


def input_case(world: World, name: str) -> list[str]:
    """The base model or the data is another one at the same place; a fresh run says what must come out."""
    path = world.root / name
    kept = path.read_bytes() if path.exists() else None
    run = world.copy("changed")
    try:
        replace(path)
        return _changed_case(world, run, stale_by(run, INPUTS[name]))
    finally:
        path.unlink() if kept is None else path.write_bytes(kept)


def replace(path: Path) -> None:
    """Puts another file of the same kind at the place of one of the model's or the data."""
    if path.suffix == ".safetensors":
        tensors = load_file(path)
        save_file({k: np.flip(v).copy() for k, v in tensors.items()}, path, {"format": "pt"})
        return
    if path.suffix == ".jinja":
        path.write_text(CHAT_TEMPLATE.replace("<|im_end|>' + '\n'", "<|im_end|>' + '\n\n'"), encoding="utf-8")
        return
    content: Any = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if path.name == "data.json":
        content = [*content[2:], content[0] | {"output": "Nobody knows."}]
    elif path.name == "tokenizer.json":
        content["model"]["merges"] = content["model"]["merges"][:-20]
    else:
        content |= {"a_note": "another", "transformers_version": "9.9.9"}
    path.write_text(json.dumps(content), encoding="utf-8")


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
        if not status(moved.finished)["complete"]:
            broken.append("`middo status` takes finished stages for stale")
        (moved.finished.final / "huggingface" / "model.safetensors").unlink()
        again = moved.run(moved.finished)
        if again.error is not None or again.redone != ["final export"]:
            broken.append(f"after the loss of the export: {again.error}, redone: {again.redone}")
        return broken
    finally:
        aside.rename(world.root)
        shutil.rmtree(moved.root, ignore_errors=True)
