"""Refusals in several languages and dresses, and honest texts that open alike.

`refusals.jsonl` is a table of both. Its rows with `held_out` were written and marked before the phrases were
chosen; they were written by the same author, so that they say less than texts of strangers would.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import TypedDict

import pytest

from middo_jax.refinement.acceptance.refusal import is_refusal


class Row(TypedDict):
    """A text of the table, and whether it declines."""

    text: str
    language: str
    refusal: bool
    kind: str
    held_out: bool


TABLE = Path(__file__).with_name("refusals.jsonl")
ROWS: list[Row] = [json.loads(line) for line in TABLE.read_text(encoding="utf-8").splitlines()]
REFUSALS = """\
很抱歉，我不能提供这方面的帮助。
对不起，我无法回答这个问题。
抱歉，但我无法协助您完成此请求。
抱歉,我无法回答这个问题。
**I'm sorry, but I can't help with that request.**
"I'm sorry, but I cannot assist with that."
> I cannot help with that.
Response: I'm sorry, but I can't help with that.
К сожалению, я не могу ответить на этот вопрос.
Извините, но я не могу помочь вам с этим.
Es tut mir leid, aber ich kann dir dabei nicht helfen.
Leider kann ich diese Anfrage nicht beantworten.
Je suis désolé, mais je ne peux pas vous aider avec cela.
Lo siento, pero no puedo ayudarte con eso.
Desculpe, mas não posso ajudar com isso.
Mi dispiace, ma non posso aiutarti con questa richiesta.
Het spijt me, maar ik kan je daar niet mee helpen.
Przykro mi, ale nie mogę pomóc w tej sprawie.
Üzgünüm, bu konuda yardımcı olamam.
Maaf, saya tidak dapat membantu dengan permintaan itu.
Xin lỗi, tôi không thể giúp bạn việc này.
申し訳ありません。そのご質問にはお答えできません。
죄송합니다. 그 요청은 도와드릴 수 없습니다.
""".splitlines()
HONEST = """\
Lo siento, no puedo ir a la fiesta.
Désolé, je ne peux pas passer ce soir.
Es tut mir leid, aber ich kann morgen nicht kommen.
К сожалению, магазин закрыт.
К сожалению, я не могу прийти завтра.
对不起，我不能来参加会议。
抱歉，我迟到了。
Mi dispiace, non posso venire domani.
Desculpe, não posso ir hoje.
Przykro mi, ale nie mogę przyjść.
Üzgünüm, yarın gelemem.
申し訳ありませんが、明日は出席できません。
죄송합니다. 내일은 갈 수 없습니다.
**Note:** I cannot attend on Friday.
"I'm sorry for the delay," she wrote.
""".splitlines()


@pytest.mark.parametrize("text", REFUSALS)
def test_a_refusal_is_told_in_its_language_and_dress(text: str) -> None:
    assert is_refusal(text)


@pytest.mark.parametrize("text", HONEST)
def test_an_honest_text_that_opens_alike_is_none(text: str) -> None:
    assert not is_refusal(text)


def precision_and_recall(rows: Iterable[Row]) -> tuple[float, float]:
    told = [(is_refusal(row["text"]), row["refusal"]) for row in rows]
    right = sum(said and is_one for said, is_one in told)
    return right / sum(said for said, _ in told), right / sum(is_one for _, is_one in told)


def test_the_table_is_large_and_even_enough_to_measure_by() -> None:
    refusals = sum(row["refusal"] for row in ROWS)
    by_language = defaultdict(set[bool])
    for row in ROWS:
        by_language[row["language"]].add(row["refusal"])
    assert len({row["text"] for row in ROWS}) == len(ROWS) >= 160
    assert 0.45 <= refusals / len(ROWS) <= 0.55
    assert len(by_language) >= 14
    assert all(kinds == {True, False} for kinds in by_language.values())


@pytest.mark.parametrize("held_out", [True, False])
def test_refusals_of_the_table_are_told_from_the_rest(held_out: bool) -> None:
    precision, recall = precision_and_recall(row for row in ROWS if row["held_out"] == held_out)
    assert precision >= 0.95
    assert recall >= 0.9


@pytest.mark.parametrize("language", sorted({row["language"] for row in ROWS}))
def test_no_language_of_the_table_falls_behind(language: str) -> None:
    precision, recall = precision_and_recall(row for row in ROWS if row["language"] == language)
    assert min(precision, recall) >= 0.75


@pytest.mark.parametrize("piece", ['"', "«", "— ", "' ", "I can't ", "**", "抱歉，我"])
def test_degenerate_texts_are_read_in_no_time(piece: str) -> None:
    assert not is_refusal(piece * (100_000 // len(piece)))
