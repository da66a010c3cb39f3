"""Each of IFEval's 25 kinds of instructions, with a response that follows it and one that does not."""

from __future__ import annotations

from typing import Any

import pytest

from middo_jax.evaluation.offline.instructions import CHECKS, follows, sentences, variants

ENGLISH = "the weather is nice today and we will walk along the river with our old dog"
GERMAN = "Das Wetter ist heute schön, und wir gehen mit unserem alten Hund am Fluss entlang."
AT_LEAST, LESS = "at least", "less than"
# id, arguments, what follows, what does not
CASES: list[tuple[str, dict[str, Any], list[str], list[str]]] = [
    ("keywords:existence", {"keywords": ["river", "Dog"]}, ["A dog by the RIVER."], ["A dog.", "A river."]),
    (
        "keywords:frequency",
        {"keyword": "river", "frequency": 2, "relation": AT_LEAST},
        ["River, river!", "a river of rivers"],
        ["One river."],
    ),
    (
        "keywords:frequency",
        {"keyword": "river", "frequency": 2, "relation": LESS},
        ["One river.", "None."],
        ["River, river!"],
    ),
    ("keywords:forbidden_words", {"forbidden_words": ["cat"]}, ["A category."], ["A Cat.", "cat"]),
    (
        "keywords:letter_frequency",
        {"letter": "e", "let_frequency": 3, "let_relation": AT_LEAST},
        ["Eleven"],
        ["Else"],
    ),
    ("language:response_language", {"language": "de"}, [GERMAN], [ENGLISH]),
    (
        "length_constraints:number_sentences",
        {"num_sentences": 3, "relation": LESS},
        ["One. Two!", "Mr. Smith went to St. Paul. He stayed.", "It is 3.5 miles."],
        ["One. Two! Three?"],
    ),
    (
        "length_constraints:number_paragraphs",
        {"num_paragraphs": 2},
        ["a\n***\nb", "***\na\n***\nb"],
        ["a\n\nb", "a *** b *** c"],
    ),
    (
        "length_constraints:number_words",
        {"num_words": 3, "relation": AT_LEAST},
        ["one two three", "one two three four"],
        ["one two", "one - two"],
    ),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "However"},
        ["a\n\nhowever, b", 'a\n\n"However" b'],
        ["However\n\nb", "a\n\nhowever\n\nc", "a however"],
    ),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, ["[name], [place]"], ["[name]"]),
    (
        "detectable_content:postscript",
        {"postscript_marker": "P.S."},
        ["Bye.\nP.S. x", "p. s. x"],
        ["Bye.", "ps"[:1]],
    ),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, ["P.P.S x"], ["P.S. x"]),
    (
        "detectable_format:number_bullet_lists",
        {"num_bullets": 2},
        ["* a\n* b", "- a\n* b"],
        ["* a", "**a**\n* b"],
    ),
    ("detectable_format:constrained_response", {}, ["My answer is maybe."], ["Maybe.", "my answer is yes"]),
    (
        "detectable_format:number_highlighted_sections",
        {"num_highlights": 2},
        ["*a* and **b**"],
        ["*a*", "* a\n* b"],
    ),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "SECTION", "num_sections": 2},
        ["SECTION 1\na\nSECTION 2\nb"],
        ["SECTION 1\na\nSECTION two\nb"],
    ),
    ("detectable_format:json_format", {}, ['{"a": [1]}', '```json\n{"a": 1}\n```'], ['{"a": 1', "Here: {}"]),
    ("detectable_format:title", {}, ["<<A title>>\ntext"], ["<A title>", "<< >>"]),
    ("combination:two_responses", {}, ["a\n******\nb"], ["a\n******\na", "a", "a******b******c", "a******"]),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say it."}, ["say it. It."], ["It. Say it."]),
    (
        "startend:end_checker",
        {"end_phrase": "Any questions?"},
        ["So. any questions?", '"Any questions?"'],
        ["Any questions? No."],
    ),
    ("startend:quotation", {}, ['"All of it."'], ['"', '"Part" of it', "none"]),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": AT_LEAST},
        ["NASA AND others", "WELL-KNOWN ABC"],
        ["NASA and Others"],
    ),
    ("change_case:english_capital", {}, [ENGLISH.upper()], [ENGLISH, GERMAN.upper()]),
    ("change_case:english_lowercase", {}, [ENGLISH], [ENGLISH.upper(), GERMAN.lower()]),
    ("punctuation:no_comma", {}, ["No comma here."], ["Well, one."]),
]


def test_every_kind_has_a_case() -> None:
    assert {name for name, *_ in CASES} == set(CHECKS)
    assert len(CHECKS) == 25


@pytest.mark.parametrize(
    ("name", "arguments", "good", "bad"), CASES, ids=[f"{c[0]}-{i}" for i, c in enumerate(CASES)]
)
def test_what_follows_and_what_does_not(
    name: str, arguments: dict[str, Any], good: list[str], bad: list[str]
) -> None:
    assert [follows(text, name, arguments) for text in good] == [True] * len(good)
    assert [follows(text, name, arguments) for text in bad] == [False] * len(bad)
    assert not follows(" \n", name, arguments)


def test_loosely_a_first_or_a_last_line_is_no_fault() -> None:
    quoted = 'Sure, here it is:\n"All of it."\nI hope this helps.'
    assert not follows(quoted, "startend:quotation", {})
    assert follows(quoted, "startend:quotation", {}, loose=True)
    assert follows("**My answer is** yes.", "detectable_format:constrained_response", {}, loose=True)
    assert variants("a\n*b*\nc")[3] == "*b*"
    assert len(variants("a")) == 8


def test_arguments_that_are_null_are_left_out_and_wrong_ones_are_errors() -> None:
    assert follows("a", "punctuation:no_comma", {"keywords": None})
    with pytest.raises(KeyError):
        follows("a", "keywords:none", {})
    with pytest.raises(TypeError):
        follows("a", "keywords:existence", {})
    with pytest.raises(ValueError, match="neither 'at least' nor"):
        follows("a", "keywords:frequency", {"keyword": "a", "frequency": 1, "relation": "about"})


def test_sentences_end_where_a_reader_ends_them() -> None:
    assert sentences('He said "Go!" Then he went. e.g. here') == [
        'He said "Go!"',
        "Then he went.",
        "e.g. here",
    ]
    assert sentences("A title\n\nText without an end") == ["A title", "Text without an end"]
    assert sentences(" \n . ") == []
