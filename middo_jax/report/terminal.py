"""The output of commands for people: selections, traces and inspections as plain text."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from middo_jax.data.repair import strict_hint
from middo_jax.data.sources import ReasonCount, reason_lines
from middo_jax.report.axes import shown_axes
from middo_jax.rundir.rows import SelectionFile

_STYLES = {"target": "black on green", "prompt": "cyan", "template": "dim"}
_BAR = 40  # characters of the longest bar


def printable(text: str, *, lines: bool = True) -> str:
    """Text of a dataset, a model or a file name without characters that control a terminal.

    Args:
      text: any text.
      lines: whether line breaks are kept.
    """
    kept = "\n" if lines else ""
    return "".join(c if c.isprintable() or c in kept else "\N{REPLACEMENT CHARACTER}" for c in text)


def render_selection(selection: SelectionFile) -> str:
    """selection.json as text: size and threshold of each set, the overlaps, and the sizes for other m."""
    lines, axes = [], shown_axes([selection])
    for axis, facts in selection["axes"].items():
        m = "none" if facts["m"] is None else f"{facts['m']:.3f}"
        bounds = ", ".join(
            f"{name} {'>' if axes[axis].above else '<'} {value:.4f}"
            for name, value in facts["threshold"].items()
            if value is not None
        )
        nulls = f", {facts['n_null']} without a score" if facts["n_null"] else ""
        lines.append(
            f"{axes[axis].title:<12} {len(facts['ids']):>6} of {facts['n_scored']}  m {m}  {bounds}{nulls}"
        )
    lines += [f"{name:<12} {n:>6}" for name, n in selection["overlap"].items()]
    if duplicates := selection["duplicates"]:
        lines.append(f"{'same prompt':<12} {duplicates['n_samples']:>6} in {duplicates['n_groups']} groups")
    for axis, points in selection["sweep"].items():
        counts = "  ".join(f"{point['m']:g}: {point['n']}" for point in points)
        lines.append(f"{axes[axis].title} by m   {counts}")
    return "\n".join(lines) or "no axis has scores"


def render_dry_run(plan: dict[str, Any]) -> str:
    """The numbers of a `DryRun` and the first of its requests."""
    rows = plan["rows"]
    probe = ", the first to find out whether the server enforces a schema" if plan["probes"] else ""
    conversations = (
        f"{plan['conversations']:,} conversations of several turns: {plan['turns_changed']:,} of their "
        f"{plan['turns']:,} turns change"
    )
    lines = [
        f"{len(rows):,} new prompts and their answers: {plan['requests']:,} requests{probe}",
        *([conversations] if plan["conversations"] else []),
        *(f"{n:,} selected samples stay as they are: {why}" for why, n in plan["kept"].items()),
        f"prompt tokens: about {plan['prompt_tokens_estimate']:,}",
        f"completion tokens: about {plan['completion_tokens_estimate']:,}, "
        f"at most {plan['completion_tokens_at_most']:,}",
        f"at refine.prices: about ${plan['usd_estimate']:.4f}, at most ${plan['usd_at_most']:.4f}",
        "plus corrections, retries and further attempts",
    ]
    if rows:
        lines.append("\nthe first request (--json shows all):")
        lines += [
            textwrap.indent(f"[{turn['role']}]\n{turn['content']}", "  ") for turn in rows[0]["messages"]
        ]
    return printable("\n".join(lines))


def render_batch(state: dict[str, Any], command: str, written: Path | None) -> str:
    """The state of refining by batch files, and the next command."""
    lines = [f"{state['taken']:,} results read"] if state["taken"] else []
    if state["failed"]:
        lines.append(
            f"{state['failed']:,} results are failures and will be asked again, the first: "
            f"{state['first_failure']}"
        )
    if written is None:
        lines.append(f"{state['waiting']:,} requests wait; next: {command} --write-batch FILE")
    else:
        lines += [
            f"{state['waiting']:,} requests are in {written}: have them run, then",
            f"  {command} --read-batch RESULTS --write-batch NEXT",
        ]
    return printable("\n".join(lines))


def render_trace(chain: list[dict[str, Any]]) -> str:
    """The result of `lineage.trace` as text, oldest first."""
    parts = []
    for sample in chain:
        how = sample["op"] + (f" ({sample['axis']})" if sample["axis"] else "")
        parents = f" from {', '.join(sample['parent_ids'])}" if sample["parent_ids"] else ""
        verdict = "" if sample["accepted"] else f", rejected: {sample['verdict']}"
        scores = sample.get("scores") or {}
        shown = ("loss_pre", "loss_post", "knn_mean_sim", "quality")
        known = [f"{name} {scores[name]:.3f}" for name in shown if scores.get(name) is not None]
        changed = sample.get("turns_changed")
        turns = f", {changed} of {sample['turns']} turns changed" if changed is not None else ""
        user_id = sample.get("user_id")
        own = "" if user_id is None else f" (yours: {user_id})"
        block = [f"round {sample['round']}  {sample['id']}{own}  {how}{parents}{turns}{verdict}"]
        block += [f"  {', '.join(known)}"] if known else []
        if back := sample.get("taken_back"):
            worse = ", ".join(
                f"{axis} {before:+.2f} -> {back['badness_after'][axis]:+.2f}"
                for axis, before in back["badness_before"].items()
            )
            block.append(
                f"  taken back in round {back['round']}: {worse} standard deviations worse than the mean"
            )
        for name in ("prompt", "response"):
            block.append(textwrap.indent(f"{name}: {sample[name]}", "  "))
        parts.append("\n".join(block))
    return printable("\n\n".join(parts))


def render_inspection(facts: dict[str, Any], *, color: bool = False) -> str:
    """The result of `inspection` as text; the targets are in colour, or between [[ and ]] without colour."""
    lines = [f"{facts['n']:,} rows can be used, {len(facts['rejected'])} cannot"]
    lines += reason_lines([ReasonCount(**reason) for reason in facts["reasons"]], limit=5)
    if facts["repairs"]:
        lines.append(f"repaired{strict_hint(repair['reason'] for repair in facts['repairs'])}:")
        lines += reason_lines([ReasonCount(**reason) for reason in facts["repairs"]], limit=5)
    if "tokens" not in facts:
        return printable("\n".join(lines))
    lines += [f"warning: {warning}" for warning in facts["warnings"]]
    sample = facts["sample"]
    cut = ", cut" if sample["truncated"] else ""
    lines += ["", *_lengths(facts["tokens"]), "", f"sample {sample['id']} as the model reads it{cut}; "]
    text = printable("\n".join(lines))
    parts = [(part["kind"], printable(part["text"])) for part in sample["parts"]]
    if color:
        return text + _colored(parts)
    return (
        text
        + "what is learnt in [[ ]]:\n"
        + "".join(f"[[{part}]]" if kind == "target" else part for kind, part in parts)
    )


def _lengths(tokens: dict[str, Any]) -> list[str]:
    """Quantiles and histogram of the lengths, the cut, the targets and the packing."""
    quantiles = "  ".join(f"{name} {value:,}" for name, value in tokens["quantiles"].items())
    names = [f"{bar['from']:,}-{bar['to']:,}" for bar in tokens["histogram"]]
    highest = max(bar["n"] for bar in tokens["histogram"])
    bars = [
        f"  {name:>{max(map(len, names))}}  {'█' * -(-bar['n'] * _BAR // highest):<{_BAR}} {bar['n']:,}"
        + ("  cut" if bar["from"] > tokens["max_length"] and bar["n"] else "")
        for name, bar in zip(names, tokens["histogram"], strict=True)
    ]
    shapes = tokens["scoring"]["shapes"]
    return [
        f"tokens per conversation: {quantiles}",
        *bars,
        f"cut at model.max_length {tokens['max_length']:,}: {tokens['truncated']:,} conversations, "
        f"{tokens['tokens_cut']:,} tokens",
        f"learnt: {tokens['target_share']:.1%} of {tokens['total']:,} tokens",
        f"packed for scoring: {tokens['scoring']['fill']:.1%} full, {len(shapes)} compiled "
        f"{'shape' if len(shapes) == 1 else 'shapes'} "
        f"({', '.join(f'{b} x {t:,} for up to {n:,}' for b, t, n in shapes)})",
        f"packed for training: {tokens['training']['fill']:.1%} full, "
        f"{tokens['training']['rows']:,} rows of {tokens['pack_length']:,}",
    ]


def _colored(parts: list[tuple[str, str]]) -> str:
    # `Text` is never parsed as markup, and `printable` has removed control characters.
    text = Text.assemble(
        ("what is learnt", _STYLES["target"]),
        ", ",
        ("the user's words", _STYLES["prompt"]),
        ", ",
        ("the template's", _STYLES["template"]),
        ":\n",
        *((part, _STYLES[kind]) for kind, part in parts),
    )
    console = Console(force_terminal=True, color_system="standard", no_color=False, highlight=False)
    with console.capture() as capture:
        console.print(text, soft_wrap=True, end="")
    return capture.get()
