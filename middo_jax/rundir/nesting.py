"""Refuses untrusted JSON that is nested too deep, before it is parsed: parsers of JSON are recursive."""

from __future__ import annotations

import json
import re

MAX_DEPTH = 64  # a chat completion has about six levels, a tokenizer.json about ten

# A string may end with the text: otherwise each quotation mark of a cut text would be searched to its end.
_PART = re.compile(rb'"(?:[^"\\]|\\.)*+(?:"|\\?\Z)|[\[{]|[\]}]', re.DOTALL)


class NestedTooDeep(ValueError):
    """JSON is nested deeper than MAX_DEPTH."""


class NotUtf8(ValueError):
    """JSON is not in UTF-8, and must be (RFC 8259)."""


def require_flat(text: bytes) -> None:
    """Checks the depth of JSON in UTF-8. Takes linear time, and no recursion.

    Raises:
      NestedTooDeep: it is nested deeper than MAX_DEPTH.
      NotUtf8: `json.loads` would read it as UTF-16 or UTF-32, in which brackets are other bytes.
    """
    if not (encoding := json.detect_encoding(text)).startswith("utf-8"):
        raise NotUtf8(f"JSON in {encoding.upper()}; it must be in UTF-8")
    if text.count(b"[") + text.count(b"{") <= MAX_DEPTH:
        return
    depth = 0
    for match in _PART.finditer(text):
        first = match.group()[:1]
        if first in b"[{":
            depth += 1
            if depth > MAX_DEPTH:
                raise NestedTooDeep(f"JSON that is nested deeper than {MAX_DEPTH} levels")
        elif first in b"]}":
            depth -= 1
