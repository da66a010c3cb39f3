"""Weights of strangers: absurd sizes, deep headers, false counts. One sentence, at once, in little memory."""

from __future__ import annotations

import dataclasses
import json
import struct
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.tiny_model import LLAMA3_ROPE, write_tiny_model
from transformers import AutoConfig

from middo_jax.models.config import UnsupportedModel, from_hugging_face, read_config
from middo_jax.models.gguf.convert import convert
from middo_jax.models.hf import CheckpointError
from middo_jax.models.hf.companions import ChatFormat, write_companions
from middo_jax.models.hf.files import Weights
from middo_jax.models.hf.peft import load_adapters, read_adapter_config
from middo_jax.models.loading import tokenizer_directory
from middo_jax.parallel.mesh import one_device

MOST_BYTES = 100_000_000
MOST_SECONDS = 1.0  # of processor time


@pytest.fixture(scope="module", autouse=True)
def _imported() -> None:
    """The libraries' first import takes seconds."""
    AutoConfig.for_model("llama")


@pytest.fixture(autouse=True)
def _at_once_and_in_little_memory() -> Iterator[None]:
    tracemalloc.start()
    began = time.process_time()
    yield
    took, peak = time.process_time() - began, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert took < MOST_SECONDS
    assert peak < MOST_BYTES


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "model")


ABSURD: list[tuple[dict[str, Any], str]] = [
    ({"num_hidden_layers": 10**12}, "num_hidden_layers must be between 1 and 4,096"),
    ({"num_hidden_layers": 0}, "num_hidden_layers"),
    ({"num_hidden_layers": -3}, "num_hidden_layers"),
    ({"vocab_size": 10**12}, "vocab_size"),
    ({"vocab_size": -1}, "vocab_size"),
    ({"hidden_size": 10**4000}, "hidden_size .* not a number of 4001 digits"),
    ({"intermediate_size": 0}, "intermediate_size"),
    ({"num_attention_heads": 0}, "num_attention_heads"),
    ({"num_attention_heads": 7, "head_dim": None, "num_key_value_heads": 7}, "does not divide hidden_size"),
    ({"num_attention_heads": 4, "num_key_value_heads": 3}, "does not divide num_attention_heads=4"),
    ({"num_key_value_heads": 0}, "num_key_value_heads"),
    ({"head_dim": -8}, "head_dim"),
    ({"head_dim": 7}, "head_dim=7 is odd"),
    ({"max_position_embeddings": 0}, "max_position_embeddings"),
    ({"sliding_window": -1}, "sliding_window"),
    ({"rope_theta": -1.0}, "rope_theta must be a finite number above 0"),
    ({"rope_theta": float("inf")}, "rope_theta"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
    ({"max_window_layers": 10**9}, "max_window_layers"),
    ({"sliding_window_pattern": 0}, "sliding_window_pattern"),
    ({"rope_local_base_freq": 0.0}, "rope_local_base_freq"),
    ({"query_pre_attn_scalar": -1}, "query_pre_attn_scalar"),
    ({"attn_logit_softcapping": float("inf")}, "attn_logit_softcapping"),
    ({"final_logit_softcapping": 1e300}, "final_logit_softcapping"),
    ({"num_labels": 10**9}, "num_labels must be of at most 65,536 labels, not 1,000,000,000"),
    ({"id2label": {str(i): "" for i in range(70_000)}}, "id2label must be of at most 65,536 labels"),
    ({"label2id": dict.fromkeys(map(str, range(70_000)), 0)}, "label2id must be of at most 65,536 labels"),
    ({"text_config": {"vision": [{"num_labels": 10**9}]}}, "num_labels must be of at most 65,536 labels"),
    ({"bos_token_id": "x" * 10**6}, "bos_token_id"),
    ({"rms_norm_eps": 1}, "rms_norm_eps"),
    ({"layer_types": [1]}, "layer_types"),
    ({"rope_scaling": {"rope_type": [1]}}, r"rope_scaling: rope_type \[1\] is not supported"),
    ({"rope_scaling": {"type": "x" * 10**6}}, "rope_scaling: rope_type 'xxx"),
    ({"rope_parameters": {"full_attention": 3}}, "rope_parameters: full_attention: must be an object, not 3"),
    ({"rope_parameters": {"rope_type": None}}, "rope_parameters: rope_type None is not supported"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "[Mm]issing .*low_freq_factor"),
]
for _factor in (0, -1.0, "x", float("nan"), float("inf"), None, True, [1], 10**400):
    _linear = {"rope_type": "linear", "factor": _factor}
    ABSURD.append(({"rope_scaling": _linear}, "rope_scaling: factor must be a finite number above 0"))
for _theta in (float("inf"), -5, 10**400, "abc", None):
    _default = {"full_attention": {"rope_type": "default", "rope_theta": _theta}}
    ABSURD.append(
        ({"rope_parameters": _default}, "rope_parameters: full_attention: rope_theta must be a fin")
    )
for _changes, _message in (
    ({"original_max_position_embeddings": "8192"}, "original_max_position_embeddings must be a whole number"),
    ({"original_max_position_embeddings": 0}, "original_max_position_embeddings must be a whole number"),
    ({"low_freq_factor": 4.0}, "must be below high_freq_factor"),
    ({"high_freq_factor": "x"}, "high_freq_factor must be a finite number"),
):
    ABSURD.append(({"rope_scaling": LLAMA3_ROPE | _changes}, f"rope_scaling: .*{_message}"))


@pytest.mark.parametrize(("changes", "message"), ABSURD)
def test_absurd_numbers_of_a_config(model: Path, changes: dict[str, Any], message: str) -> None:
    path = model / "config.json"
    fields = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(fields))
    with pytest.raises(UnsupportedModel, match=message) as caught:
        read_config(model)
    assert len(str(caught.value)) < 500
    assert len(str(caught.value).splitlines()) == 1
    assert "config.json: " in str(caught.value)
    with pytest.raises(UnsupportedModel, match=message):
        from_hugging_face(fields)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_labels": 10**9}, "num_labels"),
        ({"text_config": {"num_labels": 10**9}}, "num_labels"),
        ({"configuration_files": ["config.4.0.0.json"]}, "configuration_files"),  # would be read in its place
    ],
)
def test_a_config_is_refused_before_the_library_of_tokenizers_reads_it(
    model: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    path, trained = model / "config.json", tmp_path / "checkpoint"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    trained.mkdir()
    (trained / "metadata.json").write_text(json.dumps({"base": str(model)}))
    for named in (model, trained):
        with pytest.raises(UnsupportedModel, match=message):
            tokenizer_directory(str(named))


@pytest.mark.parametrize("content", ["[" * 1_000_000, '{"a":' * 500_000, "{" + " " * 5_000_000 + "}"])
def test_a_config_that_is_deep_or_long(model: Path, content: str) -> None:
    (model / "config.json").write_text(content)
    with pytest.raises(UnsupportedModel, match=r"config\.json: .*(nested deeper|5,000,002 bytes)"):
        read_config(model)


def safetensors(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def entry(**changes: Any) -> bytes:
    tensor = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes
    return safetensors(json.dumps({"a": tensor}).encode(), b"\0" * 8)


TWO = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
HEADERS: dict[str, tuple[bytes, str]] = {
    "deep": (safetensors(b"[" * 1_000_000), "nested deeper than"),
    "deep metadata": (safetensors(b'{"__metadata__":' + b'{"a":' * 100_000), "nested deeper than"),
    "longer than the file": (safetensors(b"{}", length=10**18), "truncated or not a safetensors file"),
    "longer than any header": (safetensors(b" " * 17_000_000), "truncated or not a safetensors file"),
    "no header": (b"\0" * 7, "truncated"),
    "offsets behind the end": (entry(shape=[10**12], data_offsets=[0, 4 * 10**12]), "truncated"),
    "offsets backwards": (entry(data_offsets=[8, 0]), "is not where"),
    "negative offsets": (entry(data_offsets=[-8, 0]), "is not where"),
    "negative shape": (entry(shape=[-1, -2]), "is not where"),
    "axes": (entry(shape=[1] * 100_000), "100,000 axes"),
    "overlap": (
        safetensors(json.dumps(TWO | {"b": TWO["a"] | {"data_offsets": [4, 12]}}).encode(), b"\0" * 12),
        "is not where",
    ),
    "infinite": (entry(shape=[float("inf")]), "not a safetensors file"),
    "text": (entry(shape="2" * 10_000), "axes|not a safetensors file"),
    "list": (safetensors(b"[1]"), "not a safetensors file"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_headers_of_safetensors(model: Path, name: str) -> None:
    content, message = HEADERS[name]
    (model / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        Weights(model)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("content", ["[" * 100_000, "[1]", "{"], ids=["deep", "list", "cut"])
def test_companions_that_are_no_object(model: Path, tmp_path: Path, content: str) -> None:
    (model / "generation_config.json").write_text(content)
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match=r"generation_config\.json: not a JSON object"):
        write_companions(model, tmp_path / "out", "float32", ChatFormat())


def test_an_adapter_of_absurd_rank(tmp_path: Path) -> None:
    for changes in ({"r": 10**12}, {"r": 0}, {"r": -1}, {"lora_alpha": float("nan")}, {"r": float("inf")}):
        fields = {"base_model_name_or_path": "m", "r": 8, "lora_alpha": 16} | changes
        (tmp_path / "adapter_config.json").write_text(json.dumps(fields))
        with pytest.raises(CheckpointError, match=r"adapter_config\.json"):
            read_adapter_config(tmp_path)
    (tmp_path / "adapter_config.json").write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match="nested deeper"):
        read_adapter_config(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base_model_name_or_path": [1]}, "base_model_name_or_path is no path"),
        ({"base_model_name_or_path": "x" * 10**6}, "base_model_name_or_path is no path"),
        ({"base_model_name_or_path": None}, "base_model_name_or_path is empty"),
        ({"r": "x" * 10**6}, "not a LoRA config: ValueError"),
        ({"bias": "x" * 10**6}, "bias='xxx.* is not supported, only 'none'"),
        ({"x" * 10**6: "y" * 10**6}, "xxx='yyy.* is not supported"),
    ],
    ids=["base", "long base", "no base", "rank", "bias", "unknown"],
)
def test_an_adapter_config_of_absurd_values(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    fields = {"base_model_name_or_path": "m", "r": 8, "lora_alpha": 16} | changes
    (tmp_path / "adapter_config.json").write_text(json.dumps(fields))
    with pytest.raises((CheckpointError, UnsupportedModel), match=message) as caught:
        read_adapter_config(tmp_path)
    assert len(str(caught.value)) < 500 + len(str(tmp_path))


def test_an_adapter_config_that_is_a_list_of_pairs(tmp_path: Path) -> None:
    pairs = [["base_model_name_or_path", "m"], ["r", 8], ["lora_alpha", 16], [1, 2]]
    (tmp_path / "adapter_config.json").write_text(json.dumps(pairs))
    with pytest.raises(CheckpointError, match="must be a JSON object"):
        read_adapter_config(tmp_path)


def test_an_adapter_whose_tensors_have_other_names(model: Path, tmp_path: Path) -> None:
    fields = {"base_model_name_or_path": "m", "r": 8, "lora_alpha": 16}
    (tmp_path / "adapter_config.json").write_text(json.dumps(fields))
    (tmp_path / "adapter_model.safetensors").write_bytes(entry())  # of one tensor called a
    _, lora = read_adapter_config(tmp_path)
    assert lora.target_modules == ()
    config = dataclasses.replace(read_config(model), lora=lora)
    with pytest.raises(CheckpointError, match="tensor a adapts nothing of the base model"):
        load_adapters(tmp_path, config, one_device())


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def gguf(*fields: bytes, tensors: bytes = b"", n_fields: int | None = None, n_tensors: int = 0) -> bytes:
    count = len(fields) if n_fields is None else n_fields
    return b"GGUF" + struct.pack("<IQQ", 3, n_tensors, count) + b"".join(fields) + tensors + b"\0" * 64


def array(kind: int, count: int, content: bytes = b"") -> bytes:
    return text(b"general.a") + struct.pack("<IIQ", 9, kind, count) + content


def tensor(axes: int, *sizes: int, offset: int = 0) -> bytes:
    return text(b"t") + struct.pack(f"<I{len(sizes)}QIQ", axes, *sizes, 0, offset)


GGUFS: dict[str, tuple[Callable[[], bytes], str]] = {
    "fields": (lambda: gguf(n_fields=10**15), "claims 1,000,000,000,000,000 fields"),
    "tensors": (lambda: gguf(n_tensors=10**15), "1,000,000,000,000,000 tensors"),
    "a long name": (lambda: gguf(struct.pack("<Q", 10**15)), "the name of a field claims"),
    "a long text": (lambda: gguf(text(b"a") + struct.pack("<IQ", 8, 10**15)), "field a claims"),
    "an array": (lambda: gguf(array(4, 10**12)), r"field general\.a claims 1,000,000,000,000 elements"),
    "an array behind the end": (lambda: gguf(array(4, 1_000_000)), "past the end"),
    "a real array": (lambda: gguf(array(0, 5_000_000, b"\0" * 5_000_000)), "claims 5,000,000 elements"),
    "texts": (lambda: gguf(array(8, 1_000_000)), "past the end"),
    "arrays in arrays": (
        lambda: gguf(array(9, 1, struct.pack("<IQ", 9, 1) * 100_000)),
        "array of arrays",
    ),
    "a type": (lambda: gguf(text(b"a") + struct.pack("<I", 99)), "unknown type 99"),
    "axes": (lambda: gguf(tensors=tensor(10**9), n_tensors=1), "tensor t claims 1,000,000,000 axes"),
    "numbers": (lambda: gguf(tensors=tensor(2, 2**40, 2**40), n_tensors=1), "tensor t claims"),
    "nothing": (lambda: gguf(tensors=tensor(2, 0, 4), n_tensors=1), "tensor t claims 0 numbers"),
    "an offset": (lambda: gguf(tensors=tensor(1, 4, offset=10**15), n_tensors=1), "past the end"),
    "no file": (lambda: b"PK\3\4" + b"\0" * 100, "does not begin with GGUF"),
    "empty": (lambda: b"", "empty"),
}


@pytest.mark.parametrize("name", GGUFS)
def test_headers_of_gguf(tmp_path: Path, name: str) -> None:
    make, message = GGUFS[name]
    (tmp_path / "m.gguf").write_bytes(make())
    with pytest.raises(CheckpointError, match=message):
        convert(tmp_path / "m.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_metadata_of_gguf_that_make_no_model(tmp_path: Path) -> None:
    def number(name: str, value: int) -> bytes:
        return text(f"gemma2.{name}".encode()) + struct.pack("<IQ", 10, value)

    kind = text(b"general.architecture") + struct.pack("<I", 8) + text(b"gemma2")
    for layers, heads, message in (
        (10**15, 4, "num_hidden_layers must be between"),
        (2, 0, "num_attention_heads must be between"),
    ):
        fields = [kind, number("block_count", layers), number("attention.head_count", heads)]
        (tmp_path / "m.gguf").write_bytes(gguf(*fields))
        with pytest.raises(CheckpointError, match=message):
            convert(tmp_path / "m.gguf", tmp_path / "out")
    (tmp_path / "m.gguf").write_bytes(
        gguf(kind, text(b"gemma2.block_count") + struct.pack("<I", 8) + text(b"x"))
    )
    with pytest.raises(CheckpointError):
        convert(tmp_path / "m.gguf", tmp_path / "out")
