"""Three datasets and tiny models for the laws of held-out loss, the same whenever they are made.

`golden/heldout_losses.json` holds the losses that the program computed before held-out loss went through the
scoring pass, when it had a packer and a compiled program of its own.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from middo_jax.data.example import Example, Message
from middo_jax.data.sources import read
from middo_jax.data.tokenize import TokenizedExample, load_tokenizer, tokenize_all
from support.tiny_model import FAMILIES, write_tiny_model

DATASETS = {"quickstart": "smollm2", "turns": "qwen3", "random": "gemma2"}  # the model's family
MAX_LENGTH = 512
_TEXT = "what is the capital of France a short story about cat who wanted to see sea paris three reasons"
_WORDS = _TEXT.split()


def dataset(name: str, directory: Path) -> tuple[Path, list[TokenizedExample], list[str]]:
    """(a tiny model's directory, the examples, the source of each)."""
    model = write_tiny_model(directory / name, **FAMILIES[DATASETS[name]])
    if name == "random":
        return model, _random(60), ["law", "sea", "code"] * 20
    examples = _turns(40) if name == "turns" else _quickstart()
    tokenized = tokenize_all(examples, load_tokenizer(model), MAX_LENGTH)
    return model, tokenized, ["code" if len(e.response) % 2 else "law" for e in examples]


def _quickstart() -> list[Example]:
    return read(str(Path(__file__).parents[2] / "configs" / "quickstart_data.jsonl"))[0]


def _turns(n: int) -> list[Example]:
    """Conversations of one to three turns behind one system turn; some are longer than MAX_LENGTH."""
    rng = np.random.default_rng(11)

    def words(longest: int) -> str:
        return " ".join(rng.choice(_WORDS, rng.integers(1, longest)))

    examples = []
    for _ in range(n):
        turns = [Message("system", "Answer in one short sentence, and only if you know.")]
        for _ in range(rng.integers(1, 4)):
            turns += [Message("user", words(40)), Message("assistant", words(60))]
        examples.append(Example(tuple(turns)))
    return examples


def _random(n: int) -> list[TokenizedExample]:
    """Random tokens of 2 to 120; some begin with a target, some have none."""
    rng = np.random.default_rng(12)
    examples = []
    for i in range(n):
        length = int(rng.integers(2, 120))
        is_target_n = (np.arange(length) >= rng.integers(0, length)) & (i % 7 != 3)
        tokens_n = rng.integers(3, 390, length).astype(np.int32)
        examples.append(TokenizedExample(f"id{i}", tokens_n, is_target_n, ~is_target_n, False))
    return examples
