"""Laws of the report: no text of a run becomes markup, figures are the files', what is missing is said."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from markupsafe import escape
from support.report_page import Page
from support.synthetic_run import write_run

from middo_jax.progress import duration
from middo_jax.report import plots
from middo_jax.report.build import EXCERPTS, PAGE_BYTES, REFUSED_SHOWN, build, page
from middo_jax.report.lineage import score_rows, trace
from middo_jax.report.status import render_status, status
from middo_jax.report.texts import word_diff
from middo_jax.rundir import (
    RoundDir,
    RunDir,
    RunError,
    file_hash,
    read_jsonl,
    write_json,
    write_jsonl,
    write_text,
)
from middo_jax.rundir.events import read_events


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    return write_run(tmp_path_factory.mktemp("runs") / "demo")


@pytest.fixture
def run(finished: RunDir, tmp_path: Path) -> RunDir:
    """A copy that a test may take apart."""
    return RunDir(shutil.copytree(finished.path, tmp_path / "demo"))


# The page


def test_the_page_is_one_well_formed_file_that_asks_for_nothing(finished: RunDir) -> None:
    path = build(finished)
    assert path == finished.report
    html = path.read_text(encoding="utf-8")
    parsed = Page(html)
    assert parsed.unclosed == []
    assert not {t for t, _ in parsed.elements} & {"link", "img", "iframe", "object", "embed", "base", "form"}
    addresses = [
        a[k] or "" for _, a in parsed.elements for k in ("href", "src", "action", "xlink:href") if k in a
    ]
    assert all(address.startswith("#") for address in addresses)
    assert "@import" not in html
    assert "url(" not in html


def test_only_the_script_that_the_policy_names_is_in_the_page(finished: RunDir) -> None:
    parsed = Page(page(finished))
    (script,) = parsed.scripts
    policy = next(a["content"] for t, a in parsed.elements if t == "meta" and "http-equiv" in a)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy is not None
    assert f"script-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy


def test_the_page_is_a_function_of_the_folder(finished: RunDir, tmp_path: Path) -> None:
    copy = RunDir(shutil.copytree(finished.path, tmp_path / finished.path.name))
    assert page(copy) == page(finished)


def test_long_texts_are_shown_in_excerpts(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines of 1 MB, in every file whose texts are shown, leave the page small, and quick to make."""
    long = "<&\u00e9> word " * 80_000
    for folder in run.rounds():
        tasks = read_jsonl(folder.refined)
        for task in [*(t for t in tasks if t["accepted"])][:1] + [t for t in tasks if not t["accepted"]][:1]:
            for example in filter(None, (task["original"], task["example"])):
                for message in example["messages"]:
                    message["content"] += long
            if task["detail"]:
                task["detail"] += long
        write_jsonl(folder.refined, tasks)
        requests = read_jsonl(folder.requests)
        requests[0]["answer"] += long
        write_jsonl(folder.requests, requests)
    refused = {"where": "d.jsonl:1", "reason": f"broken {long}", "row": {"text": long}}
    write_jsonl(run.path / "rejected.jsonl", [refused] * 5)
    began = time.monotonic()
    html = page(run)
    assert time.monotonic() - began < 30  # two seconds where nothing else runs
    assert len(html.encode()) < PAGE_BYTES
    assert Page(html).unclosed == []
    assert re.search(r"\[\.\.\. and [\d,]+ more characters\]", html)
    assert str(escape(long[: EXCERPTS[0] + 1])) not in html
    monkeypatch.setattr("middo_jax.report.build.PAGE_BYTES", len(html.encode()) - 1)
    assert len(page(run)) < len(html)


def test_of_many_refused_rows_the_first_are_shown(run: RunDir) -> None:
    rows = [{"where": f"d.jsonl:{n}", "reason": "broken", "row": "x"} for n in range(REFUSED_SHOWN + 7)]
    write_jsonl(run.path / "rejected.jsonl", rows)
    words = Page(page(run)).words
    assert f"could not be used: {REFUSED_SHOWN + 7:,}; the first {REFUSED_SHOWN:,} are shown" in words
    assert f"d.jsonl:{REFUSED_SHOWN - 1} " in words
    assert f"d.jsonl:{REFUSED_SHOWN} " not in words


def test_figures_and_tables_can_be_read_without_seeing_them(finished: RunDir) -> None:
    parsed = Page(page(finished))
    pictures = [a for t, a in parsed.elements if t == "svg"]
    assert len(pictures) >= 3 + 2 * 5
    assert all(a.get("role") == "img" and a.get("aria-label") for a in pictures)
    assert parsed.count("table") == parsed.count("caption")
    identities = [a["id"] for _, a in parsed.elements if "id" in a]
    assert len(identities) == len(set(identities))
    links = {a["href"] for t, a in parsed.elements if t == "a"}
    assert {f"#{i}" for i in identities} == links


def test_the_headline_is_what_the_files_say(finished: RunDir) -> None:
    words = Page(page(finished)).words
    rows_in, rows_out = (len(read_jsonl(d.dataset)) for d in (finished.round(0), finished.final))
    accepted = sum(t["accepted"] for r in finished.rounds() for t in read_jsonl(r.refined))
    tried = sum(len(read_jsonl(r.refined)) for r in finished.rounds())
    seconds = sum(s["seconds"] for r in [*finished.rounds(), finished.final] for s in r.stages().values())
    assert f"{rows_in} → {rows_out}" in words
    assert "Effect of the rounds on held-out loss −0.1210 95 % interval −0.1" in words
    assert "round_00 1.7020 → final 1.5810" in words
    assert "Effect of fine-tuning on held-out loss −0.5120 95 % interval −0.5" in words
    assert "base 2.2140 → round_00 1.7020" in words
    assert f"{accepted} of {tried} tried" in words
    assert duration(seconds) in words


def test_every_rewrite_stands_there_with_both_texts(finished: RunDir) -> None:
    parsed = Page(page(finished))
    text = re.sub(r"\s+", "", "".join(parsed.text))
    tasks = [t for r in finished.rounds() for t in read_jsonl(r.refined)]
    for task in tasks:
        before, after = (task[k]["messages"] for k in ("original", "example"))
        for message in [*(before[:1] if not task["accepted"] else before), *after]:
            assert re.sub(r"\s+", "", message["content"]) in text
        for hint in task["hint_ids"]:
            assert not task["accepted"] or hint in text
    assert parsed.count("details", "card") == len(tasks)
    assert parsed.count("ins") > 10


def test_scores_after_are_those_of_the_next_round(finished: RunDir) -> None:
    words = Page(page(finished)).words
    before, after = score_rows(finished.round(0)), score_rows(finished.round(1))
    task = next(
        t for t in read_jsonl(finished.round(0).refined) if t["accepted"] and t["axes"] == ["quality"]
    )
    old, new = before[task["source_id"]]["quality"], after[task["example"]["id"]]["quality"]
    assert f"quality {old:.3f} → {new:.3f}" in words
    last = next(
        t for t in read_jsonl(finished.round(1).refined) if t["accepted"] and t["axes"] == ["quality"]
    )
    assert f"quality {after[last['source_id']]['quality']:.3f} → not yet" in words


def test_sets_and_thresholds_are_those_of_selection_json(finished: RunDir) -> None:
    words = Page(page(finished)).words
    for folder in finished.rounds():
        selection = json.loads(folder.selection.read_text())
        for record in selection["axes"].values():
            assert all(f"{v:.3f}" in words for v in record["threshold"].values())
        for name, axis in (("hard", "complexity"), ("sparse", "diversity"), ("low quality", "quality")):
            assert f"{name} {len(selection['axes'][axis]['ids'])}" in words


def test_held_out_losses_while_training_stand_by_source(finished: RunDir) -> None:
    words = Page(page(finished)).words
    assert "Held-out loss while training" in words
    assert "round_00 code 1.700 1.300 round_00 chat 1.900 1.900 round_01 code 1.400 1.000" in words


def test_a_curve_over_other_held_out_rows_is_left_out_by_name(run: RunDir) -> None:
    for index, known in ((0, file_hash(run.heldout)), (1, "of other rows")):
        run.round(index).finish("train", [run.round(index).metrics], 1.0, heldout=known)
    words = Page(page(run)).words
    assert "round_00 code 1.700 1.300" in words
    assert "round_01 code 1.400 1.000" not in words
    assert "not shown for round_01: evaluated on other held-out rows than the present ones" in words


def test_plots_say_what_scale_the_settings_chose_on(run: RunDir) -> None:
    before = Page(page(run)).words
    settings = yaml.safe_load(run.config.read_text(encoding="utf-8"))
    settings["complexity"]["normalise"] = "length"
    settings["quality"]["score"] = "log_odds"
    write_text(run.config, yaml.safe_dump(settings))
    after = Page(page(run)).words
    for words in ("no threshold is drawn", "log-odds of a good rating"):
        assert (words in before, words in after) == (False, True)
    assert ("quality, 0 to 10" in before, "quality, 0 to 10" in after) == (True, False)


OPTIONAL = (
    "config.yaml", "events.jsonl", "rejected.jsonl",
    "heldout.jsonl", "heldout_losses.json", "heldout_rows.parquet",
    "round_00/dataset.jsonl", "round_00/scores.parquet", "round_00/selection.json", "round_00/refined.jsonl",
    "round_00/requests.jsonl", "round_00/metrics.jsonl", "round_00/evaluations.jsonl",
    "round_00/manifest.json", "round_01", "final",
)  # fmt: skip


@pytest.mark.parametrize("missing", OPTIONAL)
def test_any_file_may_be_missing(run: RunDir, missing: str) -> None:
    target = run.path / missing
    shutil.rmtree(target) if target.is_dir() else target.unlink()
    assert Page(page(run)).unclosed == []
    render_status(status(run))


def test_a_run_of_empty_folders_says_not_yet_and_invents_nothing(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    with pytest.raises(RunError, match="not a run"):
        page(run)
    run.final.path.mkdir()
    parsed = Page(page(run))
    assert parsed.words.count("not yet") >= 8
    assert parsed.count("svg") == 0
    body = parsed.words[parsed.words.index("Rounds") :]
    assert re.findall(r"(?<![\w.])[1-9]\d*(?!\.\d)(?![\w.])", body.split("middo-jax")[0]) == []


def test_an_axis_that_was_not_scored_is_said_not_to_be(run: RunDir) -> None:
    import pyarrow.parquet as pq

    folder = run.round(0)
    selection = json.loads(folder.selection.read_text())
    del selection["axes"]["quality"], selection["sweep"]["quality"]
    write_json(folder.selection, selection)
    table = pq.read_table(folder.scores)
    pq.write_table(table.drop_columns(["quality"]), folder.scores)
    words = Page(page(run)).words
    assert "not scored on this axis" in words
    assert "quality low quality not scored" in words


def test_degenerate_values_are_drawn(run: RunDir) -> None:
    """One sample, equal values, nothing chosen, no tasks, a loss that is null."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = run.round(0)
    row = {"id": "a", "loss_pre": 1.0, "loss_post": 1.0, "knn_mean_sim": 0.5, "quality": float("nan")}
    pq.write_table(pa.Table.from_pylist([row, {**row, "id": "b"}]), folder.scores)
    figures = {"m": 1.0, "fraction": None, "n_scored": 2, "n_null": 0, "ids": []}
    flat = {"loss_pre": None, "loss_post": None}
    axes = {"complexity": {**figures, "mean": flat, "std": flat, "threshold": flat}}
    overlap = dict.fromkeys(("hard&sparse", "hard&low_quality", "sparse&low_quality", "all"), 0)
    sweep = {"complexity": [{"m": 1.0, "n": 0}]}
    write_json(folder.selection, {"n": 2, "axes": axes, "overlap": overlap, "sweep": sweep})
    for path in (folder.refined, folder.requests):
        write_jsonl(path, [])
    write_json(run.heldout_losses, {"n": 1, "models": [{"name": "base", "loss": None, "n_target_tokens": 3}]})
    html = page(run)
    assert "nothing was selected, so nothing was refined" in html
    assert not re.search(r'="[^"]*\b(nan|inf)\b', html)


@pytest.mark.parametrize("name", ["selection.json", "refined.jsonl", "manifest.json", "scores.parquet"])
def test_a_broken_file_is_an_error_that_names_it(run: RunDir, name: str) -> None:
    before = build(run).read_bytes()
    write_text(run.round(0) / name, '{"half": ')
    with pytest.raises(RunError, match=re.escape(name)):
        build(run)
    assert run.report.read_bytes() == before


# Untrusted text

POISON = (
    "<script>alert(1)</script>",
    "\"onmouseover=alert(1) x='",
    "{{7*7}}{% raw %}{{ settings }}",
    "</svg></style></title><img src=x onerror=alert(1)>",
    "a\u2028b\u2029c",
    "<!-- <![CDATA[ & &amp; &#x3c;b&#x3e; --!>",
    "nul\x00esc\x1b[31m\ud800 end",
)
EVIL_ID = "\"><script>alert('id')</script>"


def _poisoned(value: Any, poison: str, ids: dict[str, str]) -> Any:
    """`ids` renamed wherever they stand, and the poison put behind all texts that are free."""
    if isinstance(value, dict):
        return {k: _poisoned(v, poison, ids) for k, v in value.items()}
    if isinstance(value, list):
        return [_poisoned(v, poison, ids) for v in value]
    return ids.get(value, value) if isinstance(value, str) else value


@pytest.mark.parametrize("poison", POISON)
def test_no_text_of_a_run_becomes_markup(tmp_path: Path, poison: str) -> None:
    # JSON and YAML files in UTF-8 cannot hold a lone surrogate itself; as \ud800 it can come out of one.
    clean = poison.replace("\ud800", "")
    yaml_safe = clean.replace("\x00", "").replace("\x1b", "")
    run = write_run(tmp_path / "hostile", n_rows=60, poison=yaml_safe)
    reference = Page(page(write_run(tmp_path / "harmless" / "hostile", n_rows=60)))

    ids = {e["id"]: f"{e['id']}{EVIL_ID}{poison}" for r in run.rounds() for e in read_jsonl(r.dataset)}
    for folder in run.rounds():
        tasks = _poisoned(read_jsonl(folder.refined), poison, ids)
        for task in tasks:
            task["example"]["messages"][-1]["content"] += poison
        text = "".join(json.dumps(t) + "\n" for t in tasks)
        write_text(folder.refined, text)
    html = page(run)
    parsed = Page(html)
    assert parsed.scripts == reference.scripts
    assert parsed.count("script") == 1
    assert [a for _, attributes in parsed.elements for a in attributes if a.startswith("on")] == []
    assert {t for t, _ in parsed.elements} <= {t for t, _ in reference.elements} | {"ins", "del"}
    assert not re.search("[\u2028\u2029\ud800-\udfff\x00-\x08\x0b-\x1f]", html)
    html.encode("utf-8")
    shown = poison.split("\x00")[0].strip()
    assert shown in "".join(parsed.text)  # escaped, not dropped
    build(run)


@pytest.mark.parametrize("poison", POISON[:4])
def test_no_text_escapes_from_a_plot(poison: str) -> None:
    values = np.array([1.0, 2.0, 3.0])
    mask = np.array([False, False, True])
    drawn = [
        plots.scatter(
            poison, plots.Points(values, values, mask), (poison, poison), (2.5, 2.5), "c-complexity"
        ),
        plots.histogram(poison, values, mask, 2.5, poison, "c-quality"),
        plots.lines(poison, [plots.Line(poison, [1, 2], [1, 2], "c-s0", (1, 1))], (poison, poison)),
        plots.dot_plot(poison, [(poison, 1.0), ("b", 2.0)], poison),
        plots.bars(poison, [plots.Bar(poison, ((3, "c-s0"),), poison)]),
        plots.strip(poison, [(poison, 1.0, "c-s0")]),
    ]
    for svg in drawn:
        parsed = Page(svg)
        assert parsed.unclosed == []
        assert {t for t, _ in parsed.elements} <= {"svg", "title", "text", "line", "path", "rect", "circle"}
        assert not [a for _, attributes in parsed.elements for a in attributes if a.startswith("on")]
        assert poison in [a.get("aria-label") for _, a in parsed.elements]


# Plots


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3.2, 7.9), (0.001, 0.0013), (1e5, 9e7), (2.1, 2.100001)])
def test_ticks_are_few_inside_and_evenly_spaced(low: float, high: float) -> None:
    found = plots.ticks(low, high)
    assert 2 <= len(found) <= 6
    assert all(low - 1e-9 * (high - low) <= t <= high + 1e-9 * (high - low) for t in found)
    assert np.allclose(np.diff(found), found[1] - found[0])


def test_a_histogram_draws_every_value_once_and_no_bar_straddles_its_threshold() -> None:
    values = np.random.default_rng(0).normal(size=500)
    chosen = values < -0.7
    svg = plots.histogram("h", values, chosen, -0.7, "x", "c-quality")
    heights: dict[str, float] = {"c-quality": 0.0, "quiet": 0.0}
    sides: dict[str, list[float]] = {"c-quality": [], "quiet": []}
    for tag, a in Page(svg).elements:
        if tag == "rect":
            kind = (a["class"] or "").removeprefix("bar ")
            heights[kind] += float(a["height"] or 0)
            sides[kind].append(float(a["x"] or 0))
    assert heights["c-quality"] / sum(heights.values()) == pytest.approx(chosen.mean(), abs=1e-3)
    assert max(sides["c-quality"]) < min(sides["quiet"])


def test_a_scatter_draws_every_point_until_there_are_too_many() -> None:
    for n, expected in ((500, 500), (20_000, 6_667)):
        values = np.linspace(1, 2, n)
        points = plots.Points(values, values, np.zeros(n, bool))
        svg = plots.scatter("s", points, ("x", "y"), (None, None), "c-complexity")
        assert svg.count("h0") == expected == len(range(n)[plots.thinned(n)])


# Word diff


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("a red fox", "a fox ran"),
        ("", ""),
        ("", "new"),
        ("x\n\n  y  ", " x y"),
        ("one two three four", "one two 3 four five"),
        ("السلام عليكم", "السلام عليكم ورحمة"),
        ("all other", "words here entirely"),
    ],
)
def test_spans_join_to_the_texts_and_the_unmarked_words_agree(before: str, after: str) -> None:
    old, new = word_diff(before, after)
    assert "".join(t for _, t in old) == before
    assert "".join(t for _, t in new) == after
    if any(changed for changed, _ in [*old, *new]):
        kept = [[w for changed, t in side if not changed for w in t.split()] for side in (old, new)]
        assert kept[0] == kept[1]


def test_marks_fall_on_what_changed() -> None:
    assert word_diff("a red fox", "a fox ran") == (
        [(False, "a "), (True, "red"), (False, " fox")],
        [(False, "a fox "), (True, "ran")],
    )
    assert word_diff("wrapped\nanew here", "wrapped anew\n\nhere") == (
        [(False, "wrapped\nanew here")],
        [(False, "wrapped anew\n\nhere")],
    )


# Status


def test_status_of_a_finished_run(finished: RunDir) -> None:
    d = status(finished)
    assert json.loads(json.dumps(d)) == d
    assert (d["run"], d["complete"], d["next"]) == ("demo", True, None)
    assert [r["name"] for r in d["rounds"]] == ["round_00", "round_01"]
    assert d["rounds"][0]["rows"] == 240
    selection = json.loads(finished.round(0).selection.read_text())
    assert d["rounds"][0]["selected"] == {a: len(s["ids"]) for a, s in selection["axes"].items()}
    distinct = {i for s in selection["axes"].values() for i in s["ids"]}
    assert d["rounds"][0]["n_selected"] == len(distinct)
    assert d["rounds"][1]["accepted"] + d["rounds"][1]["rejected"] == len(
        read_jsonl(finished.round(1).refined)
    )
    assert [m["name"] for m in d["heldout"]] == ["base", "round_00", "round_01", "final"]
    assert d["last_event"]["event"] == "run_finished"


def test_status_names_the_first_stage_that_is_not_done(run: RunDir) -> None:
    shutil.rmtree(run.final.path)
    assert status(run)["next"] == {"round": "final", "stage": "train"}
    run.round(1).refined.unlink()  # the manifest names it, so the stage is not done any more
    d = status(run)
    assert d["next"] == {"round": "round_01", "stage": "refine"}
    assert not d["complete"]
    text = render_status(d)
    assert "next: refine of round_01" in text
    shutil.rmtree(run.round(1).path)  # config.yaml still asks for it
    assert status(run)["next"] == {"round": "round_01", "stage": "train"}


def test_torn_lines_of_the_log_are_counted_and_harm_nothing(run: RunDir) -> None:
    """Half a line anywhere, blocks of NUL as after a power cut, and bytes that are no UTF-8."""
    whole = run.events.read_bytes()
    first, _, rest = whole.partition(b"\n")
    torn = b'{"time": "2026-\n' + first + b"\n" + bytes(4096) + b"\n\xff\xfe\x80\n3\n" + bytes(9) + rest
    run.events.write_bytes(torn + b'{"time": "20')
    found = status(run)
    assert found["last_event"]["event"] == "run_finished"
    assert found["unreadable_events"] == 5
    assert "5 lines of events.jsonl cannot be read and are ignored" in render_status(found)
    assert "unreadable lines of events.jsonl: 5" in build(run).read_text(encoding="utf-8")
    assert read_events(run.events).rows == [json.loads(line) for line in whole.splitlines()]
    run.events.write_text('{"version": 9, "event": "start"}\n', encoding="utf-8")  # maybe a flipped bit
    assert len(read_events(run.events).rows) == 1
    run.log("resume")  # on a line of its own
    assert status(run)["last_event"]["event"] == "resume"
    lines = whole.decode().splitlines()
    last = json.dumps(json.loads(lines[-1]) | {"version": 9})
    run.events.write_text("\n".join([*lines[:-1], last]))  # one digit was damaged
    assert status(run)["last_event"]["version"] == 9
    run.events.write_text('{"version": 2, "time": "later"}\n' * 2)
    with pytest.raises(RunError, match=r"events\.jsonl has format version 2"):
        status(run)


@pytest.mark.parametrize("line", ['{"event": "x"}', '{"time": null, "event": null}', '{"event": ["x"]}'])
def test_a_line_of_the_log_may_lack_what_the_page_shows(run: RunDir, line: str) -> None:
    run.events.write_text(line + "\n", encoding="utf-8")
    assert " at ?" in Page(page(run)).words
    assert " at ?" in render_status(status(run))


@pytest.mark.parametrize("levels", [400, 5000])  # too deep to be written, and to be read
def test_settings_that_are_nested_too_deep_are_named(run: RunDir, levels: int) -> None:
    run.config.write_text("a: " + "[" * levels + "]" * levels, encoding="utf-8")
    with pytest.raises(RunError, match=r"config\.yaml: (not valid YAML|nested too deep)"):
        page(run)


def test_settings_that_cannot_be_read_are_named(run: RunDir) -> None:
    run.config.unlink()
    run.config.mkdir()
    with pytest.raises(RunError, match=r"config\.yaml cannot be read .*--repair"):
        status(run)


def test_rendered_status_is_plain_text(run: RunDir) -> None:
    run.log("\x1b[31mred [bold]b[/bold]\n")
    text = render_status(status(run))
    assert all(c.isprintable() or c == "\n" for c in text)
    assert "[bold]b[/bold]" in text
    assert max(map(len, text.splitlines())) <= 120


def test_a_run_that_does_not_exist_is_an_error_that_names_its_neighbours(finished: RunDir) -> None:
    gone = RunDir(finished.path.parent / "dmo")
    for ask in (status, build, lambda r: trace(r, "a")):
        with pytest.raises(RunError, match="demo"):
            ask(gone)
    assert not gone.path.exists()


# Lineage


def _twice_refined(run: RunDir) -> dict[str, Any]:
    first = {t["example"]["id"] for t in read_jsonl(run.round(0).refined) if t["accepted"]}
    return next(t for t in read_jsonl(run.round(1).refined) if t["accepted"] and t["source_id"] in first)


def test_a_family_is_the_same_from_wherever_it_is_asked(finished: RunDir) -> None:
    task = _twice_refined(finished)
    youngest, middle = task["example"]["id"], task["source_id"]
    family = trace(finished, youngest)
    assert [s["relation"] for s in family] == ["ancestor", "ancestor", "self"]
    assert [s["round"] for s in family] == [0, 1, 2]
    oldest = family[0]["id"]
    assert family[0]["op"] == "seed"
    assert family[1]["parent_ids"] == [oldest]
    assert {oldest, middle, youngest} <= {s["id"] for s in trace(finished, oldest)}
    assert {s["id"]: s["relation"] for s in trace(finished, middle)}.items() >= {
        oldest: "ancestor", middle: "self", youngest: "descendant"
    }.items()  # fmt: skip
    assert json.loads(json.dumps(family)) == family


def test_scores_are_those_of_the_sample_in_its_own_rounds(finished: RunDir) -> None:
    task = _twice_refined(finished)
    first, second, last = trace(finished, task["example"]["id"])
    assert first["scores"] == score_rows(finished.round(0))[first["id"]]
    assert second["scores"] == score_rows(finished.round(1))[second["id"]]
    assert last["scores"] is None  # the final dataset is not scored
    for column, value in last["scores_before"].items():
        assert second["scores"][column] == value
    for sample in (first, second):
        for name, row in sample["later_scores"].items():
            assert row == score_rows(RoundDir(finished.path / name))[sample["id"]]
    assert first["later_scores"] or second["rounds"][0] == "round_01"


def test_refused_candidates_are_descendants_that_no_round_holds(finished: RunDir) -> None:
    task = next(t for t in read_jsonl(finished.round(0).refined) if not t["accepted"])
    candidate = next(s for s in trace(finished, task["source_id"]) if s["id"] == task["example"]["id"])
    assert candidate["rounds"] == []
    assert candidate["accepted"] is False
    assert candidate["verdict"] == (f"{task['gate']}: " if task["gate"] else "") + task["detail"]


def test_a_prefix_is_enough_if_only_one_id_begins_so(finished: RunDir) -> None:
    whole = read_jsonl(finished.round(0).dataset)[3]["id"]
    assert trace(finished, whole[:10]) == trace(finished, whole)
    with pytest.raises(RunError, match="give more digits"):
        trace(finished, whole[:1])


def test_an_unknown_id_is_answered_with_the_nearest(finished: RunDir) -> None:
    whole = read_jsonl(finished.round(0).dataset)[3]["id"]
    with pytest.raises(RunError, match=whole):
        trace(finished, whole[:7] + "zz" + whole[9:])
    for wanted in ("", "no such id"):
        with pytest.raises(RunError, match="no sample has the id"):
            trace(finished, wanted)


def test_a_run_without_datasets_has_nothing_to_trace(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.round(0).path.mkdir()
    with pytest.raises(RunError, match="no round has a dataset yet"):
        trace(run, "a")


def test_a_lineage_that_bites_its_tail_still_ends(run: RunDir) -> None:
    rows = read_jsonl(run.round(0).dataset)[:2]
    for row, other in zip(rows, reversed(rows), strict=True):
        row["lineage"]["parent_ids"] = [other["id"]]
    write_jsonl(run.round(0).dataset, rows)
    assert {s["id"] for s in trace(run, rows[0]["id"])} >= {r["id"] for r in rows}
