"""The gates: what a rewrite must keep of its original's text, and by what its measurement is accepted."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.gate_verdicts import prompt_verdict, text_verdict

from middo_jax.config import ConfigError, GateSettings, RefineSettings
from middo_jax.data.example import Example, Message
from middo_jax.refinement.acceptance.agreement import agreement
from middo_jax.refinement.acceptance.candidate import Candidate, Limits, Measurement
from middo_jax.refinement.acceptance.context import changed_numbers, code_blocks, lost_code, numbers
from middo_jax.refinement.acceptance.language import changed_language, languages, load_identifier
from middo_jax.refinement.acceptance.measured import length_bounds, pair_similarity
from middo_jax.refinement.acceptance.refusal import is_refusal
from middo_jax.refinement.acceptance.table import asked, first_verdict
from middo_jax.refinement.tasks import Task, Verdict

GATES = GateSettings()
NEW = ("information", "ending", "floor")
OPEN = GateSettings(
    open=("numbers", "code", "language", "loss", "coverage", "distribution", "quality", *NEW),
    length=None,
    duplicate=None,
    context=None,
    novelty=None,
)
ENGLISH = "Explain in one or two sentences why leaves turn red in autumn."
GERMAN = "Erkläre in ein oder zwei Sätzen, warum sich die Blätter im Herbst rot färben."
CHINESE = "请用一两句话解释为什么秋天树叶会变红,以及为什么有些树叶会变黄。"
CODE = "What does this print?\n```python\nfor i in range(3):\n    print(i)\n```"


def sample(prompt: str, response: str = "Yes.") -> Example:
    return Example((Message("user", prompt), Message("assistant", response)))


def task(op: Any, *axes: str, prompt: str = "Q", response: str = "Yes.", **scores: float | None) -> Task:
    return Task(op, axes, sample(prompt, response), scores=scores)


HARD = task("simplify", "complexity", loss_post=3.0, quality=5.0, knn_mean_sim=0.9)
LOW = task("rewrite", "quality", loss_post=2.0, quality=5.0, knn_mean_sim=0.9)
BOTH = task("rewrite", "complexity", "quality", loss_post=3.0, quality=5.0, knn_mean_sim=0.9)
SPARSE = task("synthesize", "diversity", loss_post=2.0, quality=5.0, knn_mean_sim=0.8)
LIMITS = Limits(
    loss=2.5,
    context=0.9,
    novelty=0.96,
    prompt_chars=(2, 100),
    response_chars=(1, 100),
    end_nll=0.5,
    floor=0.75,
)
GOOD = Measurement(
    loss=1.0,
    similarity=0.95,
    nearest=0.95,
    knn_similarity=0.9,
    core_similarity=0.85,
    quality=6.0,
    end_nll=0.5,
    pmi=20.0,
    reverse_ifd=0.75,
    original_pmi=20.0,
    original_reverse_ifd=0.75,
)

# Numbers, code, language -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Add 12 and 7 to 12.", ["12", "7"]),
        ("1,000 and 1.000 and 1000", ["1000"]),
        ("2,50 or 2.5 or 10.00", ["2.5", "10"]),
        ("1. Boil 3 eggs.\n2) Peel them.", ["3"]),
        ("COVID-19, 1st, H2O, 50%, ٣, ４", ["19", "1", "2", "50%", "3", "4"]),
        ("v1.2.3 of 2019/07/14", ["1.2.3", "2019", "7", "14"]),
        ("None.", []),
    ],
)
def test_numbers(text: str, found: list[str]) -> None:
    assert numbers(text) == found


def test_a_rewrite_keeps_every_number() -> None:
    assert changed_numbers("Take 15% off 120 euros.", "What is left of 120 euros after 15 percent?") is None
    assert changed_numbers("Name 3 birds.", "Name three birds and say what they eat.") is None
    assert changed_numbers("Name a bird.", "Name 5 birds.") is None
    assert changed_numbers("Take 15% off 120.", "What is 10% of 120?") == "15% not kept"
    assert changed_numbers("1, 2, 3, 4, 5, 6", "none") == "1, 2, 3, 4 and 2 more not kept"


def test_a_simpler_prompt_may_lose_numbers_or_gain_some_but_not_exchange_them() -> None:
    def changed(original: str, rewrite: str) -> str | None:
        return changed_numbers(original, rewrite, exchanged_only=True)

    assert changed("Divide 156 by 12, then by 2.", "Divide 156 by 12.") is None
    assert changed("Prove the formula.", "Compute 1 + 2 + 3.") is None
    assert changed("Divide 156 by 12.", "Divide 150 by 10.") == "150, 10 instead of 156, 12"


@given(st.text(), st.text())
def test_what_holds_the_original_keeps_its_numbers_and_code(original: str, more: str) -> None:
    # In lines of their own: "1" beside "2" would be another number, and "5." at a line's start none.
    assert changed_numbers(original, f"{original}\n. {more}") is None
    assert lost_code(original, f"{original}\n. {more}") is None


def test_code_blocks_are_kept_word_for_word() -> None:
    assert code_blocks(CODE) == ["for i in range(3):\n    print(i)"]
    assert lost_code(CODE, CODE.replace("What does this print?", "Explain:")) is None
    assert lost_code(CODE, CODE.replace("print(i)", "print(i)  ")) is None  # spaces that nobody sees
    assert lost_code(CODE, "What does it print?") == "a block of 2 lines not kept"
    assert lost_code(CODE, CODE.replace("    print", "print")) == "a block of 2 lines not kept"
    assert lost_code("No code.", "None.") is None


def test_languages_are_told_apart_or_not_told() -> None:
    assert [languages(text)[0] for text in (ENGLISH, GERMAN, CHINESE)] == ["en", "de", "zh"]
    for text in ("Name a bird.", "1 + 1 = 2", "", "```\nfor i in range(30): print(the_number_of_all_i)\n```"):
        assert languages(text) == ()
    assert changed_language(GERMAN, [ENGLISH]) == "de instead of en"
    assert changed_language(GERMAN, [ENGLISH, GERMAN]) is None
    assert changed_language(GERMAN, ["Hm."]) is None  # nothing to compare with
    assert changed_language("Hm.", [ENGLISH]) is None


def test_a_missing_package_is_an_error_that_names_the_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "py3langid.langid", None)
    load_identifier.cache_clear()
    with pytest.raises(ConfigError, match=r"py3langid.* refine\.gates\.open=\[language\]"):
        languages(ENGLISH)


def test_prompts_stay_in_their_language_and_answers_in_theirs_or_the_prompts() -> None:
    def check(prompt: str, response: str, original: str = ENGLISH, answered: str = ENGLISH) -> Verdict | None:
        of = task("rewrite", "quality", prompt=original, response=answered)
        return text_verdict(of, f"{prompt} Please.", response)

    assert check(ENGLISH, ENGLISH) is None
    assert check(GERMAN, ENGLISH) == Verdict("language", "prompt in de instead of en")
    assert check(ENGLISH, GERMAN) == Verdict("answer_language", "answer in de instead of en")
    assert check(ENGLISH, GERMAN, answered=GERMAN) is None  # a translation stays one
    assert check(ENGLISH, ENGLISH, answered=GERMAN) is None  # answered in the language of the question
    assert check(ENGLISH, GERMAN, answered="Rot.") is None
    translate = task("synthesize", "diversity", prompt=ENGLISH, response=ENGLISH)
    assert text_verdict(translate, f"{ENGLISH} In German.", GERMAN) is None
    assert text_verdict(translate, GERMAN, ENGLISH) is not None


def test_text_gates_are_asked_before_an_answer_is_paid_for() -> None:
    settings = RefineSettings()
    numbered = task("rewrite", "quality", prompt="Divide 156 by 12.")
    simpler = task("simplify", "complexity", prompt="Divide 156 by 12, then by 2.")
    coded = task("simplify", "complexity", prompt=CODE)
    assert prompt_verdict(numbered, "Divide 156 by 13.", settings) == Verdict("numbers", "12 not kept")
    assert prompt_verdict(simpler, "Divide 156 by 12.", settings) is None
    lost = prompt_verdict(coded, "Explain a loop.", settings)
    assert lost == Verdict("code", "a block of 2 lines not kept")
    for loose in (RefineSettings(gates=OPEN), RefineSettings(accept="none")):
        for any_task in (numbered, simpler, coded):
            assert prompt_verdict(any_task, GERMAN, loose) is None


@pytest.mark.parametrize(
    "text",
    [
        "Es tut mir leid, aber ich kann dabei nicht helfen.",
        "Je suis désolé, mais je ne peux pas répondre à cette demande.",
        "Lo siento, pero no puedo ayudar con eso.",
        "Desculpe, mas não posso ajudar com isso.",
        "Mi dispiace, ma non posso aiutarti.",
        "抱歉,我无法回答这个问题。",
        "申し訳ありませんが、お手伝いできません。",
        "죄송하지만 도와드릴 수 없습니다.",
    ],
)
def test_refusals_elsewhere(text: str) -> None:
    assert is_refusal(text)


@pytest.mark.parametrize(
    "text",
    ["Es tut mir leid, dass ich so spät schreibe.", "Lo siento mucho por la espera.", "对不起,我来晚了。"],
)
def test_apologies_are_no_refusals(text: str) -> None:
    assert not is_refusal(text)


# Measured gates --------------------------------------------------------------------------------------

numbers_or_none = st.none() | st.floats(-2, 12)
measurements = st.builds(
    Measurement,
    loss=numbers_or_none,
    similarity=numbers_or_none,
    nearest=numbers_or_none,
    knn_similarity=numbers_or_none,
    core_similarity=numbers_or_none,
    truncated=st.booleans(),
    quality=numbers_or_none,
    end_nll=numbers_or_none,
    pmi=numbers_or_none,
    reverse_ifd=numbers_or_none,
    original_pmi=numbers_or_none,
    original_reverse_ifd=numbers_or_none,
)
limits = st.builds(
    Limits, loss=numbers_or_none, context=numbers_or_none, novelty=numbers_or_none, end_nll=numbers_or_none
)
known_scores = st.fixed_dictionaries(
    {"loss_post": st.floats(0, 10), "quality": st.floats(0, 10), "knn_mean_sim": st.floats(-1, 1)}
)
kinds = st.sampled_from([HARD, LOW, BOTH, SPARSE])


def verdict(asked: Task, measured: Measurement, bars: Limits, gates: GateSettings) -> Verdict | None:
    """Of the dataset's lengths, the measurement and the rating."""
    settings = RefineSettings(gates=gates)
    candidate = Candidate(
        asked, example=sample("What?"), truncated=measured.truncated, limits=bars, measured=measured
    )
    phases = ("dataset", "measurement", "rating")
    return next((v for needs in phases if (v := first_verdict(candidate, needs, settings))), None)


def accepted(asked: Task, measured: Measurement, bars: Limits, gates: GateSettings) -> bool:
    return verdict(asked, measured, bars, gates) is None


@given(kinds, known_scores, measurements, limits)
def test_a_candidate_that_is_no_better_on_its_own_axis_is_never_accepted(
    kind: Task, scores: Any, measured: Measurement, bars: Limits
) -> None:
    asked = dataclasses.replace(kind, scores=scores)
    if not accepted(asked, measured, bars, GATES):
        return
    if "complexity" in asked.axes:
        assert measured.loss is not None
        assert measured.loss < scores["loss_post"]
        assert bars.loss is None or measured.loss <= bars.loss
    if "quality" in asked.axes:
        assert measured.quality is not None
        assert measured.quality > scores["quality"]
    if "diversity" in asked.axes:
        assert measured.core_similarity is not None
        assert measured.core_similarity > scores["knn_mean_sim"]
        assert measured.knn_similarity is not None
        assert measured.knn_similarity >= scores["knn_mean_sim"]


@given(kinds, known_scores, measurements)
def test_with_every_gate_open_everything_is_accepted(kind: Task, scores: Any, measured: Measurement) -> None:
    assert accepted(dataclasses.replace(kind, scores=scores), measured, Limits(), OPEN)


@given(kinds, measurements)
def test_a_better_candidate_is_never_refused_where_a_worse_one_is_not(kind: Task, worse: Measurement) -> None:
    better = dataclasses.replace(
        worse,
        loss=None if worse.loss is None else worse.loss - 1,
        core_similarity=None if worse.core_similarity is None else worse.core_similarity + 1,
        quality=None if worse.quality is None else worse.quality + 1,
    )
    bars = dataclasses.replace(LIMITS, floor=None)  # a lower loss is better down to the floor
    assert accepted(kind, better, bars, GATES) >= accepted(kind, worse, bars, GATES)


def test_one_direction_of_information_is_enough() -> None:
    for change in ({"pmi": 17.9}, {"reverse_ifd": 0.766}, {"pmi": None}, {"reverse_ifd": None}):
        assert accepted(LOW, dataclasses.replace(GOOD, **change), LIMITS, GATES), change
    little = dataclasses.replace(GOOD, pmi=18.1, reverse_ifd=0.9)
    assert accepted(LOW, little, LIMITS, GATES)
    against = dataclasses.replace(GOOD, original_pmi=-20.0, reverse_ifd=0.9)
    assert accepted(LOW, dataclasses.replace(against, pmi=-21.9), LIMITS, GATES)
    assert not accepted(LOW, dataclasses.replace(against, pmi=-22.1), LIMITS, GATES)
    lost = dataclasses.replace(GOOD, pmi=17.9, reverse_ifd=0.766)
    assert not accepted(LOW, lost, LIMITS, GATES)
    assert accepted(SPARSE, lost, LIMITS, GATES)  # it replaces nothing
    turns = Example((*sample("Q").messages, *sample("Q2").messages))
    assert accepted(dataclasses.replace(LOW, original=turns), lost, LIMITS, GATES)


def test_the_loss_is_not_asked_of_a_refiner_that_is_the_model_under_training() -> None:
    own = dataclasses.replace(LIMITS, refines_itself=True)
    high, low = (dataclasses.replace(GOOD, loss=loss) for loss in (4.0, 0.7))
    assert verdict(HARD, high, LIMITS, GATES) == Verdict("loss", "3.000 -> 4.000, at most 2.500 wanted")
    assert accepted(HARD, high, own, GATES)
    assert verdict(HARD, low, own, GATES) == Verdict("floor", "loss 0.700, at least 0.750 wanted")
    unknown = dataclasses.replace(GOOD, loss=None)
    assert verdict(LOW, unknown, own, GATES) == Verdict("floor", "loss unknown, at least 0.750 wanted")
    assert verdict(LOW, low, own, GATES) == Verdict("floor", "loss 0.700, at least 0.750 wanted")
    assert accepted(LOW, low, LIMITS, GATES)  # another refiner's plain answer is no fault


@pytest.mark.parametrize(
    ("asked", "change", "name", "detail"),
    [
        (HARD, {"loss": 2.6}, "loss", "3.000 -> 2.600, at most 2.500 wanted"),
        (HARD, {"similarity": 0.89}, "context", "0.890 similar to the original, 0.900 wanted"),
        (HARD, {"similarity": None}, "context", "unknown similar to the original, 0.900 wanted"),
        (HARD, {"truncated": True}, "length", "over model.max_length"),
        (
            HARD,
            {"pmi": 17.9, "reverse_ifd": 0.766},
            "information",
            "PMI 20.000 -> 17.900, reverse IFD 0.750 -> 0.766",
        ),
        (
            LOW,
            {"pmi": None, "reverse_ifd": None},
            "information",
            "PMI 20.000 -> unknown, reverse IFD 0.750 -> unknown",
        ),
        (LOW, {"end_nll": 0.6}, "ending", "the end's loss is 0.600, at most 0.500 wanted"),
        (LOW, {"end_nll": None}, "ending", "the end's loss is unknown, at most 0.500 wanted"),
        (BOTH, {"loss": 0.7}, "floor", "loss 0.700, at least 0.750 wanted"),
        (LOW, {"quality": 5.0}, "quality", "5.000 -> 5.000, a rise wanted"),
        (LOW, {"quality": None}, "quality", "5.000 -> unknown, a rise wanted"),
        (BOTH, {"loss": 2.6}, "loss", "3.000 -> 2.600, at most 2.500 wanted"),
        (BOTH, {"quality": 4.0}, "quality", "5.000 -> 4.000, a rise wanted"),
        (
            SPARSE,
            {"core_similarity": 0.8},
            "coverage",
            "0.950 similar to its core, no nearer than its neighbours",
        ),
        (SPARSE, {"nearest": 0.97}, "novelty", "0.970 similar to a sample, at most 0.960 wanted"),
        (
            SPARSE,
            {"knn_similarity": 0.79},
            "distribution",
            "farther out than its core, 0.800 -> 0.790",
        ),
        (SPARSE, {"loss": 2.6}, "distribution", "loss 2.600, hard from 2.500 on"),
    ],
)
def test_each_gate_alone_rejects_and_alone_can_be_opened(
    asked: Task, change: dict[str, Any], name: str, detail: str
) -> None:
    measured = dataclasses.replace(GOOD, **change)
    assert accepted(asked, GOOD, LIMITS, GATES)
    assert verdict(asked, measured, LIMITS, GATES) == Verdict(name, detail)
    opened = GateSettings(open=(name,)) if GATES.value(name) is True else GateSettings(**{name: None})
    assert verdict(asked, measured, LIMITS, opened) is None


def test_only_what_the_judge_has_to_rate_is_rated() -> None:
    def rated(gates: GateSettings) -> list[bool]:
        return [bool(asked("rating", t.axes, RefineSettings(gates=gates))) for t in (HARD, LOW, BOTH, SPARSE)]

    assert rated(GATES) == [False, True, True, False]
    assert not any(rated(OPEN))


def test_lengths_are_those_of_the_dataset() -> None:
    bounds = length_bounds(np.arange(1, 101), 2.0)
    np.testing.assert_allclose(bounds, (1.99 / 2, 99.01 * 2))
    bars = Limits(prompt_chars=(4, 8), response_chars=(2, 6))

    def check(prompt: str, response: str) -> Verdict | None:
        candidate = Candidate(HARD, example=sample(prompt, response), limits=bars)
        return first_verdict(candidate, "dataset", RefineSettings())

    assert check("12345", "1234") is None
    assert check("123", "1234") == Verdict("length", "prompt of 3 characters, 4 to 8 wanted")
    assert check("12345", "1" * 7) == Verdict("length", "response of 7 characters, 2 to 6 wanted")


# What sets the bars ----------------------------------------------------------------------------------


def test_pair_similarity_is_the_quantile_over_all_pairs() -> None:
    embedding_nd = np.random.default_rng(0).standard_normal((40, 8)).astype(np.float32)
    unit_nd = embedding_nd / np.linalg.norm(embedding_nd, axis=1, keepdims=True)
    every = (unit_nd @ unit_nd.T)[~np.eye(40, dtype=bool)]
    for quantile in (0.5, 0.95):
        wanted = float(np.quantile(every, quantile))
        assert pair_similarity(embedding_nd, quantile) == pytest.approx(wanted, abs=1e-6)
        assert pair_similarity(embedding_nd * 7.0, quantile) == pytest.approx(wanted, abs=1e-6)


def test_pair_similarity_of_many_samples_is_near_that_of_all() -> None:
    embedding_nd = np.random.default_rng(1).standard_normal((3000, 4)).astype(np.float32) + 0.5
    unit_nd = embedding_nd / np.linalg.norm(embedding_nd, axis=1, keepdims=True)
    every = (unit_nd @ unit_nd.T)[~np.eye(3000, dtype=bool)]
    estimate = pair_similarity(embedding_nd, 0.95)
    assert estimate is not None
    assert 0.945 < (every < estimate).mean() < 0.955


def test_rows_without_a_direction_set_no_bar() -> None:
    assert pair_similarity(np.ones((1, 4), np.float32), 0.95) is None
    assert pair_similarity(np.zeros((3, 4), np.float32), 0.95) is None
    with_one_lost = np.array([[1, 0], [0, 1], [np.nan, 0]], np.float32)
    assert pair_similarity(with_one_lost, 0.5) == pytest.approx(0.0)


# The answer to the old prompt ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "other", "wanted"),
    [
        ("Paris.", "paris", 1.0),
        ("Lyon", "Paris", 0.0),
        ("It is 12.", "12", 1.0),
        ("It is 12.", "It is 13.", 0.0),
        ("1,000", "1000", 1.0),
        ("The sky is blue on clear days", "On clear days the sky looks blue to us", 2 * 6 / 16),
        ("Paris", "The capital of France is Paris", 2 / 7),  # one of them is long
        ("", "", 1.0),
    ],
)
def test_agreement(one: str, other: str, wanted: float) -> None:
    assert agreement(one, other) == agreement(other, one) == pytest.approx(wanted)


@given(st.text(), st.text())
def test_agreement_is_a_share_and_each_text_agrees_with_itself(one: str, other: str) -> None:
    assert 0 <= agreement(one, other) <= 1
    assert agreement(one, one) == 1


def test_the_agreement_gate_is_open_until_it_has_a_bar() -> None:
    candidate = Candidate(LOW, response="Paris.", again="Lyon.")
    closed = RefineSettings(gates=GateSettings(agreement=0.5))
    assert first_verdict(candidate, "again", RefineSettings(gates=GATES)) is None
    assert first_verdict(candidate, "again", closed) == Verdict(
        "agreement", "agreement 0.00 with its answer to the old prompt"
    )
    assert first_verdict(dataclasses.replace(candidate, again="paris"), "again", closed) is None
    missing = first_verdict(dataclasses.replace(candidate, again=None), "again", closed)
    assert missing == Verdict("agreement", "the old prompt got no whole answer")
    assert first_verdict(dataclasses.replace(candidate, task=SPARSE), "again", closed) is None
