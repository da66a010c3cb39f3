"""Computes decoder.json with torch and transformers: `python tests/support/golden/make_golden.py`.

For each case a tiny model and random tokens, both from fixed numpy seeds, and what transformers makes of
them in float32: the NLL of every next token and the logits of the last position.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))
from support.tiny_model import FAMILIES, VOCAB_SIZE, write_tiny_model

GOLDEN = Path(__file__).with_name("decoder.json")
# Long enough for llama3 to read positions far beyond its original 32, and for every window to end.
CASES: dict[str, dict[str, Any]] = {
    family: {"length": 96, "model": {"seed": seed, **model}}
    for seed, (family, model) in enumerate(FAMILIES.items(), start=1)
}


def tokens_of(case: str) -> np.ndarray:
    """int32 [1, length] random tokens."""
    length = CASES[case]["length"]
    return np.random.default_rng(length).integers(VOCAB_SIZE, size=(1, length), dtype=np.int32)


def torch_logits(directory: Path, tokens: np.ndarray) -> np.ndarray:
    """float32 [b, t, v] logits of transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    # Else tensors of a wrong name would be left out, or made up, with a warning only.
    assert not any(info.values()), info
    with torch.no_grad():
        return model(torch.from_numpy(tokens.astype(np.int64))).logits.numpy()


def next_token_nll(logits: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """[b, t - 1] negative log-likelihoods of tokens[:, 1:], in float64."""
    logits = logits[:, :-1].astype(np.float64)
    chosen = np.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
    top = logits.max(axis=-1)
    return top + np.log(np.exp(logits - top[..., None]).sum(axis=-1)) - chosen


def main() -> None:
    """Writes decoder.json beside this script."""
    golden = {}
    for case, settings in CASES.items():
        with tempfile.TemporaryDirectory() as directory:
            tokens = tokens_of(case)
            logits = torch_logits(write_tiny_model(directory, **settings["model"]), tokens)
        golden[case] = {
            "nll": [round(float(x), 6) for x in next_token_nll(logits, tokens)[0]],
            "last_logits": [round(float(x), 6) for x in logits[0, -1]],
        }
    rows = [f"{json.dumps(case)}: {json.dumps(values)}" for case, values in golden.items()]
    GOLDEN.write_text("{\n" + ",\n".join(rows) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
