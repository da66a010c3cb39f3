"""What commands print for people: selections, traces and inspections as plain text."""

from __future__ import annotations

import textwrap
from typing import Any

_AXES = {"complexity": "hard", "diversity": "sparse", "quality": "low quality"}


def printable(text: str) -> str:
    """Keeps text from a dataset or a model from steering the terminal; newlines stay."""
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)


def render_selection(selection: dict[str, Any]) -> str:
    """selection.json as text: each set's size and threshold, the overlaps, and the m-sweep."""
    lines = []
    for axis, facts in selection["axes"].items():
        m = "none" if facts["m"] is None else f"{facts['m']:.3f}"
        bounds = ", ".join(
            f"{name} {'>' if axis == 'complexity' else '<'} {value:.4f}"
            for name, value in facts["threshold"].items()
            if value is not None
        )
        nulls = f", {facts['n_null']} without a score" if facts["n_null"] else ""
        lines.append(
            f"{_AXES[axis]:<12} {len(facts['ids']):>6} of {facts['n_scored']}  m {m}  {bounds}{nulls}"
        )
    lines += [f"{name:<12} {n:>6}" for name, n in selection["overlap"].items()]
    for axis, points in selection["sweep"].items():
        counts = "  ".join(f"{point['m']:g}: {point['n']}" for point in points)
        lines.append(f"{_AXES[axis]} by m   {counts}")
    return "\n".join(lines) or "no axis has scores"


def render_trace(chain: list[dict[str, Any]]) -> str:
    """The chain that `lineage.trace` gives, oldest first."""
    parts = []
    for sample in chain:
        how = sample["op"] + (f" ({sample['axis']})" if sample["axis"] else "")
        parents = f" from {', '.join(sample['parent_ids'])}" if sample["parent_ids"] else ""
        verdict = "" if sample["accepted"] else f", rejected: {sample['reject_reason']}"
        scores = sample.get("scores") or {}
        shown = ("loss_pre", "loss_post", "knn_mean_sim", "quality")
        known = [f"{name} {scores[name]:.3f}" for name in shown if scores.get(name) is not None]
        block = [f"round {sample['round']}  {sample['id']}  {how}{parents}{verdict}"]
        block += [f"  {', '.join(known)}"] if known else []
        for name in ("prompt", "response"):
            block.append(textwrap.indent(f"{name}: {sample[name]}", "  "))
        parts.append("\n".join(block))
    return printable("\n\n".join(parts))


def render_inspection(facts: dict[str, Any]) -> str:
    """What `inspection` found, as text."""
    lines = [f"{facts['n']:,} rows can be used, {len(facts['rejected'])} cannot"]
    lines += [f"  {row['where']}: {row['reason']}" for row in facts["rejected"][:5]]
    if "tokens" in facts:
        tokens = facts["tokens"]
        quantiles = ", ".join(f"{name} {value:,}" for name, value in tokens["quantiles"].items())
        lines += [
            f"tokens a conversation: {quantiles}",
            f"targets: {tokens['target_share']:.0%} of {tokens['total']:,} tokens",
            f"longer than max_length {tokens['max_length']:,}: {tokens['truncated']:,}",
            f"packed for scoring: {tokens['fill']:.1%} of the computed positions are real, "
            f"in {tokens['shapes']} shapes",
            "",
            "the first sample, what is learnt in [[ ]]:",
            facts["rendered"],
        ]
    return printable("\n".join(lines))
