"""Laws of PEFT directories: written == read, computed as peft computes; what is not, is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.tiny_model import FAMILIES, write_tiny_model

from middo_jax.config import MeshSettings
from middo_jax.models import hf
from middo_jax.models.config import Lora, UnsupportedModel
from middo_jax.models.loading import load, locate
from middo_jax.models.lora import Model, merge_adapters, partition, with_adapters, with_fresh_adapters
from middo_jax.models.model import Params, Structure, bound
from middo_jax.parallel.mesh import make_mesh
from middo_jax.training.step import Batch, batch_gradient

MESH = make_mesh(MeshSettings(data=2, fsdp=2, tensor=2))
LORA = Lora(4, 6.0, ("q_proj", "v_proj", "down_proj"))
TOKENS = np.random.default_rng(0).integers(3, 390, (2, 20)).astype(np.int32)


def adapted_model(directory: Path, lora: Lora = LORA) -> Model:
    """The model in a directory with adapters as after some training."""
    base = hf.load(directory)
    fresh = with_fresh_adapters(base, lora, seed=0)
    trained, _ = partition(fresh.params, fresh.config)
    keys = iter(jax.random.split(jax.random.key(1), len(jax.tree.leaves(trained))))
    trained = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(next(keys), x.shape), trained)
    return with_adapters(base, lora, trained)


def write_adapter(root: Path, family: str = "smollm2", lora: Lora = LORA, dtype: str | None = None) -> Model:
    """root/model and root/adapter; returns the model that the two are."""
    model = adapted_model(write_tiny_model(root / "model", **FAMILIES[family]), lora)
    hf.export_adapters(model.params, model.config, root / "model", root / "adapter", dtype)
    return model


def change(directory: Path, tensors: dict[str, np.ndarray | None] | None = None, **fields: Any) -> None:
    """Replaces fields of adapter_config.json, and replaces, adds or (None) removes tensors."""
    path, file = directory / "adapter_config.json", directory / "adapter_model.safetensors"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    changed = load_file(file) | (tensors or {})
    save_file({name: value for name, value in changed.items() if value is not None}, file)


def assert_identical(got: Params, want: Params) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_what_is_written_is_read(tmp_path: Path) -> None:
    model = write_adapter(tmp_path)
    source = locate(tmp_path / "adapter")
    assert (source.base, source.lora) == (tmp_path / "model", LORA)
    for mesh in (None, MESH):
        again = load(source, mesh=mesh)
        assert again.graphdef == model.graphdef
        assert_identical(again.params, model.params)
    names = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(names) == 2 * 2 * 3
    assert names["base_model.model.model.layers.1.mlp.down_proj.lora_A.weight"].shape == (4, 64)
    assert names["base_model.model.model.layers.0.self_attn.v_proj.lora_B.weight"].shape == (8, 4)
    # Whoever opens the adapter alone finds the tokenizer beside it, and no second base.
    files = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json"} <= files
    assert "config.json" not in files


def test_from_a_sharded_model_the_same_bytes(tmp_path: Path) -> None:
    write_adapter(tmp_path)
    model = load(locate(tmp_path / "adapter"), mesh=MESH)
    hf.export_adapters(model.params, model.config, tmp_path / "model", tmp_path / "again")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "adapter" / name).read_bytes()


def test_a_base_from_the_hub_is_named_by_its_repo_id(tmp_path: Path) -> None:
    snapshot = tmp_path / "hub" / "models--some-org--tiny-1.5" / "snapshots" / "0123abc"
    model = adapted_model(write_tiny_model(snapshot))
    hf.export_adapters(model.params, model.config, snapshot, tmp_path / "adapter", "bfloat16")
    written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == "some-org/tiny-1.5"
    assert {x.dtype for x in load_file(tmp_path / "adapter" / "adapter_model.safetensors").values()} == {
        jnp.dtype("bfloat16")
    }


def test_rank_stabilised_adapters_are_weighed_as_they_ask(tmp_path: Path) -> None:
    write_adapter(tmp_path)
    change(tmp_path / "adapter", use_rslora=True, target_modules="all-linear")
    lora = locate(tmp_path / "adapter").lora
    assert lora is not None
    assert lora.target_modules == LORA.target_modules
    assert lora.scale == pytest.approx(6.0 / 4**0.5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"peft_type": "IA3"}, r"adapter_config\.json: peft_type='IA3' is not supported, only 'LORA'"),
        ({"use_dora": True}, r"use_dora=True is not supported"),
        ({"bias": "all"}, r"bias='all'"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\]"),
        ({"rank_pattern": {"q_proj": 2}}, r"rank_pattern="),
        ({"init_lora_weights": "pissa"}, r"init_lora_weights='pissa'"),
    ],
)
def test_what_would_be_computed_otherwise_is_refused(
    tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    write_adapter(tmp_path)
    change(tmp_path / "adapter", **fields)
    with pytest.raises(UnsupportedModel, match=message):
        locate(tmp_path / "adapter")


A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
ELSEWHERE = "base_model.model.lm_head.lora_A.weight"


@pytest.mark.parametrize(
    ("tensors", "fields", "message"),
    [
        ({A: None}, {}, rf"adapter_model\.safetensors: tensor {A} is missing"),
        ({A: np.zeros((4, 31), np.float32)}, {}, rf"tensor {A} is F32 \(4, 31\), .* imply \(4, 32\)"),
        ({A: np.full((4, 32), np.nan, np.float32)}, {}, rf"adapter_model\.safetensors: tensor {A} holds NaN"),
        ({A: np.zeros((4, 32), np.int8)}, {}, rf"tensor {A} is I8"),
        ({ELSEWHERE: np.zeros((4, 32), np.float32)}, {}, rf"tensor {ELSEWHERE} adapts nothing"),
        ({}, {"r": 8}, r"is F32 \(4, 32\), .* imply \(8, 32\)"),
        ({}, {"r": None}, r"adapter_config\.json: not a LoRA config"),
        ({}, {"base_model_name_or_path": None}, r"base_model_name_or_path is empty"),
        ({}, {"base_model_name_or_path": "./gone"}, r"\./gone: no such file or directory"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_named(
    tmp_path: Path, tensors: dict[str, np.ndarray | None], fields: dict[str, Any], message: str
) -> None:
    write_adapter(tmp_path)
    change(tmp_path / "adapter", tensors, **fields)
    with pytest.raises(hf.CheckpointError, match=message):
        load(locate(tmp_path / "adapter"))


def our_logits(model: Model) -> np.ndarray:
    """float32 [b, t, v] of TOKENS."""

    @jax.jit(static_argnums=0)
    def run(graphdef: Structure, params: Params) -> jax.Array:
        decoder = bound(graphdef, params)
        positions_bt = jnp.broadcast_to(jnp.arange(TOKENS.shape[1]), TOKENS.shape)
        hidden_btd = decoder.hidden(jnp.asarray(TOKENS), jnp.zeros_like(positions_bt), positions_bt)
        return decoder.unembed(hidden_btd.reshape(-1, hidden_btd.shape[-1])).reshape(*TOKENS.shape, -1)

    return np.asarray(run(model.graphdef, model.params))


def our_gradient(model: Model) -> Params:
    trained, frozen = partition(model.params, model.config)
    positions = np.broadcast_to(np.arange(TOKENS.shape[1], dtype=np.int32), TOKENS.shape)
    # A position is a target if the token after it is to be predicted there.
    inputs = (TOKENS, np.zeros_like(TOKENS), positions, positions < TOKENS.shape[1] - 1)
    batch = Batch(*(jnp.asarray(x)[None] for x in inputs))
    return batch_gradient(model.graphdef, trained, frozen, batch, 64, "none")[2]


@pytest.mark.parity
@pytest.mark.parametrize("family", ["llama3", "qwen2", "gemma3"])
def test_peft_computes_the_same_logits_and_gradients(tmp_path: Path, family: str) -> None:
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    every = Lora(4, 6.0, tuple(f"{n}_proj" for n in ("q", "k", "v", "o", "gate", "up", "down")))
    model = write_adapter(tmp_path, family, every)
    base = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", dtype=torch.float32, attn_implementation="eager"
    )
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True)
    tokens = torch.from_numpy(TOKENS.astype(np.int64))
    logits = theirs(input_ids=tokens).logits
    np.testing.assert_allclose(our_logits(model), logits.detach().numpy(), rtol=0, atol=1e-4)

    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    by_name = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    ours = {path: np.asarray(g[...]) for path, g in our_gradient(model).flat_state()}
    assert len(by_name) == sum(g.shape[0] for g in ours.values())
    for (_, name), stacked in ours.items():
        module, _, part = str(name).rpartition("_lora_")
        for layer, gradient in enumerate(stacked):
            want = next(
                g.numpy().T
                for full, g in by_name.items()
                if f".layers.{layer}." in full and f".{module}.lora_{part.upper()}." in full
            )
            assert np.abs(gradient - want).max() <= 1e-4 * np.abs(want).max(), (name, layer)


@pytest.mark.parity
def test_what_peft_writes_is_read_and_merges_as_peft_merges(tmp_path: Path) -> None:
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    directory = write_tiny_model(tmp_path / "model", **FAMILIES["qwen3"])
    base = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    asked = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules="all-linear", use_rslora=True, init_lora_weights=False
    )
    torch.manual_seed(0)
    theirs = peft.get_peft_model(base, asked).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    model = load(locate(tmp_path / "adapter"))
    tokens = torch.from_numpy(TOKENS.astype(np.int64))
    with torch.no_grad():
        want = theirs(input_ids=tokens).logits.numpy()
        merged = theirs.merge_and_unload()(input_ids=tokens).logits.numpy()
    np.testing.assert_allclose(our_logits(model), want, rtol=0, atol=1e-4)
    np.testing.assert_allclose(our_logits(merge_adapters(model)), merged, rtol=0, atol=1e-4)
