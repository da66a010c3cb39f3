"""Laws of hf.py: loaded == the files' bytes, exported == the original, sharded == one device."""

from __future__ import annotations

import json
import math
from pathlib import Path

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from tiny_model import write_tiny_model
from transformers import AutoTokenizer

from middo_jax.config import ConfigError, MeshSettings
from middo_jax.models import hf
from middo_jax.models.decoder import Decoder, split
from middo_jax.models.hf import CheckpointError, export, load
from middo_jax.models.parameters import num_params, parameters
from middo_jax.models.resolve import resolve
from middo_jax.parallel.mesh import make_mesh

MESHES = [(2, 2, 2), (1, 8, 1), (1, 2, 4), (8, 1, 1), (1, 1, 8)]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "model", tie=False)


def mesh_of(shape: tuple[int, int, int]) -> jax.sharding.Mesh:
    data, fsdp, tensor = shape
    return make_mesh(MeshSettings(data=data, fsdp=fsdp, tensor=tensor), jax.devices()[:8])


def rewrite(directory: Path, **changes: np.ndarray | None) -> None:
    """Replaces, adds or (None) removes tensors of model.safetensors; `__` in a name stands for a dot."""
    file = directory / "model.safetensors"
    tensors = load_file(file) | {name.replace("__", "."): value for name, value in changes.items()}
    save_file({k: v for k, v in tensors.items() if v is not None}, file, {"format": "pt"})


def all_tensors(directory: Path) -> dict[str, np.ndarray]:
    return {k: v for file in directory.glob("*.safetensors") for k, v in load_file(file).items()}


def assert_same_bits(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name].dtype, a[name].shape) == (b[name].dtype, b[name].shape), name
        assert a[name].tobytes() == b[name].tobytes(), name


def assert_same_params(a: nnx.State, b: nnx.State) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def test_loaded_values_are_those_of_the_file(model: Path) -> None:
    _, params, _ = load(model)
    tensors = load_file(model / "model.safetensors")
    np.testing.assert_array_equal(params["embed"][...], tensors["model.embed_tokens.weight"])
    np.testing.assert_array_equal(params["lm_head"][...], tensors["lm_head.weight"])
    for layer in range(2):
        prefix = f"model.layers.{layer}"
        np.testing.assert_array_equal(
            params["layers"]["k_proj"][layer], tensors[f"{prefix}.self_attn.k_proj.weight"].T
        )
        np.testing.assert_array_equal(
            params["layers"]["mlp_norm"][layer], tensors[f"{prefix}.post_attention_layernorm.weight"]
        )


def test_structure_is_that_of_a_fresh_decoder(model: Path) -> None:
    graphdef, params, config = load(model)
    fresh_graphdef, fresh = split(Decoder(config, jax.random.key(0)))
    assert graphdef == fresh_graphdef
    assert jax.tree.structure(params) == jax.tree.structure(fresh)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, fresh)


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
def test_dtypes_are_read_and_cast(tmp_path: Path, stored: str) -> None:
    directory = write_tiny_model(tmp_path, dtype=stored)
    _, params, config = load(directory, dtype="bfloat16", param_dtype="float32")
    assert config.dtype == "bfloat16"
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    original = load_file(directory / "model.safetensors")["model.embed_tokens.weight"].astype(np.float32)
    np.testing.assert_array_equal(params["embed"][...], original)
    _, narrow, _ = load(directory, dtype="bfloat16")
    np.testing.assert_array_equal(narrow["embed"][...], original.astype(jnp.bfloat16))


@pytest.mark.parametrize("shape", MESHES)
def test_sharded_parameters_equal_one_device(model: Path, shape: tuple[int, int, int]) -> None:
    mesh = mesh_of(shape)
    _, params, config = load(model)
    _, sharded, _ = load(model, mesh=mesh)
    assert_same_params(params, sharded)
    for spec in parameters(config):
        array = dict(sharded.flat_state())[spec.path][...]
        assert array.sharding.is_equivalent_to(spec.sharding(mesh), array.ndim)


@pytest.mark.parametrize("shape", MESHES[:3])
def test_sharded_logits_equal_one_device(model: Path, shape: tuple[int, int, int]) -> None:
    mesh = mesh_of(shape)
    graphdef, params, config = load(model)
    _, sharded, _ = load(model, mesh=mesh)
    tokens = jax.random.randint(jax.random.key(0), (8, 24), 0, config.vocab_size)
    segments = jnp.zeros_like(tokens)
    positions = jnp.broadcast_to(jnp.arange(24), tokens.shape)

    def logits(params: nnx.State) -> jax.Array:
        decoder = nnx.merge(graphdef, params)
        hidden_btd = decoder.hidden(tokens, segments, positions)
        return decoder.unembed(hidden_btd.reshape(-1, config.hidden_size))

    expected = jax.jit(logits)(params)
    with jax.set_mesh(mesh):
        actual = jax.jit(logits)(sharded)
    np.testing.assert_allclose(np.asarray(actual), np.asarray(expected), rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", MESHES)
def test_each_value_is_read_once(
    model: Path, shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither whole tensors for a shard, nor one shard again for each of its replicas."""
    sizes: list[int] = []
    read = hf._Weights.read

    def counted(self: hf._Weights, name: str, index: tuple[slice, ...]) -> np.ndarray:
        part = read(self, name, index)
        sizes.append(part.size)
        return part

    monkeypatch.setattr(hf._Weights, "read", counted)
    _, _, config = load(model, mesh=mesh_of(shape))
    assert sum(sizes) == num_params(config)
    assert max(sizes) == config.vocab_size * config.hidden_size // math.prod(shape[1:])


def test_a_mesh_that_does_not_divide_is_named(tmp_path: Path) -> None:
    directory = write_tiny_model(tmp_path, vocab_size=401)
    with pytest.raises(
        ConfigError, match=r"mesh\.tensor=2 does not divide axis 'vocab' \(401\) of parameter embed"
    ):
        load(directory, mesh=mesh_of((2, 2, 2)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("shape", [None, (2, 2, 2)])
def test_exported_equals_original(
    tmp_path: Path, dtype: str, tie: bool, shape: tuple[int, int, int] | None
) -> None:
    source = write_tiny_model(tmp_path / "source", tie=tie, dtype=dtype)
    mesh = mesh_of(shape) if shape else None
    _, params, config = load(source, dtype, mesh=mesh)
    export(params, config, source, tmp_path / "out", max_shard_bytes=30_000)
    assert_same_bits(all_tensors(tmp_path / "out"), all_tensors(source))
    _, again, config_again = load(tmp_path / "out", dtype)
    assert config_again == config
    assert_same_params(again, params)

    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2
    assert sorted(set(index["weight_map"].values())) == [file.name for file in files]
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in all_tensors(source).values())
    for file in files:
        with safe_open(file, framework="numpy") as opened:
            names = list(opened.keys())
            assert all(index["weight_map"][name] == file.name for name in names)
        assert len(names) == 1 or sum(t.nbytes for t in load_file(file).values()) <= 30_000


def test_export_casts_and_says_so(tmp_path: Path, model: Path) -> None:
    _, params, config = load(model)
    export(params, config, model, tmp_path / "out", dtype="bfloat16")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written == json.loads((model / "config.json").read_text()) | {"torch_dtype": "bfloat16"}
    expected = {name: tensor.astype(jnp.bfloat16) for name, tensor in all_tensors(model).items()}
    assert_same_bits(load_file(tmp_path / "out" / "model.safetensors"), expected)


def test_export_carries_the_tokenizer(tmp_path: Path, model: Path) -> None:
    (model / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    _, params, config = load(model)
    export(params, config, model, tmp_path / "out")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (model / name).read_bytes()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.decode(tokenizer(" Hé 12\n")["input_ids"]) == " Hé 12\n"


def test_export_is_whole_or_not_there(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, params, config = load(model)
    occupied = tmp_path / "occupied"
    occupied.mkdir()
    (occupied / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not an empty directory"):
        export(params, config, model, occupied)
    assert [p.name for p in occupied.iterdir()] == ["notes.txt"]

    def no_space(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(hf, "_write_file", no_space)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(OSError, match="No space"):
        export(params, config, model, tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before


def test_harmless_surplus_is_ignored(tmp_path: Path) -> None:
    directory = write_tiny_model(tmp_path)
    embed = load_file(directory / "model.safetensors")["model.embed_tokens.weight"]
    inv_freq = np.ones(4, np.float32)
    rewrite(directory, lm_head__weight=embed, model__layers__0__self_attn__rotary_emb__inv_freq=inv_freq)
    _, params, config = load(directory)
    assert num_params(config) == sum(x.size for x in jax.tree.leaves(params))


NORM = np.ones(32, np.float32)


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
        ({"model__norm__weight": NORM.astype(np.int8)}, r"model\.norm\.weight has dtype I8, supported: F32"),
    ],
)
def test_wrong_tensors_are_named(model: Path, changes: dict[str, np.ndarray | None], message: str) -> None:
    rewrite(model, **changes)
    with pytest.raises(CheckpointError, match=message) as error:
        load(model)
    assert "model.safetensors" in str(error.value)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_file_is_named(model: Path, keep: int) -> None:
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: truncated or not a safetensors file"):
        load(model)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "not a safetensors index"),
        ('{"weight_map": ["a"]}', "not a safetensors index"),
        ('{"weight_map": {"x": "../model.safetensors"}}', "not a plain file name"),
        (
            '{"weight_map": {"x": "model-00001-of-00002.safetensors"}}',
            r"model-00001-of-00002\.safetensors is missing",
        ),
    ],
)
def test_wrong_index_is_named(model: Path, index: str, message: str) -> None:
    (model / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match=message):
        load(model)


def test_no_model_there(tmp_path: Path, model: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.json there"):
        load(tmp_path)
    (model / "model.safetensors").unlink()
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
    with pytest.raises(CheckpointError, match=r"org/absent: no such directory here.*hub repo.*offline"):
        resolve("org/absent")
