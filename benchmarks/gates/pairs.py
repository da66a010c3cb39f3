"""The recorded measurements of pairs.json, as candidates that the gates can be asked of."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from middo_jax.config import GateSettings, RefineSettings
from middo_jax.data.example import Example, Message
from middo_jax.refinement.acceptance.candidate import Candidate, Limits, Measurement
from middo_jax.refinement.acceptance.measured import ENDING, FLOOR
from middo_jax.refinement.acceptance.table import first_verdict
from middo_jax.refinement.tasks import Task
from middo_jax.rundir import read_jsonl

HERE = Path(__file__).parent
PAIRS, ANSWERS = HERE / "pairs.json", HERE / "self_answers.jsonl"
BAD = ("swapped", "cut", "numbers", "nonsense")
Row = Mapping[str, Any]


class Pair(NamedTuple):
    """An original and a rewrite of it, as they were measured.

    Attributes:
      group: `expert`, one of BAD, `good self` or `bad self`.
      before, after: the columns of pairs.json; see `readings_of`.
    """

    group: str
    before: Row
    after: Row


def read(path: Path = PAIRS) -> tuple[list[Row], list[Pair]]:
    """(the originals, each once, and all pairs)."""
    columns = json.loads(path.read_text(encoding="utf-8"))
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    originals = {row["row"]: row for row in rows if row["kind"] == "original"}
    said = read_jsonl(ANSWERS) if ANSWERS.exists() else []
    labels = {row["row"]: row["label"] for row in said}

    def group(row: Row) -> str:
        return f"{labels[row['row']]} self" if row["kind"] == "self" else row["kind"]

    rewrites = [row for row in rows if row["kind"] != "original"]
    pairs = [Pair(group(row), originals[row["row"]], row) for row in rewrites]
    return list(originals.values()), pairs


def conversation(prompt: str, response: str) -> Example:
    """One turn each."""
    return Example((Message("user", prompt), Message("assistant", response)))


def pmi(row: Row) -> float:
    """Nats by which the prompt raises the answer's log-probability."""
    return row["n_targets"] * (row["loss_unconditional"] - row["loss"])


def reverse_ifd(row: Row) -> float | None:
    """The ratio, None where a loss is missing."""
    behind = row["prompt_behind_response"]
    return None if behind is None else behind / row["prompt_nll"]


def limits(originals: Sequence[Row], *, refines_itself: bool = False) -> Limits:
    """Those that the originals set, as `stages.accept` reads them."""

    return Limits(
        end_nll=float(np.quantile([row["end_nll"] for row in originals], ENDING)),
        floor=float(np.quantile([row["loss"] for row in originals], FLOOR)),
        refines_itself=refines_itself,
    )


def candidate(pair: Pair, limits: Limits, axis: str = "quality") -> Candidate:
    """The rewrite as the gates of phase `measurement` see it; `axis` asked for it."""
    before, after = pair.before, pair.after
    return Candidate(
        Task("rewrite", (axis,), conversation("Q", "A"), scores={"loss_post": before["loss"]}),
        limits=limits,
        measured=Measurement(
            loss=after["loss"],
            similarity=None,
            nearest=None,
            knn_similarity=None,
            core_similarity=None,
            end_nll=after["end_nll"],
            pmi=pmi(after),
            reverse_ifd=reverse_ifd(after),
            original_pmi=pmi(before),
            original_reverse_ifd=reverse_ifd(before),
        ),
    )


def rejected_by(pair: Pair, limits: Limits, gates: GateSettings, axis: str = "quality") -> str | None:
    """The first gate of phase `measurement` that rejects the rewrite; `context`, of embeddings, left out."""
    settings = RefineSettings(gates=gates.model_copy(update={"context": None}))
    verdict = first_verdict(candidate(pair, limits, axis), "measurement", settings)
    return None if verdict is None else verdict.gate
