"""Does `middo score` say what a plain transformers and torch loop says? Prints a table; fails if not.

    middo score --data alpaca.json --model MODEL --pre-model PRE --out scored data.limit=200
    python -m benchmarks agreement scored --model MODEL --pre-model PRE

The other side is as plain as can be: one example a forward pass, whole logits, the chat template applied by
transformers, brute-force neighbours by scikit-learn, the three sets from the formulas. It shares no code with
middo_jax, but reads its files. Needs torch (the `parity` extra).
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from sklearn.neighbors import NearestNeighbors
from transformers import AutoModelForCausalLM, AutoTokenizer

LOSS_TOLERANCE = 1e-3
COSINE_TOLERANCE = 0.9999
TIE = 1e-5  # neighbours whose similarities differ by less may change places


@torch.no_grad()
def score(model_path: str, samples: list[dict[str, Any]]) -> tuple[list[float], np.ndarray]:
    """Loss of the answer and mean last hidden state over the prompt's words, one sample at a time."""
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
    losses, embeddings = [], []
    for sample in samples:
        *before, answer = sample["messages"]
        prompt_text = tokenizer.apply_chat_template(before, tokenize=False, add_generation_prompt=True)
        text = tokenizer.apply_chat_template([*before, answer], tokenize=False)
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids = torch.tensor([encoded.input_ids])
        out = model(input_ids=ids, output_hidden_states=True)
        starts = np.asarray([start for start, _ in encoded.offset_mapping])
        stops = np.asarray([stop for _, stop in encoded.offset_mapping])
        end = max(i for i, token in enumerate(encoded.input_ids) if token == tokenizer.eos_token_id)
        first = int(np.searchsorted(starts, len(prompt_text)))
        nll = torch.nn.functional.cross_entropy(
            out.logits[0, first - 1 : end].double(), ids[0, first : end + 1], reduction="mean"
        )
        losses.append(float(nll))
        content = before[-1]["content"].strip()
        at = text.rindex(content, 0, len(prompt_text))
        inside = (stops > at) & (starts < at + len(content))
        embeddings.append(out.hidden_states[-1][0][torch.tensor(inside)].mean(0).numpy())
    return losses, np.stack(embeddings)


def column(table: Any, name: str) -> np.ndarray:
    """A score column as float64."""
    return table[name].to_numpy(zero_copy_only=False).astype(np.float64)


def sets_by_formula(table: Any, selection: dict[str, Any]) -> dict[str, set[str]]:
    """hard, sparse and low quality, straight from the formulas and the m that selection.json names."""
    ids = np.asarray(table["id"].to_pylist(), object)

    def worse(name: str, axis: str, sign: int) -> np.ndarray:
        x, m = column(table, name), selection["axes"][axis]["m"]
        finite = x[np.isfinite(x)]
        return sign * x > sign * finite.mean() + m * finite.std()

    return {
        "complexity": set(ids[worse("loss_pre", "complexity", 1) & worse("loss_post", "complexity", 1)]),
        "diversity": set(ids[worse("knn_mean_sim", "diversity", -1)]),
        "quality": set(ids[worse("quality", "quality", -1)]),
    }


def main() -> int:
    """Prints the table; 1 if anything is out of tolerance."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("scored", type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--pre-model", required=True)
    arguments = parser.parse_args()

    samples = [json.loads(line) for line in (arguments.scored / "dataset.jsonl").open(encoding="utf-8")]
    if any(len([m for m in s["messages"] if m["role"] == "user"]) != 1 for s in samples):
        parser.error("this comparison reads single-turn samples only")
    table = pq.read_table(arguments.scored / "scores.parquet")
    embedded = pq.read_table(arguments.scored / "embeddings.parquet").to_pylist()
    embedding_of = {row["id"]: row["embedding"] for row in embedded}
    ours_nd = np.array([embedding_of[id_] for id_ in table["id"].to_pylist()], np.float32)
    pre, _ = score(arguments.pre_model, samples)
    post, theirs_nd = score(arguments.model, samples)

    checks: list[tuple[str, float, bool]] = []
    for name, losses in (("loss_pre", pre), ("loss_post", post)):
        worst = float(np.abs(column(table, name) - losses).max())
        checks.append((f"{name}: largest difference", worst, worst <= LOSS_TOLERANCE))
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (ours_nd, theirs_nd)]
    cosine = float((unit[0] * unit[1]).sum(axis=1).min())
    checks.append(("embeddings: smallest cosine", cosine, cosine >= COSINE_TOLERANCE))

    knn_ids = table["knn_ids"].to_pylist()
    k = len(knn_ids[0])
    number = {id_: i for i, id_ in enumerate(table["id"].to_pylist())}
    neighbours = NearestNeighbors(n_neighbors=k + 1, metric="cosine", algorithm="brute").fit(theirs_nd)
    distance_nj, index_nj = neighbours.kneighbors(theirs_nd)
    differing = 0
    for i, chosen in enumerate(knn_ids):
        theirs = [(j, 1 - d) for j, d in zip(index_nj[i], distance_nj[i], strict=True) if j != i][:k]
        similarity = unit[1] @ unit[1][i]
        farthest = theirs[-1][1]
        differing += any(
            number[id_] not in {j for j, _ in theirs} and abs(similarity[number[id_]] - farthest) > TIE
            for id_ in chosen
        )
    checks.append(("samples with other neighbours", differing, differing == 0))

    selection_path = arguments.scored / "selection.json"
    if selection_path.exists():
        selection = json.loads(selection_path.read_text(encoding="utf-8"))
        for axis, expected in sets_by_formula(table, selection).items():
            chosen = set(selection["axes"][axis]["ids"])
            checks.append(
                (f"{axis}: {len(chosen)} selected, differing", len(chosen ^ expected), chosen == expected)
            )
    for name, value, ok in checks:
        print(
            f"{'ok  ' if ok else 'FAIL'}  {name:<42} {value:.3g}"
            if "cosine" not in name
            else f"{'ok  ' if ok else 'FAIL'}  {name:<42} {value:.7f}"
        )
    print(f"{len(samples)} samples")
    return 0 if all(ok for _, _, ok in checks) else 1


if __name__ == "__main__":
    sys.exit(main())
