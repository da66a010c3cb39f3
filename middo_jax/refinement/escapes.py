"""The JSON object in a reply whose model wrote backslashes as they are: `{"prompt": "\\frac{1}{2}"}`.

JSON reads `\\f`, `\\b`, `\\n`, `\\r` and `\\t` as control characters and refuses most other letters. A form
feed or a backspace is never meant before a letter. A line break or a tab is, unless its letter begins the
name of a command. Pure functions.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable

_ESCAPE = re.compile(r"\\(u[0-9a-fA-F]{4}|.|\Z)", re.DOTALL)
_WORD = re.compile(r"[A-Za-z]+")
_PATH = re.compile(r"(?:^|[^A-Za-z])[A-Za-z]:(?:\\{1,2}[\w.-]+)*\Z")
_LOOKED_BACK = 120  # characters of a path before the escape
_FORMULA = 2000  # characters before the escape that are searched for the beginning of a formula
_CONTROLS = ("b", "f", "n", "r", "t")
# Commands of LaTeX whose first letter is an escape of JSON. After `\n` the shorter ones count in mathematics
# only: a line may begin with "e", "i" or "u".
_T = re.compile(
    r"(?:text\w*|times|theta|tau|tan|tanh|to|top|triangle\w*|tfrac|tilde|therefore|thick\w*|tbinom|tag|tiny|"
    r"title|today|table\w*|tabular|tikz\w*|thinspace|thetasym|twoheadrightarrow|two\w*arrow)"
)
_N = re.compile(
    r"(?:nabla|neq|not|notin|nmid|natural|newline|newcommand|newpage|newenvironment|newtheorem|normalsize|"
    r"nonumber|noindent|nolimits|nexists|nparallel|ncong|nsim|nless|ngtr|nleq\w*|ngeq\w*|nprec\w*|nsucc\w*|"
    r"nsub\w*|nsup\w*|n\w+arrow|nrightarrow|ntriangle\w*|nvdash|nVdash|nvDash|nwarrow|nearrow|nobreak\w*)"
)
_N_SHORT = re.compile(r"(?:ne|neg|ni|nu)")
_LAST_COMMA = re.compile(r",\s*\}\Z")  # {"prompt": "Name a bird.",}: no JSON, but clear
_DECODER = json.JSONDecoder(strict=False)  # a line break inside a string is no reason to ask again


def object_at(text: str, start: int) -> tuple[dict[str, object], int] | None:
    """(the JSON object that begins at `start`, where it ends), its backslashes read as they were meant."""
    if not text.startswith("{", start):
        return None
    end = _end_of_object(text, start)
    if end is None:
        return None
    try:
        value = _DECODER.decode(_LAST_COMMA.sub("}", _escaped(text[start:end])))
    except (ValueError, RecursionError):
        return None
    return (value, end) if isinstance(value, dict) else None


_PART = re.compile(r'"(?:[^"\\]|\\.)*"|[{}]', re.DOTALL)


def _end_of_object(text: str, start: int) -> int | None:
    depth = 0
    for part in _PART.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(part.group(), 0)
        if depth == 0:
            return part.end()
    return None


def _escaped(source: str) -> str:
    """JSON in which each backslash that begins no escape is escaped itself."""
    if "\\" not in source:
        return source
    bare = _is_bare(source)
    meant: list[str] = []
    for match in _ESCAPE.finditer(source):
        meant.append(_meant(match, source, bare))
    parts = iter(meant)
    return _ESCAPE.sub(lambda _: next(parts), source)


def _is_bare(source: str) -> bool:
    """Whether a text has a backslash that no JSON has: then its writer escaped none."""
    certain = any(
        not _is_json(m[1]) or (m[1] in _CONTROLS and _is_command(m, source, in_mathematics=False))
        for m in _ESCAPE.finditer(source)
    )
    return certain and not re.search(r"\\\\[A-Za-z]", source)


def _meant(match: re.Match[str], source: str, bare: bool) -> str:
    letter, literal = match[1], "\\" + match.group()
    if letter == "\\":
        following = source[match.end() : match.end() + 1]
        # A writer who escapes nothing means a line break of LaTeX by two backslashes.
        return 2 * match.group() if bare and not following.isalpha() and following != '"' else match.group()
    if not _is_json(letter):
        return literal
    if letter not in _CONTROLS:
        return match.group()
    mathematics = bare or _in_mathematics(source, match.start())
    return literal if _is_command(match, source, mathematics) else match.group()


def _is_json(escape: str) -> bool:
    return len(escape) == 5 or (escape != "" and escape in '"\\/bfnrt')


def _is_command(match: re.Match[str], source: str, in_mathematics: bool) -> bool:
    """Whether `\\n` or another escape of a control character begins a command or a part of a path."""
    word = _WORD.match(source, match.end() - 1)
    name = word.group() if word else match[1]
    if path := _PATH.search(source[max(0, match.start() - _LOOKED_BACK) : match.start()]):
        # Behind its colon a path may look like "Q:" and a line break, or "X:" and a tab: JSON is believed,
        # but for such as "C:\\temp", which nobody means as a tab.
        begins = path.group().partition(":")[2].lstrip("\\") or source[match.end() - 1 : match.end() + 1]
        if in_mathematics or begins[0] not in "nrt":
            return True
        if begins[0] == "t" and begins[1:2].isalpha() and path.group().partition(":")[0][-1].isupper():
            return True
    if name == match[1]:  # no letter follows; regular expressions have `\\b` at their end
        return in_mathematics and match[1] in "bf"
    if match[1] in "bfr":  # nobody means a backspace or a form feed; a carriage return is before a line feed
        return True
    known: Callable[[str], re.Match[str] | None] = (_T if match[1] == "t" else _N).fullmatch
    return bool(known(name) or (in_mathematics and match[1] == "n" and _N_SHORT.fullmatch(name)))


def _in_mathematics(source: str, position: int) -> bool:
    before = source[max(0, position - _FORMULA) : position]
    return before.replace("\\$", "").count("$") % 2 == 1
