"""A tiny closed loop to break: one finished run, copies of it, faults, and what a run must end with.

with world(folder) as here:
    run = here.copy("broken")
    FAULTS["flip"](run.path / "round_00" / "scores.parquet")
    again = here.run(run)              # Again(redone=["round_00 score", "round_00 select"], error=None, ...)
    differences(here.results(run), here.results(here.finished))
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import pyarrow.parquet as pq

from middo_jax.config import load
from middo_jax.data.files import inputs_of
from middo_jax.loop import run_loop
from middo_jax.progress import Silent
from middo_jax.rundir import RunDir, RunError
from middo_jax.rundir.arms import control_links
from middo_jax.rundir.chain import chain
from middo_jax.rundir.link import assess
from middo_jax.rundir.manifest import Reason
from middo_jax.stage_functions import Stage
from middo_jax.starting import Plan
from middo_jax.training import sft

TESTS = Path(__file__).parent.parent / "tests"
sys.path.insert(0, str(TESTS))

from support.loop_fixture import fake_answer, fake_refiner, settings, write_data  # noqa: E402
from support.tiny_model import write_tiny_model  # noqa: E402

ROWS = 16
SETTINGS = {
    "data__eval_fraction": 0.2,
    "train__batch_size": 2,
    "train__num_epochs": 2,
    "train__eval_every": 1,
    "train__save_every": 1,
    "refine__max_attempts": 1,
}
# What says when, where and how fast, and the cache, whose rows depend on the order of answers.
_OWN = ("config.yaml", "events.jsonl", "report.html", "middo.lock")


class Said(Silent):
    """Keeps what a run says."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        """Keeps a line."""
        self.lines.append(text)


@dataclasses.dataclass(frozen=True)
class Again:
    """What became of a start.

    Attributes:
      redone: stages that were done, as `round_00 score`, in order.
      error: what it was refused with; None if it ended well.
      said: the lines of its progress.
      stale: what the chain said before, by stage; None where it could not be asked.
      repaired: whether damaged files were put aside first.
    """

    redone: list[str]
    error: Exception | None
    said: list[str]
    stale: dict[str, Reason] | None
    repaired: bool


class World:
    """A model, data, a refiner and one finished run; nothing outside of `root` is written."""

    def __init__(
        self,
        root: Path,
        url: str,
        answers: list[Callable[[str], str]],
        own: Mapping[str, Any],
        name: str = "finished",
    ) -> None:
        """Makes nothing yet.

        Args:
          root: has `model`, `data.json` and `runs`.
          url: of the refiner.
          answers: its first entry is what the refiner says, and may be replaced.
          own: the settings of the finished run, beside those of `support.loop_fixture`; `__` for the dot.
          name: of the finished run.
        """
        self.root, self.url, self.answers, self.own = root, url, answers, dict(own)
        self.finished = RunDir(root / "runs" / name)

    def settings(self, name: str, /, **more: Any) -> list[str]:
        """The settings of a run in this world, with changes (`__` for the dot)."""
        defaults = {"data__if_changed": "redo", "name": name}
        return settings(self.root, self.url, **(self.own | defaults | more))

    def begin(self) -> None:
        """Makes the finished run."""
        if not (self.root / "model").exists():
            write_tiny_model(self.root / "model")
            write_data(self.root / "data.json", ROWS)
        found = self.run(self.finished)
        if found.error is not None:
            raise found.error

    def copy(self, name: str, of: RunDir | None = None) -> RunDir:
        """A run's folder under another name; its mtimes stay."""
        run = RunDir(self.root / "runs" / name)
        shutil.rmtree(run.path, ignore_errors=True)
        shutil.copytree((of or self.finished).path, run.path)
        return run

    def run(self, run: RunDir, repair: bool = False, **more: Any) -> Again:
        """Starts a run in this process, and keeps what it did."""
        config, said, redone = load(None, self.settings(run.path.name, **more)), Said(), list[str]()
        stale = self._stale(run, config)
        do = Stage.do

        def record(self: Stage, plan: Plan) -> None:
            redone.append(self.link.where)
            do(self, plan)

        Stage.do = record
        try:
            run_loop(config, said, repair)
        except (RunError, ValueError, OSError, RuntimeError) as error:  # those that the program prints
            return Again(redone, error, said.lines, stale, repair)
        finally:
            Stage.do = do
        return Again(redone, None, said.lines, stale, repair)

    def _stale(self, run: RunDir, config: Any) -> dict[str, Reason] | None:
        base = Path(config.model.path)
        try:
            states = assess(chain(run, config, base, inputs_of(config.data)), config)
            arms = [arm for of, own in control_links(run, config, base) for arm in assess([of], own)]
        except (RunError, OSError):
            return None
        return {
            link.where: state.why or Reason("not done")
            for link, state in (*states, *arms)
            if not state.is_fresh
        }

    def results(self, run: RunDir) -> dict[str, str]:
        """A hash per public file of a run, without times and places; of checkpoints, of their parameters."""
        found = {}
        for path in sorted(run.path.rglob("*")):
            name = path.relative_to(run.path).as_posix()
            if not path.is_file() or path.name in _OWN or name.startswith(("damaged-", "llm_cache")):
                continue
            if "/checkpoint/" in name:
                continue
            found[name] = _digest(path)
        for here in (*run.rounds(), run.final):
            for checkpoint in (here.checkpoint, here.checkpoint / "best"):
                if (checkpoint / "metadata.json").is_file():
                    name = checkpoint.relative_to(run.path).as_posix()
                    found[name] = _digest_of_checkpoint(checkpoint, _stamp(checkpoint))
        return found


@contextlib.contextmanager
def world(root: Path) -> Iterator[World]:
    """A world with a finished run, and its refiner until the block ends."""
    answers: list[Callable[[str], str]] = [fake_answer]
    os.environ.pop("OPENAI_BASE_URL", None)
    with fake_refiner(answer=lambda text: answers[0](text)) as (url, _):
        here = World(root, url, answers, SETTINGS)
        here.begin()
        yield here


def differences(got: Mapping[str, str], wanted: Mapping[str, str]) -> list[str]:
    """In which files two runs differ: missing, surplus or other."""
    lines = [f"{name} is missing" for name in wanted if name not in got]
    lines += [f"{name} should not be there" for name in got if name not in wanted]
    return lines + [f"{name} differs" for name in wanted if name in got and got[name] != wanted[name]]


def files(run: RunDir) -> list[str]:
    """All files of a run, relative to it."""
    return [p.relative_to(run.path).as_posix() for p in sorted(run.path.rglob("*")) if p.is_file()]


def folders(run: RunDir) -> list[str]:
    """All folders of a run, relative to it."""
    return [p.relative_to(run.path).as_posix() for p in sorted(run.path.rglob("*")) if p.is_dir()]


def _digest(path: Path) -> str:
    """A hash of what is the same in every run with the same settings."""
    if path.name == "manifest.json":
        stages = json.loads(path.read_text(encoding="utf-8"))["stages"]
        kept = {
            name: [
                r["versions"],
                {k: v for k, v in r["settings"].items() if k not in ("model.path", "data.path")},
            ]
            for name, r in stages.items()
        }
        inputs = {n: {role: of["hash"] for role, of in r["inputs"].items()} for n, r in stages.items()}
        names = {n: sorted(f for f in r["files"] if "checkpoint/" not in f) for n, r in stages.items()}
        text = json.dumps([kept, inputs, names, {n: r.get("n") for n, r in stages.items()}], sort_keys=True)
    elif path.name == "metrics.jsonl":
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        text = json.dumps([{k: v for k, v in row.items() if k != "speed"} for row in rows])
    elif path.suffix == ".parquet":
        text = repr(pq.read_table(path).to_pydict())
    else:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    return hashlib.sha256(text.encode()).hexdigest()


def _stamp(folder: Path) -> str:
    return repr(
        [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(folder.rglob("*")) if p.is_file()]
    )


@functools.lru_cache(maxsize=512)
def _digest_of_checkpoint(checkpoint: Path, stamp: str) -> str:
    import numpy as np
    import orbax.checkpoint as ocp

    metadata = json.loads((checkpoint / "metadata.json").read_text(encoding="utf-8"))
    digest = hashlib.sha256(json.dumps([metadata["identity"], metadata["step"]]).encode())
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        tree = reader.restore(checkpoint.absolute() / "params")
    for path, value in sorted(jax.tree_util.tree_flatten_with_path(tree)[0], key=lambda kv: str(kv[0])):
        digest.update(str(path).encode() + np.asarray(value).tobytes())
    return digest.hexdigest()


# Faults of a file


def _bytes(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def flip(path: Path) -> None:
    """Flips one bit in the middle."""
    data = bytearray(path.read_bytes())
    if data:
        data[len(data) // 2] ^= 1 << (len(data) % 8)
    _bytes(path, bytes(data) or b"\0")


def edit(path: Path) -> None:
    """Replaces the last digit that is a value, or else the last one; where there is none, appends a line."""
    data = path.read_bytes()
    found = [*re.finditer(rb"(?<=[: ])[0-8](?=[,}\]\n ])", data)] or [*re.finditer(rb"[0-8]", data)]
    at = found[-1].start() if found else len(data)
    _bytes(path, data[:at] + (bytes([data[at] + 1]) if found else b"\n") + data[at + 1 :])


def as_folder(path: Path) -> None:
    """Puts a folder with a note at the place of the file."""
    path.unlink()
    path.mkdir()
    (path / "note.txt").write_text("mine", encoding="utf-8")


def unreadable(path: Path) -> None:
    """Takes all permissions; see `permissions` for root."""
    path.chmod(0)


FAULTS: dict[str, Callable[[Path], None]] = {
    "remove": Path.unlink,
    "empty": lambda path: _bytes(path, b""),
    "truncate": lambda path: _bytes(path, path.read_bytes()[: path.stat().st_size // 2]),
    "flip": flip,
    "edit": edit,
    "folder": as_folder,
    "unreadable": unreadable,
}


def folder_as_file(path: Path) -> None:
    """Puts a file at the place of the folder."""
    shutil.rmtree(path)
    path.write_text("not a folder", encoding="utf-8")


FOLDER_FAULTS: dict[str, Callable[[Path], None]] = {"remove": shutil.rmtree, "file": folder_as_file}


@contextlib.contextmanager
def permissions() -> Iterator[bool]:
    """Within the block permissions apply to this thread also if it is root's; yields whether they do.

    Linux's capabilities DAC_OVERRIDE and DAC_READ_SEARCH are put down meanwhile (capset(2)).
    """
    if os.geteuid() != 0 or sys.platform != "linux":
        yield os.geteuid() != 0
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header, data = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    if libc.capget(header, data) != 0:
        yield False
        return
    before, data[0] = data[0], data[0] & ~0b110
    done = libc.capset(header, data) == 0
    try:
        yield done
    finally:
        data[0] = before
        libc.capset(header, data)


@contextlib.contextmanager
def small_disk(path: Path, kilobytes: int) -> Iterator[bool]:
    """A file system of that size (tmpfs) at `path` within the block; yields whether mounting is allowed."""
    path.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(path)]
    try:
        mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:  # there is no mount
        mounted = False
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", str(path)], check=True)


@contextlib.contextmanager
def programs_kept() -> Iterator[None]:
    """Within the block trainings that compile the same step share it.

    Each training traces and compiles its own step, which takes longer than all steps of a tiny model.
    """
    made, kept = sft.make_train_step, dict[Any, jax.stages.Compiled]()

    def make(*given: Any, **more: Any) -> _Lowering:
        step = made(*given, **more)

        def lower(*args: Any) -> _Lowered:
            leaves, tree = jax.tree.flatten(args)
            shapes = tuple((x.shape, str(x.dtype), x.sharding) for x in leaves)
            key = (given, more["chunk"], more.get("longest"), more.get("seed"), shapes, str(tree))

            def compiled() -> jax.stages.Compiled:
                if key not in kept:
                    kept[key] = step.lower(*args).compile()
                return kept[key]

            return _Lowered(compiled)

        return _Lowering(lower)

    sft.make_train_step = make
    try:
        yield
    finally:
        sft.make_train_step = made


class _Lowered(NamedTuple):
    compile: Callable[[], jax.stages.Compiled]


class _Lowering(NamedTuple):
    lower: Callable[..., _Lowered]
