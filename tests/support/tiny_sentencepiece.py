"""A tiny tokenizer of SentencePiece's kind: spaces are part of words, unknown characters are bytes."""

from __future__ import annotations

import json
from typing import Any, Literal

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

CONTROL = ("<unk>", "<s>", "</s>")
BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))
SENTENCES = (
    "What is the capital of France? The capital of France is Paris.",
    "Write a short story about a cat who wanted to see the sea, the lake and the river.",
    "Be kind. The assistant answers in simple words, then the user asks again.",
)
Prefix = Literal["none", "always", "first"]


def tiny_pieces() -> tuple[list[str], list[tuple[str, str]]]:
    """(tokens by id: control, bytes, characters, merged pieces; merges, the best first)."""
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "▁")
    trained.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    trained.train_from_iterator(SENTENCES, trainers.BpeTrainer(vocab_size=160, show_progress=False))
    model: dict[str, Any] = json.loads(trained.to_str())["model"]
    return [*CONTROL, *BYTES, *sorted(model["vocab"], key=model["vocab"].get)], [
        (left, right) for left, right in model["merges"]
    ]


def tiny_sentencepiece(prefix: Prefix = "none") -> Tokenizer:
    """The tokenizer.

    Args:
      prefix: the space that a text gets in front: none (Gemma), one after every control token too (Llama 2),
        one at the start of the text only (Mistral v0.3).
    """
    tokens, merges = tiny_pieces()
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    replace = normalizers.Replace(" ", "▁")
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix == "first":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    elif prefix == "always":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace])
    else:
        tokenizer.normalizer = replace
    if prefix != "none":
        steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens(list(CONTROL))
    return tokenizer
