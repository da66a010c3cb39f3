"""Several datasets as one, by weights and counts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from middo_jax.config import load
from middo_jax.config.base import ConfigError
from middo_jax.config.settings import Source
from middo_jax.data.mixing import chosen, read_sources, shares
from middo_jax.data.own_shape import names_of
from middo_jax.data.reading import Reading
from middo_jax.data.sources import DataError


def file(tmp_path: Path, name: str, n: int, first: int = 0) -> str:
    rows = [{"instruction": f"Name {i}.", "output": "5", "id": i} for i in range(first, first + n)]
    if name.endswith(".csv"):
        text = "instruction,output,id\n" + "".join(f"{r['instruction']},5,{r['id']}\n" for r in rows)
    else:
        text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / name).write_text(text)
    return str(tmp_path / name)


@pytest.mark.parametrize(
    ("sizes", "how", "taken"),
    [
        ([1000, 300], [{"weight": 1}, {"weight": 1}], [300, 300]),
        ([1000, 300], [{"weight": 3}, {"weight": 1}], [900, 300]),
        ([1000, 300], [{"weight": 0.3}, {"weight": 0.1}], [900, 300]),
        ([1000, 300], [{"count": 10}, {}], [10, 300]),
        ([1000, 300, 50], [{"weight": 1}, {"weight": 1}, {"count": 7}], [300, 300, 7]),
        ([5, 1000], [{"weight": 1000}, {"weight": 1}], [5, 1]),
    ],
)
def test_shares(sizes: list[int], how: list[dict[str, float]], taken: list[int]) -> None:
    assert shares(sizes, [Source(path="x", **h) for h in how]) == taken  # type: ignore[arg-type]


def test_which_rows_depends_on_the_seed_and_the_source() -> None:
    assert chosen(100, 10, 0, 0) == chosen(100, 10, 0, 0) == sorted(set(chosen(100, 10, 0, 0)))
    assert chosen(100, 10, 0, 0) != chosen(100, 10, 1, 0)
    assert chosen(100, 10, 0, 0) != chosen(100, 10, 0, 1)
    assert chosen(3, 5, 0, 0) == [0, 1, 2]


def test_sources_are_read_as_one(tmp_path: Path) -> None:
    a, b = file(tmp_path, "a.jsonl", 40), file(tmp_path, "b.csv", 10, first=100)
    sources = [Source(path=a, weight=2), Source(path=b, weight=1, format="alpaca")]
    data, said = read_sources(sources, None, Reading(), seed=0)
    assert len(data.examples) == 30
    assert said == [f"{a}: 20 of 40 rows taken", f"{b}: 10 of 10 rows taken"]
    assert {str(e.user_id) for e in data.examples} >= {"100", "109"}
    assert data.places[-1] == f"{b}:11"


def test_sources_have_their_own_names_of_columns(tmp_path: Path) -> None:
    a, b = file(tmp_path, "a.jsonl", 3), tmp_path / "b.jsonl"
    b.write_text(json.dumps({"question": "Why?", "answer": "So."}) + "\n")
    own = {"instruction": "question", "output": "answer"}
    data, _ = read_sources([Source(path=a), Source(path=str(b), columns=own)], None, Reading(), seed=0)
    assert (len(data.examples), data.format, data.examples[-1].prompt) == (4, "alpaca", "Why?")
    with pytest.raises(DataError, match=r"a\.jsonl: data\.columns names 'question'.*its own `columns`"):
        read_sources([Source(path=a), Source(path=str(b))], None, Reading(columns=own), seed=0)
    assert names_of({"columns": own, "sources": [{"path": a}, {"path": str(b)}]}) == own
    assert names_of({"columns": own, "sources": [{"path": a, "columns": {}}, {"path": str(b)}]}) == {}


def test_a_row_of_two_sources_is_used_once_and_common_ids_are_no_ids(tmp_path: Path) -> None:
    a, b = file(tmp_path, "a.jsonl", 4), file(tmp_path, "b.jsonl", 4, first=3)
    data, _ = read_sources([Source(path=a), Source(path=b)], None, Reading(), seed=0)
    assert len(data.examples) == 7
    assert data.rejections[0].reason == f"duplicate of {data.examples[3].id} ({a}:4)"
    (tmp_path / "b.jsonl").write_text(json.dumps({"instruction": "Other.", "output": "5", "id": 0}) + "\n")
    data, said = read_sources([Source(path=a), Source(path=b)], None, Reading(), seed=0)
    assert {e.user_id for e in data.examples} == {None}
    assert data.examples[-1].extra == {"id": 0}
    assert "column 'id' is not unique over all sources" in said[-1]


def test_the_spelling_of_a_path_does_not_change_which_rows_are_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"instruction": f"Name {n}.", "output": "x"} for n in range(20)]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    monkeypatch.chdir(tmp_path)

    def prompts(path: str) -> list[str]:
        return [e.prompt for e in read_sources([Source(path=path, count=5)], None, Reading(), 3)[0].examples]

    assert prompts("a.json") == prompts("./a.json") == prompts(str(tmp_path / "a.json"))


def test_a_count_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    a = file(tmp_path, "a.jsonl", 4)
    with pytest.raises(DataError, match="wants 5 rows of it, and 4 can be used"):
        read_sources([Source(path=a, count=5)], None, Reading(), seed=0)


def test_settings_take_a_path_or_sources() -> None:
    config = load(
        None, ["model.path=m", "data.sources=[{path: a.jsonl, weight: 2}, {path: b.csv, count: 3}]"]
    )
    assert [s.path for s in config.data.sources] == ["a.jsonl", "b.csv"]
    assert config.data.name == "a.jsonl + b.csv"
    for given, message in (
        (["model.path=m", "data.limit=3"], "data.path is missing"),
        (["model.path=m", "data.path=d", "data.sources=[{path: a}]"], "not both"),
        (["model.path=m", "data.sources=[{path: a, weight: 1, count: 2}]"], "weight or a count"),
        (["model.path=m", "data.sources=[{path: a, wieght: 1}]"], "wieght"),
    ):
        with pytest.raises(ConfigError, match=message):
            load(None, given)
