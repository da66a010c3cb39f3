"""The table of gates: one order, asked once each, extended from outside; and what a verdict leads to."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from support.gate_verdicts import text_verdict

from middo_jax.config import ConfigError, GateSettings, RefineSettings, load
from middo_jax.config.gates import PHASES, Gate, Switch, gate, gates
from middo_jax.data.example import Example, Message
from middo_jax.refinement.acceptance import table
from middo_jax.refinement.acceptance.candidate import Candidate, Finding
from middo_jax.refinement.acceptance.table import asked, first_verdict, register, unregister
from middo_jax.refinement.rewrite import first_request
from middo_jax.refinement.tasks import Outcome, Task, Verdict

SWITCHES = {row.name: row.switch for row in gates() if isinstance(row.switch, Switch)}
OPEN = GateSettings(
    open=tuple(name for name, switch in SWITCHES.items() if not switch.has_bar),
    **{name: None for name, switch in SWITCHES.items() if switch.has_bar},
)


def sample(prompt: str, response: str = "Yes.") -> Example:
    return Example((Message("user", prompt), Message("assistant", response)))


def task(op: Any, *axes: str, prompt: str = "Q", response: str = "Yes.", **scores: float | None) -> Task:
    return Task(op, axes, sample(prompt, response), scores=scores)


HARD = task("simplify", "complexity", loss_post=3.0, quality=5.0, knn_mean_sim=0.9)
LOW = task("rewrite", "quality", loss_post=2.0, quality=5.0, knn_mean_sim=0.9)
BOTH = task("rewrite", "complexity", "quality", loss_post=3.0, quality=5.0, knn_mean_sim=0.9)
SPARSE = task("synthesize", "diversity", loss_post=2.0, quality=5.0, knn_mean_sim=0.8)


# The table -------------------------------------------------------------------------------------------


def test_gates_stand_in_the_order_of_what_they_need_and_each_says_what_to_do_better() -> None:
    rows = gates()
    assert [PHASES.index(row.needs) for row in rows] == sorted(PHASES.index(row.needs) for row in rows)
    assert len({row.name for row in rows}) == len(rows)
    assert set(GateSettings().values()) == {row.setting for row in rows if row.setting}
    assert set(GateSettings.model_fields) == {"open", *(name for name, s in SWITCHES.items() if s.has_bar)}
    for row in rows:
        assert row.feedback
        assert row.title
        assert row.rule.endswith(".")
        assert not any(c.isdigit() for text in row.feedback.values() for c in text)


def test_a_candidate_meets_the_gates_in_the_order_of_the_table_and_each_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    met: list[str] = []
    stops: set[str] = set()

    def recording(name: str) -> Any:
        def check(candidate: Candidate, value: Any) -> Finding | None:
            met.append(name)
            return Finding("so it was", next(iter(gate(name).feedback))) if name in stops else None

        return check

    for row in gates():
        monkeypatch.setitem(table._CHECKS, row.name, recording(row.name))

    def verdict(of: Task, settings: RefineSettings) -> Verdict | None:
        met.clear()
        candidate = Candidate(of)
        return next((v for needs in PHASES if (v := first_verdict(candidate, needs, settings))), None)

    every = set()
    for of in (HARD, LOW, BOTH, SPARSE):
        shut = RefineSettings(gates=GateSettings(agreement=0.5))  # the one that is open by default
        for settings in (shut, RefineSettings(accept="sane"), RefineSettings(accept="none")):
            stops.clear()
            assert verdict(of, settings) is None
            whole = list(met)
            names = [row.name for row in gates()]
            assert whole == [name for name in names if name in whole]
            for place, name in enumerate(whole):
                stops.clear()
                stops.update(whole[place:])  # whatever else is wrong with it
                assert verdict(of, settings) == Verdict(name, "so it was")
                assert met == whole[: place + 1]
            every |= set(whole)
    assert every == {row.name for row in gates()}


def test_what_refine_accept_asks() -> None:
    def names(of: Task, **settings: Any) -> list[str]:
        return [row.name for needs in PHASES for row in asked(needs, of.axes, RefineSettings(**settings))]

    assert names(HARD, accept="none") == ["readable", "answer_readable", "duplicate"]
    by_text = ["readable", "sane", "numbers", "code", "language", "answer_readable", "answer_sane"]
    assert names(HARD, accept="sane") == [*by_text, "answer_language", "length", "duplicate"]
    assert names(HARD, gates=OPEN) == ["readable", "sane", "answer_readable", "answer_sane", "duplicate"]
    new = ["coverage", "novelty", "distribution"]
    assert [name for name in names(SPARSE) if name in (*new, "context", "loss", "quality")] == new
    measured = ["context", "information", "ending", "floor", "loss", "quality", "duplicate"]
    assert names(BOTH)[-7:] == measured
    assert names(LOW)[-5:] == [name for name in measured if name not in ("floor", "loss")]


def test_a_gate_from_outside_is_asked_in_its_place_and_is_a_setting() -> None:
    """Its row and its check are all that it takes."""

    def polite(candidate: Candidate, wanted: float) -> Finding | None:
        said = candidate.response.lower().count("please")
        return None if said >= wanted else Finding(f"please said {said} times, {wanted:g} wanted")

    row = Gate(
        "polite",
        needs="answer",
        accept="sane",
        of="hard",
        title="politely answered",
        rule="The answer says please this often.",
        feedback={"": "It was rude."},
        switch=Switch(1.0, ge=0),
    )
    register(row, polite)
    try:
        assert [r.name for r in gates()].index("polite") == [r.name for r in gates()].index("agreement") - 1
        with pytest.raises(ValueError, match="a gate called 'polite' already"):
            register(row, polite)
        of = task("simplify", "complexity", prompt="Prove it.")
        rude = text_verdict(of, "Why?", "So.")
        assert rude == Verdict("polite", "please said 0 times, 1 wanted")
        assert rude is not None
        assert rude.feedback == "It was rude."
        assert text_verdict(of, "Why?", "Please see.") is None
        assert text_verdict(LOW, "Why?", "So.") is None
        given = ["model.path=m", "data.path=d", "refine.gates.polite=2"]
        twice = load(None, given).refine
        assert text_verdict(of, "Why?", "Please see.", settings=twice) == Verdict(
            "polite", "please said 1 times, 2 wanted"
        )
        assert text_verdict(of, "Why?", "So.", settings=RefineSettings(gates={"polite": None})) is None  # type: ignore
        assert "polite: 2.0" in load(None, given).to_yaml()
        with pytest.raises(ConfigError, match=r"refine\.gates\.polite: .*greater than or equal to 0"):
            load(None, ["model.path=m", "data.path=d", "refine.gates.polite=-1"])
    finally:
        unregister("polite")
    assert text_verdict(of, "Why?", "So.") is None
    with pytest.raises(ConfigError, match=r"refine\.gates\.polite is not a setting"):
        load(None, given)


def test_a_setting_may_be_shared_but_only_one_that_exists() -> None:
    row = dataclasses.replace(gate("answer_language"), name="other", switch="polite")
    with pytest.raises(ValueError, match="no gate is called 'polite'"):
        register(row, lambda candidate, value: None)
    with pytest.raises(KeyError):
        gate("other")


# Verdicts and attempts --------------------------------------------------------------------------------


def test_what_a_gate_rejected_is_tried_again_and_told_why() -> None:
    told = {name: gate(name).feedback[""] for name in ("loss", "context")}
    again = Outcome(HARD, None, Verdict("loss", "3.000 -> 3.100, at most 2.500 wanted")).next_attempt()
    assert again is not None
    assert (again.attempt, again.feedback, again.task_id) == (1, (told["loss"],), HARD.task_id)
    first, second = (first_request(t, RefineSettings()) for t in (HARD, again))
    assert second[:-1] == first[:-1]
    assert second[-1]["content"].endswith(first[-1]["content"])
    assert told["loss"] in second[-1]["content"]
    third = Outcome(again, None, Verdict("context", "0.1 similar to the original")).next_attempt()
    assert third is not None
    assert third.feedback == (told["loss"], told["context"])
    same = Outcome(third, None, Verdict("loss", "again")).next_attempt()
    assert same is not None
    assert (same.attempt, same.feedback) == (3, third.feedback)


def test_what_no_gate_rejected_is_not_tried_again() -> None:
    assert Outcome(HARD, None, Verdict(None, "request refused (400): too long")).next_attempt() is None
    assert Outcome(HARD, None, Verdict(None, "budget")).next_attempt() is None
    assert Outcome(HARD, sample("Q2")).next_attempt() is None


def test_a_gates_faults_are_told_apart_to_the_refiner() -> None:
    of = task("simplify", "complexity", prompt="Prove it.")
    empty, copied = text_verdict(of, " ", "So."), text_verdict(of, "PROVE it.", "So.")
    assert empty is not None
    assert copied is not None
    assert empty.feedback == "It was empty."
    assert copied.feedback == "It changed nothing. Make a real change."
