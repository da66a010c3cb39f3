"""Lists of names have no language, and Chinese characters alone may be Japanese."""

from __future__ import annotations

import pytest

from middo_jax.refinement.acceptance.language import changed_language, languages

ENGLISH = "Name ten towns of the country that lie at a river, and order them by their size."
JAPANESE = "京都の歴史と文化について、初めて訪れる人にもわかるように簡単に説明してください。"


@pytest.mark.parametrize(
    "answer",
    [
        "Belém, Porto Alegre, São Luís, Goiânia, Florianópolis, Vitória, Natal, Maceió, João Pessoa.",
        "1. Zürich\n2. Genf\n3. Basel\n4. Bern\n5. Lausanne\n6. Winterthur\n7. Sankt Gallen\n8. Lugano",
        "- Rzeszów\n- Gdańsk\n- Łódź\n- Kraków\n- Wrocław\n- Poznań\n- Bydgoszcz\n- Częstochowa",
        "Juan Pérez García; María Fernández López; José Luis Rodríguez; Ana Belén Martínez de la Torre",
        "feijoada, pão de queijo, moqueca, brigadeiro, açaí na tigela, farofa, vatapá, coxinha",
    ],
)
def test_a_list_of_names_has_no_language(answer: str) -> None:
    assert changed_language(answer, [ENGLISH]) is None


@pytest.mark.parametrize(
    "answer",
    [
        "京都府：人口約二百五十万人、面積約四千六百平方粁。平安京以来、千年以上日本政治文化中心地。",
        "源氏物語、枕草子、徒然草、方丈記、平家物語、古今和歌集、万葉集、日本書紀、古事記。",
        "東京大学法学部卒業後、外務省入省。駐米大使、外務大臣、内閣総理大臣歴任。",
        "春夏秋冬、花鳥風月、一期一会、温故知新、七転八起、十人十色、以心伝心。",
    ],
)
def test_japanese_in_chinese_characters_alone_is_japanese(answer: str) -> None:
    assert changed_language(answer, [JAPANESE]) is None


@pytest.mark.parametrize(
    ("text", "known", "fault"),
    [
        (
            "京都是日本的一座古老的城市,拥有悠久的历史和丰富的文化遗产,值得一去。",
            JAPANESE,
            "zh instead of ja",
        ),
        ("京都是日本的古都,我們可以在這裡看到很多寺廟,也有很多好吃的東西。", JAPANESE, "zh instead of ja"),
        (
            "Liste dix villes du pays qui se trouvent au bord d'une rivière, par taille.",
            ENGLISH,
            "fr instead of en",
        ),
        (
            "Nenne zehn Städte des Landes, die an einem Fluss liegen, nach ihrer Größe.",
            ENGLISH,
            "de instead of en",
        ),
        (
            "Wer, wie, was, und warum? Das weiß doch jedes Kind in unserem Dorf am See.",
            ENGLISH,
            "de instead of en",
        ),
    ],
)
def test_prose_in_another_language_is_still_told(text: str, known: str, fault: str) -> None:
    assert changed_language(text, [known]) == fault
    assert languages(text)
