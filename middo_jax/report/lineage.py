"""The ancestors and descendants of a sample over the rounds, with their scores."""

from __future__ import annotations

import difflib
import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.lib
import pyarrow.parquet as pq

from middo_jax.data.example import Example
from middo_jax.report.status import judged_tasks, load_jsonl, planned_rounds, require_run, takes_back
from middo_jax.report.verdicts import verdict
from middo_jax.rundir import RoundDir, RunDir, RunError
from middo_jax.rundir.schemas import SCORES
from middo_jax.rundir.tables import refuse_newer


def trace(run: RunDir, example_id: str) -> list[dict[str, Any]]:
    """A sample with all its ancestors and descendants, oldest first.

    Rejected candidates are descendants too: they have `accepted` False and are in no round.

    Args:
      run: the run's folder.
      example_id: an id, or the beginning of exactly one id.

    Returns:
      One dict of JSON values per sample: id, user_id (the user's own id, None if there is none), relation
      (ancestor | self | descendant), round (the first round whose dataset contains it, or would contain it;
      `final` counts as the round after the last), rounds (all folders whose dataset contains it), op, axis,
      parent_ids, root_id, hint_ids, refiner, accepted, verdict,
      taken_back (the round that takes the rewrite back, with the sample's badness before and after; None),
      prompt, response, turns, turns_changed (of a rewrite, against its original; None of others), scores
      (its row in the first round's scores.parquet, None if it was not scored), later_scores ({folder: row}),
      scores_before (for which the parent was selected).

    Raises:
      RunError: the folder or the id does not exist (the message names similar ids), or several ids begin so.
    """
    require_run(run)
    folders = [*planned_rounds(run), run.final]
    samples = _samples(folders, takes_back(run))
    target = _resolve(run, samples, example_id)

    children: dict[str, list[str]] = defaultdict(list)
    for sample in samples.values():
        for parent in sample["parent_ids"]:
            children[parent].append(sample["id"])
    ancestors = _reach(target, lambda i: samples[i]["parent_ids"] if i in samples else ())
    descendants = _reach(target, lambda i: children[i])

    family = [samples[i] for i in {target, *ancestors, *descendants} if i in samples]
    turns = {sample["id"]: _turns(sample, samples) for sample in family}
    scores = {f.path.name: score_rows(f, [s["id"] for s in family]) for f in folders}
    for sample in family:
        own = {name: scores[name][sample["id"]] for name in sample["rounds"] if sample["id"] in scores[name]}
        first = sample["rounds"][0] if sample["rounds"] else None
        relation = "ancestor" if sample["id"] in ancestors else "descendant"
        sample["relation"] = "self" if sample["id"] == target else relation
        sample["scores"] = own.pop(first, None) if first else None
        sample["later_scores"] = own
        sample |= turns[sample["id"]]
        del sample["example"]
    return sorted(family, key=lambda s: (s["round"], not s["rounds"], s["id"]))


def score_rows(round_dir: RoundDir, ids: Iterable[str] | None = None) -> dict[str, dict[str, Any]]:
    """Rows of scores.parquet by id, without the id column; {} if the file does not exist.

    NaN becomes None, as in JSON. Raises RunError if the file is not a table of scores.

    Args:
      round_dir: a round's folder.
      ids: read only these; None reads all.
    """
    table = None if ids == set() else score_table(round_dir, ids)
    rows = [] if table is None else table.to_pylist()
    return {row.pop("id"): {k: _finite(v) for k, v in row.items()} for row in rows}


def score_table(
    round_dir: RoundDir, ids: Iterable[str] | None = None, columns: Collection[str] | None = None
) -> pa.Table | None:
    """scores.parquet as a table, see `score_rows`; None if the file does not exist.

    Args:
      round_dir: a round's folder.
      ids: read only these; None reads all.
      columns: read only those of them that the file has, beside the id; None reads all.
    """
    path = round_dir.scores
    if not path.exists():
        return None
    try:
        # No Parquet file holds a text with half of a surrogate pair.
        known = None if ids is None else pa.array([id_ for id_ in ids if _is_utf8(id_)], pa.string())
        wanted = None if known is None else pc.field("id").isin(known)
        schema = pq.read_schema(path)
        refuse_newer(schema, SCORES, path)
        names = None if columns is None else [n for n in schema.names if n == "id" or n in columns]
        table = pq.read_table(path, columns=names, filters=wanted)
        table["id"]
        return table
    except (pyarrow.lib.ArrowException, KeyError) as e:
        raise RunError(
            f"{path}: not a table of scores ({e}); `middo run CONFIG --repair` makes it again"
        ) from e


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _finite(value: Any) -> Any:
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _samples(folders: list[RoundDir], takes_back: bool) -> dict[str, dict[str, Any]]:
    """All samples of datasets and all candidates of refined.jsonl files by id, as `trace` describes them."""
    samples: dict[str, dict[str, Any]] = {}
    for index, folder in enumerate(folders):
        for row in load_jsonl(folder.dataset) or []:
            sample = samples.get(row["id"])
            if sample is None or not sample["rounds"]:
                # The dataset takes precedence over refined.jsonl.
                sample = samples[row["id"]] = _sample(row, index)
            sample["rounds"].append(folder.path.name)
        for row in (load_jsonl(folder.taken_back) or []) if takes_back else []:
            if row["id"] in samples and samples[row["id"]]["taken_back"] is None:
                facts = ("badness_before", "badness_after")
                back = {"round": row["round"]} | {name: row[name] for name in facts}
                samples[row["id"]]["taken_back"] = back
        for task in judged_tasks(folder) or []:
            if task["example"] is not None and task["example"]["id"] not in samples:
                end = {"accepted": task["accepted"], "verdict": _verdict_text(task)}
                samples[task["example"]["id"]] = _sample(task["example"], index + 1) | end
    return samples


def _sample(row: dict[str, Any], index: int) -> dict[str, Any]:
    example = Example.from_json(row)
    lineage = example.lineage
    return {
        "id": example.id,
        "user_id": example.user_id,
        "round": index,
        "rounds": [],
        "op": lineage.op,
        "axis": lineage.axis,
        "parent_ids": list(lineage.parent_ids),
        "root_id": example.root_id,
        "hint_ids": list(lineage.hint_ids),
        "refiner": lineage.refiner,
        "accepted": True,
        "verdict": None,
        "taken_back": None,
        "scores_before": lineage.scores_before,
        "example": example,
        "prompt": example.prompt,
        "response": example.response,
    }


def _turns(sample: Mapping[str, Any], samples: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The number of turns and, of a rewrite, how many of them differ from its original's."""
    parents = [samples[i] for i in sample["parent_ids"] if i in samples]
    changed = None
    if parents and sample["op"] not in ("seed", "synthesize"):
        changed = len(sample["example"].changed_turns(parents[0]["example"]))
    return {"turns": len(sample["example"].messages), "turns_changed": changed}


def _verdict_text(task: dict[str, Any]) -> str | None:
    return None if task["accepted"] else str(verdict(task))


def _resolve(run: RunDir, samples: dict[str, Any], wanted: str) -> str:
    if wanted in samples:
        return wanted
    # A rewrite has its original's own id, so that several samples may have it; the user's row is the first.
    own = [i for i, sample in samples.items() if wanted and str(sample["user_id"]) == wanted]
    if own:
        return min(own, key=lambda i: samples[i]["round"])
    if not samples:
        raise RunError(f"{run.path}: no round has a dataset yet, so there is no sample to trace")
    matches = sorted(i for i in samples if wanted and i.startswith(wanted))
    if len(matches) == 1:
        return matches[0]
    if matches:
        more = f" and {len(matches) - 5:,} more" if len(matches) > 5 else ""
        raise RunError(
            f"{wanted!r} begins {len(matches):,} ids: {', '.join(matches[:5])}{more}; give more digits"
        )
    near = difflib.get_close_matches(wanted, samples, n=3, cutoff=0.5)
    hint = f"nearest: {', '.join(near)}" if near else f"ids are in the dataset.jsonl files of {run.path}"
    raise RunError(f"{run.path}: no sample has the id {wanted!r}; {hint}")


def _reach(start: str, step: Any) -> set[str]:
    """All ids that repeated steps from `start` reach, without `start`."""
    seen, front = {start}, [start]
    while front:
        for found in step(front.pop()):
            if found not in seen:
                seen.add(found)
                front.append(found)
    return seen - {start}
