"""Which language a text is in, where that can be told: py3langid, offline, with the model in its package."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import TYPE_CHECKING

from middo_jax.config import ConfigError
from middo_jax.refine.acceptance.context import without_code

if TYPE_CHECKING:
    from py3langid.langid import LanguageIdentifier

# With both, no two of 20,000 pairs of English prompts were taken for different languages, and 99 % of foreign
# prompts of one sentence were told from English ones.
POSSIBLE = 0.02  # probability from which on a text may be in a language
MIN_BYTES = 50  # of letters in UTF-8: fifty Latin ones, seventeen Chinese ones
MAX_CHARS = 4000  # more would not change the answer
NO_LANGUAGE = "zxx"


def languages(text: str) -> tuple[str, ...]:
    """The ISO 639 codes of the languages that a text may be in, likeliest first; none if nobody can tell.

    "Nombra tres ríos de España y di dónde nacen, por favor." -> ("es", "gl", "an", "ext")

    Raises:
      ConfigError: the package that can tell is not installed.
    """
    prose = without_code(text)[:MAX_CHARS]
    if sum(len(c.encode("utf-8", "replace")) for c in prose if c.isalpha()) < MIN_BYTES:
        return ()
    ranked = load_identifier().rank(prose)
    return tuple(code for code, share in ranked if share >= POSSIBLE and code != NO_LANGUAGE)


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
            "config: refine.gates.language needs the package py3langid: install it, or set "
            "refine.gates.language=false"
        ) from e
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
