"""GGUF files of tiny models, written as llama.cpp's converter writes them.

    write_gguf(tmp_path / "m.gguf", write_tiny_model(tmp_path / "model", **FAMILIES["qwen3"]))

Tensor names come from the `gguf` package's own table, which the converter uses; nothing of the code under
test is used here.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.numpy import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from support.tiny_model import CHAT_TEMPLATE, SPECIAL_TOKENS
from support.tiny_sentencepiece import BYTES, CONTROL, SENTENCES, tiny_pieces

ARCHITECTURES = {"mistral": "llama", "gemma3_text": "gemma3"}  # the others are called as by Hugging Face
SPACES = ("\n\n", "\n\n\n", "  ", "   ")  # tokens of their own in Gemma's vocabulary, spelt with real spaces
WHOLE_WORD = "Ġzebras"
_UNSPLIT = (
    *SENTENCES,
    "1234567890 123 12 1 3.14 2024-01-01 10 100 1000 10000\n\n\n\n  1\n  2\n",
    "don't we'll I'D 'TIS it's they're I've I'm WE'RE I'M 'Tis\r\n\r\n\t\tx\n\t y \n z",
    '!!!??? ... <html> a->b {"k": [1, 2]} ==  !=   ( ) ();\n}\n\n    return x ** 2  # square\n',
    "日本語のテキスト 한국어 Ελληνικά עברית café naïve é a\u00a0b\u3000c \u200b ½ ² ٣٤٥ 🎉🎉",
) * 3


def vocab_size(tokens: str) -> int:
    """How many tokens `write_gguf` gives a file with this tokenizer."""
    sentencepiece = tokens.startswith("sentencepiece")
    return len(sentencepiece_tokens() if sentencepiece else byte_level_pieces()[0])


TOKENIZERS = ("gpt-2", "smollm", "qwen2", "llama-bpe", "sentencepiece", "sentencepiece prefixed")
NORMAL, UNKNOWN, CONTROL_TOKEN, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


def write_gguf(
    path: Path,
    model: Path,
    *,
    architecture: str | None = None,
    tokens: str = "smollm",
    quantization: Any = None,
    add_bos: bool | None = None,
    extra: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
) -> Path:
    """A GGUF file of the tiny model.

    Args:
      path: of the file.
      model: the directory of `write_tiny_model`; its vocabulary is as large as the tokenizer's.
      architecture: as the file calls it; by default what the converter would.
      tokens: one of TOKENIZERS: a byte-level BPE with this pre-tokenizer, or a SentencePiece.
      quantization: of the matrices; None is float32.
      add_bos: whether a text begins with BOS; None does not say.
      extra: writes what else is to be in the file.
    """
    config = json.loads((model / "config.json").read_text())
    family: str = config["model_type"]
    writer = gguf.GGUFWriter(path, architecture or ARCHITECTURES.get(family, family))
    _add_shapes(writer, config)
    if family.startswith("gemma"):
        _add_gemma(writer, config)
    if tokens.startswith("sentencepiece"):
        _add_sentencepiece(writer, prefix=tokens.endswith("prefixed"))
    else:
        _add_byte_level(writer, tokens)
    if add_bos is not None:
        writer.add_add_bos_token(add_bos)
    writer.add_chat_template(CHAT_TEMPLATE)
    rope = config["rope_scaling"] or {}
    if rope.get("rope_type") == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_factors(config["head_dim"], config["rope_theta"], rope))
    for name, tensor in _tensors(model, config):
        if quantization is not None and tensor.ndim == 2:
            packed = gguf.quants.quantize(tensor, quantization)
            writer.add_tensor(name, packed, raw_dtype=quantization)
        else:
            writer.add_tensor(name, np.ascontiguousarray(tensor))
    extra(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_shapes(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    rope = config["rope_scaling"] or {}
    if rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])


def _add_gemma(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    writer.add_sliding_window(config["sliding_window"])
    if "sliding_window_pattern" in config:
        writer.add_sliding_window_pattern(config["sliding_window_pattern"])
    if "attn_logit_softcapping" in config:
        writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])


@functools.cache
def byte_level_pieces() -> tuple[list[str], list[str]]:
    """(tokens by id, merges) of a byte-level BPE that would merge across words, digits and lines.

    It was trained on unsplit text, so that only a pre-tokenizer keeps it from doing so. One token comes of no
    merge: only those who look for whole words find it.
    """
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    trained.train_from_iterator(_UNSPLIT, trainer)
    model: dict[str, Any] = json.loads(trained.to_str())["model"]
    tokens = [*sorted(model["vocab"], key=model["vocab"].get), WHOLE_WORD]
    return tokens, [" ".join(merge) for merge in model["merges"]]


def _add_byte_level(writer: gguf.GGUFWriter, pre: str) -> None:
    tokens, merges = byte_level_pieces()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([CONTROL_TOKEN if token in SPECIAL_TOKENS else NORMAL for token in tokens])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def sentencepiece_tokens() -> list[str]:
    """Tokens by id of the SentencePiece vocabulary: the tiny one's, and Gemma's runs of spaces."""
    return [*tiny_pieces()[0], *SPACES]


def _add_sentencepiece(writer: gguf.GGUFWriter, prefix: bool) -> None:
    tokens = sentencepiece_tokens()
    kinds = {**dict.fromkeys(CONTROL, CONTROL_TOKEN), **dict.fromkeys(BYTES, BYTE), "<unk>": UNKNOWN}
    kinds |= dict.fromkeys(SPACES, USER_DEFINED)
    types = [kinds.get(token, NORMAL) for token in tokens]
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores([float(-i) if kind == NORMAL else -1000.0 for i, kind in enumerate(types)])
    writer.add_token_types(types)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    if not prefix:
        writer.add_add_space_prefix(False)


def llama3_factors(head_dim: int, theta: float, rope: dict[str, Any]) -> np.ndarray:
    """What llama.cpp's converter stores as `rope_freqs.weight`: the divisor of every frequency."""
    factors = []
    for frequency in 1.0 / theta ** (np.arange(0, head_dim, 2) / head_dim):
        length, low, high = (
            rope[name] for name in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
        )
        wavelength = 2 * math.pi / frequency
        smooth = (length / wavelength - low) / (high - low)
        if wavelength < length / high:
            factors.append(1.0)
        elif wavelength > length / low:
            factors.append(rope["factor"])
        else:
            factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(factors, np.float32)


def _tensors(model: Path, config: dict[str, Any]) -> list[tuple[str, np.ndarray]]:
    """GGUF's name and value of every tensor."""
    family = config["model_type"]
    architecture = ARCHITECTURES.get(family, family)
    (number,) = (key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(number, config["num_hidden_layers"])
    tensors = []
    for name, tensor in load_file(model / "model.safetensors").items():
        stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert stored is not None, name
        if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
            heads = config["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
            tensor = tensor.reshape(heads, 2, -1, tensor.shape[1]).swapaxes(1, 2).reshape(tensor.shape)
        if family.startswith("gemma") and name.endswith("norm.weight"):
            tensor = tensor + np.float32(1)
        tensors.append((stored, tensor))
    return tensors
