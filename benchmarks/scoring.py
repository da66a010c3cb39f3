"""`middo score` beside the published pipeline's scoring in PyTorch, the same rows and weights. Prints tables.

    python -m benchmarks scoring --peer PEER.py --data alpaca.json \
        --model TUNED --pre-model models/SmolLM2-135M-Instruct --out scoring.json

The parts are
  alpaca      the first --rows rows of --data;
  dolly-like  as many, joined from its rows to a log-normal distribution as Dolly's: 66 tokens in the median,
              1,600 at the 99th percentile, the template's included;
  long        --long-rows rows, joined to nearly 2,048 tokens each;
  judge       ratings of the first --judge-rows rows: ours expected, the peer's from --max-new tokens each.

The peer is a script of your own; there is none in this repository. It is called as PEER --pre DIR --post DIR
--data FILE --limit N --out FILE, or with --judge --max-new K behind it. It computes losses under both models,
then embeddings, then ratings, and prints one JSON line: real_tokens and computed_tokens of a pass, and
seconds by phase.

The sides take turns, each time as a process of its own: ours is the command that a user gives, and its
seconds by pass are those of its manifest. "Computing" is losses under both models and embeddings, less
starting, loading and compiling; the peer's holds its rendering and tokenizing, ours not. "All" is the whole
process. Seconds are medians, but those of the first turn, before which nothing of ours was compiled, stand
by themselves. Memory is the process's peak, VmHWM as seen from outside every 0.2 s, so Linux only.

The limit is the time that the matrix products of the real tokens take at the best rate that XLA reaches, in
the same turns, in a float32 product of the model's shapes. Embeddings cost nothing there, for the pass that
gives losses has them. What all rows begin with, the template's head, counts in every row; in brackets, once.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import json
import os
import platform
import shlex
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.scoring_rows import forward_flops, join_to, log_normal
from benchmarks.scoring_sides import LONGEST, Turn, measure_rate, ours, peer
from middo_jax.data.example import Example
from middo_jax.data.sources import read, write
from middo_jax.data.tokenize import load_tokenizer, tokenize
from middo_jax.data.trees import common_prefix
from middo_jax.models.config import DecoderConfig, read_config

SLACK = 16  # tokens that joining may add to a row
PARTS = ("alpaca", "dolly-like", "long", "judge")
PROJECTED = 1024  # new tokens that the published pipeline allows a rating


class Part(NamedTuple):
    """Rows, each one's tokens up to the last target, its targets, and how many tokens all rows begin with."""

    rows: list[Example]
    tokens_n: np.ndarray
    targets_n: np.ndarray
    shared: int

    def flops(self, config: DecoderConfig, sharing: bool) -> int:
        """Of a forward pass over every row, as `forward_flops`; `sharing`: with their beginning only once."""
        once = forward_flops(config, self.shared, 0) if sharing else 0
        sizes = zip(self.tokens_n.tolist(), self.targets_n.tolist(), strict=True)
        return once + sum(forward_flops(config, n, targets) - once for n, targets in sizes)


def make_part(name: str, arguments: argparse.Namespace) -> Part:
    """The rows of a part, none longer than LONGEST."""
    tokenizer = load_tokenizer(arguments.model)

    def size(row: Example) -> tuple[int, int]:
        """Tokens up to the last target, targets."""
        at = np.flatnonzero(tokenize(row, tokenizer, 1 << 30).is_target_n)
        return int(at[-1]) + 1, len(at)

    pool = [row for row in read(arguments.data, "alpaca")[0] if len(row.messages) == 2]
    wanted = {"long": arguments.long_rows, "judge": arguments.judge_rows}.get(name, arguments.rows)
    if name in ("alpaca", "judge"):
        rows = list(itertools.islice((row for row in pool if size(row)[0] <= LONGEST), wanted))
    else:
        first = tokenize(pool[0], tokenizer, 1 << 30)
        template = len(first) - int(first.in_prompt_n.sum() + first.is_target_n.sum())
        most = LONGEST - SLACK - template
        of_long, of_dolly = np.full(wanted, most), log_normal(wanted, 66 - template, 1600 - template)
        targets = of_long if name == "long" else of_dolly.clip(max=most)
        rows = join_to(pool, [size(row)[0] - template for row in pool], targets.tolist())
    tokens_n, targets_n = map(np.asarray, zip(*map(size, rows), strict=True))
    if len(rows) < wanted or tokens_n.max() > LONGEST:
        sys.exit(f"{name}: {len(rows)} rows of {wanted}, the longest of {tokens_n.max()} tokens")
    shared = common_prefix([tokenize(row, tokenizer, LONGEST).tokens_n for row in rows])
    return Part(rows, tokens_n, targets_n, shared)


def take_turns(repeats: int, sides: dict[str, Callable[[], Turn]]) -> dict[str, list[Turn]]:
    """Each side `repeats` times, in reversed order every other time."""
    turns: dict[str, list[Turn]] = {name: [] for name in sides}
    for repeat in range(repeats):
        for name in list(sides)[:: -1 if repeat % 2 else 1]:
            turns[name].append(sides[name]())
            print(f"  {name}, {repeat + 1} of {repeats}: {turns[name][-1].seconds:.0f} s", file=sys.stderr)
    return turns


def median(turns: Sequence[Turn], what: Callable[[Turn], float]) -> float:
    """Of a figure over the turns."""
    return statistics.median(map(what, turns))


def compute(turn: Turn) -> float:
    """Seconds of losses and embeddings."""
    return sum(seconds for phase, seconds in turn.phases.items() if phase != "judge")


def judging(turn: Turn) -> float:
    """Seconds of ratings."""
    return turn.phases["judge"]


def peak(turns: Sequence[Turn]) -> float:
    """Most gigabytes of all turns."""
    return max(turn.peak for turn in turns) / 1e9


def print_table(rows: Sequence[dict[str, str]]) -> None:
    """As markdown; all rows have the columns of the first."""
    for cells in (rows[0], ["---"] * len(rows[0]), *(row.values() for row in rows)):
        print(f"| {' | '.join(cells)} |")


def measure_scores(name: str, arguments: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Losses and embeddings of one part, both sides: prints the table, returns the figures."""
    part, data = make_part(name, arguments), scratch / "data.json"
    write(part.rows, data, "alpaca")
    rates: list[float] = []

    def our_turn() -> Turn:
        rates.append(measure_rate(arguments, scratch))
        return ours(arguments, data, scratch, judging=False)

    def their_turn() -> Turn:
        return peer(arguments, data, scratch, len(part.rows))

    turns = take_turns(arguments.repeats, {"middo": our_turn, "peer": their_turn})
    tokens, config = int(part.tokens_n.sum()), read_config(arguments.model)
    limit, sharing = (2 * part.flops(config, once) / max(rates) for once in (False, True))

    def row(side: str, of: list[Turn]) -> dict[str, str]:
        def phase(name: str) -> str:
            return f"{median(of, lambda turn: turn.phases[name]):.1f}" if name in of[0].phases else "as above"

        seconds = median(of, compute)
        return {
            "side": side,
            "losses before, s": phase("loss_pre"),
            "losses after, s": phase("loss_post"),
            "embeddings, s": phase("embedding").replace("as above", "with them"),
            "computing, s": f"{seconds:.1f} ({' '.join(f'{compute(turn):.1f}' for turn in of)})",
            "compiling, first, s": f"{of[0].compiling:.1f}",
            "all, first, s": f"{of[0].seconds:.1f}",
            "all, s": f"{median(of, lambda turn: turn.seconds):.1f}",
            "tokens/s": f"{tokens / seconds:.0f}",
            "real positions": f"{of[0].real:.1%}",
            "of the limit": f"{limit / seconds:.0%} ({sharing / seconds:.0%})",
            "peak, GB": f"{peak(of):.2f}",
        }

    marks = [f"{q:.0f}" for q in np.quantile(part.tokens_n, (0.5, 0.9, 0.99, 1))]
    print(f"\n### {name}: {len(part.rows)} rows, {tokens:,} tokens\n")
    print(
        f"Tokens of a row: median {marks[0]}, 90 % {marks[1]}, 99 % {marks[2]}, most {marks[3]}; the first "
        f"{part.shared} are the same.\nThe limit is {limit:.1f} s ({sharing:.1f}), at "
        f"{max(rates) / 1e9:.0f} GFLOP/s.\n"
    )
    print_table([row(side, of) for side, of in turns.items()])
    our, their = turns["middo"], turns["peer"]
    ratios = {
        "computing": median(their, compute) / median(our, compute),
        "all, first": their[0].seconds / our[0].seconds,
        "all": median(their, lambda turn: turn.seconds) / median(our, lambda turn: turn.seconds),
        "memory": peak(their) / peak(our),
    }
    print(f"\npeer / middo: {'; '.join(f'{what} {ratio:.2f}' for what, ratio in ratios.items())}.")
    print(f"Shapes compiled: {our[0].shapes}.")
    print("\n".join(agreement(part, our[0], their[0], arguments.text)), flush=True)
    facts = {"tokens": part.tokens_n.tolist(), "rates": rates, "limits": [limit, sharing], "ratios": ratios}
    return facts | {"turns": figures(turns)}


def agreement(part: Part, our: Turn, their: Turn, text: str) -> list[str]:
    """Lines that say how far the two computed the same. Ends the program if the rows are not the same."""
    if not np.array_equal(our.found["n_target_tokens"], part.targets_n):
        sys.exit("middo scored other rows than it was given, or parts of them")
    lines = []
    for name in ("loss_pre", "loss_post"):
        x, y = our.found[name], their.found[name]
        lines.append(f"{name}: largest difference {abs(x - y).max():.1e}, r = {np.corrcoef(x, y)[0, 1]:.7f}.")
    unit = [side.found["embedding"] for side in (our, their)]
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in unit]
    cosine = (unit[0] * unit[1]).sum(axis=1)
    note = (
        "both of the prompt alone"
        if text == "raw"
        else "ours within the template, theirs of the prompt alone"
    )
    return [
        *lines,
        f"Embeddings, {note}: cosine {np.median(cosine):.7f} (median), {cosine.min():.7f} (least).",
    ]


def measure_judge(arguments: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Ratings, both sides, and what the peer's would take with as many new tokens as the pipeline allows."""
    part, data = make_part("judge", arguments), scratch / "data.json"
    write(part.rows, data, "alpaca")
    few, many = max(1, arguments.max_new // 4), arguments.max_new

    def their_turn(max_new: int) -> Callable[[], Turn]:
        return lambda: peer(arguments, data, scratch, len(part.rows), max_new)

    sides = {
        "middo": lambda: ours(arguments, data, scratch, judging=True),
        f"peer, {few} new tokens": their_turn(few),
        f"peer, {many} new tokens": their_turn(many),
    }
    turns = take_turns(arguments.repeats, sides)
    seconds = [median(of, judging) for of in turns.values()]
    print(f"\n### judge: six ratings of {len(part.rows)} rows\n")
    print_table(
        [
            {
                "side": side,
                "ratings, s": f"{took:.1f} ({' '.join(f'{judging(turn):.1f}' for turn in of)})",
                "compiling, first, s": f"{of[0].compiling:.1f}",
                "peak, GB": f"{peak(of):.2f}",
                "times middo's": f"{took / seconds[0]:.1f}",
            }
            for (side, of), took in zip(turns.items(), seconds, strict=True)
        ]
    )
    a_token = (seconds[2] - seconds[1]) / (many - few)
    projected = seconds[2] + (PROJECTED - many) * a_token
    texts = list(turns[f"peer, {many} new tokens"][0].found["judge"])
    encoded = load_tokenizer(arguments.model)(texts, add_special_tokens=False).input_ids
    ended = sum(len(tokens) < many for tokens in encoded)
    print(
        f"\nProjected to {PROJECTED} new tokens, not measured: {projected:.0f} s, "
        f"{projected / seconds[0]:.0f} times middo's.\nOne more new token of every rating takes the peer "
        f"{a_token:.2f} s, by the difference of its two rows; it is taken\nto cost that however long the "
        "text is, and some answer of each of its batches to reach the end."
    )
    print(f"Of {len(texts)} answers {ended} ended before {many} tokens.", flush=True)
    facts = {"projected_s": projected, "s_a_token": a_token, "answers": len(texts), "ended": ended}
    return facts | {"turns": figures(turns)}


def figures(turns: dict[str, list[Turn]]) -> dict[str, Any]:
    """All turns without what they found, for the file."""
    return {side: [turn._replace(found={})._asdict() for turn in of] for side, of in turns.items()}


def setting() -> dict[str, Any]:
    """Where and with what it is measured."""
    cpu = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    packages = ("jax", "jaxlib", "numpy", "torch", "transformers")
    return {
        "cpu": next(line.split(":")[1].strip() for line in cpu if line.startswith("model name")),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
        "command": shlex.join(["python", *sys.argv]),
    }


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peer", required=True, help="the peer's script")
    parser.add_argument("--data", required=True, help="rows in Alpaca's format")
    parser.add_argument("--model", required=True, help="the model after training")
    parser.add_argument("--pre-model", required=True, help="the model before it")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--long-rows", type=int, default=24)
    parser.add_argument("--judge-rows", type=int, default=64)
    parser.add_argument("--max-new", type=int, default=32, help="tokens of the peer's ratings")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--text",
        choices=("templated", "raw"),
        default="templated",
        help="our embeddings: within the template, or in a pass of their own as the peer's",
    )
    parser.add_argument("--out", type=Path, help="gets all figures as JSON")
    arguments = parser.parse_args()
    results: dict[str, Any] = {"setting": setting()}
    print("; ".join(f"{name} {value}" for name, value in results["setting"].items()), flush=True)
    for name in arguments.parts:
        # What middo compiles is kept for the later turns of a part, not for the next part.
        with tempfile.TemporaryDirectory() as scratch:
            if name == "judge":
                results[name] = measure_judge(arguments, Path(scratch))
            else:
                results[name] = measure_scores(name, arguments, Path(scratch))
    if arguments.out:
        arguments.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
