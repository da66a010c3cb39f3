"""The language of a text, if it is recognisable, by py3langid: offline, with the model in its package."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from middo_jax.config import ConfigError
from middo_jax.refinement.acceptance.context import without_code

if TYPE_CHECKING:
    from py3langid.langid import LanguageIdentifier

# With these two values, none of 20,000 pairs of English prompts was classified as different languages, and 99
# % of foreign prompts of one sentence were distinguished from English ones.
POSSIBLE = 0.02  # minimum probability of a possible language
MIN_BYTES = 50  # of letters in UTF-8: fifty Latin ones, seventeen Chinese ones
MAX_CHARS = 4000  # more characters would not change the result
NO_LANGUAGE = "zxx"
SENTENCE_WORDS = 4  # fewer words between two commas are a list item
NAMES = 0.6  # share of letters in capitalised words above which an item is a name; German prose has 0.45
LISTED = 0.7  # share of letters in such items above which a text is a list
CHINESE_SHARE = 0.02

_ITEMS = re.compile(r"[\n,;:•|]|\.\s|(?<=\s)[-–*](?=\s)")
_WORDS = re.compile(r"[^\W\d_]+")
_HAN = re.compile(r"[\u3400-\u9fff]")
_UNSPACED = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]")
# Chinese words whose characters are rarely or never separate words in Japanese.
_CHINESE_WORDS = frozenset("了是我你他她們這那嗎呢吧很也沒把被給個就")


def languages(text: str) -> tuple[str, ...]:
    """The ISO 639 codes of a text's possible languages, likeliest first; () if it is not recognisable.

    "Nombra tres ríos de España y di dónde nacen, por favor." -> ("es", "gl", "an", "ext")

    Raises:
      ConfigError: py3langid is not installed.
    """
    prose = without_code(text)[:MAX_CHARS]
    if sum(len(c.encode("utf-8", "replace")) for c in prose if c.isalpha()) < MIN_BYTES:
        return ()
    if _is_list(prose):
        return ()
    ranked = load_identifier().rank(prose)
    codes = tuple(code for code, share in ranked if share >= POSSIBLE and code != NO_LANGUAGE)
    return (*codes, "ja") if "zh" in codes and "ja" not in codes and _may_be_japanese(prose) else codes


def _is_list(prose: str) -> bool:
    """Whether a text is mostly a list of names or of short items, which do not show a language.

    "São Paulo, Rio de Janeiro, Salvador" may answer an English question. Scripts without spaces do not count.
    """
    listed = told = 0
    for item in _ITEMS.split(prose):
        words = _WORDS.findall(item)
        letters = sum(map(len, words))
        names = sum(len(word) for word in words if word[0].isupper())
        is_listed = len(words) < SENTENCE_WORDS or names > NAMES * letters
        if is_listed and not _UNSPACED.search(item):
            listed += letters
        else:
            told += letters
    return listed > LISTED * (listed + told)


def _may_be_japanese(prose: str) -> bool:
    """Whether Chinese characters alone may be Japanese: none is simplified, few are Chinese words."""
    try:
        prose.encode("euc_jp")
    except UnicodeEncodeError:
        return False
    characters = _HAN.findall(prose)
    return sum(c in _CHINESE_WORDS for c in characters) <= CHINESE_SHARE * len(characters)


def changed_language(text: str, known: Iterable[str]) -> str | None:
    """From which language to which a text changed, in words; None if it did not.

    It changed if its languages are recognisable and differ from all possible languages of the known texts.
    """
    before = [codes for codes in map(languages, known) if codes]
    now = languages(text) if before else ()
    if not now or not set(now).isdisjoint(c for codes in before for c in codes):
        return None
    return f"{now[0]} instead of {' or '.join(sorted({codes[0] for codes in before}))}"


@functools.cache
def load_identifier() -> LanguageIdentifier:
    """The language identifier, loaded once.

    Raises:
      ConfigError: py3langid is not installed.
    """
    try:  # not at the top: the gate can be opened where the package is missing
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError as e:
        raise ConfigError(
            "config: the gate `language` needs the package py3langid: install it, or set "
            "refine.gates.open=[language]"
        ) from e
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
