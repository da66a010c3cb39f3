"""Laws of planting: what is planted is what the labels say, on as many rows as they say, and nothing else."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import pytest

from benchmarks.planted_defects import measure
from benchmarks.planting import (
    FAULTS,
    Planted,
    cut,
    from_gsm8k,
    plant,
    shuffled,
    with_other_numbers,
    with_other_words,
)
from middo_jax.data.example import Example, Message
from middo_jax.data.formats import to_example

COUNT = 10  # of each fault: 5 % of 200


def sample(prompt: str, response: str) -> Example:
    return Example((Message("user", prompt), Message("assistant", response)))


@pytest.fixture(scope="module")
def clean() -> list[Example]:
    """200 rows; a quarter have no number to be replaced, a third too short an answer to be cut."""
    rng = np.random.default_rng(0)
    words = np.array([a + b for a in ("ba", "de", "fi", "go", "hu") for b in ("lo", "mi", "na", "ru", "se")])

    def text(n: int) -> str:
        return " ".join(rng.choice(words, n))

    return [
        sample(
            f"{text(8)} q{i}",
            text(4 if i % 3 == 0 else 14) + ("." if i % 4 == 0 else f" in {1900 + i}, {i}."),
        )
        for i in range(200)
    ]


@pytest.fixture(scope="module")
def foreign() -> list[Example]:
    return [
        from_gsm8k({"question": f"What is {i} + 1?", "answer": f"<<{i}+1={i + 1}>>{i + 1}\n#### {i + 1}"})
        for i in range(30)
    ]


@pytest.fixture(scope="module")
def planted(clean: list[Example], foreign: list[Example]) -> Planted:
    return plant(clean, foreign, seed=0)


def of(planted: Planted, clean: list[Example], fault: str) -> list[tuple[Example, Example]]:
    """(row before, row after) of all rows with a fault; the id says from which row it was made."""
    before = {example.id: example for example in clean}
    rows = [e for e in planted.examples if planted.fault.get(e.id) == fault]
    return [(before[e.id.split("-")[0]], e) for e in rows]


def test_five_percent_of_each_on_disjoint_rows(clean: list[Example], planted: Planted) -> None:
    assert Counter(planted.fault.values()) == dict.fromkeys(FAULTS, COUNT)
    assert len(planted.examples) == len(clean) == len({e.id for e in planted.examples})
    assert set(planted.fault) <= {e.id for e in planted.examples}
    replaced = {id_.split("-")[0] for id_ in planted.fault}
    assert len(replaced) == COUNT * len(FAULTS)  # no row carries two
    # All others are there unchanged, in their place.
    for before, after in zip(clean, planted.examples, strict=True):
        assert (after is before) == (after.id not in planted.fault)
        assert after.id.split("-")[0] == before.id


def test_the_seed_decides(clean: list[Example], foreign: list[Example], planted: Planted) -> None:
    assert plant(clean, foreign, seed=0) == planted
    assert plant(clean, foreign, seed=1).fault != planted.fault


def test_rows_survive_the_file(planted: Planted) -> None:
    """Read back with the id that the label is kept by, exact duplicates too."""
    assert [to_example(e.to_json(), "messages")[0] for e in planted.examples] == list(planted.examples)


def test_each_fault_is_what_it_says(clean: list[Example], foreign: list[Example], planted: Planted) -> None:
    for before, after in of(planted, clean, "swapped response"):
        assert after.prompt == before.prompt
        assert after.response != before.response
    swapped = of(planted, clean, "swapped response")
    assert Counter(b.response for b, _ in swapped) == Counter(a.response for _, a in swapped)
    for before, after in of(planted, clean, "shuffled prompt"):
        assert after.response == before.response
        assert after.prompt != before.prompt
        assert sorted(after.prompt.split()) == sorted(before.prompt.split())
    for before, after in of(planted, clean, "cut response"):
        assert after.prompt == before.prompt
        assert before.response.startswith(after.response)
        assert len(after.response.split()) == len(before.response.split()) // 2
        assert after.response[-1].isalnum()
    for before, after in of(planted, clean, "wrong numbers"):
        assert after.prompt == before.prompt
        assert re.sub(r"\d", "#", after.response) == re.sub(r"\d", "#", before.response)
        numbers = [re.findall(r"\d+", e.response) for e in (before, after)]
        assert all(a != b for a, b in zip(*numbers, strict=True))
        assert numbers[0]
    assert {a.messages for _, a in of(planted, clean, "foreign topic")} <= {e.messages for e in foreign}


def test_a_duplicate_has_a_clean_twin(clean: list[Example], planted: Planted) -> None:
    by_id = {e.id: e for e in planted.examples}
    assert len(set(planted.twin.values())) == len(planted.twin) == 2 * COUNT
    for id_, twin in planted.twin.items():
        assert twin not in planted.fault
        copy, original = by_id[id_], by_id[twin]
        assert copy.response == original.response
        changed = [a != b for a, b in zip(copy.prompt.split(), original.prompt.split(), strict=True)]
        assert sum(changed) == (0 if planted.fault[id_] == "exact duplicate" else 1)  # prompts of nine words


def test_too_few_rows(clean: list[Example], foreign: list[Example]) -> None:
    without = [sample(e.prompt, "no number here") for e in clean]
    with pytest.raises(ValueError, match="wrong numbers: only 0 of 200 rows can carry it, not 10"):
        plant(without, foreign, seed=0)
    with pytest.raises(ValueError, match="only 3 foreign rows, not 10"):
        plant(clean, foreign[:3], seed=0)


def test_texts_by_hand() -> None:
    rng = np.random.default_rng(0)
    assert cut("One two three, four. Five six") == "One two three"
    assert sorted(shuffled("b a a\n a", rng).split()) == ["a", "a", "a", "b"]
    text = "1. H2O has 3 atoms. 2. It boils at 99.6 degrees since 074"
    other = with_other_numbers(text, rng)
    match = re.fullmatch(
        r"1\. H2O has (\d) atoms\. 2\. It boils at (\d\d)\.(\d) degrees since (\d{3})", other
    )
    assert match
    assert all(a != b for a, b in zip(match.groups(), ("3", "99", "6", "074"), strict=True))
    ten = "one two three four five six seven eight nine ten"
    other = with_other_words(ten, ["x", "two"], rng)
    assert sum(a != b for a, b in zip(other.split(), ten.split(), strict=True)) == 2
    row = from_gsm8k({"question": "How many?", "answer": "3 * 2 = <<3*2=6>>6 eggs.\n#### 6"})
    assert row.response == "3 * 2 = 6 eggs.\nThe answer is 6."


def test_measure_by_hand() -> None:
    badness, selected = np.array([3.0, 2.0, 1.0, 0.0]), np.array([True, True, False, False])
    faulty, clean = np.array([True, False, True, False]), np.array([False, True, False, True])
    figures = measure((badness, selected), faulty, clean)
    assert figures == {"auc": 0.75, "precision": 0.5, "recall": 0.5, "base_rate": 0.5, "selected_share": 0.5}
