"""Does the choice of rows help? Arms choose among planted faults, an oracle repairs, a model is trained.

    python -m benchmarks oracle --data alpaca.json --model models/SmolLM2-135M-Instruct --out oracle

For each seed, clean rows are drawn and faults are planted into a fifth of them (planting.py, 5 % per fault).
The base model is trained on the faulty rows, and `middo score` scores them under both models. Then each arm
repairs as many rows as the budget allows, the worst by its score: a faulty one becomes its clean original, a
clean one stays as it is. The base model is trained again on the result, with the same seed. The figure is its
loss on clean held-out rows. Only the choice differs between arms:

  none, all     no row repaired, or all faulty ones, whatever the budget: the ends of the scale
  only:FAULT    all rows with this fault: how much harm it does
  random        rows drawn by the seed
  axes          the three axes in turn: the worst row by each, then the second worst by each ...
  complexity, diversity, quality, ifd, loss, length, ...    the worst rows by this score

"share" is the recovered share of the gap: (loss of none - loss of the arm) / (loss of none - loss of all).
Its interval is a bootstrap: seeds are drawn with replacement, then held-out rows.

Called again it continues. Each training is stored in OUT/trainings.jsonl under a hash of rows, settings
and model, so arms that repair the same rows share it. Ctrl-C loses at most the steps since the last
checkpoint. Tables go to stdout; `--table` prints what there is and computes nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.oracle_figures import report
from benchmarks.planted_defects import clean_rows, middo
from benchmarks.planting import plant
from middo_jax.data.example import Example
from middo_jax.data.tokenize import load_tokenizer
from middo_jax.report.paired import Losses
from middo_jax.rundir import RoundDir, json_line, write_json, write_jsonl

FAULTS = ("swapped response", "cut response", "wrong numbers", "shuffled prompt")
SHARE = 0.05  # of the rows, per fault
TRAINING = ("train.learning_rate=1e-4", "train.batch_size=4", "train.remat=none")
SETTINGS = ("model.dtype=float32", "model.max_length=256")
# Columns of scores.parquet that are arms of their own, and the sign of a bad score.
COLUMNS = {
    "loss": ("loss_post", 1),
    "ifd": ("ifd", 1),
    "diversity": ("knn_mean_sim", -1),
    "quality": ("quality", -1),
    "length": ("n_target_tokens", -1),
    "end_nll": ("end_nll", 1),
    "worst_decile_nll": ("worst_decile_nll", 1),
    "consistency": ("consistency", 1),
}
ENDS = ("none", "all")
ARMS = (
    *ENDS,
    *(f"only:{fault}" for fault in FAULTS),
    "random",
    "complexity",
    "diversity",
    "quality",
    "axes",
    "ifd",
    "loss",
)


class Seed(NamedTuple):
    """The rows of one seed.

    Attributes:
      number: the seed.
      clean: the rows before faults were planted.
      faulty: the same rows, in the same order, with faults.
      fault: the fault of each row; "" is none.
      heldout: other clean rows.
    """

    number: int
    clean: list[Example]
    faulty: list[Example]
    fault: list[str]
    heldout: list[Example]


class Choice(NamedTuple):
    """The rows that an arm repairs.

    Attributes:
      arm: its name, with the budget behind it where it has one.
      rows: indices of the chosen rows.
    """

    arm: str
    rows: list[int]


def draw(arguments: argparse.Namespace, number: int) -> Seed:
    """Draws the rows of a seed and plants the faults."""
    tokenizer = load_tokenizer(arguments.model)
    drawn = clean_rows(
        arguments.data, tokenizer, arguments.rows + arguments.heldout, number, arguments.max_tokens
    )
    clean, heldout = drawn[: arguments.rows], drawn[arguments.rows :]
    planted = plant(clean, [], number, SHARE, FAULTS)
    fault = [planted.fault.get(example.id, "") for example in planted.examples]
    return Seed(number, clean, list(planted.examples), fault, heldout)


def repaired(seed: Seed, rows: Sequence[int]) -> list[Example]:
    """The faulty dataset with these rows replaced by their clean originals."""
    chosen = set(rows)
    return [seed.clean[i] if i in chosen else example for i, example in enumerate(seed.faulty)]


class Trainings:
    """The held-out losses of all trainings so far, by a hash of what each depends on."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.path: Path = arguments.out / "trainings.jsonl"
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        self.known: dict[str, Losses] = {}
        for line in lines:
            row = json.loads(line)
            self.known[row["key"]] = Losses(np.array(row["nll"]), np.array(row["n_tokens"]))
        weights = Path(arguments.model) / "model.safetensors"
        self.model_hash = hashlib.sha256(weights.read_bytes()).hexdigest()

    def key(self, seed: Seed, rows: Sequence[Example]) -> str:
        """A hash of the rows, their order, the held-out rows, the seed, the settings and the base model."""
        texts = [[(m.role, m.content) for m in example.messages] for example in (*rows, *seed.heldout)]
        facts = [texts, len(seed.heldout), seed.number, TRAINING, SETTINGS, self.model_hash]
        return hashlib.sha256(json_line(facts).encode()).hexdigest()[:24]

    def losses(self, seed: Seed, rows: Sequence[Example], name: str) -> Losses:
        """The held-out losses after a training on these rows, which runs only if it is not stored."""
        key = self.key(seed, rows)
        if key not in self.known:
            began = time.monotonic()
            folder = self.folder(seed, rows)
            checkpoint = self.train(seed, rows, folder)
            write_jsonl(folder / "heldout.jsonl", (example.to_json() for example in seed.heldout))
            scored = folder / "heldout"
            middo(
                *("score", "--data", str(folder / "heldout.jsonl"), "--model", str(checkpoint)),
                *("--axes", "complexity", "--out", str(scored), *SETTINGS),
            )
            table = scores_of(scored)
            n_tokens = table["n_target_tokens"]
            found = Losses(table["loss_post"] * n_tokens, n_tokens)
            seconds = time.monotonic() - began
            line = {"key": key, "seed": seed.number, "name": name, "seconds": round(seconds, 1)}
            with self.path.open("a", encoding="utf-8") as file:
                file.write(
                    json_line(line | {"nll": found.nll.tolist(), "n_tokens": n_tokens.tolist()}) + "\n"
                )
            self.known[key] = found
            if name != "none":  # scoring reads that model
                shutil.rmtree(folder)
        return self.known[key]

    def folder(self, seed: Seed, rows: Sequence[Example]) -> Path:
        """Where a training is while it is needed."""
        return self.arguments.out / f"training_{self.key(seed, rows)}"

    def train(self, seed: Seed, rows: Sequence[Example], folder: Path) -> Path:
        """Trains the base model on these rows; the checkpoint. Continues a training that was interrupted."""
        write_jsonl(folder / "rows.jsonl", (example.to_json() for example in rows))
        data = ("--data", str(folder / "rows.jsonl"), "--model", self.arguments.model)
        if not RoundDir(folder / "tuned").is_done("train"):
            middo("train", *data, "--out", str(folder / "tuned"), f"seed={seed.number}", *SETTINGS, *TRAINING)
        return folder / "tuned" / "checkpoint"

    def scores(self, seed: Seed) -> dict[str, np.ndarray]:
        """All scores of the faulty rows under the base model and the one that was trained on them."""
        kept = self.arguments.out / f"scores_{self.key(seed, seed.faulty)}"
        if not RoundDir(kept).is_done("score"):
            folder = self.folder(seed, seed.faulty)
            checkpoint = self.train(seed, seed.faulty, folder)
            middo(
                *("score", "--data", str(folder / "rows.jsonl"), "--model", str(checkpoint)),
                *("--pre-model", self.arguments.model, "--out", str(kept), *SETTINGS),
                *("scoring.readings=[ifd,consistency]", f"seed={seed.number}"),
            )
            shutil.rmtree(folder)
        return scores_of(kept)


def scores_of(folder: Path) -> dict[str, np.ndarray]:
    """The numeric columns of a folder's scores.parquet, float64 [n] each; null is NaN."""
    import pyarrow.types as types

    from middo_jax.signals.table import as_floats, read_scores

    table = read_scores(RoundDir(folder).scores)
    numeric = [f.name for f in table.schema if types.is_floating(f.type) or types.is_integer(f.type)]
    return {name: np.asarray(as_floats(table, name), np.float64) for name in numeric}


def badness(arm: str, scores: dict[str, np.ndarray]) -> np.ndarray:
    """[n] how bad an arm finds each row; a row without a score is the best."""
    from middo_jax.signals.select import Standardised

    if arm == "complexity":
        z = np.minimum(*(Standardised.of(scores[name]).z for name in ("loss_pre", "loss_post")))
    else:
        column, sign = COLUMNS[arm]
        z = sign * scores[column]
    return np.where(np.isfinite(z), z, -np.inf)


def choose(arm: str, count: int, seed: Seed, scores: dict[str, np.ndarray]) -> list[int]:
    """The rows that an arm repairs.

    Args:
      arm: one of ARMS or COLUMNS.
      count: the budget in rows.
      seed: its rows.
      scores: [n] each.
    """
    if arm == "none":
        return []
    if arm == "all":
        return [i for i, fault in enumerate(seed.fault) if fault]
    if arm.startswith("only:"):
        return [i for i, fault in enumerate(seed.fault) if fault == arm.removeprefix("only:")]
    if arm == "random":
        return np.random.default_rng([seed.number, 1]).permutation(len(seed.faulty))[:count].tolist()
    if arm == "axes":
        return in_turn(
            [worst_first(badness(axis, scores)) for axis in ("complexity", "diversity", "quality")], count
        )
    return worst_first(badness(arm, scores))[:count].tolist()


def worst_first(badness_n: np.ndarray) -> np.ndarray:
    """[n] row indices, the worst row first; ties go to the earlier row."""
    return np.argsort(-badness_n, kind="stable")


def in_turn(orders: Sequence[np.ndarray], count: int) -> list[int]:
    """The first `count` different rows of several orders: the first of each, then the second of each ..."""
    found = dict.fromkeys(int(i) for place in zip(*orders, strict=True) for i in place)
    return list(found)[:count]


def choices(arguments: argparse.Namespace, seed: Seed, scores: dict[str, np.ndarray]) -> Iterator[Choice]:
    """What every arm chooses at every budget; arms without a budget once, and first."""
    unlimited = [arm for arm in arguments.arms if arm in ENDS or arm.startswith("only:")]
    for arm in unlimited:
        yield Choice(arm, choose(arm, 0, seed, scores))
    for budget in arguments.budgets:
        for arm in arguments.arms:
            if arm not in unlimited:
                count = round(budget * len(seed.faulty))
                yield Choice(f"{arm} at {budget:.0%}", choose(arm, count, seed, scores))


def main() -> None:
    """Computes what is missing, then prints the tables and writes result.json."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="Clean rows, in any format that middo reads.")
    parser.add_argument("--model", required=True, help="A Hugging Face directory.")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--rows", type=int, default=400, help="Rows to train on, per seed.")
    parser.add_argument("--heldout", type=int, default=80, help="Clean held-out rows, per seed.")
    parser.add_argument("--max-tokens", type=int, default=128, help="The longest row, rendered.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.1], help="Shares of the rows.")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=[*ARMS, *COLUMNS], metavar="ARM")
    parser.add_argument("--table", action="store_true", help="Compute nothing, print what there is.")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    trainings = Trainings(arguments)
    found: dict[str, dict[int, Losses]] = {}
    hits: dict[str, dict[int, dict[str, int]]] = {}
    for number in arguments.seeds:
        seed = draw(arguments, number)
        is_scored = RoundDir(arguments.out / f"scores_{trainings.key(seed, seed.faulty)}").is_done("score")
        if arguments.table and not is_scored:
            continue
        if not is_scored:
            trainings.losses(seed, seed.faulty, "none")
        for choice in choices(arguments, seed, trainings.scores(seed)):
            rows = repaired(seed, choice.rows)
            if arguments.table and trainings.key(seed, rows) not in trainings.known:
                continue
            found.setdefault(choice.arm, {})[number] = trainings.losses(seed, rows, choice.arm)
            by_fault = {fault: sum(seed.fault[i] == fault for i in choice.rows) for fault in ("", *FAULTS)}
            hits.setdefault(choice.arm, {})[number] = by_fault
            print(
                f"seed {number}, {choice.arm}: {found[choice.arm][number].mean:.4f}",
                file=sys.stderr,
                flush=True,
            )
    text, figures = report(found, hits)
    print(text)
    write_json(arguments.out / "result.json", figures)


if __name__ == "__main__":
    main()
