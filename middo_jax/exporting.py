"""`middo export-data`: a run's dataset in the user's own shape, with what other trainers need to read it.

OUT/
  train.jsonl          the last dataset (train.parquet with parquet)
  heldout.jsonl        with --with-heldout
  pairs.jsonl          with --with-pairs: preference pairs for DPO and the like
  README.md            dataset card with front matter, so that `datasets.load_dataset(OUT)` reads it
  dataset_info.json    for LLaMA-Factory: dataset_dir: OUT
  axolotl.yaml, trl.py
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypedDict, Unpack

import pyarrow.parquet as pq

from middo_jax.data.example import Example
from middo_jax.data.formats import to_rows
from middo_jax.data.sources import DataError, write
from middo_jax.preferences import preference_pairs
from middo_jax.progress import Progress
from middo_jax.report.card import card
from middo_jax.report.status import load_settings, require_run
from middo_jax.rundir import (
    RoundDir,
    RunDir,
    RunError,
    local,
    read_jsonl,
    write_json,
    write_jsonl,
    write_text,
)

SCORES = ("loss_pre", "loss_post", "knn_mean_sim", "quality")
_PREFIX = "middo_"


class ExportedDataset(NamedTuple):
    """What was written: the folder, rows to train on, held-out rows, pairs, and the format."""

    path: Path
    n: int
    n_heldout: int
    n_pairs: int
    format: str


class Extras(TypedDict, total=False):
    """What is written beside the dataset.

    Attributes:
      heldout: whether the held-out rows are written too.
      scores: whether rows have their last scores, as middo_loss_post etc.
      lineage: whether rows say where they come from, as middo_op etc.
      pairs: whether preference pairs are written too.
    """

    heldout: bool
    scores: bool
    lineage: bool
    pairs: bool


def export_data(
    run: RunDir,
    out: Path,
    form: str | None = None,
    license: str | None = None,
    **extras: Unpack[Extras],
) -> ExportedDataset:
    """Writes the last dataset of a run.

    Args:
      run: its folder.
      out: a folder that does not exist or is empty.
      form: alpaca, sharegpt, messages, prompt_completion or parquet; None: the format that came in.
      license: of the dataset, for its card, by its name at the hub: apache-2.0, cc-by-4.0, other, ...
      **extras: what is written beside the dataset.

    Raises:
      RunError: the run has no dataset yet, or `out` is not empty.
      DataError: the format has no place for a row.
    """
    scores, lineage = extras.get("scores", False), extras.get("lineage", False)
    require_run(run)
    folder = last_dataset(run)
    place = local(out)
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise RunError(f"{out} exists and is not an empty folder; name another, or remove it first")
    settings = load_settings(run)
    form = form or _format(run)
    examples = [Example.from_json(row) for row in read_jsonl(folder.dataset)]
    kept_out = [Example.from_json(row) for row in read_jsonl(run.heldout)] if extras.get("heldout") else []
    known = _scores(run) if scores else {}
    id_column = _id_column(settings)
    ending = "parquet" if form == "parquet" else "jsonl"
    files = {"train": (examples, f"train.{ending}"), "heldout": (kept_out, f"heldout.{ending}")}
    columns: set[str] = set()
    for rows, name in files.values():
        if not rows:
            continue
        shown = [_with_columns(example, known.get(example.id), scores, lineage) for example in rows]
        write(shown, place / name, form, id_column)
        columns |= _columns(place / name)
    written = {split: name for split, (rows, name) in files.items() if rows}
    name = settings.get("name") or run.path.resolve().name
    _write_readers(place, str(name), "messages" if form == "parquet" else form, written, columns)
    found = preference_pairs(run) if extras.get("pairs") else []
    if found:
        write_jsonl(place / "pairs.jsonl", found)
    write_text(place / "README.md", card(run, written, form, "pairs.jsonl" if found else None, license))
    return ExportedDataset(place, len(examples), len(kept_out), len(found), form)


def write_as_it_came(run: RunDir, examples: Sequence[Example], path: Path, progress: Progress) -> str:
    """Writes a dataset in the format of the user's data; returns the name of the format that was used.

    A conversation of several turns or with tools may have no place in that format. Then all rows are written
    as messages, which is said.
    """
    form, id_column = _format(run), _id_column(load_settings(run))
    try:
        rows = to_rows(examples, form, id_column)
    except DataError as error:
        if form == "messages":
            raise
        progress.say(f"{path}: written as messages ({error})")
        form, rows = "messages", to_rows(examples, "messages", id_column)
    write_jsonl(path, rows)
    return form


def _id_column(settings: Mapping[str, Any]) -> str:
    return settings.get("data", {}).get("id_column") or "id"


def last_dataset(run: RunDir) -> RoundDir:
    """The folder of the newest dataset of a run: `final`, or the last round's.

    Raises:
      RunError: there is none.
    """
    for folder in (run.final, *reversed(run.rounds())):
        if folder.dataset.exists():
            return folder
    raise RunError(f"{run.path}: no round has a dataset yet; `middo run` makes one")


def _format(run: RunDir) -> str:
    """The format of the rows that came in; of a run that did not record it, messages."""
    return row_format(run.round(0).stages().get("prepare", {}).get("format"))


def row_format(of_data: str | None) -> str:
    """The format in which rows of such data are written: its own, or messages where it has none of rows."""
    return of_data if of_data in ("alpaca", "sharegpt", "messages", "prompt_completion") else "messages"


def _scores(run: RunDir) -> dict[str, dict[str, float | None]]:
    """The last scores of each sample that any round scored, by id."""
    found: dict[str, dict[str, float | None]] = {}
    for folder in run.rounds():
        if folder.scores.exists():
            for row in pq.read_table(folder.scores, columns=["id", *SCORES]).to_pylist():
                found[row.pop("id")] = row
    return found


def _with_columns(
    example: Example, scores: Mapping[str, float | None] | None, with_scores: bool, with_lineage: bool
) -> Example:
    """The example with columns about it beside the user's own."""
    added: dict[str, Any] = {}
    lineage = example.lineage
    if with_scores:
        after = {k: v for k, v in (lineage.scores_after or {}).items() if v is not None}
        measured = {**(scores or {}), **after}
        added |= {_PREFIX + name: measured.get(name) for name in SCORES}
    if with_lineage:
        added |= {
            f"{_PREFIX}id": example.id,
            f"{_PREFIX}op": lineage.op,
            f"{_PREFIX}round": lineage.round,
            f"{_PREFIX}axis": lineage.axis,
            f"{_PREFIX}parent_ids": list(lineage.parent_ids),
            f"{_PREFIX}root_id": lineage.root_id,
            f"{_PREFIX}refiner": lineage.refiner,
        }
    if taken := sorted(added.keys() & example.extra.keys()):
        raise DataError(f"sample {example.id} has a column {taken[0]!r} of its own; rename it")
    return dataclasses.replace(example, extra={**example.extra, **added}) if added else example


def _columns(path: Path) -> set[str]:
    if path.suffix == ".parquet":
        return set(pq.read_schema(path).names)
    return {name for row in read_jsonl(path) for name in row}


def _write_readers(
    out: Path, name: str, form: str, files: Mapping[str, str], columns: Collection[str]
) -> None:
    """dataset_info.json for LLaMA-Factory, axolotl.yaml and trl.py."""
    info = {
        name if split == "train" else f"{name}_{split}": {"file_name": file, **_llama_factory(form, columns)}
        for split, file in files.items()
    }
    write_json(out / "dataset_info.json", info)
    kind = "parquet" if files["train"].endswith(".parquet") else "json"
    write_text(out / "axolotl.yaml", _axolotl(form, files["train"], kind))
    test = f', "test": "{files["heldout"]}"' if "heldout" in files else ""
    write_text(
        out / "trl.py",
        '"""For TRL: run in this folder, or give full paths."""\n\n'
        "from datasets import load_dataset\n\n"
        f'data = load_dataset("{kind}", data_files={{"train": "{files["train"]}"{test}}})\n'
        f"{_TRL[form]}"
        '# SFTTrainer(model, train_dataset=data["train"], args=SFTConfig(assistant_only_loss=True))\n',
    )


def _llama_factory(form: str, columns: Collection[str]) -> dict[str, Any]:
    def present(**named: str) -> dict[str, str]:
        return {key: column for key, column in named.items() if column in columns}

    if form == "alpaca":
        named = present(
            prompt="instruction", query="input", response="output", system="system", history="history"
        )
        return {"columns": named}
    if form == "prompt_completion":
        return {"columns": present(prompt="prompt", response="completion")}
    if form == "sharegpt":
        return {"formatting": "sharegpt", "columns": present(messages="conversations", tools="tools")}
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    tags |= {"system_tag": "system", "observation_tag": "tool"}
    return {"formatting": "sharegpt", "columns": present(messages="messages", tools="tools"), "tags": tags}


def _axolotl(form: str, file: str, kind: str) -> str:
    types = {
        "alpaca": "    type: alpaca\n",
        "sharegpt": "    type: chat_template\n    field_messages: conversations\n"
        "    message_property_mappings: {role: from, content: value}\n",
        "messages": "    type: chat_template\n    field_messages: messages\n",
        "prompt_completion": "    type:\n      field_instruction: prompt\n      field_output: completion\n",
    }
    head = "# For axolotl, whose paths are relative to where it is started.\ndatasets:\n"
    return f"{head}  - path: {file}\n    ds_type: {kind}\n{types[form]}"


_TRL = {
    "alpaca": (
        "data = data.map(\n"
        '    lambda row: {"prompt": "\\n".join(filter(None, [row["instruction"], row["input"]])), '
        '"completion": row["output"]}\n'
        ")\n"
    ),
    "sharegpt": (
        'roles = {"human": "user", "gpt": "assistant", "system": "system", "observation": "tool"}\n'
        "data = data.map(\n"
        '    lambda row: {"messages": [{"role": roles[t["from"]], "content": t["value"]} for t in '
        'row["conversations"]]}\n'
        ")  # rows with function_call turns: export as messages\n"
    ),
    "messages": "",
    "prompt_completion": "",
}
