"""Laws of the pass over continuations: shared == separate == a log-softmax over everything."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.forward import forward
from support.tiny_model import FAMILIES, write_tiny_model

from middo_jax.config import MeshSettings
from middo_jax.models import hf
from middo_jax.models.model import Model
from middo_jax.parallel.mesh import make_mesh
from middo_jax.passes import continuations
from middo_jax.passes.continuations import Continuation, ContinuationScores, score_continuations, shared_texts

PASS = jax.jit(forward, static_argnums=0)
WIDTH = 128


def random_texts() -> list[Continuation]:
    """Questions after the same examples; answers begin alike, are equal, or are the beginning of others."""
    rng = np.random.default_rng(0)

    def tokens(n: int) -> list[int]:
        return rng.integers(3, 390, n).tolist()

    texts = []
    examples = tokens(30)
    for i in range(6):
        question = [*(examples if i % 2 else []), *tokens(int(rng.integers(1, 40)))]
        start = tokens(2)
        answers = [tokens(1), tokens(9), [*start, *tokens(3)], start, [*start, 7], start]
        texts += [Continuation(question, answer) for answer in answers]
    texts += [Continuation([5], [t]) for t in (6, 7, 5)]
    return [texts[i] for i in rng.permutation(len(texts))]


TEXTS = random_texts()


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"), **FAMILIES["smollm2"])


@pytest.fixture(scope="module")
def model(directory: Path) -> Model:
    return hf.load(directory)


def score(model: Model, texts: list[Continuation], batch_tokens: int = 1024) -> ContinuationScores:
    return score_continuations(model, texts, batch_tokens=batch_tokens, chunk=32)[0]


def log_probabilities(model: Model, whole: list[int]) -> np.ndarray:
    """One text alone: float64 log-softmax of all its logits."""
    at = jnp.arange(WIDTH)[None]  # padded behind, which nothing before it sees
    tokens = jnp.zeros((1, WIDTH), jnp.int32).at[0, : len(whole)].set(jnp.asarray(whole))
    hidden_btd = PASS(model.graphdef, model.params, tokens, jnp.where(at < len(whole), 0, -1), at)
    logits = np.asarray(hidden_btd[0], np.float64) @ np.asarray(model.params["embed"][...], np.float64).T
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def by_hand(model: Model, text: Continuation) -> tuple[float, bool]:
    whole = [*text.context, *text.continuation]
    log_p = log_probabilities(model, whole)
    targets = range(len(text.context), len(whole))
    greedy = all(int(log_p[t - 1].argmax()) == whole[t] for t in targets)
    return float(sum(log_p[t - 1, whole[t]] for t in targets)), greedy


def test_shared_texts_score_as_a_log_softmax_of_each_alone(model: Model) -> None:
    context = list(TEXTS[0].context)
    likeliest = int(log_probabilities(model, context)[len(context) - 1].argmax())
    texts = [*TEXTS, Continuation(context, [likeliest])]
    found = score(model, texts)
    alone = [by_hand(model, text) for text in texts]
    np.testing.assert_allclose(found.log_likelihood_n, [ll for ll, _ in alone], rtol=1e-5)
    assert found.is_greedy_n.tolist() == [greedy for _, greedy in alone]
    assert found.is_greedy_n[-1]
    assert not found.is_greedy_n.all()


def test_sharing_changes_nothing_and_saves_tokens(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    together, facts = score_continuations(model, TEXTS, batch_tokens=1024, chunk=32)
    monkeypatch.setattr(continuations, "MAX_TEXTS", 1)
    apart, facts_apart = score_continuations(model, TEXTS, batch_tokens=1024, chunk=32)
    np.testing.assert_allclose(together.log_likelihood_n, apart.log_likelihood_n, rtol=1e-5)
    np.testing.assert_array_equal(together.is_greedy_n, apart.is_greedy_n)
    assert facts.real_tokens < facts_apart.real_tokens / 3
    assert facts_apart.real_tokens == sum(len(t.context) + len(t.continuation) - 1 for t in TEXTS)


def test_answers_come_in_the_order_of_the_texts_in_any_batch(model: Model) -> None:
    found = score(model, TEXTS)
    order = np.random.default_rng(1).permutation(len(TEXTS))
    shuffled = score(model, [TEXTS[i] for i in order], batch_tokens=256)
    np.testing.assert_allclose(shuffled.log_likelihood_n, found.log_likelihood_n[order], rtol=1e-5)
    np.testing.assert_array_equal(shuffled.is_greedy_n, found.is_greedy_n[order])


def test_a_mesh_changes_nothing(directory: Path, model: Model) -> None:
    mesh = make_mesh(MeshSettings(data=2, fsdp=2, tensor=2))
    split = score(hf.load(directory, mesh=mesh), TEXTS)
    np.testing.assert_allclose(split.log_likelihood_n, score(model, TEXTS).log_likelihood_n, rtol=1e-5)


def test_no_tree_outgrows_its_bounds() -> None:
    many = [Continuation([5], [t % 300]) for t in range(300)]
    assert [len(one.texts) for one in shared_texts(many)] == [128, 128, 44]
    long = [Continuation([*range(3, 200), *[i] * 300], [1, 2]) for i in range(5, 11)]
    sizes = [len(one.tree.tokens_n) for one in shared_texts(long)]
    assert max(sizes) <= 1024
    assert sum(sizes) < 6 * 498


def test_nothing_to_score_and_nothing_before_it(model: Model) -> None:
    assert len(score(model, []).log_likelihood_n) == 0
    with pytest.raises(ValueError, match=r"text 1: .* at least one token"):
        score(model, [TEXTS[0], Continuation([], [1])])
    with pytest.raises(ValueError, match=r"text 0: .* at least one token"):
        score(model, [Continuation([1], [])])
