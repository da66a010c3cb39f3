"""How well readings and gates tell good rewrites from bad ones, from the measurements of pairs.json.

    python -m benchmarks gates.roc

Prints three tables. Readings: the probability that a faulty conversation has a higher value than an expert's
revision (ROC-AUC; 0.5 is chance), and the same of the originals, whose faults are real. Gates: the share of
each group that passes each gate alone, and all of them. ROC of what the gates compare: the AUC between the
good rewrites (the experts', and the model's own that a person found good) and each bad group.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from sklearn.metrics import roc_auc_score

from benchmarks.gates.pairs import BAD, Pair, Row, limits, pmi, read, rejected_by, reverse_ifd
from middo_jax.config import GateSettings
from middo_jax.signals.consistency import FAULTS, consistency

GROUPS = ("expert", *BAD, "good self", "bad self")
MEASURED = ("information", "ending", "floor", "loss")
SHARE = 0.2  # of planted faults in a dataset, all kinds together
DRAWS = 20  # datasets
READINGS: dict[str, Callable[[Row], float | None]] = {
    "loss": lambda row: row["loss"],
    "end_nll": lambda row: row["end_nll"],
    "worst_decile_nll": lambda row: row["worst_decile_nll"],
    "prompt_nll": lambda row: row["prompt_nll"],
    "ifd": lambda row: row["loss"] / row["loss_unconditional"],
    "-pmi": lambda row: -pmi(row),
    "reverse_ifd": reverse_ifd,
    "length": lambda row: row["n_targets"],
}


def auc(bad: Sequence[float | None], good: Sequence[float | None]) -> float:
    """Probability that a bad one has the higher value, ties half; missing values are left out."""
    known = [[value for value in values if value is not None] for values in (bad, good)]
    labels = [1] * len(known[0]) + [0] * len(known[1])
    return float(roc_auc_score(labels, [*known[0], *known[1]]))


class Asked(NamedTuple):
    """Which of MEASURED are asked, of which rewrites.

    Attributes:
      gates: their names.
      axis: that asked for the rewrites.
      itself: whether the refiner is the model that measures.
    """

    gates: Sequence[str]
    axis: str = "quality"
    itself: bool = False


ASKED = {
    "information": Asked(("information",)),
    "ending": Asked(("ending",)),
    "floor": Asked(("floor",), itself=True),
    "loss, of hard samples": Asked(("loss",), axis="complexity"),
    "all, another refiner": Asked(MEASURED),
    "all, the refiner is the scorer": Asked(MEASURED, itself=True),
    "all, hard samples, another refiner": Asked(MEASURED, axis="complexity"),
}


def passing(pairs: Sequence[Pair], originals: Sequence[Row], asked: Asked) -> dict[str, float]:
    """The share of each group that no gate of phase `measurement` rejects."""
    bars = limits(originals, refines_itself=asked.itself)
    settings = GateSettings(open=tuple(name for name in MEASURED if name not in asked.gates))
    ok: dict[str, list[bool]] = {group: [] for group in GROUPS}
    for pair in pairs:
        ok[pair.group].append(rejected_by(pair, bars, settings, asked.axis) is None)
    return {group: float(np.mean(values)) for group, values in ok.items() if values}


def table(title: str, columns: Sequence[str], rows: Mapping[str, Sequence[float | None]], form: str) -> str:
    """A Markdown table."""
    lines = [[title, *columns], ["---", *["---:"] * len(columns)]]
    for name, values in rows.items():
        lines.append([name, *("" if value is None else format(value, form) for value in values)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def planted(pairs: Sequence[Pair]) -> dict[str, list[float]]:
    """AUC of the consistency axis and of its single ranks on datasets of which SHARE is faulty.

    In each of DRAWS datasets every row is there once: SHARE of them with a fault, the kinds in equal parts,
    the others as the expert left them.
    """
    rng = np.random.default_rng(0)
    of_row: dict[int, dict[str, Row]] = {}
    for pair in pairs:
        if pair.after["part"] == "planted":
            of_row.setdefault(pair.after["row"], {})[pair.group] = pair.after
    found: dict[str, list[list[float]]] = {}
    for _ in range(DRAWS):
        chosen, count = {}, round(SHARE / len(BAD) * len(of_row))
        free = list(rng.permutation(sorted(of_row)))
        for fault in sorted(BAD, key=lambda kind: sum(kind in kinds for kinds in of_row.values())):
            rows = [row for row in free if fault in of_row[row]][:count]
            free = [row for row in free if row not in rows]
            chosen |= dict.fromkeys(rows, fault)
        kinds = np.array([chosen.get(row, "expert") for row in of_row])
        data = [of_row[row][kind] for row, kind in zip(of_row, kinds, strict=True)]
        columns = {
            name: np.array([np.nan if (v := read_(row)) is None else v for row in data], float)
            for name, read_ in READINGS.items()
        }
        columns["loss_post"] = columns["loss"]
        ranks = {"consistency": consistency(columns).rank_n}
        ranks |= {fault.reading: columns[fault.reading] for fault in FAULTS} | {"loss": columns["loss"]}
        for name, values in ranks.items():
            row = [auc(values[kinds == fault].tolist(), values[kinds == "expert"].tolist()) for fault in BAD]
            found.setdefault(name, []).append(
                [*row, auc(values[kinds != "expert"].tolist(), values[kinds == "expert"].tolist())]
            )
    return {name: np.mean(draws, axis=0).tolist() for name, draws in found.items()}


def main() -> None:
    """Prints the tables."""
    originals, pairs = read()
    members = {group: [pair for pair in pairs if pair.group == group] for group in GROUPS}
    groups = {group: found for group, found in members.items() if found}
    rewrites = [group for group in groups if group != "expert"]
    print(", ".join(f"{len(members)} {group}" for group, members in groups.items()), "\n")

    def values(rows: Sequence[Row], name: str) -> list[float | None]:
        return [READINGS[name](row) for row in rows]

    expert = [pair.after for pair in groups["expert"]]
    rows = {}
    for name in READINGS:
        good = values(expert, name)
        rows[name] = [auc(values([p.after for p in groups[kind]], name), good) for kind in rewrites]
        rows[name].append(auc(values(originals, name), good))
    print(table("AUC against revisions", [*rewrites, "originals"], rows, ".2f"), "\n")
    print(table(f"AUC, {SHARE:.0%} faulty", [*BAD, "all"], planted(pairs), ".2f"), "\n")
    shares = {name: list(passing(pairs, originals, asked).values()) for name, asked in ASKED.items()}
    print(table("passes", list(groups), shares, ".0%"), "\n")
    compared: dict[str, Callable[[Pair], float | None]] = {
        "fall of PMI": lambda pair: pmi(pair.before) - pmi(pair.after),
        "rise of reverse IFD": lambda pair: _rise(reverse_ifd(pair.before), reverse_ifd(pair.after)),
        "end_nll": lambda pair: pair.after["end_nll"],
        "-loss": lambda pair: -pair.after["loss"],
        "rise of loss": lambda pair: pair.after["loss"] - pair.before["loss"],
    }
    bad_groups = [group for group in rewrites if group != "good self"]
    compared_groups = [
        (good, bad) for good in ("expert", "good self") if good in groups for bad in bad_groups
    ]
    rows = {}
    for name, of in compared.items():
        rows[name] = [
            auc([of(p) for p in groups[bad]], [of(p) for p in groups[good]]) for good, bad in compared_groups
        ]
    columns = [f"{good}: {bad}" for good, bad in compared_groups]
    print(table("ROC-AUC", columns, rows, ".2f"))


def _rise(before: float | None, after: float | None) -> float | None:
    return None if before is None or after is None else after - before


if __name__ == "__main__":
    main()
