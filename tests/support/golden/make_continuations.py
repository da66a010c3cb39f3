"""Computes continuations.json: `python tests/support/golden/make_continuations.py`.

How transformers continues ten prompts greedily in float32, with each of the demo models, whose packages must
be installed. The prompts are the first nine of the quickstart's data, and the first thirty in one, which is
longer than Gemma's window.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from middo_jax.data.example import Message
from middo_jax.data.sources import read
from middo_jax.data.tokenize import load_tokenizer, tokenize_prompt
from middo_jax.models.gguf import DEMOS, demo_gguf
from middo_jax.models.resolve import resolve

if TYPE_CHECKING:
    import torch

GOLDEN = Path(__file__).with_name("continuations.json")
DATA = Path(__file__).parents[3] / "configs" / "quickstart_data.jsonl"
NUM_TOKENS = 64


def demo_directory(name: str) -> Path:
    """A demo model as a Hugging Face directory, converted once.

    Raises:
      CheckpointError: its packages are not installed.
    """
    with demo_gguf(name) as path:
        return resolve(str(path))


def prompts(directory: Path) -> list[list[int]]:
    """Tokens of the ten prompts, as the program asks a model."""
    texts = [example.prompt for example in read(str(DATA))[0]]
    tokenizer = load_tokenizer(directory)
    asked = [*texts[:9], "\n\n".join(texts[:30])]
    return [tokenize_prompt([Message("user", text)], tokenizer).tolist() for text in asked]


def continuation(model: torch.nn.Module, prompt: list[int]) -> tuple[list[int], float]:
    """The likeliest token, NUM_TOKENS times, and by how much the closest second one was less likely.

    The difference is one of logits. What would end an answer ends nothing here.
    """
    import torch

    tokens: list[int] = []
    closest = float("inf")
    read, cache = torch.tensor([prompt]), None
    with torch.no_grad():
        for _ in range(NUM_TOKENS):
            output = model(read, past_key_values=cache, use_cache=True, logits_to_keep=1)
            first, second = output.logits[0, -1].topk(2).values.tolist()
            closest, cache = min(closest, first - second), output.past_key_values
            tokens.append(int(output.logits[0, -1].argmax()))
            read = torch.tensor([tokens[-1:]])
    return tokens, closest


def main() -> None:
    """Writes continuations.json beside this script."""
    import torch
    from transformers import AutoModelForCausalLM

    rows = []
    for name in DEMOS:
        directory = demo_directory(name)
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        for prompt in prompts(directory):
            tokens, closest = continuation(model, prompt)
            row = {"model": name, "prompt": prompt, "continuation": tokens, "closest": round(closest, 5)}
            rows.append(json.dumps(row))
    GOLDEN.write_text("[\n" + ",\n".join(rows) + "\n]\n", encoding="utf-8")


if __name__ == "__main__":
    main()
