"""Files that are not what they should be: the error names file and tensor. And what a model may be called."""

from __future__ import annotations

import json
import re
from pathlib import Path

import huggingface_hub
import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.tiny_model import FAMILIES, write_tiny_model

from middo_jax.config import MeshSettings
from middo_jax.models.hf import CheckpointError, load, write_weights
from middo_jax.models.hf.files import LazyTensor
from middo_jax.models.parameters import num_params
from middo_jax.models.resolve import resolve
from middo_jax.parallel.mesh import make_mesh

NORM = np.ones(32, np.float32)
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "model", tie=False)


def rewrite(directory: Path, **changes: np.ndarray | None) -> None:
    """Replaces, adds or (None) removes tensors of model.safetensors; `__` in a name stands for a dot."""
    file = directory / WEIGHTS
    tensors = load_file(file) | {name.replace("__", "."): value for name, value in changes.items()}
    save_file({k: v for k, v in tensors.items() if v is not None}, file, {"format": "pt"})


def in_two_files(directory: Path) -> dict[str, str]:
    """Makes two files and an index of the one; returns the index's map."""
    tensors = load_file(directory / WEIGHTS)
    lazy = [
        LazyTensor(name, value.shape, value.dtype, lambda value=value: value)
        for name, value in tensors.items()
    ]
    write_weights(directory, lazy, max_shard_bytes=sum(tensor.nbytes for tensor in lazy) - 1)
    (directory / WEIGHTS).unlink()
    return json.loads((directory / INDEX).read_text())["weight_map"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__norm__weight": None}, r"model\.norm\.weight is missing"),
        (
            {"model__layers__1__mlp__up_proj__weight": None},
            r"model\.layers\.1\.mlp\.up_proj\.weight is missing",
        ),
        ({"lm_head__weight": None}, r"lm_head\.weight is missing"),
        (
            {"model__layers__2__input_layernorm__weight": NORM},
            r"layers\.2\.input_layernorm\.weight is not part",
        ),
        ({"model__layers__0__self_attn__q_proj__bias": NORM}, r"q_proj\.bias is not part of"),
        ({"model__norm__weight": NORM[:31]}, r"model\.norm\.weight has shape \(31,\).*implies \(32,\)"),
        ({"model__norm__weight": NORM[None]}, r"model\.norm\.weight has shape \(1, 32\).*implies \(32,\)"),
        ({"model__norm__weight": NORM.astype(np.int8)}, r"model\.norm\.weight has dtype I8, supported: F32"),
        (
            {"model__norm__weight": NORM.astype(ml_dtypes.float8_e4m3fn)},
            r"model\.norm\.weight has dtype F8_E4M3, supported: F32",
        ),
        ({"model__norm__weight": NORM.astype(np.float64)}, r"model\.norm\.weight has dtype F64"),
    ],
)
def test_wrong_tensors_are_named(model: Path, changes: dict[str, np.ndarray | None], message: str) -> None:
    rewrite(model, **changes)
    with pytest.raises(CheckpointError, match=message) as error:
        load(model)
    assert WEIGHTS in str(error.value)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_weights_that_are_not_finite_are_named(model: Path, name: str, value: float) -> None:
    """Also where each device holds a part of the tensor only."""
    tensor = dict(load_file(model / WEIGHTS))[name].copy()
    tensor.flat[-1] = value
    rewrite(model, **{name.replace(".", "__"): tensor})
    for mesh in (None, make_mesh(MeshSettings(data=2, fsdp=2, tensor=2))):
        with pytest.raises(CheckpointError, match=rf"{WEIGHTS}: tensor {re.escape(name)} holds NaN"):
            load(model, mesh=mesh)


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("qwen2", "model.layers.1.self_attn.k_proj.bias"),
        ("qwen3", "model.layers.0.self_attn.q_norm.weight"),
        ("gemma2", "model.layers.1.post_feedforward_layernorm.weight"),
        ("gemma3", "model.layers.0.pre_feedforward_layernorm.weight"),
    ],
)
def test_what_only_a_family_has_is_missed_too(tmp_path: Path, family: str, name: str) -> None:
    directory = write_tiny_model(tmp_path, **FAMILIES[family])
    rewrite(directory, **{name.replace(".", "__"): None})
    with pytest.raises(CheckpointError, match=f"{name} is missing"):
        load(directory)


@pytest.mark.parametrize("keep", [0, 4, 100])
def test_file_without_its_header_is_named(model: Path, keep: int) -> None:
    file = model / WEIGHTS
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: truncated or not a safetensors file"):
        load(model)


def test_truncated_tensor_is_named(model: Path) -> None:
    in_two_files(model)
    file = model / "model-00002-of-00002.safetensors"
    whole = file.read_bytes()
    header = json.loads(whole[8 : 8 + int.from_bytes(whole[:8], "little")])
    del header["__metadata__"]
    last = max(header, key=lambda name: header[name]["data_offsets"][1])
    file.write_bytes(whole[:-1])
    with pytest.raises(
        CheckpointError, match=rf"-00002-of-00002\.safetensors: truncated: tensor {last} ends"
    ):
        load(model)
    file.write_bytes(whole + b"\0")
    with pytest.raises(CheckpointError, match="1 bytes behind the last tensor"):
        load(model)


def test_file_that_shrinks_while_it_is_read_is_named(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from middo_jax.models.hf import loading

    def shrink(*_: object) -> None:
        file = model / WEIGHTS
        file.write_bytes(file.read_bytes()[:-100])

    monkeypatch.setattr(loading, "_check", shrink)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: truncated while tensor .* was read"):
        load(model)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"dtype": "F32", "shape": [32], "data_offsets": [0, 127]}, "tensor a is not where"),
        ({"dtype": "F32", "shape": [32], "data_offsets": [4, 132]}, "tensor a is not where"),
        ({"dtype": "F32", "shape": [32], "data_offsets": [-4, 124]}, "tensor a is not where"),
        ({"dtype": "F32", "shape": [32]}, "truncated or not a safetensors file: 'data_offsets'"),
        ({"dtype": "F32", "shape": "x", "data_offsets": [0, 128]}, "truncated or not a safetensors file"),
        ([], "truncated or not a safetensors file"),
    ],
)
def test_header_that_lies_is_refused(model: Path, entry: object, message: str) -> None:
    text = json.dumps({"a": entry}).encode()
    (model / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + bytes(128))
    with pytest.raises(CheckpointError, match=message):
        load(model)


@pytest.mark.parametrize("text", [b"[]", b"{]", b"\xff\xfe"])
def test_header_that_is_none_is_refused(model: Path, text: bytes) -> None:
    (model / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(CheckpointError, match="truncated or not a safetensors file"):
        load(model)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "not a safetensors index"),
        pytest.param("[" * 100_000, "nested deeper", id="deep"),
        ('{"weight_map": ["a"]}', "not a safetensors index"),
        ('{"weight_map": {"x": 1}}', "not a safetensors index"),
        ('{"weight_map": {}}', "names no tensor"),
        ('{"weight_map": {"x": "../model.safetensors"}}', "not a plain file name"),
        ('{"weight_map": {"x": "/etc/passwd"}}', "not a plain file name"),
        ('{"weight_map": {"x": ".."}}', "not a plain file name"),
        ('{"weight_map": {"x": ""}}', "not a plain file name"),
        ('{"weight_map": {"x": "a/model.safetensors"}}', "not a plain file name"),
        (
            '{"weight_map": {"x": "model-00001-of-00002.safetensors"}}',
            r"model-00001-of-00002\.safetensors is missing",
        ),
        ('{"weight_map": {"x": "model.safetensors"}}', r"tensor x is not in model\.safetensors"),
    ],
)
def test_wrong_index_is_named(model: Path, index: str, message: str) -> None:
    (model / INDEX).write_text(index)
    with pytest.raises(CheckpointError, match=message):
        load(model)


def test_index_and_files_must_agree(model: Path) -> None:
    places = in_two_files(model)
    params = load(model).params
    assert sum(x.size for x in jax.tree.leaves(params)) == sum(
        x.size for file in set(places.values()) for x in load_file(model / file).values()
    )
    first, second = sorted(set(places.values()))
    norm = "model.norm.weight"
    other = second if places[norm] == first else first
    (model / INDEX).write_text(json.dumps({"weight_map": places | {norm: other}}))
    with pytest.raises(CheckpointError, match=rf"index\.json: tensor {norm} is not in {other}"):
        load(model)
    save_file(load_file(model / other) | {norm: NORM}, model / other, {"format": "pt"})
    (model / INDEX).write_text(json.dumps({"weight_map": places}))
    with pytest.raises(CheckpointError, match=rf"tensor {norm} is here and in model-0000"):
        load(model)


def test_harmless_surplus_is_ignored(tmp_path: Path) -> None:
    directory = write_tiny_model(tmp_path)
    embed = load_file(directory / WEIGHTS)["model.embed_tokens.weight"]
    inv_freq = np.ones(4, np.float32)
    rewrite(directory, lm_head__weight=embed, model__layers__0__self_attn__rotary_emb__inv_freq=inv_freq)
    loaded = load(directory)
    params, config = loaded.params, loaded.config
    assert num_params(config) == sum(x.size for x in jax.tree.leaves(params))


def test_head_that_differs_from_what_it_is_tied_to_is_refused(tmp_path: Path) -> None:
    """transformers 5 would untie them with a warning, transformers 4 and vLLM would ignore the head."""
    directory = write_tiny_model(tmp_path)
    embed = load_file(directory / WEIGHTS)["model.embed_tokens.weight"]
    almost = embed.copy()
    almost[-1, -1] += 1e-6
    for head in (almost, embed[:-8], embed.astype(np.float16)):
        rewrite(directory, lm_head__weight=head)
        with pytest.raises(
            CheckpointError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"
        ):
            load(directory)


def test_no_model_there(tmp_path: Path, model: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.json there"):
        load(tmp_path)
    (model / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors is missing"):
        load(model)


def test_resolve_local(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_download(*_: object, **__: object) -> str:
        raise AssertionError("tried to download a local path")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", no_download)
    assert resolve(str(model)) == model
    for path in (
        f"{tmp_path}/absent",
        "./absent",
        "../absent",
        "~/absent/x",
        "a/b/c",
        "absent.gguf",
        "a/absent.gguf",
    ):
        with pytest.raises(CheckpointError, match="no such file or directory"):
            resolve(path)
    with pytest.raises(CheckpointError, match=r"neither a directory nor a \.gguf file"):
        resolve(str(model / "config.json"))


def test_resolve_gguf_while_another_process_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = tmp_path / "model.gguf"
    file.write_bytes(b"weights")

    def beaten(_: Path, out: Path, *, weights: bool) -> Path:
        if finished:
            write_tiny_model(out)
        raise OSError("Directory not empty")

    monkeypatch.setattr("middo_jax.models.resolve.convert", beaten)
    finished = False
    with pytest.raises(OSError, match="not empty"):
        resolve(str(file))
    finished = True
    assert (resolve(str(file)) / "config.json").is_file()


def test_resolve_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, list[str]]] = []

    def download(repo: str, *, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        asked.append((repo, allow_patterns))
        if repo == "org/absent":
            raise ConnectionError("offline")
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve("org/name-1.5") == tmp_path
    assert not any(pattern.endswith((".bin", ".pt", ".py")) or pattern == "*" for pattern in asked[0][1])
    resolve("org/name-1.5", weights=False)
    assert set(asked[0][1]) - set(asked[1][1]) == {"model*.safetensors"}
    with pytest.raises(CheckpointError, match=r"org/absent: no such directory here.*hub repo.*offline"):
        resolve("org/absent")
