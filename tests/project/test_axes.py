"""The legend of axis suffixes: every module that names arrays by their axes links it, and gives none of its
letters another meaning."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODULES = sorted((ROOT / "middo_jax").rglob("*.py"))
LINK = "docs/contributing.md#axes"
LEGEND = dict(
    re.findall(
        r"^\| `(\w)` \| (.+?) \|$", (ROOT / "docs" / "contributing.md").read_text("utf-8"), re.MULTILINE
    )
)
_SUFFIX = re.compile(r"\w*[a-z0-9]_([a-z]{1,6})")
_ARRAY = re.compile(r"\b(np\.ndarray|jax\.Array|Array)\b")


def suffix(name: str) -> str | None:
    """`nd` of embedding_nd; None for a name that does not end in letters of the legend, each once."""
    match = _SUFFIX.fullmatch(name)
    if match is None or not set(match[1]) <= LEGEND.keys() or len(set(match[1])) < len(match[1]):
        return None
    return match[1]


def annotated(tree: ast.AST) -> Iterator[tuple[str, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.arg) and node.annotation is not None:
            yield node.arg, ast.unparse(node.annotation)
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id, ast.unparse(node.annotation)


def defined(tree: ast.AST) -> Iterator[str]:
    yield from (name for name, _ in annotated(tree))
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id


TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in MODULES}
# Of one letter only n: timeout_s, top_k and top_p are no arrays.
USED = {
    axes
    for tree in TREES.values()
    for name, type_ in annotated(tree)
    if _ARRAY.search(type_) and (axes := suffix(name)) and (len(axes) > 1 or axes == "n")
}


def test_the_legend_is_read() -> None:
    assert {"b", "t", "d", "n", "j"} <= LEGEND.keys()
    assert len(set(LEGEND.values())) == len(LEGEND)
    assert {"bt", "nd", "nj", "btd"} <= USED


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_module_that_names_axes_links_the_legend(path: Path) -> None:
    names = sorted({name for name in defined(TREES[path]) if suffix(name) in USED})
    said = " ".join((ast.get_docstring(TREES[path]) or "").split())
    assert LINK in said or not names, names
    own = re.search(rf"{LINK}; (.*?)\.( |$)", said)
    letters = re.findall(r"(?:^|, |; )(\w) ", own[1]) if own else []
    assert not set(letters) & LEGEND.keys()
