"""Neighbours after a round's edit, frozen embeddings: an update beside a search from scratch. Prints a table.

    python -m benchmarks neighbours_update --samples 50000 --replaced 0.02 0.05 0.1

Random unit vectors; each time that share of the rows is replaced and half as many are added at the end, as
the loop does. "Products" are dot products of two vectors, of N (N - 1) / 2 that a search from scratch takes.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np

from middo_jax.parallel.mesh import make_mesh
from middo_jax.signals.neighbours.incremental import Earlier, updated_neighbours
from middo_jax.signals.neighbours.nearest import Neighbours
from middo_jax.signals.neighbours.search import nearest_neighbours


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=50_000)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--k", type=int, default=2)
    parser.add_argument("--replaced", type=float, nargs="+", default=[0.02, 0.05, 0.1])
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    n, k, mesh, rng = arguments.samples, arguments.k, make_mesh(), np.random.default_rng(0)
    before_nd = rng.standard_normal((n, arguments.width), np.float32)
    found = nearest_neighbours(before_nd, k, mesh)
    print("| replaced | added | searched | products | from scratch, s | update, s | times faster | differ |")
    print("|---|---|---|---|---|---|---|---|")
    for share in arguments.replaced:
        row_n = np.r_[np.arange(n), np.full(round(share * n / 2), -1)]
        row_n[rng.choice(n, round(share * n), replace=False)] = -1
        after_nd = rng.standard_normal((len(row_n), arguments.width), np.float32)
        after_nd[row_n >= 0] = before_nd[row_n[row_n >= 0]]
        earlier, seconds = Earlier(found, row_n), {"scratch": [], "update": []}
        results: dict[str, Neighbours] = {}
        for turn in range(arguments.rounds + 1):
            for name in seconds:
                began = time.perf_counter()
                if name == "update":
                    results[name] = updated_neighbours(after_nd, k, mesh, earlier)
                else:
                    results[name] = nearest_neighbours(after_nd, k, mesh)
                if turn:  # the first compiles
                    seconds[name].append(time.perf_counter() - began)
        searched, total = int(earlier.to_search().sum()), len(row_n)
        scratch, update = (statistics.median(seconds[name]) for name in ("scratch", "update"))
        differ = (results["scratch"].index_nj != results["update"].index_nj).any(axis=1).sum()
        print(
            f"| {share:.0%} | {share / 2:.1%} | {searched / total:.1%} | {2 * searched / (total - 1):.0%} "
            f"| {scratch:.2f} | {update:.2f} | {scratch / update:.1f} | {differ} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
