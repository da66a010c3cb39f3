"""The rows of the table of faults for what the plain run lacks: control arms, benchmarks, take-back, LoRA.

A second finished run has all of them. Its rows are faults of those files and folders alone, and of the
manifests that record such stages, so that the table does not double.
"""

from __future__ import annotations

import fnmatch
import functools
import re
from collections.abc import Iterator

from benchmarks.fault_table import Case, expected, file_case
from benchmarks.fault_world import FAULTS, FOLDER_FAULTS, SETTINGS, World, files, folders

from support.local_tasks import write_local_tasks  # isort: skip

WIDE = {
    **SETTINGS,
    "rounds": 2,
    "controls": "[random]",
    "refine__take_back": True,
    "lora__rank": 2,
    "evaluate__tasks": "[capitals]",
    "evaluate__limit": 2,
}
_ARM = ("random refine", "seed_0 control")
# As `fault_table.MAKERS`, which has all other files.
MAKERS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("controls.json", ()),
    ("controls", _ARM),
    ("controls/random", _ARM),
    ("controls/random/seed_0*", ("seed_0 control",)),
    ("controls/random/*", ("random refine",)),
    ("*/taken_back.jsonl", ("* take_back",)),
    ("*/benchmarks.json", ("* benchmark",)),
    (
        "final/manifest.json",
        tuple(f"final {s}" for s in ("prepare", "train", "evaluate", "benchmark", "export")),
    ),
    (
        "round_01/manifest.json",
        tuple(
            f"round_01 {stage}"
            for stage in ("prepare", "train", "score", "select", "take_back", "refine", "merge", "benchmark")
        ),
    ),
)
_TOO = ("round_01/manifest.json", "final/manifest.json", "final/checkpoint/metadata.json")


def wide(plain: World) -> World:
    """The second world, in the same folder as the first one; its run is finished."""
    tasks = write_local_tasks(plain.root / "tasks")
    own = {**WIDE, "evaluate__include_path": tasks}
    here = World(plain.root, plain.url, plain.answers, own, "wide")
    here.begin()
    return here


def wide_cases(here: World, plain: World) -> Iterator[Case]:
    """The rows of the second world."""
    known = {_kind(name) for name in (*files(plain.finished), *folders(plain.finished))}
    for names, faults in ((files(here.finished), FAULTS), (folders(here.finished), FOLDER_FAULTS)):
        for name in names:
            if _kind(name) in known and name not in _TOO:
                continue
            path = here.finished.path / name
            is_empty = path.is_file() and path.stat().st_size == 0
            for fault, break_it in faults.items():
                if is_empty and fault in ("empty", "truncate"):
                    continue  # it stays as it is
                check = functools.partial(file_case, here, name, break_it, made_by)
                yield Case(f"wide: {fault} {name}{'' if path.is_file() else '/'}", check)


def made_by(name: str) -> list[str]:
    """The stages that the loss of a file, or of a folder, of the second run requires, in order."""
    for pattern, stages in MAKERS:
        if fnmatch.fnmatch(name, pattern):
            return [stage.replace("*", name.split("/")[0]) for stage in stages]
    return expected(name)


def _kind(name: str) -> str:
    """A name without the round, and without what Orbax draws for the files of arrays."""
    return re.sub(r"/d/[0-9a-f]+$", "/d/*", re.sub(r"^round_\d+", "round", name))
