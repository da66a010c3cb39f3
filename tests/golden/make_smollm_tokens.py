"""Computes smollm_tokens.json with llama.cpp: `python tests/golden/make_smollm_tokens.py MODEL.gguf`.

MODEL is SmolLM2-135M-Instruct; llama-cpp-python is needed here only.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

GOLDEN = Path(__file__).with_name("smollm_tokens.json")
TEXTS = (
    "What is the capital of France?",
    "  leading and trailing  ",
    " ",
    "\n",
    "tab\tnew\nline\n\n  indented \r\n\t \n",
    "a" + " " * 40 + "b",
    "1234567890 3.14 1 2  3   4 a1b22",
    "٣٤٥ ½ ² Ⅳ",
    "don't we'll I'D 'TIS it's",
    '!!!??? ... <html> a->b {"k": [1, 2]}',
    "日本語のテキスト 한국어 Ελληνικά עברית",
    "🎉 👩‍👩‍👧 e\u0301 a\u00a0b\u3000c \u200b",
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
    "text<|endoftext|>text <|im_end|> <repo_name>",
    "<|im_start >almost<|im_end",
    "def f(x):\n    return x ** 2  # square\n",
)


def main(gguf_path: str) -> None:
    """Writes smollm_tokens.json beside this script."""
    model = importlib.import_module("llama_cpp").Llama(gguf_path, vocab_only=True, verbose=False)
    golden = {text: model.tokenize(text.encode(), add_bos=False, special=True) for text in TEXTS}
    rows = [f"{json.dumps(text)}: {json.dumps(tokens)}" for text, tokens in golden.items()]
    GOLDEN.write_text("{\n" + ",\n".join(rows) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
