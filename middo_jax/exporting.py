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
import itertools
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypedDict, Unpack

import pyarrow.parquet as pq
import yaml

from middo_jax.data.example import Example
from middo_jax.data.own_shape import OwnShape
from middo_jax.data.sources import DataError, write
from middo_jax.data.stored import Changed, Examples, Stored
from middo_jax.preferences import preference_pairs
from middo_jax.progress import Progress
from middo_jax.report.card import card
from middo_jax.report.status import load_settings, require_run
from middo_jax.rundir import (
    RoundDir,
    RunDir,
    RunError,
    local,
    write_json,
    write_jsonl,
    write_text,
)
from middo_jax.rundir.files import each_jsonl

WRITTEN = ("alpaca", "sharegpt", "messages", "prompt_completion", "parquet")
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
      form: alpaca, sharegpt, messages, prompt_completion or parquet, with the columns' usual names; None: the
        format that came in, with the user's names and order of columns.
      license: of the dataset, for its card, by its name at the hub: apache-2.0, cc-by-4.0, other, ...
      **extras: what is written beside the dataset.

    Raises:
      RunError: the run has no dataset yet, or `out` is not empty.
      DataError: there is no such format, or it has no place for a row.
    """
    scores, lineage = extras.get("scores", False), extras.get("lineage", False)
    require_run(run)
    folder = last_dataset(run)
    place = local(out)
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise RunError(f"{out} exists and is not an empty folder; name another, or remove it first")
    settings, own = load_settings(run), _shape(run, form)
    examples = Stored(folder.dataset)
    kept_out: Examples = Stored(run.heldout) if extras.get("heldout") else ()
    known = _scores(run) if scores else {}
    ending = "parquet" if form == "parquet" else "jsonl"
    files = {"train": (examples, f"train.{ending}"), "heldout": (kept_out, f"heldout.{ending}")}
    columns: set[str] = set()
    for rows, name in files.values():
        if not rows:
            continue
        shown = Changed(rows, lambda one: _with_columns(one, known.get(one.id), scores, lineage))
        if form is None:
            write_jsonl(place / name, own.rows(shown))
        else:
            write(shown, place / name, form, own.id_column)
        columns |= _columns(place / name)
    written = {split: name for split, (rows, name) in files.items() if rows}
    name = settings.get("name") or run.path.resolve().name
    every = itertools.chain(examples, kept_out)
    is_weighted = not all(message.learnt for example in every for message in example.messages)
    _write_readers(place, str(name), written, _Names(own, columns, is_weighted))
    found = preference_pairs(run) if extras.get("pairs") else []
    if found:
        write_jsonl(place / "pairs.jsonl", found)
    write_text(place / "README.md", card(run, written, own.format, "pairs.jsonl" if found else None, license))
    return ExportedDataset(place, len(examples), len(kept_out), len(found), own.format)


def _shape(run: RunDir, form: str | None) -> OwnShape:
    """The shape of the rows that came in, or a format with its usual names."""
    if form not in (None, *WRITTEN):
        raise DataError(f"a run's dataset cannot be written as {form!r}; there are {', '.join(WRITTEN)}")
    own = own_shape(run)
    return own if form is None else OwnShape(form, id_column=own.id_column)


def write_as_it_came(run: RunDir, examples: Examples, path: Path, progress: Progress) -> str:
    """Writes a dataset in the format of the user's data; returns the name of the format that was used.

    A conversation of several turns or with tools may have no place in that format. Then all rows are written
    as messages, which is said.
    """
    own = own_shape(run)
    try:
        write_jsonl(path, own.rows(examples))
    except DataError as error:
        if own.format == "messages":
            raise
        progress.say(f"{path}: written as messages ({error})")
        own = OwnShape("messages", id_column=own.id_column)
        write_jsonl(path, own.rows(examples))
    return own.format


def last_dataset(run: RunDir) -> RoundDir:
    """The folder of the newest dataset of a run: `final`, or the last round's.

    Raises:
      RunError: there is none.
    """
    for folder in (run.final, *reversed(run.rounds())):
        if folder.dataset.exists():
            return folder
    raise RunError(f"{run.path}: no round has a dataset yet; `middo run` makes one")


def own_shape(run: RunDir) -> OwnShape:
    """The shape of the rows that came in; messages if the run did not record it, or it has no rows."""
    record = run.round(0).stages().get("prepare", {})
    return OwnShape.of(record.get("format"), record.get("columns", ()), load_settings(run).get("data", {}))


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
            f"{_PREFIX}root_id": example.root_id,
            f"{_PREFIX}refiner": lineage.refiner,
        }
    if taken := sorted(added.keys() & example.extra.keys()):
        raise DataError(f"sample {example.id} has a column {taken[0]!r} of its own; rename it")
    return dataclasses.replace(example, extra={**example.extra, **added}) if added else example


def _columns(path: Path) -> set[str]:
    if path.suffix == ".parquet":
        return set(pq.read_schema(path).names)
    return {name for row in each_jsonl(path) for name in row}


def _write_readers(out: Path, name: str, files: Mapping[str, str], names: _Names) -> None:
    """dataset_info.json for LLaMA-Factory, axolotl.yaml and trl.py."""
    form = names.form
    info = {
        name if split == "train" else f"{name}_{split}": {"file_name": file, **_llama_factory(form, names)}
        for split, file in files.items()
    }
    write_json(out / "dataset_info.json", info)
    kind = "parquet" if files["train"].endswith(".parquet") else "json"
    write_text(out / "axolotl.yaml", _axolotl(form, files["train"], kind, names))
    test = f', "test": "{files["heldout"]}"' if "heldout" in files else ""
    write_text(
        out / "trl.py",
        '"""For TRL: run in this folder, or give full paths."""\n\n'
        "from datasets import load_dataset\n\n"
        f'data = load_dataset("{kind}", data_files={{"train": "{files["train"]}"{test}}})\n'
        f"{_trl(form, names)}{_UNREAD_WEIGHTS if names.is_weighted else ''}"
        '# SFTTrainer(model, train_dataset=data["train"], args=SFTConfig(assistant_only_loss=True))\n',
    )


_UNREAD_WEIGHTS = "# TRL does not read `weight: 0`: it would learn these answers too. Leave out such rows.\n"


class _Names:
    """The names of columns that files have, by the names of their format.

    `is_weighted`: whether some answers have the weight 0, which only axolotl reads.
    """

    def __init__(self, shape: OwnShape, columns: Collection[str], is_weighted: bool) -> None:
        self.form = "messages" if shape.format == "parquet" else shape.format
        self._names, self._columns, self.system = shape.names, columns, shape.system_column
        self.is_weighted = is_weighted

    def __getitem__(self, name: str) -> str:
        return self._names.get(name, name)

    def present(self, **named: str) -> dict[str, str]:
        """Those of some columns that the files have: key -> name in the files."""
        found = {key: self.system if key == "system" and self.system else self[n] for key, n in named.items()}
        return {key: name for key, name in found.items() if name in self._columns}


def _llama_factory(form: str, names: _Names) -> dict[str, Any]:
    if form == "alpaca":
        named = names.present(
            prompt="instruction", query="input", response="output", system="system", history="history"
        )
        return {"columns": named}
    if form == "prompt_completion":
        return {"columns": names.present(prompt="prompt", response="completion", system="system")}
    turns = "conversations" if form == "sharegpt" else "messages"
    told = {
        "formatting": "sharegpt",
        "columns": names.present(messages=turns, system="system", tools="tools"),
    }
    if form == "sharegpt":
        return told
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    return told | {"tags": tags | {"system_tag": "system", "observation_tag": "tool"}}


def _axolotl(form: str, file: str, kind: str, names: _Names) -> str:
    said = "# For axolotl, whose paths are relative to where it is started.\n"
    source: dict[str, Any] = {"path": file, "ds_type": kind}
    if form in ("alpaca", "prompt_completion"):
        asked, answered = ("instruction", "output") if form == "alpaca" else ("prompt", "completion")
        fields = names.present(instruction=asked, input="input", output=answered, system="system")
        is_usual = form == "alpaca" and all(field == name for field, name in fields.items())
        source["type"] = "alpaca" if is_usual else {f"field_{key}": name for key, name in fields.items()}
    else:
        turns = names["conversations" if form == "sharegpt" else "messages"]
        source |= {"type": "chat_template", "field_messages": turns}
        if form == "sharegpt":
            source["message_property_mappings"] = {"role": "from", "content": "value"}
        if names.is_weighted:
            source["message_field_training"] = "weight"
        if names.present(system="system").get("system", "system") != "system":
            said += "# It reads system texts from a column `system` only: export with --format messages.\n"
    text = yaml.safe_dump({"datasets": [source]}, sort_keys=False, allow_unicode=True)
    return said + text


def _trl(form: str, names: _Names) -> str:
    """The lines that make the columns of TRL's SFTTrainer."""
    system = names.present(system="system").get("system")
    before = ""
    if system is not None:
        turn = f'{{"role": "system", "content": row[{system!r}]}}'
        before = f"*([{turn}] if row[{system!r}] else []), "
    if form in ("alpaca", "prompt_completion"):
        return _trl_of_pairs(form, names, before)
    turns = names["conversations" if form == "sharegpt" else "messages"]
    if form == "sharegpt":
        return (
            'roles = {"human": "user", "gpt": "assistant", "system": "system", "observation": "tool"}\n'
            'named = lambda turns: [{"role": roles[t["from"]], "content": t["value"]} for t in turns]\n'
            f'data = data.map(lambda row: {{"messages": [{before}*named(row[{turns!r}])]}})\n'
            "# rows with function_call turns: export as messages\n"
        )
    if not before and turns == "messages":
        return ""
    return f'data = data.map(lambda row: {{"messages": [{before}*row[{turns!r}]]}})\n'


def _trl_of_pairs(form: str, names: _Names, before: str) -> str:
    """The lines for alpaca and prompt_completion; `before` are the turns before the first question."""
    asked, answered = ("instruction", "output") if form == "alpaca" else ("prompt", "completion")
    fields = names.present(asked=asked, input="input", answered=answered, history="history")
    prompt, answer = f"row[{fields['asked']!r}]", f"row[{fields['answered']!r}]"
    if "input" in fields:
        prompt = f'"\\n".join(filter(None, [{prompt}, row[{fields["input"]!r}]]))'
    if "history" in fields:
        of_pair = 'for role, text in zip(("user", "assistant"), pair)'
        pairs = f"for pair in row[{fields['history']!r}] or []"
        before += f'*[{{"role": role, "content": text}} {pairs} {of_pair}], '
    if not before:
        is_usual = form == "prompt_completion" and fields["asked"] == "prompt"
        made = f'data = data.map(lambda row: {{"prompt": {prompt}, "completion": {answer}}})\n'
        return "" if is_usual else made
    return (
        "turns = lambda text, role: "
        'text if isinstance(text, list) else [{"role": role, "content": text}]\n'
        "data = data.map(\n"
        f'    lambda row: {{"prompt": [{before}*turns({prompt}, "user")], '
        f'"completion": turns({answer}, "assistant")}}\n'
        ")\n"
    )
