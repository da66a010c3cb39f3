"""The user's own columns as a table, to be appended to the scores of the same rows."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import pyarrow as pa

from middo_jax.data.example import Example
from middo_jax.data.formats import DataError

SUFFIX = "_user"


def own_columns(
    examples: Sequence[Example],
    rows: Sequence[Mapping[Any, Any]],
    wanted: Collection[str] | None,
    taken: Collection[str],
) -> pa.Table:
    """The user's columns of each example, in the examples' order.

    rows [{"instruction": "Add.", "output": "5", "quality": 3}], taken {"quality"}
      ->  instruction "Add.", output "5", quality_user 3

    An `id` column that equals the example's id is left out. A column of several types becomes text.

    Args:
      examples: usable rows as conversations.
      rows: the same rows as they were read.
      wanted: names of columns; None: all columns of scalars.
      taken: names of other columns. A column of the user's with such a name gets the suffix `_user`.

    Raises:
      DataError: a wanted column does not exist.
    """
    own = [_own(example, row) for example, row in zip(examples, rows, strict=True)]
    names = list(dict.fromkeys(name for row in own for name in row))
    if wanted is None:
        names = [name for name in names if all(_is_scalar(row.get(name)) for row in own)]
    else:
        if missing := [name for name in wanted if name not in names]:
            raise DataError(f"there is no column {missing[0]!r} to keep; there are: {', '.join(names)}")
        names = [name for name in names if name in wanted]
    columns: dict[str, pa.Array] = {}
    for name in names:
        columns[_free(name, {*taken, *columns}, names)] = _array([row.get(name) for row in own])
    # A table without columns has no rows either, but callers only append its columns to another table.
    return pa.table(columns)


def with_user_ids(own: pa.Table, examples: Sequence[Example]) -> pa.Table:
    """The user's columns with the user's own ids as `id_user`, whichever column these are from.

    Without ids, and if there is such a column already, the table stays as it is.
    """
    ids, name = [None if e.user_id is None else str(e.user_id) for e in examples], f"id{SUFFIX}"
    if not any(ids) or name in own.column_names:
        return own
    column = pa.array(ids, pa.string())
    return own.append_column(name, column) if own.column_names else pa.table({name: column})


def _own(example: Example, row: Mapping[Any, Any]) -> dict[str, Any]:
    own = {str(name): value for name, value in row.items()}
    # Rows of dataset.jsonl keep the user's columns in `extra`.
    own |= {name: value for name, value in example.extra.items() if name not in own}
    own.pop("user_id", None)
    if example.user_id is not None and own.get("id") == example.id:  # a row of dataset.jsonl
        own["id"] = example.user_id
    if own.get("id") == example.id:
        del own["id"]
    return own


def _free(name: str, taken: Collection[str], others: Collection[str]) -> str:
    free = name
    while free in taken or (free != name and free in others):
        free += SUFFIX
    return free


def _is_scalar(value: Any) -> bool:
    is_nested = isinstance(value, Mapping | list | tuple | set) or getattr(value, "ndim", 0) > 0
    return not is_nested


def _array(values: list[Any]) -> pa.Array:
    try:
        return pa.array(values, from_pandas=True)  # NaN and NaT are missing values
    except (pa.ArrowException, ValueError, TypeError, OverflowError):
        return pa.array([None if value is None else str(value) for value in values], pa.string())
