"""Computes llama_cpp_tokens.json: `python tests/support/golden/make_llama_cpp_tokens.py`.

The tokens that llama.cpp makes of many texts, with the vocabularies of two real models and of tiny ones with
every kind of tokenizer that is converted. Needs llama-cpp-python, here only, and both demo models' packages.
"""

from __future__ import annotations

import importlib
import json
import random
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
from support.tiny_gguf import TOKENIZERS, vocab_size, write_gguf
from support.tiny_model import write_tiny_model

from middo_jax.models.gguf import DEMOS, demo_gguf

GOLDEN = Path(__file__).with_name("llama_cpp_tokens.json")
NUM_TEXTS = 240
NUM_TINY_TEXTS = 60
BY_HAND = (
    "What is the capital of France?",
    "  leading and trailing  ",
    " ",
    "\n",
    "tab\tnew\nline\n\n  indented \r\n\t \n",
    "a" + " " * 40 + "b" + "\n" * 40 + "c" + "\t" * 7,
    "1234567890 3.14 1 2  3   4 a1b22",
    "٣٤٥ ½ ² Ⅳ",
    "don't we'll I'D 'TIS it's",
    '!!!??? ... <html> a->b {"k": [1, 2]}',
    "日本語のテキスト 한국어 Ελληνικά עברית",
    "🎉 👩‍👩‍👧 e\u0301 a\u00a0b\u3000c \u200b",
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
    "text<|endoftext|>text <|im_end|> <repo_name>",
    "<|im_start >almost<|im_end",
    "<start_of_turn>user\n hi <end_of_turn>\n<start_of_turn>model\n<bos> <eos><unused7>",
    "<s> [INST] hi [/INST] hello </s><unk>  <s>",
    "def f(x):\n    return x ** 2  # square\n",
    "<h1>Title</h1>\n<table><tr><td> 1 </td></tr></table>",
    "▁literal▁▁marks <0x0A> <0xFF>",
    "aaaaaaaaaaaaaaaaaaa mississippi bananananana hahahahaha",
    "two zebras, three  zebras and zebras' stripes",
)
PIECES = (
    *("the", "The", " of", "ing", " a", " I", "'s", "'LL", "n't", "London", "naïve", "coöperate", "e\u0301"),
    *("1", "23", "456", "7890", "3.14", "1,000", "0x1F", "½", "٣", "-5", "$9.99", "50%"),
    *(" ", "  ", "   ", "\n", "\n\n", "\n\n\n", "\t", "\r\n", "\u00a0", "\u3000", "\u200b"),
    *(".", ",", "!?", "...", "--", "=>", "{}", "();", "#", "/*", "**", '"', "<", ">", "<b>", "</p>", "€"),
    *("été", "größer", "привет", "мир", "Ελλάδα", "עברית", "العربية", "हिन्दी", "ไทย", "日本", "語", "한국어"),
    *("🎉", "👩‍👩‍👧", "🇫🇷", "\ufeff", "\x00", "\x7f", "▁", "𝕏", "ﬁ"),
    *("<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>", "<s>", "</s>", "<bos>", "[INST]"),
)


def texts() -> list[str]:
    """Those by hand, then random ones, the same every time."""
    rng = random.Random(0)
    made = ["".join(rng.choices(PIECES, k=rng.randint(2, 14))) for _ in range(NUM_TEXTS - len(BY_HAND))]
    return [*BY_HAND, *made]


def llama_cpp_tokens(gguf_path: Path, lines: list[str]) -> list[list[int]]:
    """What llama.cpp makes of each text, control tokens read as such, without BOS."""
    model = importlib.import_module("llama_cpp").Llama(str(gguf_path), vocab_only=True, verbose=False)
    return [model.tokenize(line.encode(), add_bos=False, special=True) for line in lines]


def main() -> None:
    """Writes llama_cpp_tokens.json beside this script."""
    lines = texts()
    golden = {}
    for name in DEMOS:
        with demo_gguf(name) as path:
            golden[name] = llama_cpp_tokens(path, lines)
    with tempfile.TemporaryDirectory() as folder:
        for name in TOKENIZERS:
            model = write_tiny_model(Path(folder) / name, vocab_size=vocab_size(name))
            path = write_gguf(Path(folder) / f"{name}.gguf", model, tokens=name)
            golden[name] = llama_cpp_tokens(path, lines[:NUM_TINY_TEXTS])
    rows = [f'"texts": {json.dumps(lines)}']
    rows += [f'"{name}": {json.dumps(tokens, separators=(",", ":"))}' for name, tokens in golden.items()]
    GOLDEN.write_text("{\n" + ",\n".join(rows) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
