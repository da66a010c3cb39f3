"""Refusals in several languages and dresses, and honest texts that open alike."""

from __future__ import annotations

import pytest

from middo_jax.refinement.acceptance.refusal import is_refusal

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
