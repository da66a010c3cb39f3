"""Reading a dataset from anywhere into Examples, writing Examples anywhere, splitting off the held-out part.

Every row that is read becomes an Example or a Rejection with its place and reason: none vanishes.
"""

from __future__ import annotations

import codecs
import dataclasses
import itertools
import json
import logging
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from middo_jax.data import hf_format
from middo_jax.data.example import Example
from middo_jax.data.formats import FORMATS, DataError, RowError, detect, plain, to_example, to_rows
from middo_jax.data.in_memory import IN_MEMORY, arrow_rows, rows_in_memory
from middo_jax.rundir import atomic, write_json, write_jsonl
from middo_jax.rundir.rows import RejectedRow

_log = logging.getLogger(__name__)
_NAMED = re.compile(
    r"(tfds|hf):(.+):([\w.+-]+(?:\[[^\]]*\])?)"
)  # tfds:NAME:SPLIT, SPLIT as train or train[:10%]
_VARYING = re.compile(r"'[^']*'|\b[0-9a-f]{16}\b|\([^()]*:\d+\)|\d+")  # parts of a reason
_ENDINGS = (".json", ".jsonl", ".parquet")


@dataclasses.dataclass(frozen=True)
class Rejection:
    """A row that was read but cannot be used.

    `where` is file:line of a .jsonl file, else `row N`, counted from 1; `row` is the row as read, or the text
    of a line that is no JSON, or null where it is nested too deeply to be held.
    """

    where: str
    reason: str
    row: Any

    def to_json(self) -> RejectedRow:
        """A row of rejected.jsonl; lone surrogates, which no file can hold, become `&#55296;` etc."""
        row: RejectedRow = {"where": self.where, "reason": self.reason, "row": self.row}
        text = json.dumps(row, ensure_ascii=False)
        return json.loads(text.encode("utf-8", "xmlcharrefreplace"))


class UserRows(NamedTuple):
    """A dataset as it was read. Examples and rejections together are all of its rows, each in their order.

    Attributes:
      examples: the usable rows, as conversations.
      rows: of each example the row as its source gave it.
      rejections: all other rows.
    """

    examples: list[Example]
    rows: list[Any]
    rejections: list[Rejection]


def read(path: str, format: str = "auto", limit: int | None = None) -> tuple[list[Example], list[Rejection]]:
    """(examples, rejections) of a dataset, see `read_rows`."""
    examples, _, rejections = read_rows(path, format, limit)
    return examples, rejections


def read_rows(source: Any, format: str = "auto", limit: int | None = None) -> UserRows:
    """Reads a dataset; if several rows have the same id, the first one counts.

    Args:
      source: a .json, .jsonl or .parquet file; tfds:NAME:SPLIT, hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT, where
        NAME may be a directory; a directory that TFDS or `datasets` wrote, whose `train` split is read; or
        what `rows_in_memory` takes.
      format: auto, alpaca, sharegpt, messages or prompt_completion.
      limit: take only the first rows, usable or not.

    Raises:
      DataError: nothing usable is there, or the format cannot be told.
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
        raise DataError(f"{path} holds no rows; give a file with at least one example")
    values = [item[1] for item in found if not isinstance(item, Rejection)]
    if format == "auto" and values:
        try:
            format = detect(values)
        except DataError as e:
            raise DataError(f"{path}: {e}") from e

    rejections: list[Rejection] = []
    first: dict[str, tuple[Example, str]] = {}
    usable: list[Any] = []
    unkept: set[str] = set()
    for item in found:
        if isinstance(item, Rejection):
            rejections.append(item)
            continue
        where, given = item
        row = given
        try:
            row = plain(given)
            example, fields = to_example(row, format)
        except RowError as e:
            rejections.append(Rejection(where, str(e), row))
            continue
        except RecursionError:
            rejections.append(Rejection(where, "nested too deeply", None))
            continue
        if example.id in first:
            twin, place = first[example.id]
            same = example.messages == twin.messages
            reason = f"duplicate of {example.id} ({place})" if same else f"id {example.id} is taken ({place})"
            rejections.append(Rejection(where, reason, row))
            continue
        first[example.id] = (example, where)
        usable.append(given)
        unkept |= fields
    if not first:
        reasons = "".join(f"\n{line}" for line in commonest_reasons(rejections))
        raise DataError(f"{path}: none of its {len(found)} rows can be used. The commonest reasons:{reasons}")
    if unkept:
        _log.warning("%s: not trained on, though some rows have it: %s", path, ", ".join(sorted(unkept)))
    return UserRows([example for example, _ in first.values()], usable, rejections)


def commonest_reasons(rejections: Sequence[Rejection], limit: int = 3) -> list[str]:
    """Lines with the commonest reasons, each counted and with its first place, the largest count first.

    Reasons that differ only in numbers, ids or quoted words are one; the first is shown.
    """
    groups: dict[str, list[Rejection]] = {}
    for rejection in rejections:
        groups.setdefault(_VARYING.sub("*", rejection.reason), []).append(rejection)
    largest = sorted(groups.values(), key=len, reverse=True)
    lines = [f"  {len(g)} of {len(rejections)}: {g[0].reason} ({g[0].where})" for g in largest[:limit]]
    if rest := sum(map(len, largest[limit:])):
        lines.append(f"  {rest} of {len(rejections)}: other reasons")
    return lines


def write(examples: Sequence[Example], path: str | Path, format: str) -> None:
    """Writes a dataset that `read` gives back with the same conversations, ids and extra columns.

    Args:
      examples: at least one.
      path: for a row format a .json, .jsonl or .parquet file, which is replaced; for tfds a directory that
        does not exist or is empty.
      format: alpaca, sharegpt, messages, prompt_completion; parquet (messages in a .parquet file); tfds.

    Raises:
      DataError: nothing to write, path and format do not fit, or the place cannot be written.
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
            from middo_jax.data import tfds_format

            tfds_format.write(examples, path)
            return
        rows = to_rows(examples, "messages" if format == "parquet" else format)
        write_rows = {".json": write_json, ".jsonl": write_jsonl, ".parquet": _write_parquet}
        write_rows[path.suffix.lower()](path, rows)
    except OSError as e:
        raise DataError(f"cannot write {path}: {e.strerror or e}") from e


def split_heldout(
    examples: Sequence[Example], fraction: float, seed: int, source_column: str
) -> tuple[list[Example], list[Example]]:
    """Splits off rows that are never trained on: the same ones whatever the order of the rows.

    Rows with the same prompt stay together, so no held-out prompt is trained on: `fraction` is a share of
    the distinct prompts. If all examples have extra[source_column], each source gives its share; the
    rarest sources are pooled where there are too few rows to do so.

    Returns:
      (train, held-out), both in the examples' order.
    """
    if not 0 <= fraction < 1:
        raise DataError(f"the held-out fraction must be at least 0 and less than 1, not {fraction}")
    groups: dict[str, list[Example]] = {}
    for example in sorted(examples, key=lambda example: example.id):
        groups.setdefault(example.prompt, []).append(example)
    prompts = list(groups)
    if fraction == 0 or len(prompts) < 2:
        if fraction:
            _log.warning("nothing is held out: there are fewer than two different prompts")
        return list(examples), []
    from sklearn.model_selection import train_test_split

    count = min(max(1, round(fraction * len(prompts))), len(prompts) - 1)
    sources = _strata([groups[prompt][0] for prompt in prompts], source_column, count)
    _, chosen = train_test_split(prompts, test_size=count, random_state=seed, stratify=sources)
    heldout = set(chosen)
    return (
        [example for example in examples if example.prompt not in heldout],
        [example for example in examples if example.prompt in heldout],
    )


def _strata(examples: Sequence[Example], source_column: str, count: int) -> list[str] | None:
    """A source an example, such that `count` held-out ones can be drawn from all; None: draw from the whole.

    Sorted examples give the same strata, ties between sources included, in any order of the rows.
    """
    values = [example.extra.get(source_column) for example in examples]
    missing = values.count(None)
    if missing:
        if missing < len(values):
            _log.warning(
                "held-out split is not stratified: %d of %d prompts have no %r",
                missing,
                len(values),
                source_column,
            )
        return None
    sources = [json.dumps(value, sort_keys=True) for value in values]
    room = min(count, len(sources) - count)  # each part needs at least one of each stratum
    sizes = Counter(sources).most_common()
    kept = [source for source, size in sizes if size > 1]
    if len(kept) < len(sizes) or len(kept) > room:
        kept = kept[: room - 1]
        if kept and len(sources) - sum(size for source, size in sizes if source in kept) == 1:
            kept.pop()  # the pool needs two members too
        _log.info("held-out split: %d of %d sources are pooled as other", len(sizes) - len(kept), len(sizes))
    if not kept:
        _log.warning("held-out split is not stratified: too few prompts a %r", source_column)
        return None
    chosen = set(kept)
    return [source if source in chosen else "other" for source in sources]  # no JSON text: clashes with none


def _rows(path: str) -> Iterator[tuple[str, Any] | Rejection]:
    """All rows with their places, as their source gives them; a line that is no JSON comes as a Rejection."""
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
                reason = f"JSON that cannot be held: {e}"
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
        hint = "one JSON value a line belongs in a .jsonl file" if e.msg == "Extra data" else "mend it there"
        raise DataError(f"{file}: broken JSON at line {e.lineno}, column {e.colno}: {e.msg}; {hint}") from e
    except (ValueError, RecursionError) as e:
        raise DataError(f"{file}: JSON that cannot be held: {e}") from e
    if isinstance(value, dict):
        lists = [value[key] for key in ("data", "rows") if isinstance(value.get(key), list)]
        value = lists[0] if len(lists) == 1 else value
    if not isinstance(value, list):
        raise DataError(
            f"{file}: must hold a list of rows, or an object with one such list as `data` or `rows`"
        )
    return value


def _parquet_rows(file: Path) -> Iterator[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file) as stream:
            yield from arrow_rows(stream.iter_batches(batch_size=4096), stream.schema_arrow)
    except pa.ArrowException as e:
        raise DataError(f"{file}: not a readable Parquet file: {e}") from e


def _write_parquet(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    def array(values: list[Any], type: Any) -> Any:
        # In pieces: an Arrow text array ends at 2 GiB.
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
            held = column.to_pylist() == values and "struct<>" not in str(
                column.type
            )  # Parquet has no empty struct
        except (pa.ArrowException, ValueError, TypeError, OverflowError):
            held = False
        if not held:  # values of several types: as JSON text, which `_parquet_rows` knows by the metadata
            texts = [None if value is None else json.dumps(value, allow_nan=False) for value in values]
            column, metadata = array(texts, pa.string()), {"middo": "json"}
        fields.append(pa.field(name, column.type, metadata=metadata))
        arrays.append(column)
    with atomic(path, "wb") as file:
        pq.write_table(pa.table(arrays, schema=pa.schema(fields)), file)


def _tfds_rows(name: str, split: str) -> Iterator[dict[str, Any]]:
    try:
        from middo_jax.data import tfds_format
    except ImportError as e:
        raise DataError(
            f"tfds: cannot be read without tensorflow-datasets ({e}); pip install middo-jax"
        ) from e
    return tfds_format.rows(name, split)
