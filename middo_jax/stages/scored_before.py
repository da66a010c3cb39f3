"""Scores that a folder already has: they are reused if data, models and settings are the same.

Axes: docs/contributing.md#axes.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from typing import Literal

import pyarrow as pa

from middo_jax.config import Config
from middo_jax.data.example import Example, content_id
from middo_jax.rundir import Manifest, RoundDir, RunError, read_jsonl
from middo_jax.rundir.link import Link
from middo_jax.rundir.records import StageRecord
from middo_jax.session import Session
from middo_jax.signals.embeddings import read_embeddings
from middo_jax.signals.table import read_scores, with_columns, write_scores
from middo_jax.stages.score import Scored


def found_scores(
    link: Link, session: Session, examples: Sequence[Example], axes: Collection[str], force: bool
) -> Literal["nothing", "some", "all"]:
    """What a folder has of the scores of these samples, which need not be measured again.

    `some`: those of most of its samples, by the same models and settings.

    Args:
      link: the stage, with the models; nothing of it was written yet.
      session: the settings.
      examples: the samples.
      axes: what is to be measured.
      force: whether any scores may be replaced.

    Raises:
      RunError: the folder has other scores, which would be lost; the message says what differs.
    """
    folder = link.folder
    record = folder.stages().get("score")
    if record is None or force:
        return "nothing"
    if not all((folder.path / name).exists() for name in record["files"]):
        return "nothing"
    why = _difference(session.config, link, axes)
    if why is None:
        rows = json.loads(json.dumps([example.to_json() for example in examples]))
        if folder.dataset.exists() and rows == read_jsonl(folder.dataset) and _is_of(link, session.config):
            return "all"
        why = _other_data(folder, examples)
    if why is None:
        return "some"
    raise RunError(
        f"{folder.path} has other scores ({why}): --force (force=True in Python) replaces them, another "
        "--out keeps them"
    )


def _difference(config: Config, link: Link, axes: Collection[str]) -> str | None:
    """The first difference between the folder's scores and the wanted ones, data aside; None without any."""
    folder, record = link.folder, link.folder.stages()["score"]
    was, now = record.get("axes"), sorted(axes)
    if was != now:
        return f"the axes were {_named(was)}, are {_named(now)}"
    given = {Manifest(folder.path).name(path) for path in link.reads} | link.inputs.keys()
    if gone := sorted((record["reads"].keys() | record["inputs"].keys()) - given):
        return f"they were made with {gone[0]} too"
    stale = link.why_stale(config, [folder.dataset])
    return None if stale is None else stale.text


def _is_of(link: Link, config: Config) -> bool:
    """Whether the scores are of the dataset that is there, which a stopped start may have replaced."""
    return link.why_stale(config) is None


def _other_data(folder: RoundDir, examples: Sequence[Example]) -> str | None:
    """Why the scores of a folder are not reused for these samples; None if they are.

    Samples are the same if their ids are, which are hashes of their content. If most samples of the folder
    are gone, it is another dataset, whose scores would be lost.
    """
    scored = read_scores(folder.scores)["id"].to_pylist()
    ids = {example.id for example in examples}
    n_kept = sum(id_ in ids for id_ in scored)
    if 2 * n_kept <= len(scored) or any(e.id != content_id(e.messages, e.tools) for e in examples):
        return f"the data differs: {n_kept:,} of its {len(scored):,} samples are in it"
    return None


def _named(axes: Collection[str] | None) -> str:
    return "not recorded" if axes is None else ", ".join(axes) or "none"


def kept_scores(session: Session, link: Link, own: pa.Table) -> Scored:
    """The scores of a folder, with these columns of the user's beside them; reports that they are reused.

    If other columns were kept before, the table is written anew; what was measured stays.
    """
    folder, record = link.folder, link.folder.stages()["score"]
    session.progress.say(f"{folder.path}: scored before, nothing is measured (--force measures again)")
    written = read_scores(folder.scores)
    measured = written.drop_columns([name for name in record["columns"] if name in written.column_names])
    table = with_columns(measured, own)
    if not table.equals(written):
        begun, facts = link.begin(), {k: v for k, v in record.items() if k not in StageRecord.__annotations__}
        folder.forget("select")  # it has the hash of the table that is replaced
        write_scores(folder.scores, table)
        begun.finish(session.config, record["seconds"], **facts | {"columns": own.column_names})
    embedding_nd = read_embeddings(folder.embeddings, table["id"].to_pylist())
    return Scored(table, embedding_nd, record | {"n_kept": len(table)})
