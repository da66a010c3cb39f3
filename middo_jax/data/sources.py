"""Reads a dataset into Examples and writes Examples as a dataset, in any of the supported formats.

Every row becomes an Example or a Rejection, which names the row's place and the reason. No row is dropped
silently.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from middo_jax.buckets import here
from middo_jax.data import hf_format
from middo_jax.data.example import Example
from middo_jax.data.files import (
    Rejection,
    files_at,
    is_readable_folder,
    numbered,
    rows_of_files,
    with_id,
)
from middo_jax.data.formats import (
    FORMATS,
    DataError,
    RowError,
    detect,
    is_ours,
    plain,
    to_example,
    to_rows,
)
from middo_jax.data.in_memory import IN_MEMORY, rows_in_memory
from middo_jax.data.reading import AS_IT_IS, Reading
from middo_jax.data.shapes import uniform
from middo_jax.rundir import atomic, write_json, write_jsonl

_log = logging.getLogger(__name__)
# tfds:NAME:SPLIT or hf:NAME:SPLIT; SPLIT is such as train or train[:10%].
_NAMED = re.compile(r"(tfds|hf):(.+):([\w.+-]+(?:\[[^\]]*\])?)")
# The parts of a reason that differ from row to row: quoted words, ids, places, numbers.
_VARYING = re.compile(r"'[^']*'|\b[0-9a-f]{16}\b|\([^()]*:\d+\)|\d+")
_ENDINGS = (".json", ".jsonl", ".parquet")  # of files that are written


class Repair(NamedTuple):
    """A row that was repaired: its place, see `Rejection.where`, and what was repaired."""

    where: str
    reason: str


class UserRows(NamedTuple):
    """A dataset as it was read. Every row is in `examples` or in `rejections`, in the order of the dataset.

    Attributes:
      examples: the usable rows, as conversations.
      rows: for each example, its row as it was read.
      places: for each example, the place of its row, see `Rejection.where`.
      rejections: all other rows.
      repairs: what was repaired, one per row and kind of repair.
      format: of the rows; messages for several sources of different formats.
      said: what was taken of each of several sources, one line each.
    """

    examples: list[Example]
    rows: list[Any]
    places: list[str]
    rejections: list[Rejection]
    repairs: Sequence[Repair] = ()
    format: str = ""
    said: Sequence[str] = ()


def read(path: str, format: str = "auto", limit: int | None = None) -> tuple[list[Example], list[Rejection]]:
    """(examples, rejections) of a dataset, see `read_rows`."""
    data = read_rows(path, format, limit)
    return data.examples, data.rejections


def read_rows(
    source: Any, format: str = "auto", limit: int | None = None, reading: Reading = AS_IT_IS
) -> UserRows:
    """Reads a dataset. If several rows have the same id, the first one is used and the others are rejected.

    Args:
      source: a file, a pattern such as data/*.jsonl or a folder, see `data.files`; tfds:NAME:SPLIT,
        hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT, where NAME may be a directory; a directory that TFDS or
        `datasets` wrote, whose `train` split is read; or any table that `rows_in_memory` accepts.
      format: auto, alpaca, sharegpt, messages or prompt_completion.
      limit: read only this many rows, usable or not.
      reading: the user's names, and whether faults are repaired.

    Raises:
      DataError: the dataset has no usable row, or its columns fit no format or several.
    """
    is_path = isinstance(source, str | Path)
    path = str(source) if is_path else IN_MEMORY
    if format not in ("auto", *FORMATS):
        raise DataError(f"unknown format {format!r}; there are: auto, {', '.join(FORMATS)}")
    if limit is not None and limit < 1:
        raise DataError(f"the limit must be at least 1 row, not {limit}")
    try:
        every = _rows(path) if is_path else numbered(rows_in_memory(source))
        found = list(itertools.islice(every, limit))
    except OSError as e:
        raise DataError(f"cannot read {path}: {e.strerror or e}") from e
    if not found:
        raise DataError(f"{path} has no rows; give a file with at least one example")
    values = [item[1] for item in found if not isinstance(item, Rejection)]
    if values and (missing := reading.missing_columns(values)):
        raise DataError(
            f"{path}: data.columns names {missing[0]!r}, and no row has such a column (of several "
            "data.sources, each may have its own `columns`)"
        )
    if format == "auto" and values:
        try:
            format = detect([reading.apply(row) for row in itertools.islice(values, 100)])
        except DataError as e:
            raise DataError(f"{path}: {e}") from e
    data, unkept = _converted(found, format, reading)
    data = data._replace(examples=_with_user_ids(data, reading.id_column, path), format=format)
    if not data.examples:
        reasons = "".join(f"\n{line}" for line in commonest_reasons(data.rejections))
        raise DataError(f"{path}: none of its {len(found)} rows can be used. The commonest reasons:{reasons}")
    if unkept:
        _log.warning("%s: not trained on, though some rows have it: %s", path, ", ".join(sorted(unkept)))
    return data


def _with_user_ids(data: UserRows, column: str | None, path: str) -> list[Example]:
    """The examples, with the ids that their rows have in `column`, or in `id` if these are unique.

    Raises:
      DataError: `column` was named, and its values are not unique texts or whole numbers.
    """
    name = column or "id"
    first: dict[str, str] = {}
    for example, where in zip(data.examples, data.places, strict=True):
        value = example.user_id if example.user_id is not None else example.extra.get(name)
        if value is None:
            continue
        fault = None
        if isinstance(value, bool) or not isinstance(value, str | int):
            fault = "is neither text nor a whole number"
        elif str(value) in first:
            fault = f"is also that of {first[str(value)]}"
        if fault is None:
            first[str(value)] = where
        elif column is None:
            return data.examples
        else:
            raise DataError(f"{path}: data.id_column={column}: the id {value!r} of {where} {fault}")
    if column is not None and not first and data.examples:
        raise DataError(f"{path}: data.id_column={column}: no row has such a column")
    if not first:
        return data.examples
    # A row of dataset.jsonl says itself whether it has an id of the user's.
    return [
        example if isinstance(row, dict) and is_ours(row) else _with_user_id(example, name)
        for example, row in zip(data.examples, data.rows, strict=True)
    ]


def _with_user_id(example: Example, column: str) -> Example:
    if column not in example.extra:
        return example
    extra = {name: value for name, value in example.extra.items() if name != column}
    return dataclasses.replace(example, extra=extra, user_id=example.extra[column])


def _converted(
    found: Sequence[tuple[str, Any] | Rejection], format: str, reading: Reading
) -> tuple[UserRows, set[str]]:
    """The rows as examples and rejections, and what `to_example` did not keep of any of them."""
    repairs: list[Repair] = []
    data, unkept = UserRows([], [], [], [], repairs), set[str]()
    first: dict[str, int] = {}  # id -> number of the example that has it
    for item in found:
        if isinstance(item, Rejection):
            data.rejections.append(item)
            continue
        where, given = item
        row = given
        try:
            row = plain(given)
            example, fields, repaired = to_example(row, format, reading)
        except RowError as e:
            own = row.get(reading.id_column or "id") if isinstance(row, dict) else None
            data.rejections.append(Rejection(with_id(where, own), str(e), row))
            continue
        except RecursionError:
            data.rejections.append(Rejection(where, "nested too deeply", None))
            continue
        if (number := first.get(example.id)) is not None:
            same, place = example.messages == data.examples[number].messages, data.places[number]
            reason = f"duplicate of {example.id} ({place})" if same else f"id {example.id} is taken ({place})"
            data.rejections.append(Rejection(where, reason, row))
            continue
        first[example.id] = len(data.examples)
        data.examples.append(example)
        data.rows.append(given)
        data.places.append(where)
        repairs += (Repair(where, what) for what in repaired)
        unkept |= fields
    return data, unkept


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


def write(examples: Sequence[Example], path: str | Path, format: str, id_column: str = "id") -> None:
    """Writes a dataset; `read` returns the same conversations, ids and extra columns from it.

    Args:
      examples: at least one.
      path: for the row formats a .json, .jsonl or .parquet file, which is replaced; for tfds a directory that
        does not exist or is empty.
      format: alpaca, sharegpt, messages, prompt_completion; parquet (messages in a .parquet file); tfds.
      id_column: gets the user's own ids.

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

            tfds_format.write(examples, path)
            return
        rows = to_rows(examples, "messages" if format == "parquet" else format, id_column)
        if path.suffix.lower() == ".parquet":
            rows = uniform(rows)
        write_rows = {".json": write_json, ".jsonl": write_jsonl, ".parquet": _write_parquet}
        write_rows[path.suffix.lower()](path, rows)
    except OSError as e:
        raise DataError(f"cannot write {path}: {e.strerror or e}") from e


def _rows(path: str) -> Iterator[tuple[str, Any] | Rejection]:
    """All rows with their places, as they are read. A line that is not JSON becomes a Rejection."""
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


def _write_parquet(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    def array(values: list[Any], type: Any) -> Any:
        # In chunks: one Arrow text array is limited to 2 GiB.
        return pa.chunked_array(
            [pa.array(values[i : i + 4096], type) for i in range(0, len(values), 4096)], type
        )

    fields, arrays = [], []
    for name in dict.fromkeys(name for row in rows for name in row):
        values = [row.get(name) for row in rows]
        column: Any = None
        metadata = None
        try:
            column = array(values, pa.infer_type(values))
            has_empty_struct = "struct<>" in str(column.type)  # Parquet has no such type
            is_exact = column.to_pylist() == values and not has_empty_struct
        except (pa.ArrowException, ValueError, TypeError, OverflowError):
            is_exact = False
        if not is_exact:  # values of several types become JSON text; `arrow_rows` finds it by the metadata
            texts = [None if value is None else json.dumps(value, allow_nan=False) for value in values]
            column, metadata = array(texts, pa.string()), {"middo": "json"}
        fields.append(pa.field(name, column.type, metadata=metadata))
        arrays.append(column)
    with atomic(path, "wb") as file:
        pq.write_table(pa.table(arrays, schema=pa.schema(fields)), file)


def _tfds_rows(name: str, split: str) -> Iterator[dict[str, Any]]:
    try:
        from middo_jax.data import tfds_format  # not at the top, see there
    except ImportError as e:
        raise DataError(
            f"tfds: cannot be read without tensorflow-datasets ({e}); pip install middo-jax"
        ) from e
    return tfds_format.rows(name, split)
