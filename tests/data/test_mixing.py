"""Several datasets as one, by weights and counts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from middo_jax.config import load
from middo_jax.config.base import ConfigError
from middo_jax.config.settings import Source
from middo_jax.data.example import Example
from middo_jax.data.mixing import drawn, read_sources, shares
from middo_jax.data.own_shape import names_of
from middo_jax.data.reading import Reading
from middo_jax.data.sources import DataError
from middo_jax.data.user_rows import UserRows


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
    assert drawn(100, 0, 0) == drawn(100, 0, 0)
    assert sorted(drawn(100, 0, 0)) == list(range(100))
    assert drawn(100, 0, 0) != drawn(100, 1, 0)
    assert drawn(100, 0, 0) != drawn(100, 0, 1)


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
        ([{"model.path": "m", "data": {"path": "d", "sources": [{"path": "a"}]}}], "not both"),
        (["model.path=m", "data.sources=[{path: a, weight: 1, count: 2}]"], "weight or a count"),
        (["model.path=m", "data.sources=[{path: a, wieght: 1}]"], "wieght"),
    ):
        with pytest.raises(ConfigError, match=message):
            load(None, given)


def test_a_later_layer_replaces_a_path_by_sources_and_the_other_way_round(tmp_path: Path) -> None:
    one, several = {"model": {"path": "m"}, "data": {"path": "d", "limit": 3}}, "data.sources=[{path: a}]"
    file = tmp_path / "mix.yaml"
    file.write_text("data: {sources: [{path: b}]}\n")
    for layers, names in (
        ([one, several], ["a"]),
        ([one, str(file)], ["b"]),
        ([one, str(file), several], ["a"]),
        ([one, several, {"data.path": "e"}], ["e"]),
        ([one, str(file), "data.path=e"], ["e"]),
        ([one, "data.sources=[]"], ["d"]),  # what says nothing replaces nothing
        ([one, str(file), "data.path=''"], ["b"]),
    ):
        data = load(None, layers).data
        assert (list(data.paths), data.limit) == (names, 3), layers


def taken_of(sources: list[Source], refuses: Callable[[Example], str | None]) -> tuple[list[str], UserRows]:
    """What was taken, in words, of sources some of whose rows the template refuses."""
    data, said = read_sources(sources, None, Reading(), seed=0, refuses=refuses)
    return [line.partition(": ")[2] for line in said], data


def odd(example: Example) -> str | None:
    return "refused by the template" if int(example.prompt[5:-1]) % 2 else None


def test_shares_are_of_rows_that_the_template_takes(tmp_path: Path) -> None:
    a, b = file(tmp_path, "a.jsonl", 40), file(tmp_path, "b.jsonl", 10, first=100)
    said, data = taken_of([Source(path=a, count=20), Source(path=b)], odd)
    assert said == ["20 of 40 rows taken", "5 of 10 rows taken"]
    assert len(data.examples) == len(data.places) == 25
    assert not any(map(odd, data.examples))
    assert {r.reason for r in data.rejections} == {"refused by the template"}
    assert sum(r.where.startswith(b) for r in data.rejections) == 5
    said, data = taken_of([Source(path=a, weight=2), Source(path=b, weight=1)], odd)
    assert said == ["10 of 40 rows taken", "5 of 10 rows taken"]  # b has 5 usable rows, so a gives 10


def test_only_rows_that_may_be_taken_are_checked(tmp_path: Path) -> None:
    checked = []
    a, b = file(tmp_path, "a.jsonl", 500), file(tmp_path, "b.jsonl", 2, first=1000)
    said, _ = taken_of([Source(path=a, count=3), Source(path=b)], lambda e: checked.append(e.id))
    assert (said[0], len(checked)) == ("3 of 500 rows taken", 5)


def test_rows_that_an_earlier_source_has_do_not_count(tmp_path: Path) -> None:
    a, b = file(tmp_path, "a.jsonl", 10), file(tmp_path, "b.jsonl", 20)
    said, data = taken_of([Source(path=a), Source(path=b, count=10)], lambda _: None)
    assert said == ["10 of 10 rows taken", "10 of 20 rows taken"]
    assert len(data.examples) == 20


def test_too_few_usable_rows_are_an_error_with_the_reasons(tmp_path: Path) -> None:
    a, b = file(tmp_path, "a.jsonl", 10), file(tmp_path, "b.jsonl", 10, first=100)
    wanted = r"a\.jsonl: data\.sources wants 6 rows of it, and 5 rows can be used.*\n  5 of 5: refused by the"
    with pytest.raises(DataError, match=wanted):
        taken_of([Source(path=a, count=6), Source(path=b)], odd)
    weighted = [Source(path=a, weight=1), Source(path=b, weight=1)]
    with pytest.raises(DataError, match=r"b\.jsonl: data\.sources wants a share of it, and 0 rows can be"):
        taken_of(weighted, lambda e: "too long" if len(e.prompt) > 7 else None)
    with pytest.raises(DataError, match=r"data\.sources: no row can be used\. The commonest reasons:\n"):
        taken_of([Source(path=a), Source(path=b)], lambda _: "refused by the template")
