"""report.html: one page about a run. It is made from the run's folder alone and needs no network.

The page depends on the files only, not on the time. Values that are in no file yet are marked as missing.
Jinja or `plots.element` escapes every text, and the page's content security policy allows only the template's
script, by its hash.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jinja2
import yaml
from markupsafe import Markup

from middo_jax.data.example import Example
from middo_jax.data.sources import Rejection, count_reasons
from middo_jax.progress import duration
from middo_jax.report import plots
from middo_jax.report.acceptance import acceptance
from middo_jax.report.axes import ShownAxis, shown_axes
from middo_jax.report.benchmarks import metric_text, score_text
from middo_jax.report.controls import verdict
from middo_jax.report.costs import costs
from middo_jax.report.curves import heldout_curves, training_curves
from middo_jax.report.effects import RESAMPLES
from middo_jax.report.lineage import score_rows, score_table
from middo_jax.report.planned import planned
from middo_jax.report.score_plots import score_plots
from middo_jax.report.status import (
    FINAL_STAGES,
    ROUND_STAGES,
    count_rows,
    each_row,
    judged_tasks,
    load_json,
    load_jsonl,
    load_settings,
    require_run,
    status,
)
from middo_jax.report.texts import Spans, excerpt_of, word_diff
from middo_jax.report.verdicts import refusals
from middo_jax.rundir import RoundDir, RunDir, RunError, write_text
from middo_jax.version import __version__

OPS = {
    "simplify": "simplified",
    "rewrite": "rewritten",
    "synthesize": "synthesized",
    "reanswer": "answered anew",
    "complete": "completed",
}
Axes = Mapping[str, ShownAxis]
OPTIONAL_STAGES = ("benchmark", "heldout", "best", "take_back")
STAGES = (*ROUND_STAGES, *(s for s in FINAL_STAGES if s not in ROUND_STAGES), *OPTIONAL_STAGES)
# Characters shown of each text. The first that makes the page no larger than PAGE_BYTES is used.
EXCERPTS = (10_000, 3_000, 1_000, 300)
PAGE_BYTES = 20_000_000
REFUSED_SHOWN = 1_000  # rows of the input

# Characters that a browser would not show as they are: line separators, which end a line in scripts; control
# characters, which HTML forbids; lone surrogates, which UTF-8 cannot encode.
_VISIBLE = {0x2028: "&#8232;", 0x2029: "&#8233;"}
_VISIBLE |= {c: chr(0x2400 + c) for c in range(32) if chr(c) not in "\t\n\r"} | {0x7F: "\u2421"}
_VISIBLE |= dict.fromkeys(range(0xD800, 0xE000), "\N{REPLACEMENT CHARACTER}")


def build(run: RunDir) -> Path:
    """Writes report.html, whole or not at all, and returns its path.

    Raises:
      RunError: the folder does not exist or is not a run's, or a file in it cannot be read.
    """
    require_run(run)
    write_text(run.report, page(run))
    return run.report


def page(run: RunDir) -> str:
    """The text of the page, see `build`. Long texts are shown in excerpts, the shorter the more there are."""
    text = ""
    for excerpt in EXCERPTS:
        text = _page(run, excerpt)
        if len(text.encode()) <= PAGE_BYTES:
            break
    return text


def _page(run: RunDir, excerpt: int) -> str:
    """The page with at most `excerpt` characters of each text."""
    state, settings = status(run), load_settings(run)
    folders = [RoundDir(run.path / r["name"]) for r in state["rounds"]]
    axes = shown_axes(load_json(folder.selection) for folder in folders)
    later = [*folders[1:], None][: len(folders)]
    rounds = [
        {**facts, **_round(folder, following, settings, axes, excerpt)}
        for folder, following, facts in zip(folders, later, state["rounds"], strict=True)
    ]
    refined = [r for r in rounds if r["accepted"] is not None]
    refused = load_jsonl(run.path / "rejected.jsonl")
    unusable = [Rejection(row["where"], row["reason"], None) for row in refused or []]
    return _environment(excerpt).get_template("page.html.j2").render(
        version=__version__,
        state=state,
        rounds=rounds,
        stages=[s for s in STAGES if any(s in r["stages"] for r in (*state["rounds"], state["final"]))],
        axes=axes,
        settings=settings,
        settings_text=_settings_text(run, settings),
        refused=None if refused is None else refused[:REFUSED_SHOWN],
        n_refused=len(refused or ()),
        recorded_models=sorted({r["recorded"]["model"] for r in rounds if r["recorded"]}),
        refused_reasons=count_reasons(unusable),
        repairs=run.round(0).stages().get("prepare", {}).get("repairs", {}),
        n_heldout_rows=count_rows(run.heldout),
        n_accepted=sum(r["accepted"] for r in refined) if refined else None,
        n_tried=sum(r["accepted"] + r["rejected"] for r in refined) if refined else None,
        time=_time(state),
        planned=planned(run),
        heldout=_heldout(state["heldout"], settings),
        curves=training_curves([*folders, run.final]),
        heldout_curves=heldout_curves([*folders, run.final]),
    ).translate(_VISIBLE)  # fmt: skip


def _settings_text(run: RunDir, settings: dict[str, Any]) -> str:
    try:
        return yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
    except RecursionError as e:
        raise RunError(f"{run.config}: nested too deep to be shown; repair it or start the run again") from e


def _environment(excerpt: int) -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    missing = Markup('<span class="missing">not yet</span>')

    def number(form: Callable[[Any], str]) -> Callable[[Any], str]:
        return lambda v: missing if v is None else form(v).replace("-", "\N{MINUS SIGN}")

    environment.filters |= {
        "count": number(lambda v: f"{v:,}"),
        "score": number(lambda v: f"{v:.3f}" if abs(v) < 1000 else f"{v:.3g}"),
        "loss": number(lambda v: f"{v:.4f}"),
        "change": number(lambda v: f"{v:+.4f}"),
        "percent": number(lambda v: f"{v:.1%}"),
        "ratio": number(lambda v: f"{v:,.2f}"),
        "seconds": number(duration),
        "metric": metric_text,
        "benchmark": lambda v: score_text(v).replace("+-", "\N{PLUS-MINUS SIGN}"),
        "flops": number(lambda v: f"{v:.2g}"),
        "verdict": verdict,
        "usd": number(lambda v: f"{v:,.2f}" if v >= 1 else f"{v:.4f}"),
        "raw": lambda v: v if isinstance(v, str) else json.dumps(v, ensure_ascii=False, indent=2),
        "excerpt": lambda v: excerpt_of(str(v), excerpt),
        "csp_hash": lambda s: base64.b64encode(hashlib.sha256(str(s).encode()).digest()).decode(),
    }
    return environment


def _time(state: dict[str, Any]) -> dict[str, Any]:
    """Seconds per stage over all rounds, and their plot; `total` is None if no stage is done."""
    done = [
        (stage, s)
        for r in [*state["rounds"], state["final"]]
        for stage, s in r["stages"].items()
        if s is not None
    ]
    total = {stage: sum(s for name, s in done if name == stage) for stage in STAGES if stage in dict(done)}
    parts = [(f"{stage}: {duration(s)}", s, f"c-s{STAGES.index(stage)}") for stage, s in total.items()]
    return {
        "total": sum(total.values()) if done else None,
        "stages": [(stage, s, f"c-s{STAGES.index(stage)}") for stage, s in total.items()],
        "plot": plots.strip("Time by stage", parts) if done else None,
    }


def _heldout(models: list[dict[str, Any]], settings: dict[str, Any]) -> dict[str, Any]:
    """The plot, and the rows of the table: each model's change against base and against round_00."""
    known = {m["name"]: m["loss"] for m in models if m["loss"] is not None}
    names, references = list(known), ("base", "round_00")

    def against(name: str, reference: str) -> float | None:
        if name not in names or reference not in names[: names.index(name)]:
            return None
        return known[name] - known[reference]

    rows = [m | {"against": [against(m["name"], reference) for reference in references]} for m in models]
    open_dot = names.index("round_00") if "round_00" in names else 0
    title, label = "Held-out loss of each model", "loss, nats per token"
    plot = plots.dot_plot(title, list(known.items()), label, open_dot) if known else None
    train = settings.get("train")
    return {
        "rows": rows,
        "references": references,
        "plot": plot,
        "open_dot": names[open_dot] if names else None,
        "resamples": RESAMPLES,
        "continues_training": isinstance(train, dict) and train.get("start_from") == "previous",
    }


def _round(
    folder: RoundDir,
    next_folder: RoundDir | None,
    settings: dict[str, Any],
    axes: Axes,
    excerpt: int,
) -> dict[str, Any]:
    """The page's values about one round, besides those that `status` returns."""
    selection = load_json(folder.selection)
    sets = selection["axes"] if selection else {}
    tasks = judged_tasks(folder)
    taken = [t for t in tasks or [] if t["accepted"] and t["example"]]
    before = score_rows(folder, {t["original"]["id"] for t in taken})
    later = {} if next_folder is None else score_rows(next_folder, {t["example"]["id"] for t in taken})
    # Of a dataset of millions, the other columns would need several times the memory.
    scores = score_table(folder, columns={name for axis in axes.values() for name in axis.columns})
    needed = {i for task in tasks or [] for i in task["hint_ids"]}
    hints = {}
    if needed and folder.dataset.exists():
        rows = each_row(folder.dataset)
        hints = {row["id"]: Example.from_json(row).prompt for row in rows if row["id"] in needed}
    rejected = refusals(tasks or [], load_jsonl(folder.requests) or [])
    limits = folder.stages().get("refine", {}).get("limits", {})
    return {
        "sets": sets,
        "overlap": selection["overlap"] if selection else None,
        "duplicates": selection.get("duplicates") if selection else None,  # not in older folders
        "n_scored_rows": None if scores is None else len(scores),
        "set_plot": _set_plot(selection, axes) if selection else None,
        "plots": score_plots(scores, sets, settings, axes) | {"sweep": _sweep(selection, axes)},
        "verdicts": _verdicts(tasks, axes) if tasks is not None else None,
        "reasons": Counter((_axes(t), t["verdict"].kind) for t in rejected).most_common(),
        "acceptance": acceptance(
            load_jsonl(folder.candidates),
            settings,
            {name: axis.colour for name, axis in axes.items()},
            tasks or (),
            limits,
        ),
        "costs": costs(folder.stages().get("refine", {}).get("usage"), tasks or []),
        "dropped": load_jsonl(folder.dropped),
        "recorded": folder.stages().get("refine", {}).get("recorded"),
        "taken_back": folder.stages().get("take_back")
        if settings.get("refine", {}).get("take_back")
        else None,
        "kept": folder.stages().get("refine", {}).get("kept", {}),
        "conversations": _conversations(tasks or []),
        "rewrites": [_rewrite(t, hints, (before, later), axes, excerpt) for t in taken],
        "refusals": [t | {k: _example(t[k]) for k in ("example", "original")} for t in rejected],
    }


def _set_plot(selection: dict[str, Any], axes: Axes) -> Markup:
    rows = [(axes[a].title, len(s["ids"]), axes[a].colour) for a, s in selection["axes"].items()]
    rows += [(k.replace("_", " ").replace("&", " & "), n, "c-both") for k, n in selection["overlap"].items()]
    drawn = [plots.Bar("all sets" if name == "all" else name, ((n, c),), f"{n:,}") for name, n, c in rows]
    return plots.bars("Samples chosen by each axis, and by several", drawn)


def _sweep(selection: dict[str, Any] | None, shown: Axes) -> dict[str, Any] | None:
    series = []
    for axis, points in (selection or {}).get("sweep", {}).items():
        m = selection["axes"].get(axis, {}).get("m") if selection else None
        mark = next(((p["m"], p["n"]) for p in points if p["m"] == m), None)
        x, y = [float(p["m"]) for p in points], [float(p["n"]) for p in points]
        series.append(plots.Line(shown[axis].title, x, y, shown[axis].colour, mark))
    if not any(s.x for s in series):
        return None
    plot = plots.lines(
        "Samples chosen for other m",
        series,
        ("m, standard deviations", "samples"),
        from_zero=True,
        height=240,
    )
    return {"plot": plot, "lines": series}


def _axes(task: dict[str, Any]) -> tuple[str, ...]:
    return tuple(task["axes"])


def _colour(axes: tuple[str, ...], shown: Axes) -> str:
    return shown[axes[0]].colour if len(axes) == 1 and axes[0] in shown else "c-both"


def _verdicts(tasks: list[dict[str, Any]], shown: Axes) -> dict[str, Any]:
    """Accepted and rejected rewrites by the axes that selected the sample."""
    rows = []
    for axes in sorted({_axes(t) for t in tasks}):
        group = [t for t in tasks if _axes(t) == axes]
        accepted = sum(bool(t["accepted"]) for t in group)
        rows.append({"axes": axes, "n": len(group), "accepted": accepted, "rejected": len(group) - accepted})
    drawn = [
        plots.Bar(
            " + ".join(r["axes"]),
            ((r["accepted"], _colour(r["axes"], shown)), (r["rejected"], "rejected")),
            f"{r['accepted']:,} of {r['n']:,}",
        )
        for r in rows
    ]
    return {
        "rows": rows,
        "plot": plots.bars("Rewrites accepted and rejected by axis", drawn) if rows else None,
    }


def _example(row: dict[str, Any] | None) -> Example | None:
    return Example.from_json(row) if row else None


def _conversations(tasks: list[dict[str, Any]]) -> dict[str, int]:
    """Accepted rewrites of conversations of several turns: their number, their turns, the changed ones."""
    taken = [t for t in tasks if t["accepted"] and t["example"] and t["replaces"]]
    pairs = [(Example.from_json(t["original"]), Example.from_json(t["example"])) for t in taken]
    long = [(original, child) for original, child in pairs if original.n_user_turns > 1]
    return {
        "n": len(long),
        "turns": sum(len(child.messages) for _, child in long),
        "changed": sum(len(child.changed_turns(original)) for original, child in long),
    }


def _rewrite(
    task: dict[str, Any],
    hints: dict[str, str],
    scores_of_two: tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]],
    shown: Axes,
    excerpt: int,
) -> dict[str, Any]:
    """The page's values about one accepted rewrite: texts, marked words, hints, scores before and after."""
    scores, later = scores_of_two
    original, example = Example.from_json(task["original"]), Example.from_json(task["example"])
    by = ", edited by a person" if task["person"] == "edit" else ""
    before = scores.get(original.id) or example.lineage.scores_before or {}
    # Under the same model if the gates measured it, otherwise under the next round's, which was trained on
    # it.
    measured = {c: v for c, v in (example.lineage.scores_after or {}).items() if v is not None}
    after = {**later.get(example.id, {}), **measured}

    def compare(before: str, after: str) -> tuple[Spans, Spans]:
        texts = excerpt_of(before, excerpt), excerpt_of(after, excerpt)
        return word_diff(*texts) if task["replaces"] else ([(False, texts[0])], [(False, texts[1])])

    columns = [c for axis in task["axes"] if axis in shown for c in shown[axis].columns]
    texts = [
        ("Prompt", *compare(original.prompt, example.prompt)),
        ("Response", *compare(original.response, example.response)),
    ]
    if task["replaces"] and len(original.messages) == len(example.messages) and original.n_user_turns > 1:
        changed = example.changed_turns(original)
        pairs = ((n, original.messages[n], example.messages[n]) for n in changed)
        texts = [(f"Turn {n + 1} ({m.role})", *compare(m.content, new.content)) for n, m, new in pairs]
    return {
        "id": example.id,
        "source_id": original.id,
        "user_id": original.user_id,
        "op": f"{OPS.get(task['op'], task['op'])}{by}",
        "axes": _axes(task),
        "colour": _colour(_axes(task), shown),
        "replaces": bool(task["replaces"]),
        "headline": " ".join(example.prompt.split())[:160],
        "texts": texts,
        "hints": [(i, hints.get(i)) for i in task["hint_ids"]],
        "scores": [(c, before.get(c), after.get(c)) for c in columns],
    }
