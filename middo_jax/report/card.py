"""The dataset card of a run's dataset: README.md with the front matter that the Hugging Face hub reads."""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from middo_jax.data.example import Example, Op
from middo_jax.models.resolve import repo_of
from middo_jax.report.names import model_name, without_folders
from middo_jax.report.status import judged_tasks, load_json, load_jsonl, load_settings
from middo_jax.report.verdicts import describe, people
from middo_jax.rundir import RoundDir, RunDir
from middo_jax.version import __version__

OWN_TEXTS = (("refine", "prompts"), ("quality", "rubric"))  # settings that name a file of the user's


def card(
    run: RunDir, files: Mapping[str, str], form: str, pairs: str | None = None, license: str | None = None
) -> str:
    """The text of README.md beside the exported files.

    It says how the dataset was made, with counts, costs and hashes from the run's folder. The licence is left
    to the user, since only they know that of their data.

    Args:
      run: the run's folder.
      files: the data files by split: train, and heldout if it was exported.
      form: their format.
      pairs: the file of preference pairs, if there is one.
      license: of the dataset, by its name at the hub; None: the card asks for it.
    """
    settings = load_settings(run)
    folder = run.final if run.final.dataset.exists() else run.rounds()[-1]
    lineages = [Example.from_json(row).lineage for row in load_jsonl(folder.dataset) or []]
    repairs = run.round(0).stages().get("prepare", {}).get("repairs", {})
    name = settings.get("name") or run.path.resolve().name
    splits = [
        {"split": "test" if split == "heldout" else split, "path": file} for split, file in files.items()
    ]
    configs = [{"config_name": "default", "data_files": splits}]
    if pairs is not None:
        configs.append({"config_name": "pairs", "data_files": [{"split": "train", "path": pairs}]})
    front = {
        "license": license or "unknown",
        "pretty_name": str(name),
        "tags": ["middo", "instruction-tuning", "synthetic"],
        "task_categories": ["text-generation"],
        "size_categories": [_size(len(lineages))],
        "configs": configs,
    }
    asked = (
        ""
        if license
        else " Fill in `license` above: it depends on the original dataset and on the refiner's terms."
    )
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---\n",
        f"# {name}\n",
        "An instruction dataset that was improved in a closed loop by middo-jax "
        f"{__version__} (the method: [Middo](https://arxiv.org/abs/2508.21589)).{asked}\n",
        "## What is in it\n",
        _table(("rows", "how they were made"), _made(lineages, bool(repairs))),
        *_repaired(repairs),
        f"Format: {form}.\n",
        "## How it was made\n",
        _table(("what", "value"), _facts(settings, run)),
        *_rounds(run),
        "## How to repeat it\n",
        "Save these settings as `config.yaml` and run `middo run config.yaml`. The answers of a served "
        "refiner are repeated only from the run's cache.\n",
        f"```yaml\n{yaml.safe_dump(_public(settings), sort_keys=False, allow_unicode=True)}```\n",
    ]
    return "\n".join(parts)


def _public(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings without places of one's own: folders, addresses, devices."""
    private = {
        "": ("runs_dir", "compilation_cache", "mesh", "hosts"),
        "refine": ("base_url", "cache", "api_key_env", "per_minute"),
    }
    kept = {name: value for name, value in settings.items() if name not in private[""]}
    if (repo := repo_of(_model_path(settings))) is not None:
        kept["model"] = kept["model"] | {"path": repo}
    if isinstance(kept.get("refine"), dict):
        kept["refine"] = {k: v for k, v in kept["refine"].items() if k not in private["refine"]}
    for group, name in OWN_TEXTS:
        if isinstance(kept.get(group), dict) and kept[group].get(name):
            kept[group] = kept[group] | {name: Path(kept[group][name]).name}
    return _without_folders(kept)


def _model_path(settings: Mapping[str, Any]) -> str:
    return str(settings.get("model", {}).get("path", ""))


def _without_folders(value: Any) -> Any:
    """The value with only the last name of absolute paths and URLs of buckets: the card may be published."""
    match value:
        case dict():
            return {name: _without_folders(each) for name, each in value.items()}
        case list():
            return [_without_folders(each) for each in value]
        case str():
            return without_folders(value)
    return value


def _made(lineages: list[Any], is_repaired: bool) -> list[tuple[str, str]]:
    named: dict[Op, str] = {
        "seed": "the original rows, unchanged" + (" but for the repairs below" if is_repaired else ""),
        "simplify": "rewritten to be easier (complexity)",
        "rewrite": "rewritten to be better (quality)",
        "synthesize": "new rows near sparse ones (diversity)",
        "reanswer": "the same prompt, answered anew (consistency)",
        "complete": "an answer that was cut off, completed (consistency)",
    }
    counts = Counter(lineage.op for lineage in lineages)
    return [(f"{counts[op]:,}", text) for op, text in named.items() if counts[op]]


def _repaired(repairs: Mapping[str, int]) -> list[str]:
    """A table of what was repaired when the original rows were read, if anything was."""
    if not repairs:
        return []
    return [
        "The original rows as they were read, before any was held out or rewritten:\n",
        _table(("rows", "repair"), [(f"{n:,}", what) for what, n in repairs.items()]),
    ]


def _facts(settings: Mapping[str, Any], run: RunDir) -> list[tuple[str, str]]:
    model = model_name(_model_path(settings))
    refine, data = settings.get("refine", {}), _without_folders(settings.get("data", {}))
    first = run.round(0).stages().get("prepare", {})
    inputs = [f"`{known['hash'][:16]}`" for known in first.get("inputs", {}).values()]
    sources = [source["path"] for source in data.get("sources") or []]
    rows = [
        ("model", model),
        ("original data", data.get("path") or ", ".join(sources)),
        ("SHA-256 of its files, first digits", ", ".join(inputs) or "not recorded"),
        ("rounds", str(len(run.rounds()))),
        ("refiner", _refiner(run, refine)),
        ("acceptance", str(refine.get("accept", ""))),
    ]
    for stage, (group, name) in zip(("refine", "score"), OWN_TEXTS, strict=True):
        known = run.round(0).stages().get(stage, {}).get("inputs", {}).get(name)
        if known is not None:
            rows.append((f"SHA-256 of {group}.{name}, first digits", f"`{known['hash'][:16]}`"))
    return rows


def _refiner(run: RunDir, settings: Mapping[str, Any]) -> str:
    records = (folder.stages().get("refine", {}).get("recorded") for folder in run.rounds())
    recorded = sorted({record["model"] for record in records if record})
    named = model_name(str(settings["model"])) if settings.get("model") else "the model itself"
    return f"recorded answers of {', '.join(recorded)}; what they lacked: {named}" if recorded else named


def _rounds(run: RunDir) -> list[str]:
    """A table of tasks, accepted rewrites and cost, and one of gates, if a round was refined."""
    rows, gates, judged = [], Counter[str](), Counter[str]()
    for folder in run.rounds():
        tasks = judged_tasks(folder)
        if tasks is None:
            continue
        usage = folder.stages().get("refine", {}).get("usage", {}).values()
        tokens = sum(u["prompt_tokens"] + u["completion_tokens"] for u in usage)
        usd = sum(u["usd"] for u in usage)
        rows.append(
            (
                folder.path.name,
                _selected(folder),
                f"{len(tasks):,}",
                f"{sum(task['accepted'] for task in tasks):,}",
                f"{tokens:,}",
                f"{usd:.2f}",
            )
        )
        judged.update(people(tasks) or {})
        gates.update(row["gate"] for row in load_jsonl(folder.candidates) or [] if row.get("gate"))
    if not rows:
        return []
    header = ("round", "selected", "tasks", "accepted", "refiner's tokens", "US dollars")
    found = [_table(header, rows)]
    if judged:
        found.append(f"People judged the accepted rewrites: {describe(judged)}.\n")
    if gates:
        counted = [(gate, f"{n:,}") for gate, n in gates.most_common()]
        found.append(_table(("gate", "candidates that it rejected"), counted))
    return found


def _selected(folder: RoundDir) -> str:
    axes = (load_json(folder.selection) or {"axes": {}})["axes"]
    return ", ".join(f"{axis} {len(facts['ids']):,}" for axis, facts in axes.items())


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    def shown(cell: str) -> str:  # names of models and columns are anybody's: no HTML, no links
        return html.escape(" ".join(cell.split()), quote=False).replace("|", "/").replace("[", "\\[")

    def line(cells: tuple[str, ...]) -> str:
        return f"| {' | '.join(map(shown, cells))} |"

    return "\n".join([line(header), line(("---",) * len(header)), *map(line, rows), ""])


def _size(n: int) -> str:
    """The hub's name of a size: n<1K, 1K<n<10K, ..."""
    edges = (("1K", 10**3), ("10K", 10**4), ("100K", 10**5), ("1M", 10**6), ("10M", 10**7))
    below = "n<1K"
    for (name, edge), (after, _) in zip(edges, [*edges[1:], ("100M", 10**8)], strict=True):
        if n >= edge:
            below = f"{name}<n<{after}"
    return below
