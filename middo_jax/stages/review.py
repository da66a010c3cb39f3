"""Review files of a folder's rewrites, and the verdicts that `merged` takes into account."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from middo_jax.data.example import Example
from middo_jax.data.formats import DataError
from middo_jax.data.reply import control_token, plain_lines
from middo_jax.refinement.acceptance.hidden import hidden_character
from middo_jax.refinement.review import (
    ARGILLA,
    LABELLING,
    REJECT,
    Judgement,
    ReviewFormat,
    judgements,
    review_id,
    review_rows,
)
from middo_jax.refinement.tasks import Outcome, Verdict
from middo_jax.report.verdicts import BY_A_PERSON
from middo_jax.rundir import RoundDir, RunError, read_jsonl, write_json, write_jsonl, write_text
from middo_jax.rundir.files import each_jsonl
from middo_jax.rundir.rows import VerdictRow
from middo_jax.session import read_dataset
from middo_jax.stages.surroundings import heldout_of


def outcomes_of(directory: RoundDir, examples: Sequence[Example]) -> list[Outcome]:
    """The outcomes in a folder's refined.jsonl, after the verdicts in its verdicts.jsonl, if there are any.

    A verdict on a rewrite that is not there any more is left out, see `strange_verdicts`.
    """
    outcomes, rows = _outcomes(directory, examples), _verdicts(directory)
    return [
        _after(outcome, rows.get(review_id(outcome))) if outcome.example is not None else outcome
        for outcome in outcomes
    ]


def strange_verdicts(directory: RoundDir, examples: Sequence[Example]) -> int:
    """How many verdicts of a folder are about rewrites that were made anew since then."""
    verdicts = _verdicts(directory)
    if not verdicts:
        return 0
    here = {review_id(o) for o in _outcomes(directory, examples) if o.example is not None}
    return len(verdicts.keys() - here)


def _outcomes(directory: RoundDir, examples: Sequence[Example]) -> list[Outcome]:
    by_id = {example.id: example for example in examples}
    return [Outcome.from_json(row, by_id) for row in each_jsonl(directory.refined)]


def _verdicts(directory: RoundDir) -> dict[str, VerdictRow]:
    if not directory.verdicts.exists():
        return {}
    return {row["id"]: row for row in read_jsonl(directory.verdicts)}


def _after(outcome: Outcome, row: VerdictRow | None) -> Outcome:
    if row is None or row["verdict"] in ("accept", "none"):
        return outcome
    if row["verdict"] == REJECT:
        said = "" if row["comment"] is None else f": {row['comment']}"
        return outcome.rejected(Verdict(None, f"{BY_A_PERSON}{said}"))
    assert row["example"] is not None
    return dataclasses.replace(outcome, example=Example.from_json(row["example"]))


def write_review(directory: RoundDir, path: Path, form: ReviewFormat) -> int:
    """Writes the accepted rewrites for people to judge; returns their number.

    Beside the file is what the program needs to show it: PATH.py makes Argilla's dataset, PATH.xml is Label
    Studio's labelling interface.

    Args:
      directory: a folder whose refinement is done.
      path: of the review file: JSON lines, or one JSON array if it ends in .json.
      form: argilla or label-studio.

    Raises:
      RunError: the folder has no finished refinement, no rewrite was accepted, or a file exists
        already or would be in the folder.
    """
    _require_refined(directory)
    beside = path.with_name(f"{path.name}.{'py' if form == 'argilla' else 'xml'}")
    if taken := [file for file in (path, beside) if file.exists()]:
        raise RunError(f"{taken[0]} exists, and may have been filled in; name another file, or remove it")
    directory.require_elsewhere(path)
    found = list(review_rows(_outcomes(directory, read_dataset(directory)), form))
    if not found:
        raise RunError(f"{directory.path}: no rewrite was accepted, so there is nothing to review")
    if path.suffix == ".json":
        write_json(path, found)
    else:
        write_jsonl(path, found)
    shown = ARGILLA.replace("{name}", json.dumps(path.name)) if form == "argilla" else LABELLING
    write_text(beside, shown)
    return len(found)


def read_review(directory: RoundDir, paths: Sequence[Path]) -> Counter[str]:
    """Writes verdicts.jsonl from people's verdicts; returns the number of rewrites by verdict.

    A rewrite is rejected if anybody rejects it. Otherwise it has the edited texts, if there are any. One that
    these files do not judge keeps its earlier verdict, and without one stays accepted (`none`).

    Args:
      directory: a folder whose refinement is done.
      paths: files that Argilla or Label Studio exported, or that were filled in by hand.

    Raises:
      RunError: the folder has no finished refinement.
      DataError: a file cannot be read, holds no verdict on these rewrites, or people's edits differ; or an
        edited text has a control token or a character that nobody sees, is held out, or is in the
        dataset already.
    """
    _require_refined(directory)
    for path in paths:
        if path.resolve() == directory.verdicts.resolve():
            raise DataError(f"{path} has the verdicts of earlier calls, and is replaced; leave it out")
    examples = read_dataset(directory)
    accepted = {review_id(o): o for o in _outcomes(directory, examples) if o.example is not None}
    said: dict[str, list[Judgement]] = {}
    for path in paths:
        for where, row in _rows(path):
            for judgement in judgements(row, where):
                said.setdefault(judgement.id, []).append(judgement)
    if not said.keys() & accepted.keys():
        what = "no verdict" if not said else f"no verdict on a rewrite of {directory.path}"
        raise DataError(f"{', '.join(map(str, paths))}: {what}; nothing was changed")
    heldout = {example.prompt for example in heldout_of(directory)}
    earlier = _verdicts(directory)
    rows = [
        earlier[id_] if id_ in earlier and id_ not in said else _row(id_, outcome, said.get(id_, []))
        for id_, outcome in accepted.items()
    ]
    known = {example.id for example in examples}
    known |= {row["id"].rpartition("@")[2] for row in rows if row["verdict"] in ("accept", "none")}
    for row in rows:
        edited = None if row["example"] is None else Example.from_json(row["example"])
        if edited is not None and (edited.id in known or edited.prompt in heldout):
            why = "is held out" if edited.prompt in heldout else "is in the dataset already"
            raise DataError(f"{row['id']}: the edited conversation {why}; reject it, or edit it further")
        known |= set() if edited is None else {edited.id}
    write_jsonl(directory.verdicts, rows)
    return Counter(row["verdict"] for row in rows) + Counter(strangers=len(said.keys() - accepted.keys()))


def _row(id_: str, outcome: Outcome, said: Sequence[Judgement]) -> VerdictRow:
    child = outcome.example
    assert child is not None
    texts = {"prompt": child.question, "answer": child.response}
    comments = [f"{j.comment}" for j in said if j.comment]
    row: VerdictRow = {
        "id": id_,
        "verdict": "none" if not said else "accept",
        "example": None,
        "comment": "; ".join(comments) or None,
        "by": sorted({j.by for j in said if j.by}),
    }
    if any(j.verdict == REJECT for j in said):
        row["verdict"] = "reject"
        return row
    for name, text in texts.items():
        new = {
            plain_lines(value): j.where
            for j in said
            if (value := getattr(j, name)) and not _same(value, text)
        }
        if len(new) > 1:
            raise DataError(f"{id_}: {len(new)} different edits of its {name}; keep one of them")
        for edited, where in new.items():
            _refuse_unseen(edited, outcome.task.given, f"{where}: {id_}: the edited {name}")
            texts[name] = edited
    if texts == {"prompt": child.question, "answer": child.response}:
        return row
    # The measurement is of the text before the edit.
    lineage = dataclasses.replace(
        child.lineage, refiner=f"{child.lineage.refiner or ''}+person", scores_after=None
    )
    edited = child.replace_text(texts["prompt"], texts["answer"], lineage)
    row["verdict"], row["example"] = "edit", edited.to_json()
    return row


def _refuse_unseen(text: str, given: str, what: str) -> None:
    """Raises DataError for a control token, or a character that nobody sees, which the originals lack."""
    found = control_token(text, given)
    if found is not None:
        raise DataError(f"{what} has the control token {found}")
    if (hidden := hidden_character(text, given)) is not None:
        raise DataError(
            f"{what} has the {hidden.kind} {hidden.code}, which nobody sees; remove it, or reject the rewrite"
        )


def _same(one: str, other: str) -> bool:
    return plain_lines(one).strip() == other.strip()


def _require_refined(directory: RoundDir) -> None:
    if not directory.is_done("refine"):
        raise RunError(f"{directory.path}: no finished refinement there; run `middo refine` first")


def _rows(path: Path) -> list[tuple[str, Any]]:
    """The rows of a JSON array or of JSON lines, with their places."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}") from None
    if text.lstrip().startswith("["):
        return [(f"{path} row {n}", row) for n, row in enumerate(_parsed(text, f"{path}"), 1)]
    lines = ((f"{path}:{n}", line) for n, line in enumerate(text.split("\n"), 1))
    return [(where, _parsed(line, where)) for where, line in lines if line.strip()]


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON ({error})") from None


def waits_for_review(directory: RoundDir) -> str | None:
    """The message for a run that waits for a review; None if every accepted rewrite has a verdict."""
    accepted = [o for o in _outcomes(directory, read_dataset(directory)) if o.example is not None]
    judged = {id_ for id_, row in _verdicts(directory).items() if row["verdict"] != "none"}
    n = len({review_id(outcome) for outcome in accepted} - judged)
    if not n:
        return None
    return (
        f"{directory.path}: {n:,} rewrites wait for a review: `middo refine {directory.path} --write-review "
        f"FILE`, then `middo refine {directory.path} --read-review VERDICTS`, then this command again "
        "(refine.wait_for_review=false goes on without it)"
    )
