"""Laws of held-out loss: over the scoring pass it is what it always was, and what each example alone says."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.forward import forward
from support.heldout_datasets import DATASETS, MAX_LENGTH, dataset

from middo_jax.data.tokenize import TokenizedExample
from middo_jax.evaluation.heldout import row_losses, total
from middo_jax.models import hf
from middo_jax.models.model import Model, Params, Structure, bound
from middo_jax.parallel.mesh import make_mesh
from middo_jax.passes import runner
from middo_jax.passes.losses import LossPass
from middo_jax.progress import Silent

BEFORE = json.loads((Path(__file__).parents[1] / "support" / "golden" / "heldout_losses.json").read_text())


@functools.partial(jax.jit, static_argnums=0)
def logits_alone(
    graphdef: Structure, params: Params, tokens_bt: jax.Array, segment_ids_bt: jax.Array, at_bt: jax.Array
) -> jax.Array:
    """float32 [t, v] of one row."""
    return bound(graphdef, params).unembed(forward(graphdef, params, tokens_bt, segment_ids_bt, at_bt)[0])


@pytest.mark.parametrize("name", DATASETS)
def test_held_out_loss_is_what_it_was_and_what_each_example_alone_says(name: str, tmp_path: Path) -> None:
    directory, tokenized, sources = dataset(name, tmp_path)
    model, before = hf.load(directory, mesh=make_mesh()), BEFORE[name]
    scores, _ = LossPass(tokenized, model, 4096, 256)(model, Silent(), "loss")
    rows = row_losses([e.id for e in tokenized], scores.loss_n, scores.n_targets_n)
    found = total(rows, sources)
    assert (found.n, found.n_target_tokens) == (before["n"], before["n_target_tokens"])
    assert found.loss == pytest.approx(before["loss"], rel=1e-6)
    assert found.by_source.keys() == before["by_source"].keys()
    for source, of in found.by_source.items():
        assert of.n_target_tokens == before["by_source"][source]["n_target_tokens"]
        assert of.loss == pytest.approx(before["by_source"][source]["loss"], rel=1e-6)
    one = hf.load(directory)
    by_hand = [nll_sum(one, example) for example in tokenized]
    assert found.loss == pytest.approx(math.fsum(by_hand) / found.n_target_tokens, rel=1e-6)
    np.testing.assert_allclose(rows.nll_n, by_hand, rtol=1e-5)


def nll_sum(model: Model, example: TokenizedExample) -> float:
    """Of an example alone: float64 log-softmax of its whole logits."""
    n, at_bt = len(example), np.arange(MAX_LENGTH)[None]
    tokens_bt = np.zeros((1, MAX_LENGTH), np.int32)
    tokens_bt[0, :n] = example.tokens_n
    logits_tv = logits_alone(model.graphdef, model.params, tokens_bt, np.where(at_bt < n, 0, -1), at_bt)
    logits_nv = np.asarray(logits_tv, np.float64)[:n]
    log_p_nv = logits_nv - np.log(np.exp(logits_nv).sum(axis=1, keepdims=True))
    targets = np.flatnonzero(example.is_target_n[1:])
    return -float(log_p_nv[targets, example.tokens_n[targets + 1]].sum())


def test_nothing_to_predict_is_an_error() -> None:
    with pytest.raises(ValueError, match="none of the 2 examples has a token to predict"):
        row_losses(["a", "b"], np.full(2, np.nan, np.float32), np.zeros(2, np.int32))


def test_a_broken_model_has_no_loss() -> None:
    """Examples without a target are left out; a loss that is no number is not."""
    loss_n, n_targets_n = np.array([1.0, np.nan, np.nan], np.float32), np.array([3, 0, 2], np.int32)
    assert math.isnan(total(row_losses(["a", "b", "c"], loss_n, n_targets_n)).loss)
    assert total(row_losses(["a", "b"], loss_n[:2], n_targets_n[:2])).loss == 1.0


def test_a_pass_compiles_once_for_models_that_are_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, tokenized, _ = dataset("random", tmp_path)
    compiled: list[int] = []

    def counted(lowered: list[object], advance: Callable[[int, int], None]) -> list[object]:
        compiled.append(len(lowered))
        return compile_(lowered, advance)

    compile_ = runner._compile
    monkeypatch.setattr(runner, "_compile", counted)
    model = hf.load(directory)
    loss_pass = LossPass(tokenized, model, 4096, 256)
    moved = model.with_params(jax.tree.map(lambda x: x * 1.01, model.params))
    first, _ = loss_pass(model, Silent(), "loss")
    second, facts = loss_pass(moved, Silent(), "loss")
    assert compiled == [facts.shapes]
    assert not np.array_equal(first.embedding_nd, second.embedding_nd, equal_nan=True)
    again, _ = LossPass(tokenized, moved, 4096, 256)(moved, Silent(), "loss")
    np.testing.assert_array_equal(second.loss_n, again.loss_n)
    narrow = model.with_params(jax.tree.map(lambda x: x.astype(jnp.bfloat16), model.params))
    loss_pass(narrow, Silent(), "loss")
    assert compiled == [facts.shapes] * 3
