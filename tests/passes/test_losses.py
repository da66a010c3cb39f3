"""Laws of the scoring pass: packing, batching, chunking and sharding change no number."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.forward import forward
from support.tiny_model import write_tiny_model

from middo_jax.config import ConfigError, MeshSettings
from middo_jax.data.tokenize import TokenizedExample
from middo_jax.models import hf
from middo_jax.models.model import Model
from middo_jax.parallel.mesh import MESH_AXES, make_mesh
from middo_jax.passes import losses as scoring
from middo_jax.passes.loss_plan import MIN_PREFIX, plan_losses
from middo_jax.passes.losses import ExampleScores, score_examples
from middo_jax.passes.runner import PassFacts
from middo_jax.progress import Advance, Silent
from middo_jax.signals.table import Measured, read_scores, write_scores


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model(directory: Path) -> Model:
    return hf.load(directory)


def random_examples(n: int, longest: int = 300, seed: int = 0) -> list[TokenizedExample]:
    """Prompt, then answer; some without any target, some whose every token but the first is one."""
    rng = np.random.default_rng(seed)
    examples = []
    for i in range(n):
        length = int(rng.integers(4, 60) if i % 8 else rng.integers(60, longest))
        prompt = int(rng.integers(1, length))
        at = np.arange(length)
        is_target = (at >= prompt) & (i % 5 != 3)
        tokens = rng.integers(3, 390, length).astype(np.int32)
        examples.append(TokenizedExample(str(i), tokens, is_target, (at > 0) & (at < prompt), False))
    return examples


EXAMPLES = random_examples(40)
NUMBERS = ("loss_n", "last_nll_n", "worst_decile_nll_n", "prompt_nll_n")
PASS = jax.jit(forward, static_argnums=0)


class ByHand(NamedTuple):
    """Of one example: float64 log-softmax of its whole logits."""

    loss: float
    last: float
    worst_decile: float
    prompt: float
    embedding: np.ndarray


def by_hand(model: Model, example: TokenizedExample) -> ByHand:
    """What the pass gives, of one example alone."""
    # Padded behind, which nothing before it sees, so that one shape is compiled.
    at = np.arange(300)[None]
    tokens = np.zeros((1, 300), np.int32)
    tokens[0, : len(example)] = example.tokens_n
    hidden_btd = PASS(model.graphdef, model.params, tokens, np.where(at < len(example), 0, -1), at)
    hidden_nd = np.asarray(hidden_btd[0], np.float64)[: len(example)]
    logits = hidden_nd @ np.asarray(model.params["embed"][...], np.float64).T
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))

    def nlls(chosen_n: np.ndarray) -> list[float]:
        return [-log_p[t - 1, example.tokens_n[t]] for t in np.flatnonzero(chosen_n) if t > 0]

    def mean(values: list[float]) -> float:
        return float(np.mean(values)) if values else math.nan

    nll = nlls(example.is_target_n)
    worst = sorted(nll, reverse=True)[: math.ceil(len(nll) / 10)]
    hidden = hidden_nd[example.in_prompt_n]
    with np.errstate(invalid="ignore"):
        embedding = hidden.sum(axis=0) / len(hidden)
    last = nll[-1] if nll else math.nan
    return ByHand(mean(nll), last, mean(worst), mean(nlls(example.in_prompt_n)), embedding)


def score(model: Model, examples: list[TokenizedExample], **how: Any) -> ExampleScores:
    how = {"batch_tokens": 1024, "chunk": 128, "prompts": True} | how
    return score_examples(model, examples, **how)[0]


def assert_same(ours: ExampleScores, theirs: ExampleScores) -> None:
    np.testing.assert_array_equal(ours.n_targets_n, theirs.n_targets_n)
    np.testing.assert_allclose(ours.embedding_nd, theirs.embedding_nd, rtol=1e-5, atol=1e-5)
    for name in NUMBERS:
        np.testing.assert_allclose(getattr(ours, name), getattr(theirs, name), rtol=1e-5, err_msg=name)


@pytest.fixture(scope="module")
def packed(model: Model) -> ExampleScores:
    return score(model, EXAMPLES)


def test_packed_is_unpacked(model: Model, packed: ExampleScores) -> None:
    alone = [by_hand(model, e) for e in EXAMPLES]
    np.testing.assert_allclose(packed.loss_n, [one.loss for one in alone], rtol=1e-5)
    np.testing.assert_allclose(packed.last_nll_n, [one.last for one in alone], rtol=1e-5)
    np.testing.assert_allclose(packed.worst_decile_nll_n, [one.worst_decile for one in alone], rtol=1e-5)
    assert packed.prompt_nll_n is not None
    np.testing.assert_allclose(packed.prompt_nll_n, [one.prompt for one in alone], rtol=1e-5)
    np.testing.assert_allclose(packed.embedding_nd, [one.embedding for one in alone], rtol=1e-5, atol=1e-5)
    assert packed.n_targets_n.tolist() == [int(e.is_target_n[1:].sum()) for e in EXAMPLES]
    no_target = [not e.is_target_n.any() for e in EXAMPLES]
    for of_targets in (packed.loss_n, packed.last_nll_n, packed.worst_decile_nll_n):
        assert np.isnan(of_targets).tolist() == no_target
    assert (packed.loss_n.dtype, packed.embedding_nd.dtype) == (np.float32, np.float32)


@pytest.mark.parametrize(
    "how", [{"batch_tokens": 256}, {"batch_tokens": 4096}, {"chunk": 1}, {"chunk": 10_000}], ids=str
)
def test_batch_and_chunk_change_nothing(model: Model, packed: ExampleScores, how: dict[str, Any]) -> None:
    assert_same(score(model, EXAMPLES, **how), packed)


def test_the_worst_tenth_is_the_same_with_and_without_a_sort() -> None:
    """With losses that are equal, 0 or rounded to below it, and with segments of no target."""
    rng = np.random.default_rng(2)
    segment_bt = np.where(rng.random((2, 96)) < 0.3, 5, rng.integers(0, 4, (2, 96))).astype(np.int32)
    nll_bt = rng.choice([-1e-7, 0.0, 0.5, 0.5, 2.0, 3.7, 11.0], (2, 96)).astype(np.float32)
    by_sort, by_threshold = (
        np.asarray(jax.jit(way, static_argnums=2)(nll_bt, segment_bt, 5))
        for way in (scoring.worst_by_sort, scoring.worst_by_threshold)
    )
    for row, segment in np.ndindex(2, 5):
        nll = np.sort(nll_bt[row][segment_bt[row] == segment])[::-1]
        worst = nll[: -(-len(nll) // 10)]
        expected = worst.mean() if len(worst) else np.nan
        np.testing.assert_allclose(by_sort[row, segment], expected, rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(by_threshold[row, segment], expected, rtol=1e-6, atol=1e-9)
    assert np.isnan(by_threshold[:, 4]).all()


def test_order_changes_nothing(model: Model, packed: ExampleScores) -> None:
    order = np.random.default_rng(1).permutation(len(EXAMPLES))
    shuffled = score(model, [EXAMPLES[i] for i in order])
    assert_same(shuffled, ExampleScores(*(values_n[order] for values_n in packed if values_n is not None)))


def test_the_prompts_are_read_only_if_asked(model: Model, packed: ExampleScores) -> None:
    without = score(model, EXAMPLES, prompts=False)
    assert without.prompt_nll_n is None
    np.testing.assert_allclose(without.loss_n, packed.loss_n, rtol=1e-5)
    prompts = [e for e in EXAMPLES if not e.is_target_n.any()]  # the head is applied to no target at all
    prompt_nll_n = score(model, prompts).prompt_nll_n
    assert prompt_nll_n is not None
    np.testing.assert_allclose(prompt_nll_n, [by_hand(model, e).prompt for e in prompts], rtol=1e-5)


@pytest.mark.parametrize("shape", [(2, 2, 2), (8, 1, 1), (1, 8, 1), (1, 2, 4)], ids=str)
def test_a_mesh_changes_nothing(directory: Path, packed: ExampleScores, shape: tuple[int, int, int]) -> None:
    mesh = make_mesh(MeshSettings(data=shape[0], fsdp=shape[1], tensor=shape[2]))
    assert_same(score(hf.load(directory, mesh=mesh), EXAMPLES), packed)


class Watched(Silent):
    """Remembers what it was told, by task."""

    def __init__(self) -> None:
        self.seen: dict[str, list[tuple[int, int]]] = {}

    @contextlib.contextmanager
    def task(self, name: str, unit: str = "samples") -> Iterator[Advance]:
        told = self.seen.setdefault(name, [])
        yield lambda done, total, note="", /: told.append((done, total))


def test_progress_counts_every_example_once_all_is_compiled(model: Model) -> None:
    watched = Watched()
    _, facts = score_examples(model, EXAMPLES, batch_tokens=512, chunk=128, progress=watched, name="loss")
    compiling, loss = watched.seen["loss: compiling"], watched.seen["loss"]
    assert list(watched.seen) == ["loss: compiling", "loss"]  # in this order, and nothing compiles later
    assert compiling == [(n, facts.shapes) for n in range(1, facts.shapes + 1)]
    assert loss[-1] == (len(EXAMPLES), len(EXAMPLES))
    assert loss == sorted(loss)


def with_prefix(n: int, examples: list[TokenizedExample]) -> list[TokenizedExample]:
    """All begin with the same n tokens of a template, which are neither prompt nor target."""
    prefix = np.random.default_rng(5).integers(3, 390, n).astype(np.int32)
    nothing = np.zeros(n, bool)
    return [
        dataclasses.replace(
            e,
            tokens_n=np.r_[prefix, e.tokens_n],
            is_target_n=np.r_[nothing, e.is_target_n],
            in_prompt_n=np.r_[nothing, e.in_prompt_n],
        )
        for e in examples
    ]


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2)], ids=str)
def test_a_prefix_that_is_read_once_a_row_changes_nothing(
    directory: Path, shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    examples = with_prefix(20, random_examples(40, longest=250))
    devices = jax.devices()[: math.prod(shape)]
    mesh = make_mesh(MeshSettings(**dict(zip(MESH_AXES, shape, strict=True))), devices)
    model = hf.load(directory, mesh=mesh)

    def scored() -> tuple[ExampleScores, PassFacts]:
        return score_examples(model, examples, batch_tokens=2048, chunk=128, prompts=True)

    shared, facts = scored()
    monkeypatch.setattr(scoring, "shares_prefixes", lambda kernel: False)
    alone, unshared = scored()
    assert_same(shared, alone)
    # Each row reads the prefix once, and each example has a first token of its own.
    assert facts.real_tokens < unshared.real_tokens - 20 * 30
    assert plan_losses(examples, True, 1, 2048, prompts=True).prefix == 20


def test_a_prefix_ends_where_something_is_read() -> None:
    """The same prompt, or the same first target, is every example's own."""
    tokens = np.arange(30, dtype=np.int32)
    at = np.arange(30)

    def prefix(prompt: int, target: int, prompts: bool = False) -> int:
        e = TokenizedExample("a", tokens, at >= target, (at >= prompt) & (at < target), False)
        plan = plan_losses([e, e], True, 1, 2048, prompts=prompts)
        assert all(len(tree.tokens_n) > plan.prefix for tree in plan.trees)
        return plan.prefix

    assert prefix(prompt=20, target=25) == 20
    assert prefix(prompt=20, target=25, prompts=True) == 19  # and where the prompt's first token is told
    assert prefix(prompt=25, target=25) == 24  # the position before the first target tells it
    assert prefix(prompt=30, target=30) == 29  # nothing is read, but each keeps a token
    assert prefix(prompt=MIN_PREFIX - 1, target=25) == 0
    other = TokenizedExample("b", tokens[::-1].copy(), at >= 25, at < 0, False)
    assert plan_losses([other], True, 1, 2048).prefix == 0


def test_what_nothing_depends_on_is_not_read() -> None:
    at = np.arange(30)
    e = TokenizedExample("a", at.astype(np.int32), (at >= 10) & (at < 20), at == 3, False)
    assert [len(tree.tokens_n) for tree in plan_losses([e], False, 1, 2048).trees] == [
        19
    ]  # the last target is told by 18


def test_a_batch_without_any_target(model: Model) -> None:
    nothing = [e for e in EXAMPLES if not e.is_target_n.any()]
    scores = score(model, nothing)
    assert np.isnan(scores.loss_n).all()
    assert not scores.n_targets_n.any()
    assert np.isfinite(scores.embedding_nd).any()


def test_nothing_to_score(model: Model) -> None:
    scores = score(model, [])
    assert (scores.loss_n.shape, scores.embedding_nd.shape) == ((0,), (0, 32))


def test_a_broken_model_gives_nulls_and_says_so(model: Model, tmp_path: Path) -> None:
    broken = model.with_params(jax.tree.map(lambda x: x * jnp.nan, model.params))
    scores = score(broken, EXAMPLES[:3])
    measured = Measured(["a", "b", "c"], scores.n_targets_n, np.zeros(3, bool), loss_post=scores.loss_n)
    write_scores(tmp_path / "scores.parquet", measured.to_table())
    table = read_scores(tmp_path / "scores.parquet").to_pydict()
    assert table["loss_post"] == [None] * 3
    assert table["error"] == ["loss_post is not finite"] * 3
    assert table["loss_pre"] == table["knn_ids"] == table["quality"] == [None] * 3


def test_meshes() -> None:
    assert dict(make_mesh().shape) == {"data": 1, "fsdp": 8, "tensor": 1}
    assert dict(make_mesh(MeshSettings(data=2, fsdp=2, tensor=-1)).shape) == {
        "data": 2,
        "fsdp": 2,
        "tensor": 2,
    }
    for wrong in (
        {"data": 3},
        {"data": -1},
        {"data": 1, "fsdp": 1, "tensor": 1},
        {"tensor": 0},
        {"fsdp": 16},
    ):
        with pytest.raises(ConfigError, match="does not fit 8 devices"):
            make_mesh(MeshSettings(**wrong))
