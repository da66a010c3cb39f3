"""Do the three signals find bad data? Known faults in clean rows, a short fine-tuning, what each axis says.

    python -m benchmarks planted_defects --data alpaca.json --foreign gsm8k_test.jsonl \\
        --model models/SmolLM2-135M-Instruct --out defects

Every seed has a folder of its own: rows drawn and faults planted (see planting.py, 5 % of each), a model
fine-tuned on all of them by `middo train`, base and tuned model's scores by `middo score`. Then for each
detector, fault by fault against the rows in which nothing was planted:

  ROC-AUC              of its badness; 0.5 says nothing, less than that prefers the faulty rows
  precision, recall    of what it selects by the default rule, worse than the mean by more than one deviation

The detectors are the three axes as the method uses them; complexity also with answer length taken out
(complexity.normalise=length); high similarity, which is where copies are to be looked for; the readings, each
alone, and the optional axis that ranks three of them; and answer length alone, in whichever direction does
better on that fault. Of a pair of
duplicates the row that was there first counts neither as faulty nor as clean. At last the judge's `expected`
beside its `sample` on a few rows.

Called again it goes on: a finished seed is read, an unfinished one continues with its next step. Tables go to
stdout, all figures to OUT/result.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from benchmarks.planting import FAULTS, SHARE, from_gsm8k, plant
from middo_jax.data.example import Example, Message
from middo_jax.data.sources import read
from middo_jax.data.tokenize import load_tokenizer, tokenize, tokenize_prompt
from middo_jax.rundir import RoundDir, RunError, read_jsonl, write_json, write_jsonl

MAX_TOKENS = 256  # of a clean row, rendered: a longer one would take the time of several
# LoRA without recomputation: two thirds of the work of full fine-tuning, and a little is enough.
TRAINING = (
    "lora.rank=16",
    "train.learning_rate=2e-4",
    "train.batch_size=4",
    "train.remat=none",
)
SETTINGS = ("model.dtype=float32", "model.max_length=512")
RULE_M = 1.0  # the default of complexity.m, diversity.m and quality.m
MAX_NEW_TOKENS = 32  # of a sampled rating
READINGS = "scoring.readings=[prompt_nll, ifd, pmi, reverse_ifd]"
Detector = tuple[np.ndarray, np.ndarray]  # badness [n], selected [n]
Figures = dict[str, float | None]


def clean_rows(
    data: str, tokenizer: Any, rows: int, seed: int, max_tokens: int = MAX_TOKENS
) -> list[Example]:
    """Single-turn rows of at most `max_tokens` with different prompts, drawn by the seed.

    Raises:
      ValueError: there are too few.
    """
    examples, _ = read(data)
    order, prompts, drawn = np.random.default_rng(seed).permutation(len(examples)), set[str](), []
    for i in order:
        example = examples[i]
        if len(example.messages) == 2 and example.prompt not in prompts:
            prompts.add(example.prompt)
            if len(tokenize(example, tokenizer, 1 << 30)) <= max_tokens:
                drawn.append(example)
        if len(drawn) == rows:
            return drawn
    raise ValueError(f"{data}: only {len(drawn)} rows of at most {max_tokens} tokens, {rows} are wanted")


def run_seed(arguments: argparse.Namespace, seed: int) -> Path:
    """Plants, trains and scores, as far as that is not done yet; the seed's folder."""
    folder: Path = arguments.out / f"seed_{seed}"
    asked = {name: str(getattr(arguments, name)) for name in ("data", "foreign", "model", "rows", "training")}
    labels = folder / "labels.json"
    if labels.exists() and json.loads(labels.read_text(encoding="utf-8"))["asked"] != asked:
        raise RunError(f"{folder} is of another call; name another --out, or remove it")
    if not labels.exists():
        tokenizer = load_tokenizer(arguments.model)
        clean = clean_rows(arguments.data, tokenizer, arguments.rows, seed)
        foreign = [from_gsm8k(row) for row in read_jsonl(arguments.foreign)]
        planted = plant(clean, foreign, seed)
        write_jsonl(folder / "planted.jsonl", (example.to_json() for example in planted.examples))
        n_tokens = sum(len(tokenize(example, tokenizer, 1 << 30)) for example in planted.examples)
        facts = {"asked": asked, "n_tokens": n_tokens, "fault": planted.fault, "twin": planted.twin}
        write_json(labels, facts)
    data = ["--data", str(folder / "planted.jsonl")]
    tuned, scored = folder / "tuned", folder / "scored"
    if not RoundDir(tuned).is_done("train"):
        middo("train", *data, "--model", arguments.model, "--out", str(tuned), *SETTINGS, *arguments.training)
    if not RoundDir(scored).is_done("score"):
        models = ("--model", str(tuned / "checkpoint"), "--pre-model", arguments.model)
        middo(
            "score",
            *data,
            *models,
            "--out",
            str(scored),
            READINGS,
            *SETTINGS,
        )
    return folder


def middo(*words: str) -> None:
    """Runs a command of the program; it shows its own progress."""
    print("middo " + " ".join(words), file=sys.stderr, flush=True)
    subprocess.run([sys.executable, "-m", "middo_jax", *words], check=True, stdout=subprocess.DEVNULL)


def detectors(folder: Path) -> dict[str, Detector]:
    """Badness and selection of every detector but length, rows as in scores.parquet."""
    from middo_jax.config import Deviations
    from middo_jax.signals.consistency import NEEDED, consistency
    from middo_jax.signals.select import Standardised, at_mean_length, select_axis
    from middo_jax.signals.table import as_floats, read_scores

    table = read_scores(RoundDir(folder / "scored").scores)
    losses = {name: as_floats(table, name) for name in ("loss_pre", "loss_post")}
    n_tokens, similarity = as_floats(table, "n_target_tokens"), as_floats(table, "knn_mean_sim")
    columns = {name: as_floats(table, name) for name in NEEDED}
    at_length = {name: at_mean_length(loss, n_tokens) for name, loss in losses.items()}

    def detector(columns: dict[str, np.ndarray], sign: int) -> Detector:
        z = [sign * Standardised.of(values).z for values in columns.values()]
        return np.minimum.reduce(z), select_axis(columns, sign, Deviations(m=RULE_M)).selected

    found = {
        "complexity": detector(losses, 1),
        "complexity, length out": detector(at_length, 1),
        "diversity": detector({"similarity": similarity}, -1),
        "quality": detector({"quality": as_floats(table, "quality")}, -1),
        "high similarity": detector({"similarity": similarity}, 1),
        "IFD": detector({"ifd": as_floats(table, "ifd")}, 1),
        "PMI": detector({"pmi": as_floats(table, "pmi")}, -1),
        "reverse IFD": detector({"reverse_ifd": as_floats(table, "reverse_ifd")}, 1),
        "end": detector({"end_nll": as_floats(table, "end_nll")}, 1),
        "worst decile": detector({"worst_decile_nll": as_floats(table, "worst_decile_nll")}, 1),
        "prompt": detector({"prompt_nll": as_floats(table, "prompt_nll")}, 1),
        "consistency": detector({"consistency": consistency(columns).rank_n}, 1),
        "long": detector({"length": np.log(n_tokens)}, 1),
        "short": detector({"length": np.log(n_tokens)}, -1),
    }
    unscored = {name: int((~np.isfinite(badness)).sum()) for name, (badness, _) in found.items()}
    if any(unscored.values()):
        raise RunError(f"{folder}: rows without a score: {unscored}; see error in scores.parquet")
    return found


def measure(detector: Detector, faulty: np.ndarray, clean: np.ndarray) -> Figures:
    """How well a detector tells the faulty rows [n] bool from the clean ones [n] bool.

    Returns:
      auc: probability that a faulty row is worse than a clean one, ties half.
      precision: share of faulty rows among all that are selected, None if none is; base_rate is chance's.
      recall: share of selected rows among the faulty; selected_share is chance's.
    """
    from sklearn.metrics import roc_auc_score

    badness, selected = detector
    known = faulty | clean
    return {
        "auc": float(roc_auc_score(faulty[known], badness[known])),
        "precision": float(faulty[selected].mean()) if selected.any() else None,
        "recall": float(selected[faulty].mean()),
        "base_rate": float(faulty.mean()),
        "selected_share": float(selected.mean()),
    }


def number(figures: Figures, name: str) -> float:
    """A figure that no detector is without."""
    value = figures[name]
    assert value is not None, name
    return value


def evaluate(folder: Path) -> dict[str, dict[str, Figures]]:
    """Figures by fault and detector, of one seed."""
    from middo_jax.signals.table import read_scores

    labels = json.loads((folder / "labels.json").read_text(encoding="utf-8"))
    ids = read_scores(RoundDir(folder / "scored").scores)["id"].to_pylist()
    fault_n = np.array([labels["fault"].get(id_, "") for id_ in ids])
    found = detectors(folder)
    result: dict[str, dict[str, Figures]] = {}
    for fault in FAULTS:
        twins = {twin for id_, twin in labels["twin"].items() if labels["fault"][id_] == fault}
        clean = (fault_n == "") & ~np.isin(ids, list(twins))
        row = {name: measure(detector, fault_n == fault, clean) for name, detector in found.items()}
        row["length"] = max(row.pop("long"), row.pop("short"), key=lambda figures: number(figures, "auc"))
        result[fault] = row
    return result


def compare_judges(arguments: argparse.Namespace, folder: Path) -> dict[str, Figures]:
    """The tuned model's `expected` and `sample` of the first rows, each after a first pass over two rows."""
    from middo_jax.config import load
    from middo_jax.inference import engine as inference
    from middo_jax.progress import for_stderr
    from middo_jax.session import Session, read_dataset
    from middo_jax.signals.judge.rubrics import DIMENSIONS, PARTS, judge_message
    from middo_jax.stages.ratings import ratings

    examples = read_dataset(RoundDir(folder / "scored"))[: arguments.judge_rows]
    decoded: list[Any] = []

    class Recording(inference.Engine):
        def submit(self, request: Any, *more: Any, **named: Any) -> Any:
            decoded.append(super().submit(request, *more, **named))
            return decoded[-1]

    tokenizer = load_tokenizer(arguments.model)
    questions = [
        judge_message(d, part, e.prompt, e.response) for e in examples for d in DIMENSIONS for part in PARTS
    ]
    question_tokens = sum(len(tokenize_prompt([Message("user", text)], tokenizer)) for text in questions)
    result: dict[str, Figures] = {}
    rated: dict[str, np.ndarray] = {}
    for method in ("expected", "sample"):
        settings = (f"model.path={arguments.model}", "data.path=none", f"quality.m={RULE_M}")
        more = [f"quality.method={method}"]
        if method == "sample":
            more.append(f"quality.max_new_tokens={MAX_NEW_TOKENS}")
        session = Session(load(None, (*settings, *more, *SETTINGS)), for_stderr())
        model = session.load_model(folder / "tuned" / "checkpoint")
        with mock.patch.object(inference, "Engine", Recording):
            ratings(session, model, examples if method == "expected" else examples[:2])
            decoded.clear()
            began = time.perf_counter()
            rated[method], facts = ratings(session, model, examples)
            seconds = time.perf_counter() - began
        result[method] = {
            "seconds": seconds,
            "read_tokens": question_tokens if facts is None else facts.real_tokens,
            "decoded_tokens": sum(len(future.result().tokens) for future in decoded),
            "unread": float(np.isnan(rated[method]).mean()),
            "distinct": len(np.unique(rated[method][np.isfinite(rated[method])])),
        }
    result["sample"]["rows_without_quality"] = int((~np.isfinite(rated["sample"]).all(axis=1)).sum())
    result["agreement"] = _agreement(rated)
    return result


def _agreement(rated: dict[str, np.ndarray]) -> Figures:
    """Rank correlations of the two methods' qualities and ratings, where both have one."""
    from scipy.stats import rankdata

    from middo_jax.signals.judge.rubrics import quality

    whole = np.isfinite(rated["sample"]).all(axis=1)
    pairs = {
        "spearman_quality": [quality(rated[method][whole]) for method in ("expected", "sample")],
        "spearman_ratings": [
            rated[method][np.isfinite(rated["sample"])] for method in ("expected", "sample")
        ],
    }
    # None where all ratings of one side are equal: then there is no order to agree on.
    ranks = {
        name: float(np.corrcoef(rankdata(a), rankdata(b))[0, 1])
        for name, (a, b) in pairs.items()
        if len(a) > 1
    }
    return {name: rho if np.isfinite(rho) else None for name, rho in ranks.items()}


def table(title: str, seeds: Sequence[dict[str, Any]], cell: Callable[[list[Figures]], str]) -> str:
    """A Markdown table: a fault a row, a detector a column; `cell` gets the figures of all seeds."""
    names = list(next(iter(seeds[0].values())))
    lines = [[title, *names], ["---", *["---:"] * len(names)]]
    lines += [[fault, *(cell([seed[fault][name] for seed in seeds]) for name in names)] for fault in FAULTS]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def auc_cell(figures: list[Figures]) -> str:
    """The mean over the seeds, and each of them."""
    values = [number(figure, "auc") for figure in figures]
    return f"{statistics.mean(values):.2f} ({' '.join(f'{value:.2f}' for value in values)})"


def selection_cell(figures: list[Figures]) -> str:
    """Precision / recall, means over the seeds that have them."""
    known = [[v for f in figures if (v := f[name]) is not None] for name in ("precision", "recall")]
    return " / ".join(f"{statistics.mean(values):.0%}" if values else "none" for values in known)


def main() -> None:
    """Runs what is missing, then prints the tables and writes result.json."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="Clean rows, in any format that middo reads.")
    parser.add_argument(
        "--foreign", required=True, type=Path, help="A .jsonl file of GSM8K: question, answer."
    )
    parser.add_argument("--model", required=True, help="A Hugging Face directory.")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--rows", type=int, default=600)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--judge-rows", type=int, default=24, help="Rows rated in both ways; 0: none.")
    parser.add_argument("--training", nargs="*", default=list(TRAINING), help="Settings of `middo train`.")
    arguments = parser.parse_args()

    folders = [run_seed(arguments, seed) for seed in arguments.seeds]
    seeds = [evaluate(folder) for folder in folders]
    count = round(SHARE * arguments.rows)
    positives, negatives = count * len(seeds), (arguments.rows - len(FAULTS) * count) * len(seeds)
    by_chance = ((positives + negatives + 1) / (12 * positives * negatives)) ** 0.5
    print(f"{arguments.rows} rows, {count} of each fault, seeds {' '.join(map(str, arguments.seeds))}\n")
    print(table("ROC-AUC", seeds, auc_cell))
    print(f"\nOf a detector that knows nothing the mean has a standard deviation of {by_chance:.3f}.\n")
    print(table("precision / recall", seeds, selection_cell))
    shares = {
        name: [number(seed[FAULTS[0]][name], "selected_share") for seed in seeds]
        for name in seeds[0][FAULTS[0]]
    }
    shown = ", ".join(
        f"{name} {statistics.mean(values):.0%}" for name, values in shares.items() if name != "length"
    )
    print(f"\nAt random: precision {SHARE:.0%}, recall the share of all rows that is selected: {shown}.")
    judges = None
    if arguments.judge_rows:
        kept = folders[0] / f"judges_{arguments.judge_rows}.json"
        if not kept.exists():
            write_json(kept, compare_judges(arguments, folders[0]))
        judges = json.loads(kept.read_text(encoding="utf-8"))
        print(f"\n{arguments.judge_rows} rows rated in both ways:")
        for what, figures in judges.items():
            print(
                f"  {what}: "
                + ", ".join(
                    f"{name} {value:.4g}" if value is not None else f"{name} none"
                    for name, value in figures.items()
                )
            )
    by_seed = dict(zip(map(str, arguments.seeds), seeds, strict=True))
    write_json(arguments.out / "result.json", {"seeds": by_seed, "judges": judges})


if __name__ == "__main__":
    main()
