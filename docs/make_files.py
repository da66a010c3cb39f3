"""Writes docs/files.md from the schemas of the public files: `python docs/make_files.py`."""

from __future__ import annotations

import inspect
import sys
import types
import typing
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, Union

from middo_jax.rundir.schemas import SCHEMAS, Schema, is_optional, keys

HEAD = """\
# Files

The files of a run that other programs may read: every key and column, its type, and what it means. Made
from `rows.py`, `records.py` and `schemas.py` in `middo_jax/rundir` by `python docs/make_files.py`. A test
compares every row of a finished run with them.

**Versions.** Each format has a version, which grows when an older program would misread the file. Versions
are kept in these places:

- a Parquet file: its metadata, as `middo_jax.version`;
- `manifest.json`: its own as `version`, and in each stage's record, as `versions`, those of the files that
  the stage wrote;
- `events.jsonl`: each line, as `version`.

A program refuses a file that is newer than itself, with a sentence that names the file. A file without a
version was written before there were versions, and is read.

JSON is UTF-8 and has no NaN. A JSON lines file has one object per line. Types with a link are described at
the end.
"""


def page() -> str:
    """The page: one section per file, then the types that several rows share."""
    shared: dict[str, Any] = {}
    sections = [_section(schema, shared) for schema in SCHEMAS]
    parts = [HEAD, _index(), *sections, "## Types\n"]
    described: set[str] = set()
    while left := [name for name in shared if name not in described]:
        for name in left:
            described.add(name)
            parts.append(f"### {name}\n\n{_doc(shared[name])}\n\n{_keys(shared[name], shared)}")
    return "\n".join(parts)


def _index() -> str:
    rows = [
        f"| [`{of.name}`](#{of.name.replace('.', '')}) | {of.where} | {of.form} | {of.version} | {of.text} |"
        for of in SCHEMAS
    ]
    return "\n".join(["| file | in | form | version | |", "|---|---|---|---:|---|", *rows]) + "\n"


def _section(of: Schema, shared: dict[str, Any]) -> str:
    facts = f"{of.form}, in {of.where}. Version {of.version}."
    first = next(other for other in SCHEMAS if other.row is of.row)
    if of.row is not None and first is not of:
        table = f"Rows are those of [{first.name}](#{first.name.replace('.', '')}).\n"
    elif of.row is None:
        rows = [f"| `{column.name}` | {column.type} | {column.text} |" for column in of.columns]
        table = "\n".join(["| column | type | |", "|---|---|---|", *rows]) + "\n"
    else:
        table = _keys(of.row, shared)
    return f"## {of.name}\n\n{of.text} {facts}\n\n{table}"


def _keys(row: Any, shared: dict[str, Any]) -> str:
    rows = []
    for name, type_ in keys(row).items():
        plain, text = _described(type_)
        absent = ", may be absent" if is_optional(type_) else ""
        rows.append(f"| `{name}` | {_shown(plain, shared)}{absent} | {text} |")
    return "\n".join(["| key | type | |", "|---|---|---|", *rows]) + "\n"


def _described(type_: Any) -> tuple[Any, str]:
    """(the type without its annotations, the line about it)."""
    if typing.get_origin(type_) is NotRequired:
        (type_,) = typing.get_args(type_)
    assert typing.get_origin(type_) is Annotated  # every key has a line
    return typing.get_args(type_)[0], type_.__metadata__[0]


def _shown(type_: Any, shared: dict[str, Any]) -> str:
    origin, arguments = typing.get_origin(type_), typing.get_args(type_)
    if origin in (Union, types.UnionType):
        return ", or ".join(_shown(choice, shared) for choice in arguments)
    if origin is Literal:
        return ", ".join(f"`{choice}`" for choice in arguments)
    if origin is list:
        return f"list of {_shown(arguments[0], shared)}"
    if origin is dict:
        return f"object of {_shown(arguments[1], shared)}"
    if typing.is_typeddict(type_):
        shared.setdefault(type_.__name__, type_)
        return f"[{type_.__name__}](#{type_.__name__.lower()})"
    words = {str: "string", int: "integer", float: "number", bool: "true or false", Any: "any value"}
    return "null" if type_ is types.NoneType else words[type_]


def _doc(row: Any) -> str:
    return inspect.cleandoc(row.__doc__ or "")


if __name__ == "__main__":
    target = Path(__file__).parent / "files.md"
    target.write_text(page(), encoding="utf-8")
    print(target, file=sys.stderr)
