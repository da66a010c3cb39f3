"""Exact nearest neighbours: ours beside faiss, scikit-learn and the whole matrix in numpy. Prints a table.

    python -m benchmarks neighbours
    python -m benchmarks neighbours --samples 300000 --sides middo --rounds 1      # memory

Random unit vectors, every hundredth a copy of another. The sides take turns, each time in a fresh process
that first searches a small part, so that programs are compiled and threads are awake; seconds are those of
the search alone, medians of the rounds. "CPU s" adds up the cores, waiting threads included. Memory is the
whole process's peak (VmHWM, so Linux only), the vectors included.

The limit is measured in the same turns: the rate of a float32 matrix product, the better of numpy's and
XLA's. "of the limit" is the time that N (N - 1) / 2 products of two vectors would take at that rate, over the
seconds: a side that multiplies each pair twice cannot pass one half.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

Found = tuple[np.ndarray, np.ndarray]  # index, similarity [n, k] each
WARM = 2048  # rows of the search before the clock


def middo(unit_nd: np.ndarray, k: int) -> Found:
    """This package, on the devices that JAX finds."""
    from middo_jax.parallel.mesh import make_mesh
    from middo_jax.signals.neighbours.search import nearest_neighbours

    found = nearest_neighbours(unit_nd, k, make_mesh())
    return found.index_nj, found.similarity_nj


def compile_middo(unit_nd: np.ndarray, k: int) -> None:
    """Starts a search and leaves it: the program's shapes are those of all rows."""
    from middo_jax.parallel.mesh import make_mesh
    from middo_jax.signals.neighbours.search import nearest_neighbours

    def leave(done: int, total: int) -> None:
        raise StopIteration

    with contextlib.suppress(StopIteration):
        nearest_neighbours(unit_nd, k, make_mesh(), on_progress=leave)


def faiss(unit_nd: np.ndarray, k: int) -> Found:
    """faiss' exact index of inner products; each row finds itself too."""
    import faiss

    index = faiss.IndexFlatIP(unit_nd.shape[1])
    index.add(unit_nd)
    similarity_nj, index_nj = index.search(unit_nd, k + 1)
    return without_itself(index_nj, similarity_nj)


def scikit_learn(unit_nd: np.ndarray, k: int) -> Found:
    """Brute force by Euclidean distance, its fast way; of unit vectors the order is that of cosines."""
    from sklearn.neighbors import NearestNeighbors

    distance_nj, index_nj = NearestNeighbors(n_neighbors=k, algorithm="brute").fit(unit_nd).kneighbors()
    return index_nj, 1 - distance_nj**2 / 2


def whole(unit_nd: np.ndarray, k: int) -> Found:
    """All N x N similarities at once, then the best of every row."""
    similarity_nn = np.empty((len(unit_nd), len(unit_nd)), np.float32)
    for start in range(0, len(unit_nd), 8192):  # OpenBLAS crashes where a product has more than 2^31 entries
        rows = slice(start, start + 8192)
        np.matmul(unit_nd[rows], unit_nd.T, out=similarity_nn[rows])
    np.fill_diagonal(similarity_nn, -np.inf)
    index_nj = np.stack([row_n.argpartition(-k)[-k:].copy() for row_n in similarity_nn])
    similarity_nj = np.take_along_axis(similarity_nn, index_nj, axis=1)
    order_nj = np.argsort(-similarity_nj, axis=1)
    return np.take_along_axis(index_nj, order_nj, axis=1), np.take_along_axis(similarity_nj, order_nj, axis=1)


SIDES: dict[str, Callable[[np.ndarray, int], Found]] = {
    "middo": middo,
    "faiss": faiss,
    "scikit-learn": scikit_learn,
    "whole": whole,
}


def without_itself(index_nj: np.ndarray, similarity_nj: np.ndarray) -> Found:
    """k of k + 1 neighbours: without the row itself, or without the last where it is not among them."""
    is_other_nj = index_nj != np.arange(len(index_nj))[:, None]
    is_other_nj[is_other_nj.all(axis=1), -1] = False
    shape = len(index_nj), index_nj.shape[1] - 1
    return index_nj[is_other_nj].reshape(shape), similarity_nj[is_other_nj].reshape(shape)


def matmul_rate() -> float:
    """FLOPs a second of a float32 product [2048, 576] x [576, 2048]: the better of numpy and XLA."""
    import jax

    a = np.random.default_rng(0).standard_normal((2048, 576), dtype=np.float32)
    on_device, product = jax.device_put(a), jax.jit(lambda x: x @ x.T)
    seconds = [
        min(_seconds(call) for _ in range(20))
        for call in (lambda: a @ a.T, lambda: product(on_device).block_until_ready())
    ]
    return 2 * len(a) * a.size / min(seconds)


def _seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def check(unit_nd: np.ndarray, found: Found, k: int) -> int:
    """How many of 500 rows have a neighbour that float64 puts behind the k-th by more than 1e-6."""
    rows = np.random.default_rng(1).choice(len(unit_nd), min(500, len(unit_nd)), replace=False)
    similarity_rn = unit_nd[rows].astype(np.float64) @ unit_nd.T.astype(np.float64)
    similarity_rn[np.arange(len(rows)), rows] = -np.inf
    kth_r = np.sort(similarity_rn, axis=1)[:, -k]
    chosen_rk = np.take_along_axis(similarity_rn, found[0][rows].astype(np.int64), axis=1)
    return int((chosen_rk < kth_r[:, None] - 1e-6).any(axis=1).sum())


def measure(side: str, path: Path, k: int) -> dict[str, float]:
    """One search in this process: seconds, peak bytes, rows that are wrong."""
    unit_nd = np.load(path, allow_pickle=False)
    SIDES[side](unit_nd[:WARM], k)
    if side == "middo":
        compile_middo(unit_nd, k)
    began, began_cpu = time.perf_counter(), time.process_time()
    found = SIDES[side](unit_nd, k)
    seconds, cpu = time.perf_counter() - began, time.process_time() - began_cpu
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    peak = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    return {"seconds": seconds, "cpu": cpu, "peak": peak, "wrong": check(unit_nd, found, k)}


def main() -> None:
    """Prints the table; with --measure, one side of it as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=50_000)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--k", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--measure", nargs=2, metavar=("SIDE", "FILE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        side, path = arguments.measure
        result = {"rate": matmul_rate()} if side == "limit" else measure(side, Path(path), arguments.k)
        print(json.dumps(result))
        return

    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "unit.npy"
        unit_nd = np.random.default_rng(0).standard_normal((arguments.samples, arguments.width), np.float32)
        unit_nd /= np.linalg.norm(unit_nd, axis=1, keepdims=True)
        unit_nd[::100] = unit_nd[50::100]  # N is a multiple of 100
        np.save(path, unit_nd)
        del unit_nd
        results: dict[str, list[dict[str, float]]] = {}
        for _ in range(arguments.rounds):
            for side in ("limit", *arguments.sides):
                command = [sys.executable, __file__, "--k", str(arguments.k), "--measure", side, str(path)]
                printed = subprocess.run(command, stdout=subprocess.PIPE, text=True)
                if printed.returncode:
                    print(f"{side}: did not run, see above", file=sys.stderr)
                    continue
                results.setdefault(side, []).append(json.loads(printed.stdout))

    rate = statistics.median(turn["rate"] for turn in results.pop("limit"))
    limit = arguments.samples * (arguments.samples - 1) * arguments.width / rate
    print(
        f"{arguments.samples} x {arguments.width}, k = {arguments.k}; products at {rate / 1e9:.0f} GFLOP/s,"
    )
    print(f"so that each pair once takes {limit:.2f} s\n")
    print("| side | s | all rounds | CPU s | of the limit | times middo's | peak, GB | wrong rows of 500 |")
    print("|---|---|---|---|---|---|---|---|")

    def median(side: str, what: str) -> float:
        return statistics.median(turn[what] for turn in results[side])

    for side, turns in results.items():
        seconds, cpu = median(side, "seconds"), median(side, "cpu")
        rounds = " ".join(f"{turn['seconds']:.1f}" for turn in turns)
        times = f"{seconds / median('middo', 'seconds'):.2f}" if "middo" in results else ""
        peak, wrong = (max(turn[what] for turn in turns) for what in ("peak", "wrong"))
        print(
            f"| {side} | {seconds:.2f} | {rounds} | {cpu:.1f} | {limit / seconds:.0%} | {times} "
            f"| {peak / 1e9:.2f} | {wrong:.0f} |"
        )


if __name__ == "__main__":
    main()
