"""Reads a dataset into Examples and writes Examples as a dataset, in any of the supported formats.

Every row becomes an Example or a Rejection, which names the row's place and the reason. No row is dropped
silently.
"""

from __future__ import annotations

import codecs
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

from middo_jax.data import hf_format
from middo_jax.data.example import Example
from middo_jax.data.formats import FORMATS, DataError, RowError, detect, plain, to_example, to_rows
from middo_jax.data.in_memory import IN_MEMORY, arrow_rows, rows_in_memory
from middo_jax.rundir import atomic, write_json, write_jsonl
from middo_jax.rundir.rows import RejectedRow

_log = logging.getLogger(__name__)
# tfds:NAME:SPLIT or hf:NAME:SPLIT; SPLIT is such as train or train[:10%].
_NAMED = re.compile(r"(tfds|hf):(.+):([\w.+-]+(?:\[[^\]]*\])?)")
# The parts of a reason that differ from row to row: quoted words, ids, places, numbers.
_VARYING = re.compile(r"'[^']*'|\b[0-9a-f]{16}\b|\([^()]*:\d+\)|\d+")
_ENDINGS = (".json", ".jsonl", ".parquet")


@dataclasses.dataclass(frozen=True)
class Rejection:
    """A row that was read but cannot be used.

    Attributes:
      where: file:line in a .jsonl file, otherwise `row N`, counted from 1.
      reason: why the row cannot be used.
      row: the row as it was read; the text of a line that is not JSON; None for a row that is nested too
        deeply.
    """

    where: str
    reason: str
    row: Any

    def to_json(self) -> RejectedRow:
        """A row of rejected.jsonl. Lone surrogates, which UTF-8 cannot encode, become `&#55296;` etc."""
        row: RejectedRow = {"where": self.where, "reason": self.reason, "row": self.row}
        text = json.dumps(row, ensure_ascii=False)
        return json.loads(text.encode("utf-8", "xmlcharrefreplace"))


class UserRows(NamedTuple):
    """A dataset as it was read. Every row is in `examples` or in `rejections`, in the order of the dataset.

    Attributes:
      examples: the usable rows, as conversations.
      rows: for each example, its row as it was read.
      places: for each example, the place of its row, see `Rejection.where`.
      rejections: all other rows.
    """

    examples: list[Example]
    rows: list[Any]
    places: list[str]
    rejections: list[Rejection]


def read(path: str, format: str = "auto", limit: int | None = None) -> tuple[list[Example], list[Rejection]]:
    """(examples, rejections) of a dataset, see `read_rows`."""
    data = read_rows(path, format, limit)
    return data.examples, data.rejections


def read_rows(source: Any, format: str = "auto", limit: int | None = None) -> UserRows:
    """Reads a dataset. If several rows have the same id, the first one is used and the others are rejected.

    Args:
      source: a .json, .jsonl or .parquet file; tfds:NAME:SPLIT, hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT, where
        NAME may be a directory; a directory that TFDS or `datasets` wrote, whose `train` split is read; or
        any table that `rows_in_memory` accepts.
      format: auto, alpaca, sharegpt, messages or prompt_completion.
      limit: read only this many rows, usable or not.

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
        numbered = _rows(path) if is_path else _numbered(rows_in_memory(source))
        found = list(itertools.islice(numbered, limit))
    except OSError as e:
        raise DataError(f"cannot read {path}: {e.strerror or e}") from e
    if not found:
        raise DataError(f"{path} has no rows; give a file with at least one example")
    values = [item[1] for item in found if not isinstance(item, Rejection)]
    if format == "auto" and values:
        try:
            format = detect(values)
        except DataError as e:
            raise DataError(f"{path}: {e}") from e
    data, unkept = _converted(found, format)
    if not data.examples:
        reasons = "".join(f"\n{line}" for line in commonest_reasons(data.rejections))
        raise DataError(f"{path}: none of its {len(found)} rows can be used. The commonest reasons:{reasons}")
    if unkept:
        _log.warning("%s: not trained on, though some rows have it: %s", path, ", ".join(sorted(unkept)))
    return data


def _converted(found: Sequence[tuple[str, Any] | Rejection], format: str) -> tuple[UserRows, set[str]]:
    """The rows as examples and rejections, and what `to_example` did not keep of any of them."""
    data, unkept = UserRows([], [], [], []), set[str]()
    first: dict[str, int] = {}  # id -> number of the example that has it
    for item in found:
        if isinstance(item, Rejection):
            data.rejections.append(item)
            continue
        where, given = item
        row = given
        try:
            row = plain(given)
            example, fields = to_example(row, format)
        except RowError as e:
            data.rejections.append(Rejection(where, str(e), row))
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
        unkept |= fields
    return data, unkept


class Reason(NamedTuple):
    """Why some rows were rejected: how many, the reason of the first one, and its place."""

    n: int
    reason: str
    where: str


def count_reasons(rejections: Sequence[Rejection]) -> list[Reason]:
    """The reasons of rejections, largest count first.

    Reasons that differ only in numbers, ids, places or quoted words count as one; the first one is shown.
    """
    groups: dict[str, list[Rejection]] = {}
    for rejection in rejections:
        groups.setdefault(_VARYING.sub("*", rejection.reason), []).append(rejection)
    largest = sorted(groups.values(), key=len, reverse=True)
    return [Reason(len(group), group[0].reason, group[0].where) for group in largest]


def reason_lines(reasons: Sequence[Reason], limit: int = 3) -> list[str]:
    """Lines for a terminal: count, reason and first place; reasons beyond `limit` share one line."""
    total = sum(reason.n for reason in reasons)
    lines = [f"  {n} of {total}: {reason} ({where})" for n, reason, where in reasons[:limit]]
    if rest := sum(reason.n for reason in reasons[limit:]):
        lines.append(f"  {rest} of {total}: other reasons")
    return lines


def commonest_reasons(rejections: Sequence[Rejection], limit: int = 3) -> list[str]:
    """Lines that say why rows were rejected, see `count_reasons` and `reason_lines`."""
    return reason_lines(count_reasons(rejections), limit)


def write(examples: Sequence[Example], path: str | Path, format: str) -> None:
    """Writes a dataset; `read` returns the same conversations, ids and extra columns from it.

    Args:
      examples: at least one.
      path: for the row formats a .json, .jsonl or .parquet file, which is replaced; for tfds a directory that
        does not exist or is empty.
      format: alpaca, sharegpt, messages, prompt_completion; parquet (messages in a .parquet file); tfds.

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
        rows = to_rows(examples, "messages" if format == "parquet" else format)
        write_rows = {".json": write_json, ".jsonl": write_jsonl, ".parquet": _write_parquet}
        write_rows[path.suffix.lower()](path, rows)
    except OSError as e:
        raise DataError(f"cannot write {path}: {e.strerror or e}") from e


def _rows(path: str) -> Iterator[tuple[str, Any] | Rejection]:
    """All rows with their places, as they are read. A line that is not JSON becomes a Rejection."""
    if named := _NAMED.fullmatch(path):
        kind, name, split = named.groups()
        yield from _numbered(_tfds_rows(name, split) if kind == "tfds" else hf_format.rows(name, split))
        return
    if path.startswith(("tfds:", "hf:")):
        kind = path.partition(":")[0]
        form = "tfds:NAME:SPLIT" if kind == "tfds" else "hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT"
        raise DataError(f"{path} names no split; write {form}, as in {path}:train")
    file = Path(path)
    ending = file.suffix.lower()
    if file.is_dir():
        is_tfds = (file / "features.json").is_file()
        yield from _numbered(_tfds_rows(path, "train") if is_tfds else hf_format.rows(path, "train"))
    elif not file.exists():
        raise DataError(
            f"there is no file {path}; give a {', '.join(_ENDINGS)}, tfds:NAME:SPLIT or hf:NAME:SPLIT"
        )
    elif ending == ".jsonl":
        yield from _jsonl_rows(file)
    elif ending == ".json":
        yield from _numbered(iter(_json_rows(file)))
    elif ending == ".parquet":
        yield from _numbered(_parquet_rows(file))
    else:
        raise DataError(f"{path}: a dataset file must end in {', '.join(_ENDINGS)}")


def _numbered(rows: Iterator[Any]) -> Iterator[tuple[str, Any]]:
    return ((f"row {n}", row) for n, row in enumerate(rows, 1))


def _jsonl_rows(file: Path) -> Iterator[tuple[str, Any] | Rejection]:
    with file.open("rb") as stream:  # as bytes: only \n ends a line, and one bad byte spoils one line
        for n, line in enumerate(stream, 1):
            line = line.removeprefix(codecs.BOM_UTF8) if n == 1 else line
            if not line.strip():
                continue
            where = f"{file}:{n}"
            try:
                yield where, json.loads(line.decode("utf-8"))
            except UnicodeDecodeError as e:
                reason = f"not UTF-8: byte 0x{line[e.start]:02x} at column {e.start + 1}"
            except json.JSONDecodeError as e:
                reason = f"broken JSON: {e.msg} (column {e.colno})"
            except (ValueError, RecursionError) as e:  # digits or depth beyond the parser's limits
                reason = f"JSON beyond the limits of the parser: {e}"
            else:
                continue
            yield Rejection(where, reason, line.decode("utf-8", "backslashreplace").rstrip("\r\n"))


def _json_rows(file: Path) -> list[Any]:
    content = file.read_bytes()
    if not content.removeprefix(codecs.BOM_UTF8).strip():
        return []
    try:
        value = json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as e:
        line = content.count(b"\n", 0, e.start) + 1
        raise DataError(
            f"{file}:{line}: not UTF-8 (byte 0x{content[e.start]:02x}); convert the file to UTF-8"
        ) from e
    except json.JSONDecodeError as e:
        is_jsonl = e.msg == "Extra data"
        hint = (
            "a file with one JSON value per line must be a .jsonl file"
            if is_jsonl
            else "correct the file there"
        )
        raise DataError(f"{file}: broken JSON at line {e.lineno}, column {e.colno}: {e.msg}; {hint}") from e
    except (ValueError, RecursionError) as e:
        raise DataError(f"{file}: JSON beyond the limits of the parser: {e}") from e
    if isinstance(value, dict):
        lists = [value[key] for key in ("data", "rows") if isinstance(value.get(key), list)]
        value = lists[0] if len(lists) == 1 else value
    if not isinstance(value, list):
        raise DataError(
            f"{file}: must contain a list of rows, or an object with one such list as `data` or `rows`"
        )
    return value


def _parquet_rows(file: Path) -> Iterator[dict[str, Any]]:
    try:
        with pq.ParquetFile(file) as stream:
            yield from arrow_rows(stream.iter_batches(batch_size=4096), stream.schema_arrow)
    except pa.ArrowException as e:
        raise DataError(f"{file}: not a readable Parquet file: {e}") from e


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
