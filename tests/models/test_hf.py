"""Laws of models/hf: loaded == the files' bytes, exported == the original, sharded == one device."""

from __future__ import annotations

import json
import math
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from support.tiny_model import FAMILIES, write_tiny_model
from transformers import AutoTokenizer

from middo_jax.config import ConfigError, MeshSettings
from middo_jax.models.decoder import Decoder, split
from middo_jax.models.hf import ChatFormat, export, files, load
from middo_jax.models.model import Params, bound
from middo_jax.models.parameters import num_params, parameters
from middo_jax.parallel.mesh import make_mesh

MESHES = [(2, 2, 2), (1, 8, 1), (1, 2, 4), (8, 1, 1), (1, 1, 8)]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "model", tie=False)


def mesh_of(shape: tuple[int, int, int]) -> jax.sharding.Mesh:
    data, fsdp, tensor = shape
    return make_mesh(MeshSettings(data=data, fsdp=fsdp, tensor=tensor), jax.devices()[:8])


def all_tensors(directory: Path) -> dict[str, np.ndarray]:
    return {k: v for file in directory.glob("*.safetensors") for k, v in load_file(file).items()}


def assert_same_bits(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name].dtype, a[name].shape) == (b[name].dtype, b[name].shape), name
        assert a[name].tobytes() == b[name].tobytes(), name


def assert_same_params(a: Params, b: Params) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def test_loaded_values_are_those_of_the_file(model: Path) -> None:
    params = load(model).params
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


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
def test_dtypes_are_read_and_cast(tmp_path: Path, stored: str) -> None:
    directory = write_tiny_model(tmp_path, dtype=stored)
    loaded = load(directory, dtype="bfloat16", param_dtype="float32")
    params, config = loaded.params, loaded.config
    assert config.dtype == "bfloat16"
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    original = load_file(directory / "model.safetensors")["model.embed_tokens.weight"].astype(np.float32)
    np.testing.assert_array_equal(params["embed"][...], original)
    narrow = load(directory, dtype="bfloat16").params
    np.testing.assert_array_equal(narrow["embed"][...], original.astype(jnp.bfloat16))


@pytest.mark.parametrize("shape", MESHES)
def test_sharded_parameters_equal_one_device(model: Path, shape: tuple[int, int, int]) -> None:
    mesh = mesh_of(shape)
    loaded = load(model)
    params, config = loaded.params, loaded.config
    sharded = load(model, mesh=mesh).params
    assert_same_params(params, sharded)
    for spec in parameters(config):
        array = dict(sharded.flat_state())[spec.path][...]
        assert array.sharding.is_equivalent_to(spec.sharding(mesh), array.ndim)


@pytest.mark.parametrize("shape", MESHES[:3])
def test_sharded_logits_equal_one_device(model: Path, shape: tuple[int, int, int]) -> None:
    mesh = mesh_of(shape)
    loaded = load(model)
    graphdef, params, config = loaded.graphdef, loaded.params, loaded.config
    sharded = load(model, mesh=mesh).params
    tokens = jax.random.randint(jax.random.key(0), (8, 24), 0, config.vocab_size)
    segments = jnp.zeros_like(tokens)
    positions = jnp.broadcast_to(jnp.arange(24), tokens.shape)

    def logits(params: Params) -> jax.Array:
        decoder = bound(graphdef, params)
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
    """Not once for each device that holds a part of it, or all of it."""
    sizes: list[int] = []
    blocks = files.Weights.blocks

    def counted(self: files.Weights, name: str, first: int, end: int) -> Iterator[tuple[int, np.ndarray]]:
        for start, block in blocks(self, name, first, end):
            sizes.append(block.size)
            yield start, block

    monkeypatch.setattr(files.Weights, "blocks", counted)
    monkeypatch.setattr(files, "_BLOCK_BYTES", 1000)  # several blocks a tensor
    loaded = load(model, mesh=mesh_of(shape))
    params, config = loaded.params, loaded.config
    assert sum(sizes) == num_params(config)
    assert max(sizes) * 4 <= 1000
    monkeypatch.undo()
    assert_same_params(params, load(model).params)


@pytest.mark.as_in_use  # or transfers hold their buffers for longer
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 8, 1)])
def test_the_host_holds_one_tensor_at_a_time(tmp_path: Path, shape: tuple[int, int, int]) -> None:
    """In numpy; what the process holds in all is measured by benchmarks/loading.py."""
    sizes: dict[str, Any] = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 4}
    directory = write_tiny_model(tmp_path / "model", **sizes)
    largest = max(tensor.nbytes for tensor in load_file(directory / "model.safetensors").values())
    assert (directory / "model.safetensors").stat().st_size > 10 * largest
    mesh = make_mesh(MeshSettings(data=1, fsdp=shape[1], tensor=1), jax.devices()[: math.prod(shape)])

    def peak(step: str) -> tuple[int, Params]:
        tracemalloc.start()
        loaded = load(directory, mesh=mesh)
        params = loaded.params
        if step == "export":
            tracemalloc.reset_peak()
            export(loaded, directory, tmp_path / f"out{len(list(tmp_path.iterdir()))}")
        held = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return held, params

    for step in ("load", "export"):
        peak(step)  # compiles
        block = min(files._BLOCK_BYTES, largest)
        # The runtime lets go of a buffer a moment after it is done with it, sometimes after the next read.
        assert min(peak(step)[0] for _ in range(4)) <= largest + block + 2_000_000


def test_a_mesh_that_does_not_divide_is_named(tmp_path: Path) -> None:
    directory = write_tiny_model(tmp_path, vocab_size=401)
    with pytest.raises(
        ConfigError, match=r"mesh\.tensor=2 does not divide axis 'vocab' \(401\) of parameter embed"
    ):
        load(directory, mesh=mesh_of((2, 2, 2)))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_exported_as_it_was(tmp_path: Path, family: str) -> None:
    source = write_tiny_model(tmp_path / "source", dtype="bfloat16", **FAMILIES[family])
    mesh = mesh_of((2, 2, 2))
    loaded = load(source, "bfloat16", mesh=mesh)
    graphdef, params, config = loaded.graphdef, loaded.params, loaded.config
    fresh_graphdef, fresh = split(nnx.eval_shape(lambda: Decoder(config, jax.random.key(0))))
    assert graphdef == fresh_graphdef
    assert jax.tree.structure(params) == jax.tree.structure(fresh)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, fresh)
    export(loaded, source, tmp_path / "out")
    assert_same_bits(all_tensors(tmp_path / "out"), all_tensors(source))
    loaded = load(tmp_path / "out", "bfloat16", mesh=mesh)
    again, config_again = loaded.params, loaded.config
    assert config_again == config
    assert_same_params(again, params)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("shape", [None, (1, 8, 1)])
def test_several_files_are_exported_as_one(
    tmp_path: Path, dtype: str, tie: bool, shape: tuple[int, int, int] | None
) -> None:
    source = write_tiny_model(tmp_path / "source", tie=tie, dtype=dtype)
    mesh = mesh_of(shape) if shape else None
    loaded = load(source, dtype, mesh=mesh)
    params, config = loaded.params, loaded.config
    export(loaded, source, tmp_path / "out", max_shard_bytes=30_000)
    assert_same_bits(all_tensors(tmp_path / "out"), all_tensors(source))
    loaded = load(tmp_path / "out", dtype)
    again, config_again = loaded.params, loaded.config
    assert config_again == config
    assert_same_params(again, params)

    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    written = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(written) > 2
    assert sorted(set(index["weight_map"].values())) == [file.name for file in written]
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in all_tensors(source).values())
    for file in written:
        with safe_open(file, framework="numpy") as opened:
            names = list(opened.keys())
            assert all(index["weight_map"][name] == file.name for name in names)
        assert len(names) == 1 or sum(t.nbytes for t in load_file(file).values()) <= 30_000


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shape", [None, (1, 8, 1)])
def test_any_number_survives(tmp_path: Path, dtype: str, shape: tuple[int, int, int] | None) -> None:
    """Subnormals and both zeros too: nothing is computed on the way. Only what is not finite is refused."""
    source = write_tiny_model(tmp_path / "source", dtype=dtype)
    rng, tensors = np.random.default_rng(0), load_file(source / "model.safetensors")
    for name, tensor in tensors.items():
        bits = rng.integers(256, size=tensor.nbytes, dtype=np.uint8).view(tensor.dtype)
        zero = np.zeros(1, tensor.dtype)
        tensors[name] = np.where(np.isfinite(bits.astype(np.float32)), bits, zero).reshape(tensor.shape)
    embed = tensors["model.embed_tokens.weight"]
    embed.flat[:2] = [0.0, -0.0]
    assert (abs(embed.astype(np.float64)) < np.finfo(np.float32).tiny).sum() > 2 or dtype == "float16"
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    loaded = load(source, dtype, mesh=mesh_of(shape) if shape else None)
    export(loaded, source, tmp_path / "out")
    assert_same_bits(all_tensors(tmp_path / "out"), tensors)


def test_export_casts_and_says_so(tmp_path: Path, model: Path) -> None:
    loaded = load(model)
    export(loaded, model, tmp_path / "out", dtype="bfloat16")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written == json.loads((model / "config.json").read_text()) | {"torch_dtype": "bfloat16"}
    expected = {name: tensor.astype(jnp.bfloat16) for name, tensor in all_tensors(model).items()}
    assert_same_bits(load_file(tmp_path / "out" / "model.safetensors"), expected)
    with pytest.raises(ValueError, match="dtype 'int8' cannot be exported, only float32, float16, bfloat16"):
        export(loaded, model, tmp_path / "other", dtype="int8")


def test_export_carries_the_tokenizer(tmp_path: Path, model: Path) -> None:
    (model / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    loaded = load(model)
    export(loaded, model, tmp_path / "out")
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "chat_template.jinja",
        "additional_chat_templates/tool_use.jinja",
    ):
        assert (tmp_path / "out" / name).read_bytes() == (model / name).read_bytes()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.decode(tokenizer(" Hé 12\n")["input_ids"]) == " Hé 12\n"


@pytest.mark.parametrize("own", ["tokenizer_config.json", "chat_template.jinja", "several", None])
def test_export_carries_the_template_of_the_training(tmp_path: Path, model: Path, own: str | None) -> None:
    settings = json.loads((model / "tokenizer_config.json").read_text())
    before = settings.pop("chat_template")
    if own == "chat_template.jinja":
        (model / own).write_text(before)
    elif own == "several":
        settings["chat_template"] = [{"name": n, "template": before} for n in ("default", "tool_use")]
    elif own is not None:
        settings["chat_template"] = before
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    trained = "{% for message in messages %}Ω {{ message['content'] }}{{ eos_token }}\n{% endfor %}"
    loaded = load(model)
    export(loaded, model, tmp_path / "out", chat=ChatFormat(trained))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.chat_template == trained
    in_config = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert in_config == settings | {"chat_template": trained}

    its_own = AutoTokenizer.from_pretrained(model).chat_template
    export(loaded, model, tmp_path / "same", chat=ChatFormat(its_own))
    assert AutoTokenizer.from_pretrained(tmp_path / "same").chat_template == its_own
    same = (tmp_path / "same" / "tokenizer_config.json").read_bytes()
    assert same == (model / "tokenizer_config.json").read_bytes()


@pytest.mark.parametrize(
    ("generation", "ids", "expected"),
    [
        ({"eos_token_id": 2, "top_k": 5}, {2}, {"eos_token_id": 2, "top_k": 5}),
        ({"eos_token_id": 0, "top_k": 5}, {2, 0}, {"eos_token_id": [0, 2], "top_k": 5}),
        ({"eos_token_id": [7, 1]}, {2, 1}, {"eos_token_id": [7, 1, 2]}),
        ({}, {2}, {"eos_token_id": [2]}),
        (None, {0, 2}, {"bos_token_id": 1, "eos_token_id": [2, 0], "pad_token_id": 2}),
        (None, set(), {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}),
    ],
)
def test_export_stops_where_the_training_ended_answers(
    tmp_path: Path, model: Path, generation: dict | None, ids: set[int], expected: dict
) -> None:
    path = model / "generation_config.json"
    path.unlink()
    if generation is not None:
        path.write_text(json.dumps(generation))
    loaded = load(model)
    export(loaded, model, tmp_path / "out", chat=ChatFormat(eos_token_ids=ids))
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == expected


def test_export_is_whole_or_not_there(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load(model)
    occupied = tmp_path / "occupied"
    occupied.mkdir()
    (occupied / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not an empty directory"):
        export(loaded, model, occupied)
    assert [p.name for p in occupied.iterdir()] == ["notes.txt"]

    def no_space(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(files, "_write_file", no_space)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(OSError, match="disk full"):
        export(loaded, model, tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before
