"""Builds a fast tokenizer from GGUF's metadata; its ids are those of llama.cpp."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import tokenizers
from tokenizers import Tokenizer, decoders, normalizers
from tokenizers import pre_tokenizers as splitters

# Types of token that are matched before a text is split into words (llama.cpp's LLAMA_TOKEN_TYPE).
_UNKNOWN, _CONTROL, _USER_DEFINED = _FOUND_FIRST = (2, 3, 4)
# Pattern by which Llama 3 and Qwen split a text; they differ in how many digits stay together.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class _PreTokenizer(NamedTuple):
    """How a text is split into words before merging, and the settings that depend on it.

    Attributes:
      make: function that returns the splitter.
      nfc: whether characters are composed first. llama.cpp does not; the published tokenizers do.
      whole_words: whether a word that is a token is used without merging.
      add_bos: whether a text begins with BOS if the file does not specify it.
    """

    make: Callable[[], Any]
    nfc: bool = False
    whole_words: bool = False
    add_bos: bool = False


def _gpt2() -> Any:
    return splitters.ByteLevel(add_prefix_space=False, use_regex=True)


def _smollm() -> Any:
    return splitters.Sequence([splitters.Digits(individual_digits=True), _gpt2()])


def _by_words(digits: str) -> Any:
    words = splitters.Split(tokenizers.Regex(_WORDS % digits), "isolated")
    return splitters.Sequence([words, splitters.ByteLevel(add_prefix_space=False, use_regex=False)])


# Keyed by tokenizer.ggml.pre.
_PRE_TOKENIZERS = {
    "gpt-2": _PreTokenizer(_gpt2),
    "smollm": _PreTokenizer(_smollm),
    "qwen2": _PreTokenizer(lambda: _by_words(r"\p{N}"), nfc=True),
    "llama-bpe": _PreTokenizer(lambda: _by_words(r"\p{N}{1,3}"), whole_words=True, add_bos=True),
}


def build_tokenizer(metadata: Mapping[str, Any]) -> Tokenizer:
    """Builds a byte-level BPE ('gpt2') or a SentencePiece BPE ('llama').

    Raises:
      KeyError: a metadata field is missing.
      ValueError: the metadata describe another kind, or contradict each other.
    """
    kind, name = metadata["tokenizer.ggml.model"], metadata.get("tokenizer.ggml.pre", "default")
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    pre = _PRE_TOKENIZERS.get(name)
    if kind == "llama":
        tokenizer, add_bos = _sentencepiece(metadata, tokens), True
    elif kind == "gpt2" and pre is not None:
        tokenizer, add_bos = _byte_level(metadata, tokens, pre), pre.add_bos
    else:
        raise ValueError(
            f"tokenizer model {kind!r} with pre-tokenizer {name!r} is not supported; "
            f"supported: 'llama', and 'gpt2' with {', '.join(map(repr, _PRE_TOKENIZERS))}"
        )
    tokenizer.add_tokens(
        [
            tokenizers.AddedToken(token, special=type_ != _USER_DEFINED, normalized=False)
            for token, type_ in zip(tokens, metadata["tokenizer.ggml.token_type"], strict=True)
            if type_ in _FOUND_FIRST
        ]
    )
    if metadata.get("tokenizer.ggml.add_bos_token", add_bos):
        bos_id = metadata["tokenizer.ggml.bos_token_id"]
        bos = tokens[bos_id]
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single=[bos, "$A"], pair=[bos, "$A", bos, "$B"], special_tokens=[(bos, bos_id)]
        )
    return tokenizer


def _byte_level(metadata: Mapping[str, Any], tokens: Sequence[str], pre: _PreTokenizer) -> Tokenizer:
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    vocab = {token: index for index, token in enumerate(tokens)}
    try:
        model = tokenizers.models.BPE(vocab=vocab, merges=merges, ignore_merges=pre.whole_words)
    except Exception as error:  # the library raises no narrower class
        raise ValueError(f"tokenizer.ggml.merges do not fit tokenizer.ggml.tokens: {error}") from error
    tokenizer = tokenizers.Tokenizer(model)
    if pre.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre.make()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(metadata: Mapping[str, Any], tokens: Sequence[str]) -> Tokenizer:
    """Spaces are ▁ within words; characters without a token become bytes; better scores are merged first."""
    vocab = {token: index for index, token in enumerate(tokens)}
    unknown = metadata.get("tokenizer.ggml.unknown_token_id", 0)
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            vocab=vocab,
            merges=_merges(tokens, metadata["tokenizer.ggml.scores"], metadata["tokenizer.ggml.token_type"]),
            unk_token=tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    add_prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    spaces = normalizers.Replace(" ", "▁")
    # The text between two control tokens is normalized separately, so its first word gets a space too.
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if add_prefix else spaces
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if add_prefix else steps)
    return tokenizer


def _merges(tokens: Sequence[str], scores: Sequence[float], kinds: Sequence[int]) -> list[tuple[str, str]]:
    """All pairs of tokens whose concatenation is a token, the best score first.

    Raises:
      ValueError: two such tokens have the same score, as in files from a converter that lacked the scores.
    """
    vocab = set(tokens)
    merged = []
    for token, score, kind in zip(tokens, scores, kinds, strict=True):
        if kind in _FOUND_FIRST:
            continue
        cuts = ((token[:at], token[at:]) for at in range(1, len(token)))
        if pairs := [(left, right) for left, right in cuts if left in vocab and right in vocab]:
            merged.append((-score, pairs))
    if len({score for score, _ in merged}) < len(merged):
        raise ValueError("tokenizer.ggml.scores do not say which of two tokens is merged first")
    return [pair for _, pairs in sorted(merged) for pair in pairs]


def tokenizer_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """tokenizer_config.json: special tokens by their text, and the chat template."""
    tokens = metadata["tokenizer.ggml.tokens"]
    names = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
    special = {
        key: tokens[metadata[f"tokenizer.ggml.{name}_token_id"]]
        for name, key in names.items()
        if f"tokenizer.ggml.{name}_token_id" in metadata
    }
    template = metadata.get("tokenizer.chat_template")
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": metadata[f"{metadata['general.architecture']}.context_length"],
        "clean_up_tokenization_spaces": False,
        **special,
        **({"chat_template": template} if template else {}),
    }
