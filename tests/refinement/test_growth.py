"""Duplicates and growth: nothing repeats, nothing is lost, and the size is what was asked for."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.gate_verdicts import without_duplicates

from middo_jax.data.example import Example, Lineage, Message
from middo_jax.refinement.acceptance.overlap import Overlaps, jaccard, shingles
from middo_jax.refinement.acceptance.repeats import KnownTexts
from middo_jax.refinement.growth import Neighbours, fit, max_size
from middo_jax.refinement.merge import merge
from middo_jax.refinement.tasks import Outcome, Task, Verdict


def sample(prompt: str, response: str = "Yes.") -> Example:
    return Example((Message("user", prompt), Message("assistant", response)))


def child_of(source: Example, op: Any, prompt: str, response: str = "New.") -> Outcome:
    axis = {"simplify": "complexity", "rewrite": "quality", "synthesize": "diversity"}[op]
    lineage = Lineage((source.id,), source.root_id, 1, op, axis)
    return Outcome(Task(op, (axis,), source), source.replace_text(prompt, response, lineage))


# Overlap ---------------------------------------------------------------------------------------------

words = st.text("ab 我", max_size=40)


def test_shingles_are_word_triples_case_and_punctuation_aside() -> None:
    assert shingles("Name a bird, please!") == {("name", "a", "bird"), ("a", "bird", "please")}
    assert shingles("Why?") == {("why",)}
    assert shingles("春天来了") == {("春", "天", "来"), ("天", "来", "了")}
    assert shingles(" ... ") == frozenset()
    assert jaccard(shingles("Tell me a joke"), shingles("Tell me a story")) == pytest.approx(1 / 3)


@given(st.lists(words, max_size=8), words, st.floats(0.05, 1))
def test_the_index_finds_what_comparing_all_finds(texts: list[str], text: str, threshold: float) -> None:
    index = Overlaps(threshold)
    for known in texts:
        index.add(known)
    overlaps = [jaccard(shingles(known), shingles(text)) for known in texts]
    wanted = [(i, overlap) for i, overlap in enumerate(overlaps) if overlap >= threshold]
    assert list(index.matches(text)) == wanted


@given(words)
def test_a_text_is_its_own_duplicate(text: str) -> None:
    index = Overlaps(1.0)
    index.add(text.upper())
    assert [overlap for _, overlap in index.matches(text)] == [1.0] * bool(shingles(text))


# Duplicates ------------------------------------------------------------------------------------------

LONG = "the quick brown fox jumps over the lazy dog and runs into the dark green wood"


def test_equal_conversations_are_rejected_by_name() -> None:
    a, b = sample("a"), sample("b")
    repeats = [child_of(a, "rewrite", "c"), child_of(b, "rewrite", "c")]
    first, second = without_duplicates([a, b], repeats)
    assert first.example == repeats[0].example
    assert first.example is not None
    assert second.verdict == Verdict("duplicate", f"equals {first.example.id}")
    [held_out] = without_duplicates([a, b], repeats[:1], heldout=[first.example])
    assert held_out.example is None


def test_near_duplicates_of_known_prompts_are_rejected() -> None:
    core, other, unseen = sample("core"), sample(f"Sum up: {LONG}"), sample(f"Go on: {LONG}")

    def verdict(op: Any, prompt: str, training: list[Example], heldout: list[Example]) -> str | None:
        child = child_of(core, op, prompt)
        [outcome] = without_duplicates(training, [child], heldout=heldout, threshold=0.6)
        return None if outcome.verdict is None else str(outcome.verdict)

    for op in ("rewrite", "synthesize"):
        assert verdict(op, f"Shorten: {LONG}", [core], []) is None
        reason = verdict(op, f"Shorten: {LONG}", [core, other], [])
        assert reason == f"duplicate: 0.82 like {other.id}"
        reason = verdict(op, f"Shorten: {LONG}", [core], [unseen])
        assert reason == f"duplicate: 0.82 like held-out {unseen.id}"
    assert verdict("rewrite", "Core!", [core], []) is None  # its own original, which it replaces
    assert verdict("synthesize", "Core!", [core], []) == f"duplicate: 1.00 like {core.id}"


def test_what_is_alike_already_may_stay_so_but_not_for_held_out_samples() -> None:
    one, other = sample(f"Sum up: {LONG}"), sample(f"Translate: {LONG}")
    rewrite = child_of(one, "rewrite", f"Sum up in one sentence: {LONG}")
    [outcome] = without_duplicates([one, other], [rewrite], threshold=0.6)
    assert outcome.example is not None
    [outcome] = without_duplicates([one], [rewrite], heldout=[other], threshold=0.6)
    assert outcome.example is None


def test_children_alike_are_accepted_once() -> None:
    a, b, c = sample("a"), sample("b"), sample("c")
    outcomes = [
        Outcome(Task("rewrite", ("quality",), a), None, Verdict("loss", "worse")),
        child_of(b, "rewrite", f"Shorten: {LONG}"),
        child_of(c, "synthesize", f"Shorten now: {LONG}"),
    ]
    known = KnownTexts([], [], 0.6)
    rejected, first, second = without_duplicates([], outcomes, known=known)
    assert rejected == outcomes[0]
    assert first == outcomes[1]
    assert first.example is not None
    assert second.verdict == Verdict("duplicate", f"0.82 like {first.example.id}")
    [late] = without_duplicates([], outcomes[2:], known=known)  # in a later attempt
    assert late.verdict == second.verdict
    assert without_duplicates([], outcomes, threshold=None) == outcomes  # equality alone


# Growth ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("growth", "size"), [("free", None), ("keep", 1000), (0.05, 1050), (0.0, 1000), (0.0019, 1001)]
)
def test_the_maximum_size(growth: Any, size: int | None) -> None:
    assert max_size(1000, growth) == size


class Round:
    """A dataset, its neighbours and what an axis chose, drawn at random; and the merged dataset."""

    def __init__(self, draw: st.DrawFn) -> None:
        n = draw(st.integers(1, 14))
        self.examples = [sample(f"Q{i}") for i in range(n)]
        ids = [e.id for e in self.examples]
        self.selected = draw(st.sets(st.sampled_from(ids)))
        similarity = st.sampled_from([0.5, 0.9, 0.9, 1.0])
        self.neighbours: Neighbours = {
            i: sorted(((j, draw(similarity)) for j in ids if j != i), key=lambda pair: -pair[1])[:2]
            for i in ids
        }
        chosen = [e for e in self.examples if e.id in self.selected]
        outcomes = [
            child_of(e, op, f"{op} {e.id}")
            for e in chosen
            for op in draw(st.sets(st.sampled_from(["rewrite", "synthesize"])).map(sorted))
        ]
        self.replaced = {o.task.original.id for o in outcomes if o.task.op == "rewrite"}
        self.merged = merge(self.examples, outcomes)


rounds = st.composite(Round)()


@settings(max_examples=200)
@given(rounds, st.sampled_from(["free", "keep", 0.1, 0.5, 3.0]))
def test_the_size_is_what_was_asked_for_and_nothing_is_lost(case: Round, growth: Any) -> None:
    size = max_size(len(case.examples), growth)
    kept, dropped = fit(case.examples, case.merged, size, case.selected, case.neighbours)
    assert len(kept) == (len(case.merged) if size is None else min(size, len(case.merged)))
    kept_ids, dropped_ids = [e.id for e in kept], [d.example.id for d in dropped]
    assert sorted(kept_ids + dropped_ids) == sorted(e.id for e in case.merged)
    assert kept_ids == [e.id for e in case.merged if e.id in set(kept_ids)]  # in order
    for example in case.examples:
        assert (example.id in kept_ids) + (example.id in dropped_ids) + (example.id in case.replaced) == 1
    known = {e.id for e in case.examples}
    for row in dropped:
        if row.example.id in known:
            assert row.example.id not in case.selected
            assert row.nearest_id in {e.id for e in case.merged}
            assert row.reason.startswith("redundant: ")
        else:
            assert row.example.lineage.op == "synthesize"
            assert row.reason.startswith("no room: ")
        assert row.to_json()["example"]["lineage"]["root_id"]
    again = fit(case.examples, case.merged, size, case.selected, case.neighbours)
    assert again == (kept, dropped)


def test_the_most_redundant_go_first_and_one_of_a_pair_stays() -> None:
    core, *others = (sample(name) for name in ("core", "a", "a again", "far", "near core"))
    a, twin, far, near = others
    neighbours = {
        a.id: [(twin.id, 1.0), (far.id, 0.2)],
        twin.id: [(a.id, 1.0), (far.id, 0.2)],
        far.id: [(near.id, 0.3), (a.id, 0.2)],
        near.id: [(core.id, 0.7), (far.id, 0.3)],
        core.id: [(near.id, 0.7), (far.id, 0.1)],
    }
    dataset = [core, *others]
    additions = [child_of(core, "synthesize", f"new {i}").example for i in range(5)]

    def dropped(n: int) -> list[tuple[str, float | None]]:
        merged = [*dataset, *(e for e in additions[:n] if e)]
        kept, gone = fit(dataset, merged, len(dataset), {core.id}, neighbours)
        assert len(kept) == len(dataset)
        return [(d.example.prompt, d.similarity) for d in gone]

    first = min(a, twin, key=lambda e: e.id)
    assert dropped(1) == [(first.prompt, 1.0)]
    assert sorted(dropped(2)) == sorted([(first.prompt, 1.0), ("near core", 0.7)])
    # `far` stands for what it was near to, and for the twin that stayed there is still its other neighbour.
    assert sorted(name for name, _ in dropped(3))[-1] == "near core"
    reasons = {name for name, _ in dropped(5)}
    assert {"new 4"} <= reasons  # no room: too few may go
    assert "core" not in reasons


def test_what_the_refiner_ever_wrote_is_not_dropped() -> None:
    old = sample("old")
    written = child_of(old, "rewrite", "written").example
    assert written is not None
    twin, core = sample("twin"), sample("core")
    dataset = [written, twin, core]
    addition = child_of(core, "synthesize", "new").example
    assert addition is not None
    neighbours = {written.id: [(twin.id, 1.0)], twin.id: [(written.id, 1.0)]}
    kept, [gone] = fit(dataset, [*dataset, addition], 3, {core.id}, neighbours)
    assert gone.example == twin
    assert kept == [written, core, addition]
