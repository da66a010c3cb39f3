"""The page fits a phone and a screen: no table is wider than its column at 390 and at 1,440 pixels."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from support.report_page import Page
from support.synthetic_run import write_run

from middo_jax.report.build import page
from middo_jax.rundir import RunDir, write_json

WIDTHS = (390, 1440)
NARROW_COLUMNS = 5  # a table of more columns is laid out as one block per row on a narrow page
LONG = "reason" * 60  # one word that is wider than any column
MEASURE = """
addEventListener("load", () => {
  const found = {};
  for (const frame of document.querySelectorAll("iframe")) {
    const page = frame.contentDocument;
    const boxes = [...page.querySelectorAll("html, table, .scroll, .tiles, .card, figure")];
    const wide = boxes.filter((e) => e.scrollWidth > e.clientWidth + 1);
    found[frame.id] = {
      visible: frame.clientWidth,
      page: page.documentElement.scrollWidth,
      tables: page.querySelectorAll("table").length,
      wide: wide.map((e) => e.textContent.trim().slice(0, 60)),
    };
  }
  document.body.innerHTML = "<pre></pre>";
  document.querySelector("pre").textContent = JSON.stringify(found);
});
"""


@pytest.fixture(scope="module", params=["", f" {LONG}"], ids=["plain", "long words"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A run that was refined for a long time, at a great cost."""
    run = write_run(tmp_path_factory.mktemp("runs") / "demo", n_rows=120, poison=request.param)
    for folder in run.rounds():
        stages = folder.stages()
        for counters in stages["refine"]["usage"].values():
            counters |= {name: n * 10_000 for name, n in counters.items() if isinstance(n, int | float)}
        write_json(folder.manifest, {"stages": stages})
    return run


def test_wide_tables_have_labels_for_narrow_pages(run: RunDir) -> None:
    """Each cell of a table that is laid out in blocks names its column, as the head is not shown there."""
    tables = re.findall(r"<table.*?</table>", page(run), re.DOTALL)
    assert len(tables) > 8
    for text in tables:
        table = Page(text)
        columns = [a for t, a in table.elements if t == "th" and a.get("scope") == "col"]
        is_stacked = table.count("table", "stack") == 1
        caption = re.search("<caption>(.*?)</caption>", text)
        assert is_stacked or len(columns) <= NARROW_COLUMNS, caption
        if is_stacked and len(columns) > NARROW_COLUMNS:
            filled = re.findall(r"<td([^>]*)>[^<\\s]", text)
            assert all("data-label=" in attributes or "colspan=" in attributes for attributes in filled), (
                caption
            )


@pytest.mark.skipif(
    shutil.which("chromium") is None, reason="chromium, which measures the page, is not installed"
)
def test_nothing_is_wider_than_the_page(run: RunDir, tmp_path: Path) -> None:
    # The measuring script is in a page around the report; the report keeps its own policy.
    style, report = "height:900px;border:0", html.escape(page(run))
    frames = [f'<iframe id="{w}" style="width:{w}px;{style}" srcdoc="{report}"></iframe>' for w in WIDTHS]
    outer = tmp_path / "outer.html"
    outer.write_text(f"<!doctype html><body>{''.join(frames)}<script>{MEASURE}</script>", encoding="utf-8")
    browser = [
        "chromium",
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path / 'profile'}",
    ]
    size = ["--window-size=1600,1000", "--virtual-time-budget=20000", "--dump-dom", outer.as_uri()]
    done = subprocess.run([*browser, *size], capture_output=True, text=True, check=True, timeout=120)
    text = re.search("<pre>(.*?)</pre>", done.stdout, re.DOTALL)
    assert text is not None, done.stderr
    measured = json.loads(html.unescape(text.group(1)))
    for width in WIDTHS:
        found = measured[str(width)]
        assert found["visible"] == width
        assert found["tables"] > 8
        assert found["page"] <= width
        assert found["wide"] == []
