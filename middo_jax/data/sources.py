"""Reads a dataset into Examples and writes Examples as a dataset, in any of the supported formats.

Every row becomes an Example or a Rejection, which names the row's place and the reason. No row is dropped
silently.
"""

from __future__ import annotations

import difflib
import itertools
import logging
import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from middo_jax.buckets import here
from middo_jax.data import hf_format
from middo_jax.data.example import Example
from middo_jax.data.files import (
    Rejection,
    files_at,
    is_readable_folder,
    numbered,
    rows_of_files,
)
from middo_jax.data.formats import (
    FORMATS,
    DataError,
    detect,
)
from middo_jax.data.id_columns import distinct_columns
from middo_jax.data.in_memory import IN_MEMORY, rows_in_memory
from middo_jax.data.layout import Layout
from middo_jax.data.parquet import write_parquet
from middo_jax.data.reading import AS_IT_IS, Reading
from middo_jax.data.stored import Examples
from middo_jax.data.tools import TOOL_COLUMN
from middo_jax.data.user_rows import Converter, Repair, UserRows, give_user_ids
from middo_jax.rundir import write_json, write_jsonl

_log = logging.getLogger(__name__)
# tfds:NAME:SPLIT or hf:NAME:SPLIT; SPLIT is such as train or train[:10%].
_NAMED = re.compile(r"(tfds|hf):(.+):([\w.+-]+(?:\[[^\]]*\])?)")
# The parts of a reason that differ from row to row: quoted words, ids, places, numbers.
_VARYING = re.compile(r"'[^']*'|\b[0-9a-f]{16}\b|\([^()]*:\d+\)|\d+")
_ENDINGS = (".json", ".jsonl", ".parquet")  # of files that are written
_MISSPELT = 0.8  # likeness from which a name in `data.columns` is taken for a misspelt one
_DETECTED_BY = 100  # rows whose columns tell the format


def read(path: str, format: str = "auto", limit: int | None = None) -> tuple[list[Example], list[Rejection]]:
    """(examples, rejections) of a dataset, see `read_rows`."""
    data = read_rows(path, format, limit)
    return data.examples, data.rejections


def read_rows(
    source: Any,
    format: str = "auto",
    limit: int | None = None,
    reading: Reading = AS_IT_IS,
    keep_rows: bool = False,
) -> UserRows:
    """Reads a dataset. If several rows have the same id, the first one is used and the others are rejected.

    Rows become examples as they are read, so a dataset needs the memory of its examples only.

    Args:
      source: a file, a pattern such as data/*.jsonl or a folder, see `data.files`; tfds:NAME:SPLIT,
        hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT, where NAME may be a directory; a directory that TFDS or
        `datasets` wrote, whose `train` split is read; or any table that `rows_in_memory` accepts.
      format: auto, alpaca, sharegpt, messages or prompt_completion.
      limit: read only this many rows, usable or not.
      reading: the user's names, and whether faults are repaired.
      keep_rows: whether the rows are returned too, as they were read.

    Raises:
      DataError: the dataset has no usable row, or its columns fit no format or several.
    """
    path = str(source) if isinstance(source, str | Path) else IN_MEMORY
    if format not in ("auto", *FORMATS):
        raise DataError(f"unknown format {format!r}; there are: auto, {', '.join(FORMATS)}")
    if limit is not None and limit < 1:
        raise DataError(f"the limit must be at least 1 row, not {limit}")
    every = itertools.islice(_every(source, path), limit)
    head = list[tuple[str, Any] | Rejection]()
    if format == "auto":
        head, format = _detected(every, reading, path)
    converter = Converter(format, reading, keep_rows)
    for item in itertools.chain(head, every):
        converter.add(item)
    if not converter.n:
        raise DataError(f"{path} has no rows; give a file with at least one example")
    if converter.n_values:
        _require_columns(reading, converter.names, path)
    data = converter.data()
    data = data._replace(distinct=distinct_columns([example.extra for example in data.examples]))
    give_user_ids(data.examples, data.places, converter.of_ours, reading.id_column, path)
    if not data.examples:
        reasons = "".join(f"\n{line}" for line in commonest_reasons(data.rejections))
        raise DataError(
            f"{path}: none of its {converter.n} rows can be used. The commonest reasons:{reasons}"
        )
    if unkept := converter.unkept:
        _log.warning("%s: not trained on, though some rows have it: %s", path, ", ".join(sorted(unkept)))
    return data


def _every(source: Any, path: str) -> Iterator[tuple[str, Any] | Rejection]:
    """All rows of a source with their places."""
    try:
        yield from rows_at(path) if isinstance(source, str | Path) else numbered(rows_in_memory(source))
    except OSError as e:
        raise DataError(f"cannot read {path}: {e.strerror or e}") from e


def _detected(
    every: Iterator[tuple[str, Any] | Rejection], reading: Reading, path: str
) -> tuple[list[tuple[str, Any] | Rejection], str]:
    """(the first rows, taken from `every`; the format by their columns, or auto if none could be read)."""
    head, values = list[tuple[str, Any] | Rejection](), list[Any]()
    for item in every:
        head.append(item)
        if not isinstance(item, Rejection):
            values.append(item[1])
            if len(values) == _DETECTED_BY:
                break
    try:
        return head, detect([reading.apply(row) for row in values]) if values else "auto"
    except DataError as e:
        # If a column of `data.columns` does not exist, that is the cause.
        rest = (item[1] for item in every if not isinstance(item, Rejection))
        rows = (row for row in itertools.chain(values, rest) if isinstance(row, dict))
        _require_columns(reading, {name for row in rows for name in row}, path)
        raise DataError(f"{path}: {e}") from e


def _require_columns(reading: Reading, names: Collection[str], path: str) -> None:
    """Raises DataError if `data.columns` names a column that no row has, or misspells one of the formats."""
    known = {TOOL_COLUMN}.union(*(form.columns for form in FORMATS.values()))
    for name in reading.columns.keys() - known:
        if near := difflib.get_close_matches(name, known, n=1, cutoff=_MISSPELT):
            raise DataError(
                f"{path}: data.columns has {name!r}, which no format has; did you mean {near[0]!r}?"
            )
    if missing := reading.missing_columns(names):
        raise DataError(
            f"{path}: data.columns names {missing[0]!r}, and no row has such a column (of several "
            "data.sources, each may have its own `columns`)"
        )


class ReasonCount(NamedTuple):
    """Why some rows were rejected: how many, the reason of the first one, and its place."""

    n: int
    reason: str
    where: str


def count_reasons(rejections: Sequence[Rejection | Repair]) -> list[ReasonCount]:
    """The reasons of rejections or repairs, largest count first.

    Reasons that differ only in numbers, ids, places or quoted words count as one; the first one is shown.
    """
    groups: dict[str, list[Rejection | Repair]] = {}
    for rejection in rejections:
        groups.setdefault(_VARYING.sub("*", rejection.reason), []).append(rejection)
    largest = sorted(groups.values(), key=len, reverse=True)
    return [ReasonCount(len(group), group[0].reason, group[0].where) for group in largest]


def reason_lines(reasons: Sequence[ReasonCount], limit: int = 3) -> list[str]:
    """Lines for a terminal: count, reason and first place; reasons beyond `limit` share one line."""
    limit += len(reasons) == limit + 1  # a line for one other reason can name it
    total = sum(reason.n for reason in reasons)
    lines = [f"  {n} of {total}: {reason} ({where})" for n, reason, where in reasons[:limit]]
    if rest := sum(reason.n for reason in reasons[limit:]):
        lines.append(f"  {rest} of {total}: other reasons")
    return lines


def commonest_reasons(rejections: Sequence[Rejection | Repair], limit: int = 3) -> list[str]:
    """Lines that say why rows were rejected or repaired, see `count_reasons` and `reason_lines`."""
    return reason_lines(count_reasons(rejections), limit)


def write(
    examples: Examples,
    path: str | Path,
    format: str,
    id_column: str = "id",
    among: Examples | None = None,
) -> None:
    """Writes a dataset; `read` returns the same conversations, ids and extra columns from it.

    Args:
      examples: at least one.
      path: for the row formats a .json, .jsonl or .parquet file, which is replaced; for tfds a directory that
        does not exist or is empty.
      format: alpaca, sharegpt, messages, prompt_completion; parquet (messages in a .parquet file); tfds.
      id_column: gets the user's own ids.
      among: the rows of all files that are to have the same columns; None: the examples alone.

    Raises:
      DataError: there are no examples, the path's ending does not fit the format, or the path is not
        writable.
    """
    path = Path(path)
    if format not in (*FORMATS, "parquet", "tfds"):
        raise DataError(f"unknown format {format!r}; there are: {', '.join(FORMATS)}, parquet, tfds")
    if not examples:
        raise DataError(f"there are no examples to write to {path}")
    endings = {"tfds": (), "parquet": (".parquet",)}.get(format, _ENDINGS)
    if endings and path.suffix.lower() not in endings:
        raise DataError(f"{path}: a file of format {format} must end in {' or '.join(endings)}")
    try:
        if format == "tfds":
            if path.exists() and (not path.is_dir() or any(path.iterdir())):
                raise DataError(
                    f"{path} exists and is not an empty directory; name another, or remove it first"
                )
            from middo_jax.data import tfds_format  # not at the top, see there

            tfds_format.write(list(examples), path)
            return
        form = "messages" if format == "parquet" else format
        layout = Layout.of(examples if among is None else among, form, id_column)
        ending = path.suffix.lower()
        if ending == ".parquet":
            write_parquet(path, lambda: map(layout.row, examples))
        elif ending == ".jsonl":
            write_jsonl(path, map(layout.row, examples))
        else:
            write_json(path, list(map(layout.row, examples)))
    except OSError as e:
        raise DataError(f"cannot write {path}: {e.strerror or e}") from e


def rows_at(path: str) -> Iterator[tuple[str, Any] | Rejection]:
    """All rows with their places, as they are read. A line that is not JSON becomes a Rejection.

    Raises:
      DataError: there is no such dataset, or it cannot be read.
    """
    if named := _NAMED.fullmatch(path):
        kind, name, split = named.groups()
        yield from numbered(_tfds_rows(name, split) if kind == "tfds" else hf_format.rows(name, split))
        return
    if path.startswith(("tfds:", "hf:")):
        kind = path.partition(":")[0]
        form = "tfds:NAME:SPLIT" if kind == "tfds" else "hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT"
        raise DataError(f"{path} names no split; write {form}, as in {path}:train")
    local = here(path)
    folder = Path(local).expanduser()
    if folder.is_dir() and (folder / "features.json").is_file():
        yield from numbered(_tfds_rows(local, "train"))
    elif folder.is_dir() and not is_readable_folder(folder):
        yield from numbered(hf_format.rows(local, "train"))
    else:
        yield from rows_of_files(files_at(local))


def _tfds_rows(name: str, split: str) -> Iterator[dict[str, Any]]:
    try:
        from middo_jax.data import tfds_format  # not at the top, see there
    except ImportError as e:
        raise DataError(
            f"tfds: cannot be read without tensorflow-datasets ({e}); pip install middo-jax"
        ) from e
    return tfds_format.rows(name, split)
