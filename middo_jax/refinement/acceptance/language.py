"""Which language a text is in, where that can be told: py3langid, offline, with the model in its package."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from middo_jax.config import ConfigError
from middo_jax.refinement.acceptance.context import without_code

if TYPE_CHECKING:
    from py3langid.langid import LanguageIdentifier

# With both, no two of 20,000 pairs of English prompts were taken for different languages, and 99 % of foreign
# prompts of one sentence were told from English ones.
POSSIBLE = 0.02  # probability from which on a text may be in a language
MIN_BYTES = 50  # of letters in UTF-8: fifty Latin ones, seventeen Chinese ones
MAX_CHARS = 4000  # more would not change the answer
NO_LANGUAGE = "zxx"
SENTENCE_WORDS = 4  # fewer words between two commas are an item of a list
NAMES = 0.6  # share of letters in capitalised words from which on an item is a name; German prose has 0.45
LISTED = 0.7  # share of letters in such items from which on a text is a list
CHINESE_SHARE = 0.02

_ITEMS = re.compile(r"[\n,;:•|]|\.\s|(?<=\s)[-–*](?=\s)")
_WORDS = re.compile(r"[^\W\d_]+")
_HAN = re.compile(r"[\u3400-\u9fff]")
_UNSPACED = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]")
# Words of Chinese in characters that Japanese has too, and uses seldom or never by themselves.
_CHINESE_WORDS = frozenset("了是我你他她們這那嗎呢吧很也沒把被給個就")


def languages(text: str) -> tuple[str, ...]:
    """The ISO 639 codes of the languages that a text may be in, likeliest first; none if nobody can tell.

    "Nombra tres ríos de España y di dónde nacen, por favor." -> ("es", "gl", "an", "ext")

    Raises:
      ConfigError: the package that can tell is not installed.
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
    """Whether a text is mostly names, or items of a few words: these have no language of their own.

    "São Paulo, Rio de Janeiro, Salvador" may answer an English question. Scripts without spaces never count.
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
    """Says from which to which language a text changed, or None.

    It did if it may be in some language, and in none that one of the known texts may be in.
    """
    before = [codes for codes in map(languages, known) if codes]
    now = languages(text) if before else ()
    if not now or not set(now).isdisjoint(c for codes in before for c in codes):
        return None
    return f"{now[0]} instead of {' or '.join(sorted({codes[0] for codes in before}))}"


@functools.cache
def load_identifier() -> LanguageIdentifier:
    """What tells languages apart, loaded once.

    Raises:
      ConfigError: the package is not installed.
    """
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError as e:
        raise ConfigError(
            "config: the gate `language` needs the package py3langid: install it, or set "
            "refine.gates.open=[language]"
        ) from e
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
