"""Every package that is imported is declared, and every one that is declared is imported."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
# TFDS imports them, to read and write array_record, without asking for them.
FOR_TFDS = {"importlib-resources", "array-record"}


def name(requirement: str) -> str:
    """tensorflow_datasets>=4 -> tensorflow-datasets"""
    return re.split(r"[<>=!~\[; ]", requirement)[0].lower().replace("_", "-")


def imported() -> dict[str, set[str]]:
    """Distribution -> the modules that import it, at any depth; those that only type checkers see too."""
    of_package = importlib.metadata.packages_distributions()
    found: dict[str, set[str]] = {}
    for path in (ROOT / "middo_jax").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names = [node.module]
            for top in {n.partition(".")[0] for n in names} - sys.stdlib_module_names - {"middo_jax"}:
                distribution = name(of_package.get(top, [top])[0])
                found.setdefault(distribution, set()).add(path.relative_to(ROOT).as_posix())
    return found


def test_declared_is_imported_and_imported_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    core = {name(requirement) for requirement in project["dependencies"]}
    extras = {name(r) for requirements in project["optional-dependencies"].values() for r in requirements}
    found = imported()
    undeclared = {package: where for package, where in found.items() if package not in core | extras}
    assert undeclared == {}
    assert core - FOR_TFDS - found.keys() == set()
