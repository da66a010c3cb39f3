"""What the measured gates let pass of rewrites whose worth is known, from recorded measurements.

`python -m benchmarks gates.roc` prints the same shares; benchmarks/README.md says how they were measured.
"""

from __future__ import annotations

from collections import Counter

import pytest

from benchmarks.gates.pairs import BAD, limits, read, rejected_by
from middo_jax.config import GateSettings

ORIGINALS, PAIRS = read()
GROUPS = Counter(pair.group for pair in PAIRS)
OTHER, ITSELF = (limits(ORIGINALS, refines_itself=itself) for itself in (False, True))


def passed(*opened: str, axis: str = "quality", itself: bool = False) -> Counter[str]:
    """How many of each group pass, some gates left open."""
    bars, gates = ITSELF if itself else OTHER, GateSettings(open=opened)
    return Counter(p.group for p in PAIRS if rejected_by(p, bars, gates, axis) is None)


def test_each_gate_passes_what_was_recorded() -> None:
    """A change of a gate, of its bar or of what it is asked of changes a count."""
    assert GROUPS & Counter(expert=72, swapped=72, nonsense=72, cut=66, numbers=17) == Counter(
        expert=72, swapped=72, nonsense=72, cut=66, numbers=17
    )
    wanted = {
        "information": (63, 3, 45, 14, 2),
        "ending": (68, 67, 1, 14, 66),
        "floor": (66, 72, 66, 17, 72),
    }
    for name, counts in wanted.items():
        found = passed(*(other for other in wanted if other != name), itself=name == "floor")
        assert tuple(found[group] for group in ("expert", *BAD)) == counts, name
    found = passed(*wanted, axis="complexity")  # the loss alone
    assert tuple(found[group] for group in ("expert", *BAD)) == (49, 19, 15, 6, 7)


def test_the_floor_stops_four_of_five_of_a_models_own_answers_good_or_bad() -> None:
    """No measurement of the model tells its good answers from its bad ones, see docs/validity.md."""
    own = ("good self", "bad self")
    assert [GROUPS[group] for group in own] == [31, 86]
    assert [passed("floor", itself=True)[group] for group in own] == [31, 80]
    found = passed(itself=True)
    assert [found[group] for group in own] == [11, 19]
    assert found["expert"] / GROUPS["expert"] > 0.7


def test_four_of_five_revisions_pass_and_one_of_ten_planted_rewrites_does_not() -> None:
    """Changed numbers are the exception: 11 of 17 pass, see docs/validity.md."""
    found = passed()
    shares = {group: found[group] / GROUPS[group] for group in ("expert", *BAD)}
    assert shares["expert"] > 0.8
    assert all(shares[group] < 0.1 for group in ("swapped", "cut", "nonsense"))
    assert found["numbers"] == 11


@pytest.mark.parametrize("gate", ["information", "ending"])
def test_no_gate_is_superfluous(gate: str) -> None:
    """Without it, a planted fault passes that must not."""
    found = passed(gate)
    assert any(found[group] / GROUPS[group] > 0.5 for group in ("swapped", "cut", "nonsense"))
