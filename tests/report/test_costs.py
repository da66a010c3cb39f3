"""The page's account of money: nothing is lost in a sum, and what accepted nothing has no price."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.synthetic_run import write_run

from middo_jax.refinement.endpoint.usage import Usage
from middo_jax.report.build import page
from middo_jax.report.costs import costs


def task(*axes: str, accepted: bool) -> dict[str, object]:
    return {"axes": list(axes), "accepted": accepted}


def test_rows_add_up_and_are_per_thousand_accepted() -> None:
    usage = {
        "quality": Usage(requests=4, prompt_tokens=3000, completion_tokens=1000, usd=0.5).to_json(),
        "complexity+quality": Usage(requests=2, prompt_tokens=500, usd=0.25).to_json(),
        "probe": Usage(requests=1, prompt_tokens=30, usd=0.01).to_json(),
    }
    tasks = [task("quality", accepted=True), task("quality", accepted=True)]
    told = costs(usage, [*tasks, task("complexity", "quality", accepted=False)])
    by_axis = {row["axis"]: row for row in told["rows"]}
    assert by_axis["quality"]["usd_per_thousand"] == 250
    assert by_axis["quality"]["tokens_per_thousand"] == 2_000_000
    assert by_axis["complexity+quality"]["usd_per_thousand"] is None
    for name in ("requests", "prompt_tokens", "usd", "accepted"):
        assert told["total"][name] == pytest.approx(sum(row[name] for row in told["rows"]))
    assert told["total"]["usd_per_thousand"] == pytest.approx(380)


def test_nothing_asked_is_no_table() -> None:
    assert costs(None, []) is None
    assert costs({}, []) is None


def test_the_page_has_the_table_of_every_round(tmp_path: Path) -> None:
    text = page(write_run(tmp_path / "demo"))
    assert text.count("<h3>What it cost</h3>") == 2
    assert "schema probe" in text
