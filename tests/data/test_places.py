"""Places of rows are stored compactly and come back as they were."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from middo_jax.data.places import Places

texts = st.text("ab:\n .7", max_size=6)
numbers = st.integers(0, 10**30).map(str) | st.sampled_from(["", "007", "0", "-1", "\u0663"])


@given(places=st.lists(st.tuples(texts, numbers).map("".join), max_size=8))
def test_places_come_back(places: list[str]) -> None:
    stored = Places(places)
    assert list(stored) == places
    assert list(stored[1:-1]) == places[1:-1]
    assert len(stored) == len(places)


def test_a_place_takes_twelve_bytes() -> None:
    stored = Places(f"data/rows.jsonl:{n}" for n in range(10_000))
    assert stored._beginnings == ["data/rows.jsonl:"]
    assert stored._number_of.itemsize + stored._beginning_of.itemsize == 12
