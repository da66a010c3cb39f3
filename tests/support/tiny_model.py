"""A tiny Hugging Face directory of any family, with random weights and a small but real tokenizer.

    directory = write_tiny_model(tmp_path / "model", **FAMILIES["qwen3"])

It takes well under a second, needs no torch, and its weights depend on the seed only.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

VOCAB_SIZE = 400  # the tokenizer's tokens and a few that no text reaches; divisible by 8 for sharding
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
# What makes a model one of its family; windows shorter than any sequence that is worth testing.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama2": {"tie": False, "num_key_value_heads": 4},
    "llama3": {"tie": False, "rope_scaling": LLAMA3_ROPE, "rope_theta": 500_000.0},
    "smollm2": {"num_key_value_heads": 1},
    "mistral-v0.1": {"model_type": "mistral", "tie": False, "sliding_window": 24},
    "mistral-v0.3": {"model_type": "mistral", "tie": False, "sliding_window": None, "rope_theta": 1e6},
    "qwen2": {"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 24},
    "qwen2-window": {
        "model_type": "qwen2",
        "tie": False,
        "num_hidden_layers": 3,
        "use_sliding_window": True,
        "sliding_window": 24,
        "max_window_layers": 2,
    },
    "qwen3": {"model_type": "qwen3", "head_dim": 16, "rope_theta": 1e6},
    "gemma2": {
        "model_type": "gemma2",
        "num_hidden_layers": 3,
        "sliding_window": 24,
        "query_pre_attn_scalar": 12,
        "attn_logit_softcapping": 3.0,
        "final_logit_softcapping": 4.0,
        "hidden_activation": "gelu_pytorch_tanh",
    },
    "gemma3": {
        "model_type": "gemma3_text",
        "num_hidden_layers": 7,
        "sliding_window": 24,
        "sliding_window_pattern": 3,
        "query_pre_attn_scalar": 12,
        "rope_theta": 1e6,
        "rope_local_base_freq": 10_000.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "hidden_activation": "gelu_pytorch_tanh",
    },
}
_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
}
_SENTENCES = (
    "What is the capital of France? The capital of France is Paris.",
    "Write a short story about a cat who wanted to see the sea.",
    "Explain the following sentence in simple words, then answer the question.",
    "Give three reasons why people should read more books, and list them in order.",
    "Rewrite the text so that it is clear, complete and correct.",
    "Rate the response on a scale of 0 to 10, where 10 is the best.",
    "system user assistant instruction input output response prompt",
)


def write_tiny_model(
    directory: str | Path,
    *,
    seed: int = 0,
    tie: bool = True,
    rope_scaling: dict[str, Any] | None = None,
    dtype: str = "float32",
    model_type: str = "llama",
    **config_overrides: Any,
) -> Path:
    """Writes config.json, model.safetensors and the tokenizer's files, and returns the directory.

    Args:
      directory: is made if it is not there.
      seed: of the weights.
      tie: whether the head is the embedding.
      rope_scaling: config.json's field, such as LLAMA3_ROPE.
      dtype: float32, float16 or bfloat16, of the stored weights.
      model_type: config.json's field.
      config_overrides: further fields of config.json, such as num_hidden_layers=3 or vocab_size=512.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": [_ARCHITECTURES[model_type]],
        "model_type": model_type,
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0,
        "rope_scaling": rope_scaling,
        "tie_word_embeddings": tie,
        "torch_dtype": dtype,
        "bos_token_id": SPECIAL_TOKENS.index("<|im_start|>"),
        "eos_token_id": SPECIAL_TOKENS.index("<|im_end|>"),
        "pad_token_id": SPECIAL_TOKENS.index("<|im_end|>"),
    } | config_overrides
    _write_json(directory / "config.json", config)
    of_tokens = {name: value for name, value in config.items() if name.endswith("token_id")}
    _write_json(directory / "generation_config.json", of_tokens)
    tensors = tiny_tensors(config, seed)
    stored = np.dtype(getattr(ml_dtypes, dtype, None) or dtype)
    save_file(
        {k: v.astype(stored) for k, v in tensors.items()}, directory / "model.safetensors", {"format": "pt"}
    )
    _write_tokenizer(directory, config)
    return directory


def _write_tokenizer(directory: Path, config: Mapping[str, Any]) -> None:
    tokenizer = tiny_tokenizer()
    assert tokenizer.get_vocab_size() <= config["vocab_size"]
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
        "chat_template": CHAT_TEMPLATE,
    }
    _write_json(directory / "tokenizer_config.json", settings)


def tiny_tensors(config: dict[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """float32 tensors by Hugging Face name: matrices of deviation 0.2, so that logits vary, norms near 1.

    Gemma stores how far its norms are from 1.
    """
    rng = np.random.default_rng(seed)
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    heads = config["num_attention_heads"] * config["head_dim"]
    kv_heads = config["num_key_value_heads"] * config["head_dim"]

    def matrix(*shape: int) -> np.ndarray:
        return (0.2 * rng.standard_normal(shape)).astype(np.float32)

    family = config["model_type"]
    is_gemma = family.startswith("gemma")

    def norm(size: int = hidden) -> np.ndarray:
        return ((not is_gemma) + 0.1 * rng.standard_normal(size)).astype(np.float32)

    norms = ["input_layernorm", "post_attention_layernorm"]
    if is_gemma:
        norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]

    tensors = {"model.embed_tokens.weight": matrix(config["vocab_size"], hidden)}
    for layer in range(config["num_hidden_layers"]):
        tensors |= {f"model.layers.{layer}.{name}.weight": norm() for name in norms}
        tensors |= {
            f"model.layers.{layer}.{name}.weight": matrix(*shape)
            for name, *shape in (
                ("self_attn.q_proj", heads, hidden),
                ("self_attn.k_proj", kv_heads, hidden),
                ("self_attn.v_proj", kv_heads, hidden),
                ("self_attn.o_proj", hidden, heads),
                ("mlp.gate_proj", inner, hidden),
                ("mlp.up_proj", inner, hidden),
                ("mlp.down_proj", hidden, inner),
            )
        }
        if family == "qwen2":
            for name, size in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
                tensors[f"model.layers.{layer}.self_attn.{name}_proj.bias"] = matrix(size)
        if family in ("qwen3", "gemma3_text"):
            for name in ("q", "k"):
                tensors[f"model.layers.{layer}.self_attn.{name}_norm.weight"] = norm(config["head_dim"])
    tensors["model.norm.weight"] = norm()
    if not config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = matrix(config["vocab_size"], hidden)
    return tensors


def tiny_tokenizer() -> Tokenizer:
    """Byte-level BPE with single digits, which encodes any text and gives it back."""
    tokenizer = Tokenizer(models.BPE())
    digits, words = (
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_SENTENCES, trainer)
    return tokenizer


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
