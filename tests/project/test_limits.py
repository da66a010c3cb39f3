"""What keeps the package readable: short functions, few parameters, imports at the top, and pages that name
files that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LINES, PARAMETERS = 60, 7
MODULES = sorted(
    path for name in ("middo_jax", "benchmarks", "tests", "docs") for path in (ROOT / name).rglob("*.py")
)
# Pallas passes references by position; typer makes an option of each parameter; so has `score`.
MANY_PARAMETERS = {
    "forward_kernel",
    "dq_kernel",
    "dkv_kernel",
    "api.score",
    "datasets.export_data",
    "datasets.push",
    "planning.plan",
    "steps.evaluate",
    "steps.refine",
    "steps.score",
}
PAGES = [ROOT / "README.md", ROOT / "benchmarks" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_functions_are_short_and_take_few_parameters(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert (node.end_lineno or 0) - node.lineno < LINES, node.name
            arguments = node.args
            names = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
            taken = len(set(names) - {"self", "cls"})
            excepted = {node.name, f"{path.stem}.{node.name}"} & MANY_PARAMETERS
            assert taken <= PARAMETERS or excepted, f"{node.name} takes {taken}"


# What a function may import when it runs: optional packages, and what costs start-up time (docs/design.md).
LATE = {
    "buckets/store.py": {"aiohttp", "gcsfs", "s3fs"},
    "data/hf_format.py": {"datasets"},
    "data/sources.py": {"middo_jax.data"},  # tfds_format, which imports TFDS
    "data/split.py": {"sklearn"},
    "data/tokenize.py": {"transformers"},
    "evaluation/offline/instructions.py": {"py3langid"},
    "models/attention/splash.py": {"jax"},
    "models/attention/tpu_trees.py": {"jax"},
    "models/attention/triton_kernels.py": {"jax"},
    "models/gguf/convert.py": {"gguf"},
    "models/hf/verifying.py": {"torch"},
    "parallel/cluster.py": {"jax", "middo_jax.parallel"},
    "refinement/acceptance/language.py": {"py3langid"},
    "stages/benchmark.py": {"middo_jax.evaluation.benchmarks", "middo_jax.evaluation.harness"},
    "training/stopping.py": {"jax", "middo_jax.parallel.coordination"},
}


def test_imports_are_at_the_top_but_for_the_commands_and_what_is_listed() -> None:
    found: dict[str, set[str]] = {}
    for path in (ROOT / "middo_jax").rglob("*.py"):
        name = path.relative_to(ROOT / "middo_jax").as_posix()
        functions = [
            n for n in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(n, ast.FunctionDef)
        ]
        late = [n for f in functions for n in ast.walk(f) if isinstance(n, ast.Import | ast.ImportFrom)]
        if late and not name.startswith("cli/"):
            modules = [n.module or "" if isinstance(n, ast.ImportFrom) else n.names[0].name for n in late]
            found[name] = {m if m.startswith("middo_jax") else m.split(".")[0] for m in modules}
    assert found == LATE


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_files_that_a_page_names_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = set(
        re.findall(
            r"(?<![\w/])((?:tests|middo_jax|benchmarks|configs|launch|docs)/[\w./-]+\.\w+)(?![\w…])", text
        )
    )
    theirs = {name for name in named if Path(name).stem == "mine"}  # the reader's
    assert [name for name in sorted(named - theirs) if not (ROOT / name).exists()] == []


def test_tests_that_pages_name_exist() -> None:
    tests = "\n".join(path.read_text("utf-8") for path in MODULES if path.is_relative_to(ROOT / "tests"))
    known = set(re.findall(r"def (test_\w+)\(", tests))
    named = {name for page in PAGES for name in re.findall(r"`(test_\w+_\w+_\w+)`", page.read_text("utf-8"))}
    assert len(named) > 10
    assert sorted(named - known) == []
