"""The user's columns that name a row, which a new sample made from that row must not have.

Besides `data.id_column` these are columns with a usual name for ids, and columns of which no two rows of a
source have the same value.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

# Without case, blanks, hyphens and underscores.
_NAMES = frozenset(
    f"{of}{name}"
    for of in ("", "row", "sample", "example", "record", "item", "conversation", "prompt", "question")
    for name in ("id", "uid", "uuid", "guid", "idx", "index")
)


def is_id_name(column: str) -> bool:
    """Whether a column is called like an id: id, uid, uuid, row_id, SampleIndex, ..."""
    return re.sub(r"[\s_-]", "", column).lower() in _NAMES


def distinct_columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, bool]:
    """For each column of a source's rows: whether it has texts and numbers only, each in one row only.

    Null is no value. A row is known by such a value, be it an id, a time or a note.

    [{"key": 7, "topic": "sea"}, {"key": 8, "topic": "sea"}]  ->  {"key": True, "topic": False}
    """
    columns = dict.fromkeys(name for row in rows for name in row)
    # One column at a time: the values of all of them would fill the memory.
    return {name: _is_distinct(rows, name) for name in columns}


def _is_distinct(rows: Sequence[Mapping[str, Any]], column: str) -> bool:
    met = set[str]()
    for row in rows:
        value = row.get(column)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, str | int | float) or str(value) in met:
            return False
        met.add(str(value))
    return bool(met)


def distinct_in_each(sources: Sequence[Mapping[str, bool]]) -> dict[str, bool]:
    """For each column, whether it is distinct in all sources that have it; two sources may share values."""
    columns = dict.fromkeys(name for source in sources for name in source)
    return {name: all(source.get(name, True) for source in sources) for name in columns}


def without_ids(columns: Mapping[str, Any], id_columns: Collection[str]) -> dict[str, Any]:
    """Columns with null in place of each value that names a row."""
    return {
        name: None if name in id_columns or is_id_name(name) else value for name, value in columns.items()
    }
