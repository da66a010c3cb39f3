"""How far `diversity.text` decides what is sparse: the prompt within its conversation, or alone as published.

    python -m benchmarks embedding_texts --data alpaca.json --model TUNED data.limit=2000

Both embeddings of every row under one model, the neighbours in each space, and how far they agree: rank
correlation (Spearman) of the mean similarities s, rows that have the same nearest neighbours, and the overlap
of the sparse sets (Jaccard: of what either selects, the share that both select) at m = 1 and at fractions.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping

import numpy as np

from middo_jax.config import Deviations, Fraction, load
from middo_jax.models.loading import locate
from middo_jax.models.resolve import resolve
from middo_jax.passes.losses import score_examples
from middo_jax.progress import for_stderr
from middo_jax.session import Session, prepare
from middo_jax.signals.neighbours.nearest import Neighbours
from middo_jax.signals.neighbours.search import nearest_neighbours
from middo_jax.signals.select import select_axis
from middo_jax.stages.passes import raw_prompts

THRESHOLDS = (Deviations(m=1.0), Fraction(fraction=0.05), Fraction(fraction=0.1))


def spearman(a_n: np.ndarray, b_n: np.ndarray) -> float:
    """Correlation of the ranks; of equal values the earlier has the lower one."""
    a_rank_n, b_rank_n = (np.argsort(np.argsort(values, kind="stable")) for values in (a_n, b_n))
    return float(np.corrcoef(a_rank_n, b_rank_n)[0, 1])


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("overrides", nargs="*", metavar="a.b=c")
    arguments = parser.parse_args()
    model = resolve(arguments.model)
    settings = [
        f"model.path={locate(model).base}",
        f"data.path={arguments.data}",
        "data.eval_fraction=0",
        "model.dtype=float32",
        *arguments.overrides,
    ]
    session = Session(load(None, settings), for_stderr())
    examples = prepare(session)[0]
    texts = {
        "templated": session.tokenize(examples),
        "raw": raw_prompts(session, examples),
    }
    loaded = session.load_model(model)
    found: dict[str, Neighbours] = {}
    for name, tokenized in texts.items():
        began = time.monotonic()
        scores, _ = score_examples(
            loaded,
            tokenized,
            batch_tokens=session.batch_tokens,
            chunk=session.config.scoring.unembed_chunk,
            progress=session.progress,
            name=name,
        )
        seconds = time.monotonic() - began
        tokens = sum(map(len, tokenized))
        print(f"{name}: {len(tokenized):,} rows, {tokens:,} tokens, {seconds:.0f} s with compiling")
        found[name] = nearest_neighbours(scores.embedding_nd, session.config.diversity.k, session.mesh)
    print_comparison(found)


def print_comparison(found: Mapping[str, Neighbours]) -> None:
    """Prints how similar the two texts make the rows, and what is selected by each."""
    similarity = {name: neighbours.mean_similarity() for name, neighbours in found.items()}
    for name, s_n in similarity.items():
        print(f"s, {name}: mean {np.nanmean(s_n):.4f}, standard deviation {np.nanstd(s_n):.4f}")
    known = np.isfinite(similarity["templated"]) & np.isfinite(similarity["raw"])
    print(f"Spearman of s: {spearman(*(s_n[known] for s_n in similarity.values())):.3f}")
    nearest = [neighbours.index_nj for neighbours in found.values()]
    first, whole = (nearest[0][:, 0] == nearest[1][:, 0]), np.equal(*(np.sort(i, axis=1) for i in nearest))
    print(
        f"same nearest neighbour: {first.mean():.1%}; same {whole.shape[1]}: {whole.all(axis=1).mean():.1%}\n"
    )
    print("| selected by | templated | raw | both | Jaccard | by chance |")
    print("|---|---|---|---|---|---|")
    for threshold in THRESHOLDS:
        a, b = (select_axis({"s": s_n}, -1, threshold).selected for s_n in similarity.values())
        chance = a.sum() * b.sum() / len(a)
        if isinstance(threshold, Deviations):
            by = f"m = {threshold.m:g}"
        else:
            by = f"fraction {threshold.fraction:g}"
        print(
            f"| {by} | {a.sum()} | {b.sum()} | {(a & b).sum()} | {(a & b).sum() / max((a | b).sum(), 1):.2f} "
            f"| {chance / (a.sum() + b.sum() - chance):.2f} |"
        )


if __name__ == "__main__":
    main()
