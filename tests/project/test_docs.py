"""What the documents say is so: settings, commands, links."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.tiny_model import write_tiny_model

from middo_jax.cli import app
from middo_jax.config import leaves, load
from middo_jax.config.gates import gates
from middo_jax.data.example import Example, Message
from middo_jax.refinement.acceptance.candidate import Candidate
from middo_jax.refinement.acceptance.table import first_verdict, unregister
from middo_jax.refinement.tasks import Task, Verdict

ROOT = Path(__file__).parents[2]
EXAMPLE = Example((Message("user", "Why?"), Message("assistant", "So.")))
PAGES = ["README.md", *(str(page.relative_to(ROOT)) for page in sorted((ROOT / "docs").glob("*.md")))]


@pytest.mark.parametrize(
    ("script", "page"),
    [("make_settings", "settings.md"), ("make_gates", "refine.md"), ("make_files", "files.md")],
)
def test_a_page_is_what_its_script_writes(script: str, page: str) -> None:
    spec = importlib.util.spec_from_file_location(script, ROOT / "docs" / f"{script}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (ROOT / "docs" / page).read_text(encoding="utf-8") == module.page()


def test_the_gate_that_the_docs_register_is_asked_and_is_a_setting() -> None:
    """Its row and its check are all that it takes."""
    text = (ROOT / "docs" / "refine.md").read_text(encoding="utf-8").split("### A gate of your own")[1]
    example = text.split("```python\n")[1].split("```")[0]
    try:
        exec(example, {})
        row = next(row for row in gates() if row.name == "polite")
        candidate = Candidate(Task("rewrite", ("quality",), EXAMPLE), response="Please see.")
        config = load(None, ["model.path=m", "data.path=d", "refine.gates.polite=2"])
        rude = first_verdict(candidate, row.needs, config.refine)
        assert rude == Verdict("polite", "please said 1 times, 2 wanted")
        assert (
            first_verdict(candidate, row.needs, config.refine.model_copy(update={"accept": "none"})) is None
        )
    finally:
        unregister("polite")


def test_the_python_page_runs_and_prints_as_much_as_it_shows(tmp_path: Path) -> None:
    """In order, on a tiny model and one device; numbers differ from those shown, words and lines do not."""
    text = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    write_tiny_model(tmp_path / "base")
    lines = (ROOT / "configs" / "quickstart_data.jsonl").read_text(encoding="utf-8").splitlines()
    (tmp_path / "data.jsonl").write_text("\n".join(lines[:24]), encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```\n(?:\n```text\n(.*?)```)?", text, re.DOTALL)
    assert len(blocks) == 7
    end = "-- end of a block --"
    script = "".join(f"{code}\nprint({end!r})\n" for code, _ in blocks)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": "1"}
    ran = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    for (code, shown), printed in zip(blocks, ran.stdout.split(f"{end}\n"), strict=False):
        assert shape_of(printed) == shape_of(shown), code


def shape_of(output: str) -> list[str]:
    """Lines without their numbers, the names of rows, and how many of something there are."""
    return [
        re.sub(r"[-+]?\d[\d.e+-]*|^\w+ +(?=similarity)|(?:True|False)$", "#", line)
        for line in output.splitlines()
    ]


def test_the_settings_page_names_every_setting() -> None:
    page = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    missing = [name for name, *_ in leaves() if f"`{name}`" not in page]
    assert missing == []


def test_the_readme_names_every_command_and_no_other() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = {c.name or c.callback.__name__ for c in app.registered_commands if c.callback}
    named = set(re.findall(r"(?:^|[·`] ?)middo ([a-z-]+)", readme, re.MULTILINE))
    assert named == commands


@pytest.mark.parametrize("page", [*PAGES, "configs/quickstart_data.md"])
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    assert [link for link in links if not (ROOT / page).parent.joinpath(link).exists()] == []


@pytest.mark.parametrize("config", sorted(ROOT.glob("configs/*.yaml")), ids=lambda p: p.name)
def test_shipped_configs_are_valid(config: Path) -> None:
    settings = load(config)
    assert settings.name
    assert not Path(settings.data.path).is_absolute()


@pytest.mark.parametrize("page", PAGES)
def test_settings_that_pages_name_are_settings(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    known = {leaf.name for leaf in leaves()}
    groups = {name.split(".")[0] for name in known if "." in name}
    named = set(re.findall(rf"`((?:{'|'.join(groups)})\.[a-z_.]+)(?:=[^`]*|: [^`]*)?`", text))
    named = {name for name in named if not name.endswith(".py")}
    assert [
        n for n in sorted(named) if n not in known and not any(k.startswith(n + ".") for k in known)
    ] == []
