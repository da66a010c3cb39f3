"""Laws of a pass that is stopped: resumed is uninterrupted, bit for bit, and no batch is computed twice."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from support.loop_fixture import settings
from support.said import Said
from support.tiny_model import write_tiny_model

from middo_jax import stages
from middo_jax.config import MeshSettings, load
from middo_jax.data.tokenize import TokenizedExample
from middo_jax.models import hf
from middo_jax.models.model import Model
from middo_jax.parallel.mesh import make_mesh
from middo_jax.parallel.preemption import Preempted
from middo_jax.passes import parts as parts_of_a_pass
from middo_jax.passes import runner
from middo_jax.passes.losses import ExampleScores, LossPass
from middo_jax.passes.parts import Parts, digests
from middo_jax.passes.runner import PassFacts, PassPlan
from middo_jax.progress import Silent
from middo_jax.rundir import RoundDir
from middo_jax.session import Session, prepare, write_dataset
from middo_jax.training.identity import of_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    mesh = make_mesh(MeshSettings(data=1, fsdp=1, tensor=1), jax.devices()[:1])
    return hf.load(write_tiny_model(tmp_path_factory.mktemp("model")), mesh=mesh)


@pytest.fixture(scope="module")
def examples() -> list[TokenizedExample]:
    rng, made = np.random.default_rng(0), []
    for i in range(60):
        length = int(rng.integers(8, 60))
        is_target_n = np.arange(length) >= length // 2
        tokens_n = rng.integers(3, 390, length).astype(np.int32)
        made.append(TokenizedExample(str(i), tokens_n, is_target_n, ~is_target_n, False))
    return made


def scored(
    model: Model, examples: list[TokenizedExample], folder: Path | None, said: Said | None = None
) -> tuple[ExampleScores, PassFacts]:
    said = said or Said()
    parts = None if folder is None else Parts(folder, of_model(model), said, "loss")
    return LossPass(examples, model, 256, 64)(model, said, "loss", parts)


@pytest.fixture
def stopped_after(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Callable[[], int]]:
    """Makes passes stop behind their first n batches, or never; returns how to count the batches."""

    def after(batches: int | None = None) -> Callable[[], int]:
        count = itertools.count()

        def stop_point() -> None:
            if next(count) == batches:
                raise Preempted

        monkeypatch.setattr(runner, "stop_point", stop_point)
        return lambda: next(count)

    return after


def assert_identical(ours: ExampleScores, theirs: ExampleScores) -> None:
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("every_s", [0.0, 3600.0])
def test_resumed_is_uninterrupted_and_nothing_is_computed_twice(
    model: Model,
    examples: list[TokenizedExample],
    tmp_path: Path,
    stopped_after: Callable[..., Callable[[], int]],
    monkeypatch: pytest.MonkeyPatch,
    every_s: float,
) -> None:
    monkeypatch.setattr(parts_of_a_pass, "SAVE_EVERY_S", every_s)
    want, all_of_it = scored(model, examples, None)
    for batches in (3, 5):
        stopped_after(batches)
        with pytest.raises(Preempted):
            scored(model, examples, tmp_path)
    stopped_after()
    said, pack, packed = Said(), PassPlan.packed, []
    monkeypatch.setattr(PassPlan, "packed", lambda *a: packed.append(a) or pack(*a))
    got, rest = scored(model, examples, tmp_path, said)
    assert_identical(got, want)
    n_batches = all_of_it.computed_tokens // 256
    assert rest.computed_tokens == 256 * (n_batches - 5)
    assert len(packed) == n_batches - 5 + rest.shapes  # and the first batch of each shape, to compile it
    assert len(list(tmp_path.iterdir())) == (3 if every_s else n_batches)
    (found,) = [line for line in said.lines if "goes on after" in line]
    assert found.startswith("loss: goes on after ")
    again, nothing = scored(model, examples, tmp_path)
    assert_identical(again, want)
    assert (nothing.real_tokens, nothing.computed_tokens) == (0, 0)


def test_what_decides_the_results_is_in_the_key(
    model: Model, examples: list[TokenizedExample], tmp_path: Path
) -> None:
    scored(model, examples, tmp_path)
    parts = Parts(tmp_path, of_model(model), Silent(), "loss")
    content, static = (np.arange(6).reshape(2, 3), None, np.ones(2, bool)), {"chunk": 3}
    contents = [
        content,
        (content[0] + 1, None, content[2]),
        (content[0].reshape(3, 2), None, content[2]),
        (content[0], content[2], None),
        (content[0].astype(np.int32), None, content[2]),
    ]
    of_each = digests(5, contents.__getitem__)
    assert len(set(of_each)) == 5
    one, two = of_each[:2]
    others = [
        parts.key([[two], [one]], static),
        parts.key([[one, two]], static),
        parts.key([[one], [two], []], static),
        parts.key([[one]], static),
        parts.key([[one], [two]], {"chunk": 4}),
        Parts(tmp_path / "b", "other weights", Silent(), "loss").key([[one], [two]], static),
    ]
    assert parts.key([[one], [two]], static) == parts.key(iter([[one], [two]]), dict(static))
    assert len({parts.key([[one], [two]], static), *others}) == 7
    # One example's answer begins later: only its batch is computed again.
    changed = list(examples)
    e = examples[7]
    changed[7] = TokenizedExample(e.id, e.tokens_n, np.arange(len(e)) >= len(e) - 2, e.in_prompt_n, False)
    got, facts = scored(model, changed, tmp_path)
    assert_identical(got, scored(model, changed, None)[0])
    assert 0 < facts.computed_tokens <= 512


def test_parts_of_another_model_are_removed(
    model: Model, examples: list[TokenizedExample], tmp_path: Path
) -> None:
    scored(model, examples, tmp_path)
    before = {path.name for path in tmp_path.iterdir()}
    other = model.with_params(jax.tree.map(lambda x: x * 1.5, model.params))
    assert_identical(scored(other, examples, tmp_path)[0], scored(other, examples, None)[0])
    assert before.isdisjoint(path.name for path in tmp_path.iterdir())


@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
def test_a_damaged_part_is_told_and_computed_again(
    model: Model, examples: list[TokenizedExample], tmp_path: Path, damage: str
) -> None:
    want, _ = scored(model, examples, tmp_path)
    (part,) = tmp_path.iterdir()
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes({"flip": bytes(content), "cut": bytes(content[:-100]), "empty": b""}[damage])
    said = Said()
    assert_identical(scored(model, examples, tmp_path, said)[0], want)
    assert any(line.startswith(f"{part}: damaged") for line in said.lines)


def test_a_scoring_stage_goes_on_and_leaves_no_parts(
    tmp_path: Path, stopped_after: Callable[..., Callable[[], int]]
) -> None:
    config = load(None, settings(tmp_path, scoring__batch_tokens=256))
    write_tiny_model(tmp_path / "tuned", seed=1)
    said = Said()
    session = Session(config, said)
    directories = {name: RoundDir(tmp_path / name) for name in ("whole", "cut")}

    def score(name: str) -> None:
        stages.score_stage(session, directories[name], tmp_path / "tuned", tmp_path / "model")

    for directory in directories.values():
        write_dataset(directory, prepare(session)[0])
    batches = stopped_after()
    score("whole")
    for stop in (1, batches() - 1):  # in the pass before training, and in the ratings
        stopped_after(stop)
        with pytest.raises(Preempted):
            score("cut")
        assert "score" not in directories["cut"].stages()
        assert directories["cut"].scoring_parts.is_dir()
    stopped_after()
    score("cut")
    assert [line.partition(":")[0] for line in said.lines if "goes on after" in line] == [
        "loss before training",
        "loss before training",
        "loss and embeddings",
        "ratings",
    ]
    for file in ("scores", "embeddings"):
        whole, cut = (getattr(d, file).read_bytes() for d in (directories["whole"], directories["cut"]))
        assert whole == cut
    assert not directories["cut"].scoring_parts.exists()
