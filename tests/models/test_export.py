"""Law: transformers computes from an export what we compute, from the tokens of the training."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from support.golden.make_golden import torch_logits
from support.said import Said
from support.tiny_model import FAMILIES, write_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from middo_jax import cli
from middo_jax.config import MeshSettings
from middo_jax.data.tokenize import load_tokenizer
from middo_jax.models import hf
from middo_jax.models.checkpoint import save_params
from middo_jax.models.hf import CheckpointError, verifying
from middo_jax.models.model import Model, Params
from middo_jax.parallel.mesh import make_mesh
from middo_jax.stages import export_checkpoint

TRAINED_WITH = (
    "{% for message in messages %}{{ '<|im_start|>' + message['content'] + eos_token }}{% endfor %}"
)


def trained(base: Path, mesh: jax.sharding.Mesh | None = None) -> Model:
    """A model of float32 parameters that have moved away from the base's, which bfloat16 cannot hold."""
    model = hf.load(base, mesh=mesh)
    return model.with_params(_moved(model.params))


@jax.jit
def _moved(params: Params) -> Params:
    return jax.tree.map(lambda x: x * 1.01 + 0.003, params)


def one_device() -> jax.sharding.Mesh:
    return make_mesh(MeshSettings(data=1, fsdp=1, tensor=1), jax.devices()[:1])


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "base", tie=False)


@pytest.fixture
def checkpoint(base: Path, tmp_path: Path) -> Path:
    """Of a training with a template of its own."""
    save_params(
        tmp_path / "checkpoint", trained(base).params, {"base": str(base), "chat_template": TRAINED_WITH}
    )
    return tmp_path / "checkpoint"


@pytest.mark.parity
@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_computes_what_we_compute(tmp_path: Path, family: str) -> None:
    pytest.importorskip("torch")
    base, out = write_tiny_model(tmp_path / "base", **FAMILIES[family]), tmp_path / "out"
    mesh = one_device()
    model = trained(base, mesh)
    expected = hf.expect(model, load_tokenizer(base), "bfloat16")
    assert sum(map(len, expected.tokens)) > 200
    verification = hf.export(model, base, out, "bfloat16", expectation=expected)
    assert verification is not None
    assert verification.max_difference < 1e-4
    assert verification.n_prompts == len(expected.tokens)

    by_hand = torch_logits(out, expected.tokens[-1][None])[0]
    np.testing.assert_allclose(by_hand, expected.logits[-1], rtol=0, atol=1e-4)
    stored = {tensor.dtype for tensor in load_file(out / "model.safetensors").values()}
    assert stored == {np.dtype(jnp.bfloat16)}


@pytest.mark.parity
def test_an_export_opens_as_it_is(tmp_path: Path, base: Path) -> None:
    """As evaluation harnesses open it; no hub is asked (HF_HUB_OFFLINE)."""
    torch = pytest.importorskip("torch")
    model = trained(base)
    hf.export(model, base, tmp_path / "out", "bfloat16", max_shard_bytes=30_000)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype="auto", output_loading_info=True
    )
    model, info = loaded
    assert not any(info.values()), info
    assert model.dtype == torch.bfloat16
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    answer = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert answer.shape[1] <= inputs["input_ids"].shape[1] + 4
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id


@pytest.mark.parity
@pytest.mark.parametrize("wrong", ["weights", "tokens", "numbers"])
def test_what_is_not_our_model_is_not_left(tmp_path: Path, base: Path, wrong: str) -> None:
    pytest.importorskip("torch")
    model = trained(base)
    expected = hf.expect(model, load_tokenizer(base), None)
    if wrong == "weights":
        message = "differs by"
        model = model.with_params(jax.tree.map(lambda x: x * 1.001, model.params))
    elif wrong == "tokens":
        message = "the exported tokenizer gives prompt 1 other tokens"
        first, second, *others = expected.tokens
        expected = dataclasses.replace(expected, tokens=(first, second + 1, *others))
    else:
        message = "logits are not all finite"
        model = model.with_params(jax.tree.map(lambda x: x * jnp.nan, model.params))
    before = sorted(tmp_path.iterdir())
    with pytest.raises(CheckpointError, match=message):
        hf.export(model, base, tmp_path / "out", expectation=expected)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parity
def test_one_wrong_logit_is_found_where_it_is(tmp_path: Path, base: Path) -> None:
    pytest.importorskip("torch")
    model = trained(base)
    expected = hf.expect(model, load_tokenizer(base), None)
    hf.export(model, base, tmp_path / "out")
    largest = max(np.abs(logits).max() for logits in expected.logits)
    changed = [logits.copy() for logits in expected.logits]
    changed[2][5, 17] += 3 * verifying.TOLERANCE * largest
    expected = dataclasses.replace(expected, logits=tuple(changed))
    with pytest.raises(CheckpointError, match="logit of token 17 at position 5 of prompt 2 differs by"):
        verifying.compare(tmp_path / "out", expected)


@pytest.mark.parity
def test_a_checkpoint_is_exported_with_its_template_and_verified(tmp_path: Path, checkpoint: Path) -> None:
    """From all eight devices."""
    pytest.importorskip("torch")
    said, out = Said(), tmp_path / "out"
    facts = export_checkpoint(checkpoint, out, "bfloat16", said)
    assert facts["verified"] is True
    assert (facts["n_prompts"], facts["max_difference"] < 1e-4) == (4, True)
    [line] = said.lines
    assert line.startswith(f"verified: max |Δlogit| {facts['max_difference']:.1e} over 4 prompts, ")
    assert line.endswith(f"{facts['n_tokens']} tokens (float32)")
    assert AutoTokenizer.from_pretrained(out).chat_template == TRAINED_WITH
    with pytest.raises(FileExistsError, match="not an empty directory"):
        export_checkpoint(checkpoint, out, None, said)
    export_checkpoint(checkpoint, tmp_path / "unverified", "bfloat16", said, verify=False)
    assert said.lines[1:] == ["not verified: switched off"]
    files = {file.name: file.read_bytes() for file in out.iterdir()}
    assert files == {file.name: file.read_bytes() for file in (tmp_path / "unverified").iterdir()}


def test_without_torch_it_says_so(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find_spec = importlib.util.find_spec

    def without_torch(name: str, *arguments: Any) -> Any:
        return None if name == "torch" else find_spec(name, *arguments)

    monkeypatch.setattr(importlib.util, "find_spec", without_torch)
    out = str(tmp_path / "out")
    monkeypatch.setattr(sys, "argv", ["middo", "export", str(checkpoint), out, "--json"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code
    printed, said = capsys.readouterr()
    assert json.loads(printed) == {"out": out, "verified": False, "reason": "torch is not installed"}
    assert said.splitlines() == ["not verified: torch is not installed"]


def test_without_memory_for_it_too(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    config = trained(base).config
    assert hf.obstacle(config) is None
    huge = dataclasses.replace(config, num_layers=10_000_000_000)
    assert "torch would hold" in (hf.obstacle(huge) or "")
    monkeypatch.setattr(verifying, "_available_bytes", lambda: None)  # where nobody knows
    assert hf.obstacle(huge) is None
