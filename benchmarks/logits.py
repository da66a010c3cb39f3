"""How far are our float32 logits from transformers', and how far is either from float64? Prints a table.

    python -m benchmarks logits --model models/SmolLM2-135M-Instruct

One row a text: rows of configs/quickstart_data.jsonl joined to about the wanted length. Needs torch (the
`parity` extra).
"""

from __future__ import annotations

import argparse
import functools
import json
from pathlib import Path

import jax
import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from middo_jax.models.hf import load
from middo_jax.models.model import Params, Structure, bound

DATA = Path(__file__).parent.parent / "configs" / "quickstart_data.jsonl"


@torch.no_grad()
def torch_logits(path: str, tokens: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """[t, v] as float64."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
    return model(input_ids=torch.tensor(tokens[None])).logits[0].double().numpy()


@functools.partial(jax.jit, static_argnums=0)
def our_logits(
    graphdef: Structure, params: Params, tokens_1t: jax.Array, positions_1t: jax.Array
) -> jax.Array:
    """float32 [t, v] of a text."""
    model = bound(graphdef, params)
    return model.unembed(model.hidden(tokens_1t, jax.numpy.zeros_like(positions_1t), positions_1t)[0])


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--lengths", type=int, nargs="+", default=[32, 64, 200, 1000])
    arguments = parser.parse_args()
    rows = [json.loads(line) for line in DATA.open(encoding="utf-8")]
    text = "\n".join(f"{r['instruction']} {r['input']} {r['output']}" for r in rows)
    ids = AutoTokenizer.from_pretrained(arguments.model)(text).input_ids
    loaded = load(arguments.model)
    print(
        "| tokens | largest logit | ours - torch | ours - float64 | torch - float64 |\n|---|---|---|---|---|"
    )
    for length in arguments.lengths:
        tokens = np.asarray(ids[:length], np.int32)
        positions = np.arange(length, dtype=np.int32)[None]
        ours = np.asarray(our_logits(loaded.graphdef, loaded.params, tokens[None], positions), np.float64)
        theirs = torch_logits(arguments.model, tokens, torch.float32)
        exact = torch_logits(arguments.model, tokens, torch.float64)
        errors = (np.abs(a - b).max() for a, b in ((ours, theirs), (ours, exact), (theirs, exact)))
        print(f"| {length} | {np.abs(exact).max():.1f} | " + " | ".join(f"{e:.2e}" for e in errors) + " |")


if __name__ == "__main__":
    main()
