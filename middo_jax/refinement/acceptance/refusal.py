"""Texts that decline what they were asked, by how they open. A pure function.

An opening alone would also match an honest letter: "I cannot attend the meeting" answers, "I cannot assist
with that" declines. So a rule needs the verb of a refusal or its object, in each language.
"""

from __future__ import annotations

import re

_OPENING = 400  # characters that are looked at
_DECORATION = " \t\n*_#>`~\"'“”„«»‘’「」『』()[]-–—•:⚠️❌🚫😔🙏"
_TITLE = re.compile(r"(?:answer|response|assistant|note|refusal)\s*[:：]\s*", re.IGNORECASE)

_CANNOT = (
    r"i(?: (?:can't|cannot|can not|won't|will not|must decline to|have to decline to"
    r"|am going to have to decline to)"
    r"|(?:'m| am) (?:unable|not able|not allowed|not permitted) to|(?:'m| am) not (?:going|comfortable) to)"
)
_TO_SERVE = (
    r"(?: (?:help|assist|comply|fulfil|fulfill|proceed)\b"
    r"| (?:answer|complete|do|process|provide|respond to|support|write|generate|create|discuss) "
    r"(?:that|this|your|such|any|the (?:requested|request|task|prompt))\b)"
)
_ENGLISH = (
    rf"(?:(?:i'm|i am)(?: (?:very|really|so|truly))? )?sorry,?(?: but)? {_CANNOT}\b"
    rf"|(?:i apologi[sz]e|my apologies|apologies|unfortunately),?(?: but)?,? {_CANNOT}{_TO_SERVE}"
    r"|as an (?:ai|artificial intelligence)(?: (?:language )?(?:model|assistant))?,? "
    rf"(?:{_CANNOT}\b|i (?:do not|don't) have\b)"
    rf"|{_CANNOT}{_TO_SERVE}"
    # "I'm sorry for the confusion, but as a chatbot made for recipes, I don't have ..."
    r"|(?:i'm sorry|i am sorry|sorry|i apologi[sz]e|my apologies)\b[^.!?]{0,80}"
    r"\bas an? (?:[\w-]+ ){0,2}(?:ai|chatbot|language model|virtual assistant)\b[^.!?]{0,120}"
    r"\bi(?:'m not| am not|'m unable| am unable| don't| do not| can't| cannot)\b"
)
# (apology, "I cannot", verb of service or its object), by language
_ELSEWHERE = (
    # German
    r"(?:(?:es )?tut mir (?:sehr )?leid|entschuldigung|leider)[,.!]? (?:aber )?(?:ich kann"
    r"|kann ich)\b[^.!?]{0,60}"
    r"\b(?:(?:dabei|damit|dir|ihnen|hierbei)\b[^.!?]{0,30}nicht|nicht[^.!?]{0,30}\b(?:helfen"
    r"|beantworten|weiterhelfen|"
    r"erfüllen|unterstützen|behilflich|nachkommen))"
    r"|(?:es )?tut mir (?:sehr )?leid[,.]? (?:aber )?das kann ich nicht\b"
    r"|ich kann (?:dir |ihnen )?(?:dabei|damit|bei dieser|diese|hierbei)[^.!?]{0,40}nicht\b",
    # French
    r"(?:(?:je suis |je )?(?:désolée?|regrette)|malheureusement"
    r"|je m'excuse)[,.]? (?:mais )?je ne (?:peux|suis pas (?:en "
    r"mesure|capable)|pourrai)\b[^.!?]{0,40}\b(?:aider|répondre|assister|satisfaire|accéder"
    r"|fournir|traiter|cela|demande)\b"
    r"|je ne (?:peux|suis pas en mesure)(?: pas)?(?: de)? (?:vous |t'|répondre|aider)[^.!?]{0,30}"
    r"(?:aider|répondre à (?:cette|votre)|cette demande)",
    # Spanish
    r"(?:lo siento(?: mucho)?|lamentablemente|disculpa|disculpe"
    r"|lo lamento)[,.]? (?:pero )?no (?:puedo|me es posible|podré)"
    r"\b[^.!?]{0,30}?(?:ayudar|asistir|responder|cumplir|proporcionar|atender|completar|hacer eso|realizar)"
    r"|no puedo (?:ayudarte|ayudarle|ayudar con (?:eso|esto)|cumplir con (?:esa|esta|tu))",
    # Portuguese
    r"(?:sinto muito|desculpe|desculpa|lamento|infelizmente)[,.]? (?:mas )?(?:eu )?não (?:posso"
    r"|consigo|poderei)\b[^.!?]{0,30}?"
    r"(?:ajud|respond|atend|fornec|cumprir|auxili|fazer isso)|não posso (?:ajudar com (?:isso"
    r"|isto)|ajudá-l)",
    # Italian
    r"(?:mi dispiace|spiacente|purtroppo|mi scuso)[,.]? (?:ma )?non (?:posso|sono in grado"
    r"|riesco)\b[^.!?]{0,30}?"
    r"(?:aiut|rispond|assist|soddisf|fornir|eseguir|farlo)|non posso (?:aiutarti|aiutarla) con quest",
    # Dutch, Swedish, Danish and Norwegian
    r"(?:het spijt me|sorry|helaas)[,.]? (?:maar )?(?:ik kan|kan ik)\b[^.!?]{0,40}\b(?:niet"
    r"|geen)\b[^.!?]{0,30}"
    r"(?:helpen|beantwoorden|voldoen|assisteren)",
    r"(?:jag är ledsen|tyvärr|förlåt|beklagar|jeg beklager|beklager|desværre|dessverre"
    r"|undskyld)[,.]? (?:men )?"
    r"(?:jag kan|kan jag|jeg kan|kan jeg)\b[^.!?]{0,15}\b(?:inte|ikke)\b[^.!?]{0,20}(?:hjälpa"
    r"|hjelpe|hjælpe|svara|svare|bistå)",
    # Polish, Czech, Russian and Ukrainian
    r"(?:przykro mi|przepraszam|niestety)[,.]? (?:ale )?nie (?:mogę|jestem w stanie)\b[^.!?]{0,20}"
    r"(?:pomóc|odpowiedzieć|spełnić)",
    r"(?:omlouvám se|je mi líto|bohužel|lituji)[,.]? (?:ale )?(?:s tímto "
    r"|s tím )?(?:vám )?nemohu\b[^.!?]{0,20}"
    r"(?:pomoci|odpovědět|vyhovět)",
    r"(?:к сожалению|извините|простите|прошу прощения"
    r"|мне (?:очень )?жаль)[,.]? (?:но )?я не (?:могу|в состоянии|смогу)\b"
    r"[^.!?]{0,30}(?:помочь|ответить|выполнить|предоставить|помогать|с этим)|я не могу (?:помочь"
    r"|ответить на этот)",
    r"(?:на жаль|вибачте|перепрошую|мені (?:дуже )?шкода)[,.]? (?:але )?я не (?:можу|в змозі)\b[^.!?]{0,30}"
    r"(?:допомогти|відповісти|виконати)",
    # Turkish, Indonesian and Vietnamese
    r"(?:üzgünüm|maalesef|özür dilerim)[,.]? (?:ama |ancak )?[^.!?]{0,40}"
    r"(?:yardımcı olamam|yardım edemem|yardımcı olamıyorum|cevap veremem|yanıtlayamam|yerine getiremem)",
    r"(?:maaf|mohon maaf|sayangnya)[,.]? (?:tetapi |tapi |namun )?saya (?:tidak (?:bisa|dapat)"
    r"|tak (?:bisa|dapat))\b"
    r"[^.!?]{0,10}(?:membantu|menjawab|memenuhi|memberikan)",
    r"(?:(?:tôi )?(?:rất )?(?:xin lỗi|tiếc))[,.]? (?:nhưng )?tôi không thể\b[^.!?]{0,10}(?:giúp"
    r"|trả lời|hỗ trợ|đáp ứng|thực hiện)",
    # Arabic and Hindi
    r"(?:عذر[اًا]+|آسف|أعتذر|للأسف|أنا آسف)[،,.]? ?(?:و?لكن(?:ني|ي)? )?لا (?:أستطيع|يمكنني)[^.!؟]{0,30}"
    r"(?:مساعد|الإجابة|المساعدة|تلبية|تقديم)",
    r"(?:क्षमा करें|माफ़ करें|माफ करें|मुझे खेद है|मुझे माफ़ करें)[,।]? ?(?:लेकिन |पर "
    r"|कि )?(?:मैं )?[^।!?]{0,50}"
    r"(?:मदद|सहायता|उत्तर|जवाब)[^।!?]{0,20}(?:नहीं|असमर्थ)",
    # Chinese, Japanese and Korean
    r"(?:(?:很|非常|十分)?(?:抱歉|对不起|遗憾|對不起"
    r"|不好意思))[,，、。!！\s]*(?:但是?)?[,，]?我(?:无法|無法|不能|没有?办法|沒有?辦法|不可以)"
    r"[^。！？]{0,12}(?:回答|提供|帮|幫|协助|協助|满足|滿足|完成|处理|處理|讨论|討論|生成|执行|回复|继续)",
    r"我(?:无法|無法|不能)(?:回答|协助|協助|帮助您|满足|提供)(?:这|這|您|你|该|此|相关|相關)",
    r"(?:(?:大変)?(?:申し訳(?:ありません|ございません|ない)|すみません|ごめんなさい)"
    r"|残念ながら)[^。]{0,40}[。、]?[^。]{0,30}"
    r"(?:お答え|お手伝い|対応|回答|お応え|提供|ご要望|支援|サポート)[^。]{0,16}(?:できません"
    r"|できかねます|出来ません|いたしかねます)",
    r"(?:죄송(?:합니다|하지만|스럽지만)|미안(?:합니다|하지만)|유감(?:입니다|스럽게도))[.,!]?[^.]{0,40}"
    r"(?:도와|도움|답변|대답|제공|응답|수행|지원)[^.]{0,16}(?:수 없|없습니다|못합니다|어렵습니다)",
)
_REFUSALS = re.compile("|".join(f"(?:{rule})" for rule in (_ENGLISH, *_ELSEWHERE)), re.IGNORECASE)


def is_refusal(text: str) -> bool:
    """Whether a text opens as a model does that will not do what it was asked."""
    opening = " ".join(text[: 4 * _OPENING].replace("’", "'").split()).lstrip(_DECORATION)[:_OPENING]
    opening = _TITLE.sub("", opening, count=1).lstrip(_DECORATION) if _TITLE.match(opening) else opening
    return bool(_REFUSALS.match(opening.replace("**", "").replace("__", "")))
