"""The state of a run, read from its folder alone: finished stages, sets, accepted rewrites, the next stage.

This module also contains the readers of run files for this package. They return None for a file that does not
exist yet. For a file that cannot be read they raise an error that names the line.
"""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from middo_jax.buckets import shown
from middo_jax.config import Config, stored
from middo_jax.progress import duration
from middo_jax.report.benchmarks import benchmark_lines, benchmark_table
from middo_jax.report.contrast import contrast, contrast_lines
from middo_jax.report.controls import control_lines
from middo_jax.report.effects import effect_lines, effects
from middo_jax.report.terminal import printable
from middo_jax.report.verdicts import after_people, describe, people
from middo_jax.rundir import Manifest, RoundDir, RunDir, RunError
from middo_jax.rundir.arms import control_links
from middo_jax.rundir.chain import chain
from middo_jax.rundir.events import read_events
from middo_jax.rundir.link import assess
from middo_jax.rundir.rows import BenchmarksFile
from middo_jax.rundir.stopping import course

ROUND_STAGES = ("train", "score", "select", "refine", "merge")
FINAL_STAGES = ("train", "evaluate", "export")


def load_json(path: Path) -> Any | None:
    """The value of a JSON file; None if the file does not exist. Raises RunError if it is not JSON."""
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as e:
        raise RunError(
            f"{path}: not valid JSON ({e}); `middo run CONFIG --repair` puts it aside and makes it again"
        ) from e


def load_jsonl(path: Path, torn_end: bool = False) -> list[Any] | None:
    """The values of a JSONL file; None if the file does not exist.

    Args:
      path: one JSON value per line; blank lines are ignored.
      torn_end: an incomplete last line is ignored, for files to which a process appends.

    Raises:
      RunError: a line is not JSON; the message names file and line.
    """
    return list(each_row(path, torn_end)) if path.exists() else None


def each_row(path: Path, torn_end: bool = False) -> Iterator[Any]:
    """The values of a JSONL file one at a time, see `load_jsonl`; the file must exist."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                yield json.loads(line)
            except (ValueError, RecursionError) as e:
                if torn_end and not line.endswith(b"\n"):
                    return
                raise RunError(
                    f"{path}:{number}: not valid JSON ({e}); mend the line, or let `middo run CONFIG "
                    "--repair` put the file aside and do again what is missing then"
                ) from e


def judged_tasks(folder: RoundDir) -> list[dict[str, Any]] | None:
    """The rows of a round's refined.jsonl after people's verdicts; None if the file does not exist."""
    tasks = load_jsonl(folder.refined)
    return None if tasks is None else after_people(tasks, load_jsonl(folder.verdicts))


def load_settings(run: RunDir) -> dict[str, Any]:
    """config.yaml as nested dicts; {} if it does not exist.

    It is not validated, so that runs of older versions stay readable.
    """
    if not run.config.exists():
        return {}
    try:
        tree = yaml.safe_load(run.config.read_text(encoding="utf-8"))
    except OSError as e:
        raise RunError(
            f"{run.config} cannot be read ({e.strerror or e}); mend it, or let `middo run CONFIG --repair` "
            "put it aside and write it again"
        ) from e
    except (yaml.YAMLError, ValueError, RecursionError) as e:  # a date such as 2026-99-99
        raise RunError(f"{run.config}: not valid YAML ({e}); repair it or start the run again") from e
    if not isinstance(tree, dict):
        raise RunError(f"{run.config}: must contain settings as `name: value`, not a {type(tree).__name__}")
    return tree


def require_run(run: RunDir) -> None:
    """Raises RunError unless the folder exists, is a run's, and no newer version wrote it."""
    if not run.path.is_dir():
        parent = run.path.parent
        beside = parent.iterdir() if parent.is_dir() else ()
        runs = sorted(path.name for path in beside if path.is_dir() and RunDir(path).is_begun)[:8]
        hint = f"runs beside it: {', '.join(runs)}" if runs else "`middo run CONFIG` makes one"
        raise RunError(f"{run.path}: no such run; {hint}")
    for folder in (*run.rounds(), run.final):
        folder.stages()
    if not run.is_begun:
        raise RunError(
            f"{run.path}: not a run: it has neither round_00 nor a run's config.yaml. A run's folder is "
            "RUNS_DIR/NAME, and `middo run CONFIG` makes one"
        )


def planned_rounds(run: RunDir) -> list[RoundDir]:
    """The rounds that config.yaml sets, then any further rounds that exist."""
    count = load_settings(run).get("rounds")
    rounds = {r.path.name: r for r in (run.round(i) for i in range(count if isinstance(count, int) else 0))}
    rounds |= {r.path.name: r for r in run.rounds()}
    return [rounds[name] for name in sorted(rounds)]


def status(run: RunDir) -> dict[str, Any]:
    """The state of the run, as JSON values.

    Returns:
      run, path; rounds and final, each {name, rows, stages: {stage: seconds | None if not done or stale},
      stale: {stage: why}, next, selected: {axis: n} | None, n_selected (distinct samples) | None, accepted,
      rejected | None, people: {verdict: n} | None if nobody judged the rewrites};
      next: {round, stage} | None if all stages are done; complete; stop: see `Course.to_json`, None without
      `stop.patience`; controls: the contents of controls.json, None while a stage or an arm is not done;
      heldout: [{name, loss, n_target_tokens}];
      n_heldout; contrast: see `contrast`; benchmarks: see `benchmark_table`;
      effects: {rounds, fine_tuning: see `effects.Effect`, None if unknown}; last_event;
      unreadable_events: lines of events.jsonl that cannot be read.

    Raises:
      RunError: the folder does not exist or is no run's, or a file in it cannot be read.
    """
    require_run(run)
    config, stale = stored(load_settings(run)), _stale(run)
    ends = None if config is None or config.stop.patience is None else course(run, config)
    rows = [_round(of, names, stale) for of, names in _stages_of(run, config if ends else None).items()]
    rounds, final = rows[:-1], rows[-1]
    pending = next(({"round": r["name"], "stage": r["next"]} for r in [*rounds, final] if r["next"]), None)
    if pending is None and config is not None:
        pending = _pending_control(run, config)
    is_evaluated = (run.final.path.name, "evaluate") not in stale
    heldout = (load_json(run.heldout_losses) if is_evaluated else None) or {}
    models = heldout.get("models", [])
    events = read_events(run.events)
    return {
        "run": run.path.resolve().name,
        "path": shown(run.path),
        "rounds": rounds,
        "final": final,
        "next": pending,
        "complete": pending is None,
        "controls": load_json(run.controls) if config and config.controls and pending is None else None,
        "stop": None if ends is None else ends.to_json(),
        "heldout": models,
        "n_heldout": heldout.get("n"),
        "contrast": contrast(run) if is_evaluated else [],
        "benchmarks": benchmark_table(_benchmarks(run, stale)),
        "effects": {name: e and e.to_json() for name, e in effects(run, models).items()},
        "last_event": events.rows[-1] if events.rows else None,
        "unreadable_events": events.n_unreadable,
    }


def _pending_control(run: RunDir, config: Config) -> dict[str, str] | None:
    """The first stage of the control arms that is not done."""
    for link, settings in control_links(run, config):
        if link.name not in link.folder.stages() or link.why_stale(settings) is not None:
            where = link.folder.path.relative_to(run.path).as_posix()
            return {"round": where, "stage": link.name}
    return None


def _stages_of(run: RunDir, stopping: Config | None) -> dict[RoundDir, tuple[str, ...]]:
    """The rounds to show and `final`, each with its stages; a round behind the end has those that it did.

    `stopping`: the settings if the rounds may end early. Then the chain has the stages.
    """
    stages: dict[Path, list[str]] = {}
    if stopping is not None:
        for link in chain(run, stopping):
            of_folder = stages.setdefault(link.folder.path, [])
            of_folder += [] if link.name == "prepare" else [link.name]
    else:
        more = ["benchmark"] if _has_benchmarks(run) else []
        count = load_settings(run).get("rounds")
        planned = planned_rounds(run)[: count if isinstance(count, int) else None]
        stages = {folder.path: [*_stages_of_round(folder, run), *more] for folder in planned}
        stages[run.final.path] = [*FINAL_STAGES[:-1], *more, *FINAL_STAGES[-1:]]
    for folder in run.rounds():
        stages.setdefault(folder.path, [name for name in folder.stages() if name != "prepare"])
    final = stages.pop(run.final.path)
    stages = {path: stages[path] for path in sorted(stages)} | {run.final.path: final}
    return {RoundDir(path): tuple(names) for path, names in stages.items()}


def _stages_of_round(folder: RoundDir, run: RunDir) -> tuple[str, ...]:
    if not takes_back(run) or folder.path == run.round(0).path:
        return ROUND_STAGES
    at = ROUND_STAGES.index("refine")
    return (*ROUND_STAGES[:at], "take_back", *ROUND_STAGES[at:])


def takes_back(run: RunDir) -> bool:
    """Whether `refine.take_back` is on; where it is off, taken_back.jsonl is of an earlier start."""
    settings = load_settings(run).get("refine")
    return isinstance(settings, dict) and bool(settings.get("take_back"))


def _has_benchmarks(run: RunDir) -> bool:
    evaluate = load_settings(run).get("evaluate")
    return isinstance(evaluate, dict) and bool(evaluate.get("tasks"))


def _benchmarks(run: RunDir, stale: dict[tuple[str, str], str]) -> list[BenchmarksFile]:
    """The scores of all rounds and of `final` that are not stale, in order."""
    folders = [of for of in (*run.rounds(), run.final) if (of.path.name, "benchmark") not in stale]
    return [found for of in folders if (found := load_json(of.benchmarks)) is not None]


def count_rows(path: Path) -> int | None:
    """The number of rows of a JSONL file; None if it does not exist. The lines are not parsed."""
    if not path.exists():
        return None
    with path.open("rb") as file:
        return sum(1 for line in file if line.strip())


def _stale(run: RunDir) -> dict[tuple[str, str], str]:
    """The reasons why finished stages are stale, by (folder, stage)."""
    config = stored(load_settings(run))
    found: dict[tuple[str, str], str] = {}
    if config is not None:
        for link, state in assess(chain(run, config), config):
            if state.is_done and state.why is not None:
                found[link.folder.path.name, link.name] = state.why.text
    for folder in (*run.rounds(), run.final):  # also stages that are not in the chain of the settings
        manifest = Manifest(folder.path)
        is_removed = folder.path != run.final.path and not folder.checkpoint.exists()
        for stage in manifest.records():
            removed = [folder.checkpoint] if stage == "train" and is_removed else []
            if (why := manifest.why_stale(stage, removed=removed)) is not None:
                found.setdefault((folder.path.name, stage), why.text)
    return found


def _round(
    round_dir: RoundDir, stages: tuple[str, ...], all_stale: dict[tuple[str, str], str]
) -> dict[str, Any]:
    records, name = round_dir.stages(), round_dir.path.name
    stale = {stage: why for (folder, stage), why in all_stale.items() if folder == name}
    seconds = {s: float(records[s]["seconds"]) if s in records and s not in stale else None for s in stages}
    # The output of a stale stage is not counted: it may be damaged, and will be written again.
    selection = None if "select" in stale else load_json(round_dir.selection)
    chosen = {axis: record["ids"] for axis, record in selection["axes"].items()} if selection else None
    refined = None if "refine" in stale else judged_tasks(round_dir)
    verdicts = Counter(bool(row["accepted"]) for row in refined) if refined is not None else None
    return {
        "name": round_dir.path.name,
        "rows": count_rows(round_dir.dataset),
        "stages": seconds,
        "stale": stale,
        "next": next((stage for stage in stages if seconds[stage] is None), None),
        "selected": {axis: len(ids) for axis, ids in chosen.items()} if chosen is not None else None,
        "n_selected": len(set().union(*chosen.values())) if chosen is not None else None,
        "accepted": verdicts[True] if verdicts is not None else None,
        "rejected": verdicts[False] if verdicts is not None else None,
        "people": people(refined or ()),
    }


def render_status(d: dict[str, Any]) -> str:
    """The result of `status` as plain text for a terminal, without colours or control characters."""
    named = [stage for row in [*d["rounds"][:1], d["final"]] for stage in row["stages"]]
    stages = list(dict.fromkeys((*ROUND_STAGES, *named)))
    table = Table(box=box.SIMPLE, pad_edge=False)
    for heading in ("", "rows", *stages, "selected", "accepted"):
        table.add_column(heading, justify="left" if not heading else "right")
    for row in [*d["rounds"], d["final"]]:
        cells = [_cell(row, stage) for stage in stages]
        tried = None if row["accepted"] is None else row["accepted"] + row["rejected"]
        kept = f"{row['accepted']:,} of {tried:,}" if tried is not None else "-"
        counts = (_count(row["rows"]), *cells, _count(row["n_selected"]), kept)
        table.add_row(*(Text(printable(cell, lines=False)) for cell in (row["name"], *counts)))
    out = io.StringIO()
    console = Console(file=out, width=120, color_system=None, highlight=False, markup=False, emoji=False)
    step = "complete" if d["complete"] else f"next: {d['next']['stage']} of {d['next']['round']}"
    losses = ", ".join(
        f"{m['name']} {m['loss']:.4f}" if m["loss"] is not None else f"{m['name']} -" for m in d["heldout"]
    )
    below = [
        *_reasons([*d["rounds"], d["final"]]),
        *(f"{r['name']}: people's verdicts: {describe(r['people'])}" for r in d["rounds"] if r["people"]),
        *([d["stop"]["line"]] if d["stop"] else []),
        f"held-out loss: {losses or 'not yet'}",
        *(f"  {line}" for line in effect_lines(d["effects"])),
        *(f"  {line}" for line in contrast_lines(d["contrast"])),
        *benchmark_lines(d["benchmarks"]),
        *control_lines(d["controls"]),
    ]
    if event := d["last_event"]:
        below.append(f"last event: {event.get('event') or '?'} at {event.get('time') or '?'}")
    if n := d["unreadable_events"]:
        below.append(unreadable_events(n))
    console.print(printable(f"{d['run']}: {step}", lines=False))
    console.print(table)
    for line in below:
        console.print(printable(line, lines=False))
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"


def unreadable_events(n: int) -> str:
    """One sentence about lines of events.jsonl that cannot be read."""
    lines = (
        "1 line of events.jsonl cannot be read and is"
        if n == 1
        else f"{n:,} lines of events.jsonl cannot be read and are"
    )
    return f"{lines} ignored: it is a log, and nothing depends on it"


def _cell(row: dict[str, Any], stage: str) -> str:
    if stage not in row["stages"]:
        return ""
    done = row["stages"][stage]
    if done is None:
        return "stale" if stage in row["stale"] else "next" if stage == row["next"] else "-"
    return duration(done)


def _reasons(rows: list[dict[str, Any]]) -> list[str]:
    """Why stages are stale, one line each; stages that are stale only because of these are in the table."""
    return [
        f"{row['name']} {stage} is stale: {why}"
        for row in rows
        for stage, why in row["stale"].items()
        if not why.startswith("follows ")
    ]


def _count(n: int | None) -> str:
    return "-" if n is None else f"{n:,}"
