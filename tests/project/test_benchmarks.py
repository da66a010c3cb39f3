"""`python -m benchmarks`: the index is complete, and every entry is a program that says what it does."""

from __future__ import annotations

import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.__main__ import INDEX, listing, main, summary

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "benchmarks"


def programs() -> set[str]:
    """Names of all modules that run when they are the program."""
    found = set()
    for path in FOLDER.rglob("*.py"):
        if path.name != "__main__.py" and 'if __name__ == "__main__":' in path.read_text(encoding="utf-8"):
            found.add(".".join(path.relative_to(FOLDER).with_suffix("").parts))
    return found


def test_the_index_lists_every_program_once() -> None:
    names = [row.name for row in INDEX]
    assert len(names) == len(set(names))
    assert set(names) == programs()


@pytest.mark.parametrize("name", [row.name for row in INDEX])
def test_every_benchmark_says_what_it_does_and_how_it_is_started(name: str) -> None:
    assert len(summary(name)) > 20
    text = (FOLDER / f"{name.replace('.', '/')}.py").read_text(encoding="utf-8").split('"""')[1]
    started = rf"python -m benchmarks(\.| ){re.escape(name)}\b"
    assert re.search(started, text), text
    assert "published_pass" not in text


def test_the_list_has_the_name_the_sentence_and_the_needs(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--list"])
    printed = capsys.readouterr().out
    assert printed.endswith(listing() + "\n")
    for row in INDEX:
        assert (
            f"\n{row.name}\n    {summary(row.name)}\n    needs {row.needs}; takes about {row.takes}"
            in f"\n{printed}"
        )


def test_listing_imports_no_benchmark_and_a_name_runs_one(tmp_path: Path) -> None:
    """Without site-packages: the list needs the standard library alone."""

    def call(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, check=False)

    listed = call("-S", "-m", "benchmarks", "--list")
    assert (listed.returncode, listed.stderr) == (0, "")
    unknown = call("-S", "-m", "benchmarks", "speed")
    assert unknown.returncode == 1
    assert "there is no benchmark 'speed'" in unknown.stderr
    ran = call("-m", "benchmarks", "refine_examples", str(tmp_path))
    assert (ran.returncode, ran.stdout) == (1, "")
    assert ran.stderr.startswith(f"{tmp_path}: nothing refined there yet; run `middo refine")


def test_a_benchmark_runs_under_the_name_of_its_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `__main__` its functions could not be pickled for worker processes."""
    module = pytest.importorskip("benchmarks.training")
    pickled = []
    monkeypatch.setattr(module, "main", lambda: pickled.append(pickle.dumps(module.turn_of)))
    with pytest.raises(SystemExit) as ended:
        main(["training"])
    assert (len(pickled), ended.value.code) == (1, None)


def test_pages_start_benchmarks_by_name_and_name_none_that_is_missing() -> None:
    for page in [ROOT / "README.md", FOLDER / "README.md", *(ROOT / "docs").glob("*.md")]:
        text = page.read_text(encoding="utf-8")
        assert re.findall(r"python benchmarks/\S+", text) == [], page
        named = set(re.findall(r"python -m benchmarks[. ]([a-z][\w.]*)", text))
        assert named <= {row.name for row in INDEX}, page
