"""Rows of files: JSON, JSON lines, Parquet, CSV and TSV, compressed or not; several of them; Arrow folders.

FILE                  .json .jsonl .csv .tsv, also with .gz or .zst behind it; .parquet
data/*.jsonl          all files that match, in the order of their names
FOLDER                its files with these endings, or those in FOLDER/data: the `train` split if names say so
FOLDER                that `datasets` wrote with save_to_disk, without that package
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import dataclasses
import glob
import gzip
import io
import json
import logging
import re
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, cast

import pyarrow as pa
import pyarrow.parquet as pq

from middo_jax.buckets import here, shown
from middo_jax.buckets.names import fits, is_pattern
from middo_jax.config.settings import DataSettings
from middo_jax.data.formats import DataError
from middo_jax.data.in_memory import arrow_rows
from middo_jax.data.saved import is_saved, saved_rows
from middo_jax.rundir.rows import RejectedRow

_log = logging.getLogger(__name__)
_COMPRESSED = (".gz", ".zst")
ENDINGS = (".json", ".jsonl", ".csv", ".tsv", ".parquet")
_ID_CHARS = 200  # of an id that a place shows
_NOT_DATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "config.json"}
# Words in names of files of a split that is not for training.
_EVALUATION = {"test", "tests", "validation", "valid", "val", "dev", "eval", "heldout"}


@dataclasses.dataclass(frozen=True)
class Rejection:
    """A row that was read but cannot be used.

    Attributes:
      where: file:line in a text file, otherwise `row N`, counted from 1; and the user's id of the row.
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


def with_id(where: str, own: Any) -> str:
    """A row's place with the user's id of it, if there is one: `chat.jsonl:3, id 17`."""
    if not isinstance(own, str | int) or isinstance(own, bool):
        return where
    shown = str(own) if str(own).isprintable() else ascii(own)
    return f"{where}, id {shown if len(shown) <= _ID_CHARS else f'{shown[:_ID_CHARS]}…'}"


def files_at(path: str) -> list[Path]:
    """The files that a path names: itself, those that match a pattern, or those of a folder.

    Raises:
      DataError: there are none.
    """
    local = here(path)
    file = Path(local).expanduser()
    if file.is_dir():
        return [file] if is_saved(file) else _shards(file)
    if file.exists():
        return [file]
    if is_pattern(local):
        found = [Path(name) for name in sorted(glob.glob(str(file), recursive=True))]
        if files := [file for file in found if file.is_file()]:
            return files
        raise DataError(f"no file matches {path}; check the pattern, or name a file or a folder")
    raise DataError(
        f"there is no file {path}; give a {', '.join(ENDINGS)} file (or one with .gz or .zst behind that), a "
        "pattern such as data/*.jsonl, a folder, tfds:NAME:SPLIT or hf:NAME:SPLIT"
    )


def inputs_of(settings: DataSettings) -> dict[str, Path]:
    """The files and folders that a dataset is read from, by role: data, data_2, ..., eval_data.

    What is not on this machine, such as a dataset of the hub, is not among them.
    """
    found = {}
    for role, paths in (("data", settings.paths), ("eval_data", filter(None, [settings.eval_path]))):
        places = [place for path in paths for place in _places(path) or _named_folder(path)]
        found |= {role if n == 1 else f"{role}_{n}": place for n, place in enumerate(places, 1)}
    return found


def require_not_read(source: str, outputs: Iterable[Path]) -> None:
    """Requires that no output is a file that is read as data, or would be one.

    Raises:
      DataError: writing it would destroy the data, or add a file to it that the next reading takes for rows.
    """
    places = _places(source) or _named_folder(source)
    read = {_identity(file) for place in places for file in (place, *_data_files(place)) if file.exists()}
    folders = {f.resolve() for f in places if f.is_dir()}
    folders |= {f.resolve().parent for folder in folders for f in _data_files(folder)}
    pattern = Path(here(source)).expanduser()
    for output in outputs:
        where = output.resolve()
        if output.exists() and _identity(output) in read:
            raise DataError(f"{output} is read as data and would be overwritten; write to another place")
        if (where.parent in folders and is_data(where)) or (pattern not in places and _fits(where, pattern)):
            raise DataError(f"{output} would be among the files of {source}, as data; write to another place")


def _identity(file: Path) -> tuple[int, int]:
    """What a file's names have in common: links, hard ones too, and other spellings of its name."""
    status = file.stat()
    return status.st_dev, status.st_ino


def _fits(path: Path, pattern: Path) -> bool:
    """Whether a pattern names a resolved path; `**` stands for any number of folders."""
    parts = pattern.absolute().parts
    n = next((n for n, part in enumerate(parts) if is_pattern(part)), len(parts))
    root = Path(*parts[:n]).resolve()
    return path.is_relative_to(root) and fits(path.relative_to(root).parts, parts[n:])


def _places(path: str) -> list[Path]:
    file = Path(here(path)).expanduser()
    if file.exists():
        return [file]
    return [Path(name) for name in sorted(glob.glob(str(file), recursive=True))]


def _named_folder(path: str) -> list[Path]:
    """FOLDER of tfds:FOLDER:SPLIT, hf:FOLDER:SPLIT or hf:FOLDER:CONFIG:SPLIT, if it is on this machine."""
    kind, _, rest = path.partition(":")
    name = rest.rpartition(":")[0]
    named = (Path(each).expanduser() for each in (name, name.rpartition(":")[0]) if each)
    return [folder for folder in named if kind in ("tfds", "hf") and folder.is_dir()][:1]


def is_readable_folder(folder: Path) -> bool:
    """Whether this module reads a folder: `save_to_disk` wrote it, or it has files of data."""
    return is_saved(folder) or bool(_data_files(folder))


def rows_of_files(files: Sequence[Path]) -> Iterator[tuple[str, Any] | Rejection]:
    """All rows with their places: file:line in text files, else `row N`, with the file's name if several."""
    for file in files:
        for item in _rows(file):
            if len(files) == 1 or isinstance(item, Rejection) or not item[0].startswith("row "):
                yield item
            else:
                yield f"{shown(file)} {item[0]}", item[1]


def numbered(rows: Iterator[Any]) -> Iterator[tuple[str, Any]]:
    """Rows with their places, `row N`, counted from 1."""
    return ((f"row {n}", row) for n, row in enumerate(rows, 1))


def _rows(file: Path) -> Iterator[tuple[str, Any] | Rejection]:
    if file.is_dir():
        yield from numbered(saved_rows(file))
        return
    ending = _ending(file)
    if ending == ".jsonl":
        yield from _jsonl_rows(file)
    elif ending == ".json":
        yield from numbered(_taken(_json_rows(file)))
    elif ending == ".parquet":
        if file.suffix.lower() in _COMPRESSED:
            raise DataError(f"{file}: Parquet is compressed inside; unpack the file, and name it .parquet")
        yield from numbered(_parquet_rows(file))
    elif ending in (".csv", ".tsv"):
        yield from _csv_rows(file, "," if ending == ".csv" else "\t")
    else:
        raise DataError(
            f"{file}: a dataset file must end in {', '.join(ENDINGS)}, with .gz or .zst behind it if it is "
            "compressed"
        )


def _taken(rows: list[Any]) -> Iterator[Any]:
    """The rows of a list that nobody else uses; each is freed when the next one is asked for."""
    rows.reverse()
    while rows:
        yield rows.pop()


def _ending(file: Path) -> str:
    """The ending that tells the format, in lower case, without that of the compression."""
    plain = file.with_suffix("") if file.suffix.lower() in _COMPRESSED else file
    return plain.suffix.lower()


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[IO[bytes]]:
    """A file's bytes, uncompressed.

    Raises:
      DataError: the compressed data is damaged or cut.
    """
    ending = file.suffix.lower()
    try:
        if ending == ".gz":
            with gzip.open(file, "rb") as unpacked:
                yield cast(IO[bytes], unpacked)  # it has all methods that are used
        elif ending == ".zst":
            with file.open("rb") as raw, pa.CompressedInputStream(raw, "zstd") as packed:
                yield io.BufferedReader(cast(io.RawIOBase, packed))  # it has all methods of a raw stream
        else:
            with file.open("rb") as stream:
                yield stream
    except (EOFError, zlib.error, gzip.BadGzipFile, pa.ArrowException) as e:
        raise DataError(f"{file}: the compressed file is damaged or cut: {e}; copy it again") from e
    except OSError as e:
        if ending != ".zst" or e.errno is not None:
            raise
        raise DataError(f"{file}: the compressed file is damaged or cut: {e}; copy it again") from e


def _jsonl_rows(file: Path) -> Iterator[tuple[str, Any] | Rejection]:
    with _opened(file) as stream:  # as bytes: only \n ends a line, and one bad byte spoils one line
        for n, line in enumerate(stream, 1):
            line = line.removeprefix(codecs.BOM_UTF8) if n == 1 else line
            if not line.strip():
                continue
            where = f"{shown(file)}:{n}"
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
    with _opened(file) as stream:
        content = stream.read()
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


def _csv_rows(file: Path, delimiter: str) -> Iterator[tuple[str, Any] | Rejection]:
    """Rows of a table with a header. A row of another length than the header is a Rejection."""
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    with _opened(file) as stream:
        reader = csv.reader(
            io.TextIOWrapper(stream, "utf-8-sig", newline=""), delimiter=delimiter, strict=True
        )
        try:
            header = next(reader, [])
            if twice := [name for name in header if header.count(name) > 1]:
                raise DataError(f"{file}: two columns are called {twice[0]!r}; rename one")
            before = reader.line_num
            for cells in reader:
                where, before = f"{shown(file)}:{before + 1}", reader.line_num
                if len(cells) == len(header):
                    yield where, dict(zip(header, cells, strict=True))
                elif cells:
                    reason = f"the row has {len(cells)} cells, and the header has {len(header)}"
                    yield Rejection(where, reason, cells)
        except UnicodeDecodeError as e:
            raise DataError(
                f"{file}: not UTF-8 behind line {reader.line_num} (byte 0x{e.object[e.start]:02x}); convert "
                "the file to UTF-8"
            ) from e
        except csv.Error as e:
            raise DataError(f"{file}:{reader.line_num}: broken CSV: {e}; correct the file there") from e


def _data_files(folder: Path) -> list[Path]:
    """The files of data in a folder, or in its subfolder `data`, by name."""
    for place in (folder, folder / "data"):
        if files := [f for f in sorted(place.glob("*")) if f.is_file() and is_data(f)]:
            return files
    return []


def is_data(file: Path) -> bool:
    """Whether a file of a folder has rows, by its name."""
    return _ending(file) in ENDINGS and file.name not in _NOT_DATA and not file.name.startswith(".")


def _shards(folder: Path) -> list[Path]:
    """The files of a folder that are for training, by their names."""
    files = _data_files(folder)
    if not files:
        raise DataError(f"{folder} has no file that ends in {', '.join(ENDINGS)}")
    words = {file: set(re.split(r"[^a-z]+", file.name.lower())) for file in files}
    training = [file for file in files if "train" in words[file]]
    others = [file for file in files if not words[file] & _EVALUATION]
    chosen = training or others or files
    left = [file.name for file in files if file not in chosen]
    if left:
        _log.warning("%s: %d files are read; not read are %s", folder, len(chosen), ", ".join(left))
    return chosen
