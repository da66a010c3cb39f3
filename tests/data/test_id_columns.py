"""Columns that name a row: an addition has none of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from middo_jax.config.settings import Source
from middo_jax.data.example import Example, Lineage
from middo_jax.data.id_columns import distinct_columns, is_id_name
from middo_jax.data.mixing import read_sources
from middo_jax.data.reading import Reading
from middo_jax.data.sources import read_rows

ADDED, REWRITTEN = Lineage(op="synthesize"), Lineage(op="rewrite")


def written(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def row(number: int, **columns: Any) -> dict[str, Any]:
    return {"prompt": f"Name {number}.", "completion": "Yes.", **columns}


@pytest.mark.parametrize(
    ("values", "is_distinct"),
    [
        (["a", "b", None], True),
        ([1, 2.5, "x"], True),
        (["a", "b", "a"], False),
        ([1, "1"], False),  # equal in a table of texts
        ([True, False], False),
        ([["a"], ["b"]], False),
        ([None, None], False),
    ],
)
def test_a_column_is_distinct_if_each_value_is_in_one_row(values: list[Any], is_distinct: bool) -> None:
    assert distinct_columns([{"key": value} for value in values]) == {"key": is_distinct}


def test_names_of_ids() -> None:
    assert all(
        map(is_id_name, ("id", "ID", "uid", "uuid", "row_id", "Sample-Index", "conversationId", "idx"))
    )
    assert not any(map(is_id_name, ("source", "grid", "valid", "topic_id", "prompt", "index_of_difficulty")))


def test_an_addition_has_no_id_of_its_core(tmp_path: Path) -> None:
    rows = [row(n, key=f"k{n}", uid=7, topic="sea", seen=n == 1) for n in range(3)]
    data = read_rows(written(tmp_path / "rows.jsonl", rows))
    columns = data.id_columns(None)
    assert columns == ["key"]
    core = data.examples[1]
    kept = {"topic": "sea", "seen": True}
    addition = core.replace_text("Name a lake.", "Como.", ADDED, id_columns=columns)
    assert addition.extra == {"key": None, "uid": None, **kept}
    assert core.replace_text("Name a lake.", "Como.", REWRITTEN, id_columns=columns).extra == core.extra
    assert core.extra == {"key": "k1", "uid": 7, **kept}


def test_two_sources_may_share_the_values_of_a_column_that_names_a_row(tmp_path: Path) -> None:
    one = written(tmp_path / "a.jsonl", [row(n, key=n, no=n, topic="sea") for n in range(3)])
    other = written(tmp_path / "b.jsonl", [row(9 + n, key=n, no=n, topic="land") for n in range(3)])
    single = written(tmp_path / "c.jsonl", [row(99, topic="sky")])
    sources = [Source(path=path) for path in (one, other, single)]
    # `topic` differs in all rows of the last source; in the others it does not.
    data, _ = read_sources(sources, None, Reading(), 0)
    assert data.id_columns(None) == ["key", "no"]
    data, said = read_sources(sources[:2], None, Reading(id_column="no"), 0)
    assert said[-1].startswith("column 'no' is not unique over all sources")
    addition = data.examples[0].replace_text("Q", "A", ADDED, id_columns=data.id_columns("no"))
    assert addition == Example(addition.messages, "", ADDED, {"no": None, "key": None, "topic": "sea"})
