"""IFEval's 25 kinds of verifiable instructions: whether a response follows one (arXiv 2311.07911).

Written from the paper's descriptions and the dataset's arguments. A check is a function of the response and
of the arguments that the dataset gives for the instruction. Where the published checks use nltk, sentences
and words are found by regular expressions here, and languages by py3langid instead of langdetect, so that
nothing is downloaded; the verdicts can differ on abbreviations and on short foreign texts.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from py3langid.langid import LanguageIdentifier

Check = Callable[..., bool]

_SENTENCE_END = re.compile(r"[.!?]+[\"')\]]*(?=\s|$)")
# Behind these, a full stop does not end a sentence.
_ABBREVIATIONS = frozenset(
    ("mr", "mrs", "ms", "dr", "prof", "sr", "jr", "st", "vs", "etc", "e.g", "i.e", "no", "inc", "ltd")
)
CONSTRAINED = ("My answer is yes.", "My answer is no.", "My answer is maybe.")


def _compares(count: int, bound: int, relation: str) -> bool:
    """`relation` is "at least" or "less than", as the dataset says."""
    if relation == "at least":
        return count >= bound
    if relation == "less than":
        return count < bound
    raise ValueError(f"relation {relation!r} is neither 'at least' nor 'less than'")


def words(text: str) -> list[str]:
    """Runs of letters, digits and underscores, also across a hyphen or an apostrophe."""
    return re.findall(r"\w+(?:[-'’]\w+)*", text)


def sentences(text: str) -> list[str]:
    """Parts that end with a full stop, an exclamation or a question mark, or with an empty line."""
    found = []
    for block in re.split(r"\n\s*\n", text):
        start = 0
        for end in _SENTENCE_END.finditer(block):
            last = block[start : end.start()].split()
            if end.group().startswith(".") and last and last[-1].lower().lstrip("(\"'") in _ABBREVIATIONS:
                continue
            found.append(block[start : end.end()])
            start = end.end()
        found.append(block[start:])
    return [part.strip() for part in found if re.search(r"\w", part)]


def _word(text: str) -> re.Pattern[str]:
    return re.compile(rf"(?<!\w){re.escape(text)}(?!\w)", re.IGNORECASE)


def has_keywords(response: str, *, keywords: list[str]) -> bool:
    """Every keyword occurs, in any case."""
    return all(keyword.lower() in response.lower() for keyword in keywords)


def keyword_frequency(response: str, *, keyword: str, frequency: int, relation: str) -> bool:
    """The keyword occurs at least, or less than, so many times."""
    return _compares(response.lower().count(keyword.lower().strip()), frequency, relation)


def no_forbidden_words(response: str, *, forbidden_words: list[str]) -> bool:
    """None of the words occurs as a word."""
    return not any(_word(word).search(response) for word in forbidden_words)


def letter_frequency(response: str, *, letter: str, let_frequency: int, let_relation: str) -> bool:
    """The letter occurs at least, or less than, so many times, in either case."""
    return _compares(response.lower().count(letter.lower()), let_frequency, let_relation)


@functools.lru_cache(maxsize=1)
def _identifier() -> LanguageIdentifier:
    # Not at the top: its model takes a tenth of a second to load.
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def is_language(response: str, *, language: str) -> bool:
    """The likeliest language of the response has this ISO 639-1 code."""
    return _identifier().rank(response)[0][0] == language.split("-")[0].lower()


def sentence_count(response: str, *, num_sentences: int, relation: str) -> bool:
    """At least, or less than, so many sentences."""
    return _compares(len(sentences(response)), num_sentences, relation)


def word_count(response: str, *, num_words: int, relation: str) -> bool:
    """At least, or less than, so many words."""
    return _compares(len(re.findall(r"\w+", response)), num_words, relation)


def paragraph_count(response: str, *, num_paragraphs: int) -> bool:
    """Exactly so many paragraphs with `***` between them; none but the first and the last may be empty."""
    parts = [part.strip() for part in re.split(r"\s?\*\*\*\s?", response)]
    inner = parts[1:-1]
    if not all(inner):
        return False
    return sum(1 for part in parts if part) == num_paragraphs


def nth_paragraph_first_word(
    response: str, *, num_paragraphs: int, nth_paragraph: int, first_word: str
) -> bool:
    """So many paragraphs with empty lines between them, of which the n-th begins with the word."""
    paragraphs = [part for part in re.split(r"\n\n", response) if part.strip()]
    if len(paragraphs) != num_paragraphs or not 1 <= nth_paragraph <= num_paragraphs:
        return False
    first = paragraphs[nth_paragraph - 1].split()[0].lstrip("\"'").lower()
    return re.split(r"[.,?!'\"]", first)[0] == first_word.lower()


def placeholder_count(response: str, *, num_placeholders: int) -> bool:
    """At least so many texts in square brackets, such as [name]."""
    return len(re.findall(r"\[.*?\]", response)) >= num_placeholders


def has_postscript(response: str, *, postscript_marker: str) -> bool:
    """A line has the marker, such as P.S. or P.P.S, with or without spaces between the letters."""
    letters = [re.escape(letter) for letter in re.findall(r"\w", postscript_marker)]
    if letters == ["P", "S"] or letters == ["P", "P", "S"]:
        pattern = r"\.?\s?".join(letters)
        return re.search(rf"(?<!\w){pattern}", response, re.IGNORECASE) is not None
    return postscript_marker.lower() in response.lower()


def bullet_count(response: str, *, num_bullets: int) -> bool:
    """Exactly so many lines that begin with a bullet: `* ` or `- `."""
    stars = re.findall(r"^\s*\*[^\*].*$", response, re.MULTILINE)
    dashes = re.findall(r"^\s*-.*$", response, re.MULTILINE)
    return len(stars) + len(dashes) == num_bullets


def is_constrained(response: str) -> bool:
    """One of the three allowed answers is in it."""
    return any(option in response for option in CONSTRAINED)


def highlight_count(response: str, *, num_highlights: int) -> bool:
    """At least so many texts between single or double asterisks on one line."""
    double = re.findall(r"\*\*([^\n\*]*)\*\*", response)
    single = re.findall(r"\*([^\n\*]*)\*", response)
    return sum(1 for text in (*single, *double) if text.strip()) >= num_highlights


def section_count(response: str, *, section_spliter: str, num_sections: int) -> bool:
    """At least so many sections, each begun with the word and a number, such as `Section 1`."""
    marks = re.findall(rf"\s?{re.escape(section_spliter.strip())}\s?\d+\s?", response)
    return len(marks) >= num_sections


def is_json(response: str) -> bool:
    """The whole response is JSON, perhaps in a code fence."""
    inner = re.sub(r"^```(?:json)?\s*|\s*```$", "", response.strip(), flags=re.IGNORECASE)
    try:
        json.loads(inner)
    except (ValueError, RecursionError):
        return False
    return True


def has_title(response: str) -> bool:
    """A title in double angular brackets, such as <<title>>, on one line."""
    return any(title.strip() for title in re.findall(r"<<([^\n]+?)>>", response))


def two_responses(response: str) -> bool:
    """Two different responses with six asterisks between them."""
    parts = response.split("******")
    given = [part.strip() for i, part in enumerate(parts) if part.strip() or 0 < i < len(parts) - 1]
    return len(given) == 2 and all(given) and given[0] != given[1]


def repeats_prompt(response: str, *, prompt_to_repeat: str) -> bool:
    """It begins with the prompt, in any case."""
    return response.strip().lower().startswith(prompt_to_repeat.strip().lower())


def ends_with(response: str, *, end_phrase: str) -> bool:
    """It ends with the phrase, in any case; quotation marks around the whole do not count."""
    return response.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def capital_words(response: str, *, capital_frequency: int, capital_relation: str) -> bool:
    """At least, or less than, so many words in capitals."""
    return _compares(
        sum(1 for word in words(response) if word.isupper()), capital_frequency, capital_relation
    )


def is_capital_english(response: str) -> bool:
    """English, all letters capital."""
    return response.isupper() and is_language(response.lower(), language="en")


def is_lowercase_english(response: str) -> bool:
    """English, no letter capital."""
    return response.islower() and is_language(response, language="en")


def has_no_comma(response: str) -> bool:
    """No comma."""
    return "," not in response


def is_quoted(response: str) -> bool:
    """It begins and ends with double quotation marks."""
    inner = response.strip()
    return len(inner) > 1 and inner[0] == inner[-1] == '"'


CHECKS: dict[str, Check] = {
    "keywords:existence": has_keywords,
    "keywords:frequency": keyword_frequency,
    "keywords:forbidden_words": no_forbidden_words,
    "keywords:letter_frequency": letter_frequency,
    "language:response_language": is_language,
    "length_constraints:number_sentences": sentence_count,
    "length_constraints:number_paragraphs": paragraph_count,
    "length_constraints:number_words": word_count,
    "length_constraints:nth_paragraph_first_word": nth_paragraph_first_word,
    "detectable_content:number_placeholders": placeholder_count,
    "detectable_content:postscript": has_postscript,
    "detectable_format:number_bullet_lists": bullet_count,
    "detectable_format:constrained_response": is_constrained,
    "detectable_format:number_highlighted_sections": highlight_count,
    "detectable_format:multiple_sections": section_count,
    "detectable_format:json_format": is_json,
    "detectable_format:title": has_title,
    "combination:two_responses": two_responses,
    "combination:repeat_prompt": repeats_prompt,
    "startend:end_checker": ends_with,
    "startend:quotation": is_quoted,
    "change_case:capital_word_frequency": capital_words,
    "change_case:english_capital": is_capital_english,
    "change_case:english_lowercase": is_lowercase_english,
    "punctuation:no_comma": has_no_comma,
}


def follows(response: str, instruction: str, arguments: dict[str, Any], loose: bool = False) -> bool:
    """Whether a response follows an instruction.

    Args:
      response: the answer; an empty one follows nothing.
      instruction: its id, such as "keywords:existence".
      arguments: of the instruction, as the dataset gives them; those that are None are left out.
      loose: also without its first line, its last line and asterisks, in all combinations: an introduction
        or a closing line is then no fault.

    Raises:
      KeyError: no such instruction.
      TypeError: an argument is missing or unknown.
    """
    check = CHECKS[instruction]
    given = {name: value for name, value in arguments.items() if value is not None}
    return any(
        text.strip() and check(text, **given) for text in (variants(response) if loose else (response,))
    )


def variants(response: str) -> list[str]:
    """The response as it is, and without its first line, its last, both; each also without asterisks."""
    lines = response.split("\n")
    cuts = [response, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
    return [*cuts, *(text.replace("*", "") for text in cuts)]
