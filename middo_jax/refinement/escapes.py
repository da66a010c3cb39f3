"""Reads a JSON object whose writer did not escape backslashes: `{"prompt": "\\frac{1}{2}"}`. Pure functions.

JSON reads `\\f`, `\\b`, `\\n`, `\\r` and `\\t` as control characters and refuses most other letters. Such an
escape is read as a backslash and a letter:

- Always for `\\f`, `\\b` and `\\r` before a letter: no text contains these control characters there.
- For `\\t` and `\\n` that begin a LaTeX command, as in `\\times` or `\\nabla`.
- For short commands such as `\\ne` and all parts of a path, if the text also has a backslash that JSON does
  not allow: then its writer escaped none.
- After a drive letter and a colon, depending on the words around it, see `_is_drive`: `C:\\new` may be a
  path, `Q:\\nName a bird.` is a label and a line break.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable

_ESCAPE = re.compile(r"\\(u[0-9a-fA-F]{4}|.|\Z)", re.DOTALL)
_WORD = re.compile(r"[A-Za-z]+")
_PATH = re.compile(r"(?:^|[^A-Za-z])[A-Za-z]:(?:\\{1,2}[\w.-]+)*\Z")
_LOOKED_BACK = 120  # characters before the escape in which a path may begin
_FORMULA = 2000  # characters before the escape in which a formula may begin
_QUOTES = {'\\"': '\\"', "'": "'", "`": "`", "“": "”", "‘": "’"}  # before a drive letter -> behind the path
_FOLDER_WORD = re.compile(
    r"\b(?:folders?|director(?:y|ies)|paths?|files?|cd|dir|mkdir|open)[ \t]+\Z", re.IGNORECASE
)
_FILE = re.compile(
    r"\\{1,2}(?:[\w-]+\\{1,2})*[\w-]+\.(?:txt|exe|dll|bat|cmd|ini|log|csv|json|xml|yaml|pdf|docx?"
    r"|xlsx?|pptx?|png|jpe?g|gif|zip|msi|sys|ps1|dat|bak|mp[34]|html?|cfg|conf)\b",
    re.IGNORECASE,
)
_LINE_START = re.compile(r'(?:\A|\n|\\n|(?<!\\)")[ \t]*\Z')
_CONTROLS = ("b", "f", "n", "r", "t")
# Commands of LaTeX whose first letter makes an escape of JSON. The short ones after `\n` count only in
# mathematics, since a line may begin with "e", "i" or "u".
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
_LAST_COMMA = re.compile(r",\s*\}\Z")  # {"prompt": "Name a bird.",}: not JSON, but clear
_DECODER = json.JSONDecoder(strict=False)  # accepts line breaks inside strings


def object_at(text: str, start: int) -> tuple[dict[str, object], int] | None:
    """(the JSON object that begins at `start`, its end); None if there is none. See above for backslashes."""
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
    """The JSON with every backslash escaped that begins no escape."""
    if "\\" not in source:
        return source
    bare = _is_bare(source)
    meant: list[str] = []
    for match in _ESCAPE.finditer(source):
        meant.append(_meant(match, source, bare))
    parts = iter(meant)
    return _ESCAPE.sub(lambda _: next(parts), source)


def _is_bare(source: str) -> bool:
    """Whether a text has a backslash that valid JSON cannot have, so that its writer escaped none."""
    certain = any(
        not _is_json(m[1]) or (m[1] in _CONTROLS and _is_command(m, source, in_mathematics=False))
        for m in _ESCAPE.finditer(source)
    )
    return certain and not re.search(r"\\\\[A-Za-z]", source)


def _meant(match: re.Match[str], source: str, bare: bool) -> str:
    letter, literal = match[1], "\\" + match.group()
    if letter == "\\":
        following = source[match.end() : match.end() + 1]
        # Without escapes, two backslashes are a line break of LaTeX.
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
    looked_from = max(0, match.start() - _LOOKED_BACK)
    if path := _PATH.search(source[looked_from : match.start()]):
        begins = path.group().partition(":")[2].lstrip("\\") or source[match.end() - 1 : match.end() + 1]
        if in_mathematics or begins[0] not in "nrt":
            return True
        # A tab between "C:" and a letter, as in "C:\\temp", does not occur.
        if begins[0] == "t" and begins[1:2].isalpha() and path.group().partition(":")[0][-1].isupper():
            return True
        if _is_drive(source, looked_from + path.end() - len(path.group()) + (not path.group()[0].isalpha())):
            return True
    if name == match[1]:  # no letter follows; a regular expression may end in `\\b`
        return in_mathematics and match[1] in "bf"
    if match[1] in "bfr":  # a carriage return is only meant before a line feed
        return True
    known: Callable[[str], re.Match[str] | None] = (_T if match[1] == "t" else _N).fullmatch
    return bool(known(name) or (in_mathematics and match[1] == "n" and _N_SHORT.fullmatch(name)))


def _is_drive(source: str, at: int) -> bool:
    """Whether the letter at `at`, a colon and a backslash begin a path, and not a label and a line break.

    They do in quotation marks that end with the path ('C:\\new'), after a word such as "folder" or "cd", and
    within a line if the path ends in a file name ("see C:\\notes.txt"). "Write it in C:\\nint x;" contains a
    line break. A, B and Q are labels.
    """
    if source[at].upper() in "ABQ":
        return False
    before, after = source[max(0, at - _LOOKED_BACK) : at], source[at + 2 : at + _LOOKED_BACK]
    for opening, closing in _QUOTES.items():
        if before.endswith(opening):
            return re.match(rf"[\w.\\ -]*{re.escape(closing)}", after) is not None
    if _FOLDER_WORD.search(before):
        return True
    return _FILE.match(after) is not None and not _LINE_START.search(before)


def _in_mathematics(source: str, position: int) -> bool:
    before = source[max(0, position - _FORMULA) : position]
    return before.replace("\\$", "").count("$") % 2 == 1
