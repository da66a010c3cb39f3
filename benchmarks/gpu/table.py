"""The GPU table in markdown, from the results of `run`."""

from __future__ import annotations

from typing import Any

Results = dict[str, Any]


def print_table(results: Results) -> None:
    """Prints the setting and a row per figure; what was not measured has no row."""
    print("; ".join(f"{name} {value}" for name, value in results["setting"].items()))
    rows = [*_scoring(results), *_training(results), *_others(results)]
    print("\n| what | side | per second | of peak | memory, GB |\n| --- | --- | --- | --- | --- |")
    for row in rows:
        print(f"| {' | '.join(row)} |")


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _gigabytes(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _tokens(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f} tokens"


def _scoring(results: Results) -> list[tuple[str, ...]]:
    rows = []
    for model in ("8b", "1b", "tiny"):
        ours = results.get(f"scoring-{model}", {})
        for name, figures in ours.items():
            if isinstance(figures, dict) and "tokens_per_s" in figures:
                share = _share(figures["of_peak"])
                memory = _gigabytes(ours.get("peak_gb"))
                rows.append(
                    (f"scoring {model}, {name}", "middo", _tokens(figures["tokens_per_s"]), share, memory)
                )
        for name in ("alpaca", "dolly"):
            for side in ("peer-scoring", "published"):
                rows += _peer(results, f"{side}-{model}-{name}", f"scoring {model}, {name}", side)
    return rows


def _peer(results: Results, job: str, what: str, side: str) -> list[tuple[str, ...]]:
    figures = results.get(job, {})
    if "tokens_per_second" not in figures:
        return []
    label = "published pass" if side == "published" else f"torch, {figures['attention']}"
    share, memory = _share(figures["share_of_peak"]), _gigabytes(figures["peak_bytes"] / 1e9)
    return [(what, label, _tokens(figures["tokens_per_second"]), share, memory)]


def _training(results: Results) -> list[tuple[str, ...]]:
    rows = []
    for job, what in (
        ("lora-8b", "LoRA step 8b (4N)"),
        ("full-1b", "full step 1b (6N)"),
        ("lora-tiny", "LoRA step tiny"),
        ("full-tiny", "full step tiny"),
    ):
        figures = results.get(job, {})
        if "tokens_per_s" in figures:
            share, memory = _share(figures["of_peak"]), _gigabytes(figures["peak_gb"])
            rows.append((what, "middo", _tokens(figures["tokens_per_s"]), share, memory))
        rows += _peer(results, f"peer-{job}", what, "peer")
    return rows


def _others(results: Results) -> list[tuple[str, ...]]:
    rows = []
    for model in ("8b", "tiny"):
        figures = results.get(f"ratings-{model}", {})
        if "tokens_per_s" in figures:
            rate = f"{figures['samples_per_s']:.1f} samples, {_tokens(figures['tokens_per_s'])} read"
            share, memory = _share(figures["of_peak_matrices_only"]), _gigabytes(figures["peak_gb"])
            rows.append((f"ratings {model}", "middo", rate, share, memory))
    for model in ("1b", "tiny"):
        figures = results.get(f"decoding-{model}", {})
        for name, found in figures.items():
            if isinstance(found, dict) and "ms_per_token_of_a_request" in found:
                rate = f"{_tokens(found['tokens_per_s'])}, {found['ms_per_token_of_a_request']:.2f} ms each"
                rows.append((f"decoding {model}, {name}", "middo", rate, "", _gigabytes(figures["peak_gb"])))
    figures = results.get("neighbours", {})
    for name, found in figures.items():
        if isinstance(found, dict) and "seconds" in found:
            size = f"{figures['rows']:,} x {figures['width']:,}"
            rate = f"{found['seconds']:.1f} s, {found['wrong_of_8']} of 8 rows wrong"
            rows.append((f"neighbours of {size}, {name}", "middo", rate, "", _gigabytes(figures["peak_gb"])))
    for name, found in results.get("kernels", {}).items():
        if isinstance(found, dict) and found.get("tflops") is not None:
            rows.append(
                (f"attention: {name}", "", f"{found['ms']:.2f} ms, {found['tflops']:.0f} TFLOP", "", "")
            )
    return rows
