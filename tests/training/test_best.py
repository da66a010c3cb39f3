"""Laws of evaluating while training: the same losses however often it is killed, the best state kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
import pytest
from support.tiny_training import (
    CHUNK,
    CONFIG,
    PACK_LENGTH,
    SETTINGS,
    Killed,
    examples,
    fresh_model,
    heldout,
    kill_at,
    mesh_of,
)

from middo_jax.config import load
from middo_jax.evaluation.heldout import HeldoutLoss, row_losses, total
from middo_jax.models.checkpoint import read_metadata, restore_params
from middo_jax.models.model import Model, Params
from middo_jax.passes import runner
from middo_jax.passes.losses import LossPass, score_examples
from middo_jax.progress import Silent
from middo_jax.rundir import read_jsonl
from middo_jax.rundir.rows import SourceLossRow
from middo_jax.training.evaluations import Evaluation
from middo_jax.training.hooks import on_metrics
from middo_jax.training.metrics import StepMetrics
from middo_jax.training.plan import TrainingPlan
from middo_jax.training.sft import train

ONE = mesh_of(1, 1, 1)
EVALUATED = SETTINGS.model_copy(update={"num_epochs": 4, "eval_every": 3, "save_every": 2, "keep_best": True})
TRAINED, HELDOUT = examples(60)[:40], examples(60)[40:]
SOURCES = [("code", "law", "sea")[i % 3] for i in range(len(HELDOUT))]


def fine_tune(
    out_dir: Path,
    evaluate: Callable[[Model], Evaluation],
    on_step: Callable[[StepMetrics], None] | None = None,
) -> Params:
    trained = train(
        fresh_model(ONE),
        TrainingPlan(TRAINED, EVALUATED, 3, PACK_LENGTH),
        out_dir,
        chunk=CHUNK,
        evaluate=evaluate,
        hooks=[] if on_step is None else [on_metrics(on_step)],
    )
    return trained.params


def measure(model: Model) -> Evaluation:
    found = heldout(model, HELDOUT, SOURCES)
    by_source: dict[str, SourceLossRow] = {
        name: {"loss": of.loss, "n_target_tokens": of.n_target_tokens} for name, of in found.by_source.items()
    }
    return Evaluation(found.loss, found.n_target_tokens, by_source)


def test_the_loss_by_source_is_that_of_the_source_alone() -> None:
    model = fresh_model(mesh_of(2, 2, 2))

    def loss(indices: list[int], sources: Sequence[str] = ()) -> HeldoutLoss:
        return heldout(model, [HELDOUT[i] for i in indices], sources)

    everything = list(range(len(HELDOUT)))
    whole, split_up = loss(everything), loss(everything, sources=SOURCES)
    assert split_up.loss == pytest.approx(whole.loss, rel=1e-6)
    assert whole.by_source == {}
    assert list(split_up.by_source) == ["code", "law", "sea"]
    for name, of in split_up.by_source.items():
        alone = loss([i for i in everything if SOURCES[i] == name])
        assert of.loss == pytest.approx(alone.loss, rel=1e-5)
        assert of.n_target_tokens == alone.n_target_tokens
    assert sum(of.n_target_tokens for of in split_up.by_source.values()) == whole.n_target_tokens


def test_each_row_has_the_loss_that_it_has_alone() -> None:
    model = fresh_model(mesh_of(2, 2, 2))
    scores, _ = score_examples(model, HELDOUT, batch_tokens=128, chunk=CHUNK)
    rows = row_losses([example.id for example in HELDOUT], scores.loss_n, scores.n_targets_n)
    assert rows.ids == [example.id for example in HELDOUT]
    for example, nll, n_targets in zip(HELDOUT, rows.nll_n, rows.n_targets_n, strict=True):
        alone = heldout(model, [example])
        assert n_targets == alone.n_target_tokens
        assert nll / n_targets == pytest.approx(alone.loss, rel=1e-5)
    assert total(rows) == heldout(model, HELDOUT)


def test_evaluating_while_training_compiles_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[int] = []
    compile_, loss_pass = runner._compile, LossPass(HELDOUT, fresh_model(ONE), 128, CHUNK)

    def counted(lowered: Sequence[object], advance: Callable[[int, int], None]) -> list[object]:
        compiled.append(len(lowered))
        return compile_(lowered, advance)

    def evaluate(model: Model) -> Evaluation:
        scores, _ = loss_pass(model, Silent(), "held-out loss")
        found = total(row_losses([e.id for e in HELDOUT], scores.loss_n, scores.n_targets_n))
        return Evaluation(found.loss, found.n_target_tokens, {})

    monkeypatch.setattr(runner, "_compile", counted)
    fine_tune(tmp_path, evaluate)
    assert len(read_jsonl(tmp_path / "evaluations.jsonl")) > 2
    assert len(compiled) == 1


@pytest.mark.parametrize("stop", [4, 7])
def test_killed_and_resumed_has_evaluated_the_same(stop: int, tmp_path: Path) -> None:
    fine_tune(tmp_path / "whole", measure)
    whole = read_jsonl(tmp_path / "whole" / "evaluations.jsonl")
    last = read_jsonl(tmp_path / "whole" / "metrics.jsonl")[-1]["step"]
    assert [row["step"] for row in whole] == sorted({*range(3, last + 1, 3), last})
    assert set(whole[0]["by_source"]) == {"code", "law", "sea"}
    with pytest.raises(Killed):
        fine_tune(tmp_path / "cut", measure, kill_at(stop))
    fine_tune(tmp_path / "cut", measure)
    assert read_jsonl(tmp_path / "cut" / "evaluations.jsonl") == whole


@pytest.mark.parametrize("stop", [None, 6, 8])
def test_the_best_state_is_kept_though_newer_ones_came(stop: int | None, tmp_path: Path) -> None:
    seen: dict[int, list[np.ndarray]] = {}
    invented = {3: 2.0, 6: 1.0}  # then worse again
    steps: Iterator[int]

    def evaluate(model: Model) -> Evaluation:
        step = next(steps)
        seen[step] = [np.array(x) for x in jax.tree.leaves(model.params)]
        return Evaluation(invented.get(step, 3.0), 10, {})

    steps = iter((3, 6, 9, 12, 15))
    if stop is not None:
        with pytest.raises(Killed):
            fine_tune(tmp_path, evaluate, kill_at(stop))
        saved = sorted(int(p.name) for p in (tmp_path / "checkpoint" / "steps").iterdir())
        # Killed after step 8 was told and before it was saved: 6, the newest and the best.
        known = [row["step"] for row in read_jsonl(tmp_path / "evaluations.jsonl")]
        assert set(saved) >= ({3} if stop == 6 else {6})
        steps = iter([s for s in (3, 6, 9, 12, 15) if s > max(k for k in saved if k in (3, 4, 6))])
        assert known
    last = fine_tune(tmp_path, evaluate)
    best = tmp_path / "checkpoint" / "best"
    metadata, final = read_metadata(best), read_metadata(tmp_path / "checkpoint")
    assert metadata is not None
    assert final is not None
    assert (metadata["step"], metadata["identity"]) == (6, final["identity"])
    assert final["step"] > 6
    for a, b in zip(jax.tree.leaves(restore_params(best, CONFIG, ONE)), seen[6], strict=True):
        np.testing.assert_array_equal(np.asarray(a), b)
    assert any(np.any(np.asarray(a) != b) for a, b in zip(jax.tree.leaves(last), seen[6], strict=True))
    assert sorted(p.name for p in (tmp_path / "checkpoint").iterdir()) == ["best", "metadata.json", "params"]


def test_the_newest_is_kept(tmp_path: Path) -> None:
    settings = SETTINGS.model_copy(update={"num_epochs": 4, "save_every": 1})
    plan = TrainingPlan(TRAINED, settings, 3, PACK_LENGTH)
    with pytest.raises(Killed):
        train(fresh_model(ONE), plan, tmp_path, chunk=CHUNK, hooks=[on_metrics(kill_at(6))])
    assert sorted(int(p.name) for p in (tmp_path / "checkpoint" / "steps").iterdir()) == [5]


def test_the_best_needs_evaluations() -> None:
    with pytest.raises(ValueError, match=r"train\.keep_best needs train\.eval_every"):
        load(None, ["model.path=m", "data.path=d", "train.keep_best=true"])
