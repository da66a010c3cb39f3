"""Laws of the scoring stage: a later round finds what a first one would, and measures only what is new."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from safetensors.numpy import load_file, save_file
from support.loop_fixture import settings
from support.tiny_model import write_tiny_model

from middo_jax import stages
from middo_jax.config import load
from middo_jax.data.example import Example, Message
from middo_jax.data.tokenize import TokenizedExample
from middo_jax.progress import Silent
from middo_jax.report.terminal import render_selection
from middo_jax.rundir import RoundDir, RunDir, RunError, fingerprint
from middo_jax.session import Session, prepare, write_dataset
from middo_jax.signals.duplicates import count_duplicates, prompt_hash
from middo_jax.signals.embeddings import read_embeddings, write_embeddings
from middo_jax.signals.select import select
from middo_jax.signals.table import as_floats, read_scores
from middo_jax.stages.accept import Acceptance
from middo_jax.stages.measure import Rewrite, UnderTraining
from middo_jax.stages.score import _require_scores


@dataclasses.dataclass(frozen=True)
class Folder:
    """Two models, a dataset, and rounds scored in `root`."""

    root: Path

    @property
    def base(self) -> Path:
        return self.root / "model"

    @property
    def tuned(self) -> Path:
        return self.root / "tuned"

    def session(self, **more: Any) -> Session:
        return Session(load(None, settings(self.root, **more)), Silent())

    def score(
        self,
        name: str,
        examples: Sequence[Example],
        earlier: RoundDir | None = None,
        axes: tuple[str, ...] = ("complexity", "diversity"),
        **more: Any,
    ) -> RoundDir:
        """Scores examples in a fresh folder, and selects."""
        shutil.rmtree(self.root / name, ignore_errors=True)
        directory, session = RoundDir(self.root / name), self.session(**more)
        write_dataset(directory, examples)
        stages.score_stage(session, directory, self.tuned, self.base, axes, earlier=earlier)
        stages.select_stage(session.config, directory)
        return directory


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    root = tmp_path_factory.mktemp("folder")
    settings(root)
    write_tiny_model(root / "tuned", seed=1)
    return Folder(root)


@pytest.fixture(scope="module")
def examples(folder: Folder) -> list[Example]:
    return prepare(folder.session())[0]


def edited(examples: list[Example]) -> list[Example]:
    """One sample replaced, one gone, one new; one with another answer."""
    new = [
        Example((Message("user", f"What is a {x}?"), Message("assistant", f"A {x} is.")))
        for x in ("cat", "sea")
    ]
    answered = Example((*examples[5].messages[:-1], Message("assistant", "No, it is another answer.")))
    return [examples[0], new[0], *examples[3:5], answered, *examples[6:], new[1]]


def score_record(directory: RoundDir) -> dict[str, Any]:
    return directory.stages()["score"]


def ids_of(directory: RoundDir) -> list[str]:
    return read_scores(directory.scores)["id"].to_pylist()


def embeddings(directory: RoundDir) -> np.ndarray:
    return read_embeddings(directory.embeddings, ids_of(directory))


def assert_same_scores(ours: RoundDir, theirs: RoundDir) -> None:
    a, b = read_scores(ours.scores), read_scores(theirs.scores)
    for name in a.column_names:
        if name == "pmi":  # a difference of two losses, each of them within its tolerance, times the targets
            losses = as_floats(b, "loss_post") + as_floats(b, "loss_unconditional")
            off = np.abs(as_floats(a, name) - as_floats(b, name))
            assert (
                np.nan_to_num(off) <= 1e-5 * np.nan_to_num(as_floats(b, "n_target_tokens") * losses)
            ).all()
        elif pa.types.is_floating(a[name].type):
            x, y = (np.asarray(t[name].to_pylist(), float) for t in (a, b))
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
        elif name == "knn_sims":
            np.testing.assert_allclose(a[name].to_pylist(), b[name].to_pylist(), rtol=0, atol=1e-5)
        else:
            assert a[name].to_pylist() == b[name].to_pylist(), name
    np.testing.assert_allclose(embeddings(ours), embeddings(theirs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("embedder", ["pre", "post"])
@pytest.mark.parametrize("text", ["templated", "raw"])
@pytest.mark.parametrize("ignore", [False, True])
def test_a_later_round_is_a_first_one(
    folder: Folder, examples: list[Example], embedder: str, text: str, ignore: bool
) -> None:
    how: dict[str, Any] = {
        "diversity__embedder": embedder,
        "diversity__text": text,
        "diversity__ignore_duplicates": str(ignore).lower(),
    }
    first, later = folder.score("first", examples, **how), edited(examples)
    updated = folder.score("updated", later, first, **how)
    assert_same_scores(updated, folder.score("scratch", later, **how))
    record = score_record(updated)
    assert record["n_kept"] == len(later) - 3
    assert score_record(first)["n_kept"] == 0
    if embedder == "post":
        assert record["n_searched"] == len(later)
        assert record["embedder"] == record["model"] == str(folder.tuned)
    else:
        assert 3 <= record["n_searched"] < len(later)
        assert record["embedder"] == str(folder.base)
    # And on from there.
    again = folder.score("again", later[1:], updated, **how)
    assert_same_scores(again, folder.score("scratch", later[1:], **how))
    assert score_record(again)["n_kept"] == len(later) - 1


ALL_AXES = ("complexity", "diversity", "quality", "consistency")


@pytest.mark.parametrize(("text", "axes"), [("templated", ALL_AXES), ("raw", ("diversity",))])
def test_a_folder_that_is_scored_again_after_an_edit_is_a_new_one(
    folder: Folder, examples: list[Example], text: str, axes: tuple[str, ...]
) -> None:
    how: dict[str, Any] = {"diversity__embedder": "post", "diversity__text": text}
    how["scoring__readings"] = "[prompt_nll,ifd,pmi,reverse_ifd]" if text == "templated" else "[]"
    directory, later = folder.score("first", examples, axes=axes, **how), edited(examples)
    full = sum(facts["real_tokens"] for facts in score_record(directory)["passes"].values())
    for rows, n_new in ((later, 3), (later[1:], 0)):
        write_dataset(directory, rows)
        session = folder.session(**how)
        stages.score_stage(session, directory, folder.tuned, folder.base, axes, earlier=directory)
        assert_same_scores(directory, folder.score("scratch", rows, axes=axes, **how))
        record = score_record(directory)
        assert record["n_kept"] == len(rows) - n_new
        assert sum(facts["real_tokens"] for facts in record["passes"].values()) < full / 3
        assert n_new <= record["n_searched"] < len(rows)


def test_a_stop_while_scores_are_replaced_leaves_no_record_of_them(
    folder: Folder, examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the next start would find other scores than those of the record, and refuse."""
    directory, session = folder.score("stopped", examples, axes=("complexity",)), folder.session()

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("middo_jax.stages.score.write_embeddings", stop)
    with pytest.raises(KeyboardInterrupt):
        stages.score_stage(session, directory, folder.tuned, folder.base, ("complexity",))
    assert directory.stages().keys() == {"prepare"}


def test_embeddings_before_training_are_the_base_models(folder: Folder, examples: list[Example]) -> None:
    pre = folder.score("pre", examples, diversity__embedder="pre")
    shutil.rmtree(folder.root / "base", ignore_errors=True)
    directory, session = RoundDir(folder.root / "base"), folder.session()
    write_dataset(directory, examples)
    stages.score_stage(session, directory, folder.base, None, ["diversity"])
    np.testing.assert_allclose(embeddings(pre), embeddings(directory), rtol=1e-5, atol=1e-5)
    names = ["knn_ids", "prompt_hash"]
    tables = [read_scores(d.scores).select(names).to_pydict() for d in (pre, directory)]
    assert tables[0] == tables[1]
    with pytest.raises(RunError, match=r"diversity\.embedder=pre.*--pre-model"):
        stages.score_stage(
            folder.session(diversity__embedder="pre"), directory, folder.tuned, None, ["diversity"]
        )


def test_rewrites_are_compared_in_the_datasets_own_space(folder: Folder, examples: list[Example]) -> None:
    """Embedded by the model that embedded the dataset: a sample's own prompt is as similar as can be."""
    directory = folder.score("measured", examples, diversity__embedder="pre")
    session = folder.session(diversity__embedder="pre")
    tasks = stages.plan_refinement(directory)
    rewrites = [Rewrite(task.original, task.original.id, "rewrite") for task in tasks[:3]]
    assert rewrites
    for m in UnderTraining(session, directory, folder.tuned).measure(rewrites):
        assert m.similarity == pytest.approx(1.0, abs=1e-5)


def test_nothing_changed(folder: Folder, examples: list[Example]) -> None:
    first = folder.score("first", examples, diversity__embedder="pre")
    again = folder.score("again", examples, first, diversity__embedder="pre")
    assert_same_scores(first, again)
    assert (score_record(again)["n_kept"], score_record(again)["n_searched"]) == (len(examples), 0)


def tampered(directory: RoundDir) -> None:
    write_embeddings(directory.embeddings, ids_of(directory), embeddings(directory) + 1)


def shuffled(directory: RoundDir) -> None:
    """Puts the rows of the embeddings in another order, as if the stage had written them so."""
    ids = ids_of(directory)
    embedding_nd, order = embeddings(directory), np.random.default_rng(0).permutation(len(ids))
    write_embeddings(directory.embeddings, [ids[i] for i in order], embedding_nd[order])
    manifest = json.loads(directory.manifest.read_text(encoding="utf-8"))
    del manifest["checksum"]
    record = manifest["stages"]["score"]
    record["files"][directory.embeddings.name] = fingerprint(directory.embeddings)
    del record["stats"]
    directory.manifest.write_text(json.dumps(manifest), encoding="utf-8")


def test_the_order_of_the_rows_of_the_embeddings_does_not_matter(
    folder: Folder, examples: list[Example]
) -> None:
    """A later round, its selection, and what the gates see of a rewrite are the same, bit for bit."""
    how: dict[str, Any] = {"diversity__embedder": "pre", "refine__accept": "measured"}
    first, session = folder.score("ordered", examples, **how), folder.session(**how)

    def seen() -> tuple[Any, ...]:
        later = folder.score("later", edited(examples), first, **how)
        assert score_record(later)["n_kept"] == len(edited(examples)) - 3
        limits = Acceptance(session, first, (), folder.tuned).limits
        tasks = stages.plan_refinement(first)[:3]
        rewrites = [Rewrite(task.original, task.original.id, "rewrite") for task in tasks]
        measured = UnderTraining(session, first, folder.tuned).measure(rewrites)
        selection = later.selection.read_text(encoding="utf-8")
        return read_scores(later.scores), embeddings(later).tolist(), selection, limits, measured

    before = seen()
    shuffled(first)
    assert seen() == before


def without_manifest(directory: RoundDir) -> None:
    manifest = json.loads(directory.manifest.read_text(encoding="utf-8"))
    del manifest["checksum"]
    del manifest["stages"]["score"]
    directory.manifest.write_text(json.dumps(manifest), encoding="utf-8")


@pytest.mark.parametrize(
    ("change", "more"),
    [
        (None, {"diversity__k": 3}),
        (None, {"diversity__text": "raw"}),
        (None, {"model__max_length": 32}),
        (None, {"model__template": "default"}),
        (None, {"model__dtype": "bfloat16"}),
        (None, {"diversity__ignore_duplicates": "true"}),
        (tampered, {}),
        (without_manifest, {}),
    ],
)
def test_what_was_measured_otherwise_is_not_used(
    folder: Folder, examples: list[Example], change: Callable[[RoundDir], None] | None, more: dict[str, Any]
) -> None:
    first = folder.score("first", examples, diversity__embedder="pre")
    if change is not None:
        change(first)
    later = folder.score("later", examples, first, **{"diversity__embedder": "pre", **more})
    assert score_record(later)["n_kept"] == 0


def test_other_weights_at_the_same_place_are_another_model(folder: Folder, examples: list[Example]) -> None:
    first = folder.score("first", examples, diversity__embedder="pre")
    kept = (folder.base / "model.safetensors").read_bytes()
    write_tiny_model(folder.base, seed=9)
    try:
        later = folder.score("later", examples, first, diversity__embedder="pre")
        assert score_record(later)["n_kept"] == 0
        assert_same_scores(later, folder.score("scratch", examples, diversity__embedder="pre"))
    finally:
        (folder.base / "model.safetensors").write_bytes(kept)


def repeated(examples: list[Example]) -> list[Example]:
    """Some prompts twice or three times, with other answers."""
    twins = [Example((*e.messages[:-1], Message("assistant", f"Again {e.id}."))) for e in examples[:3]]
    return [*examples, *twins, Example((*examples[0].messages[:-1], Message("assistant", "Thrice.")))]


def test_duplicates_are_reported_and_may_be_ignored(folder: Folder, examples: list[Example]) -> None:
    with_twins = repeated(examples)
    directory = folder.score("twins", with_twins)
    table = read_scores(directory.scores)
    _, selection = select(table, folder.session().config)
    expected = {"n_groups": 3, "n_samples": 7}
    assert selection["duplicates"] == score_record(directory)["duplicates"] == expected
    assert "same prompt       7 in 3 groups" in render_selection(selection)
    of = dict(zip(table["id"].to_pylist(), table["prompt_hash"].to_pylist(), strict=True))
    nearest = [ids[0] for ids in table["knn_ids"].to_pylist()]
    assert of[nearest[0]] == of[with_twins[0].id]  # as published: a twin is the nearest of all
    assert table["knn_sims"].to_pylist()[0][0] == pytest.approx(1, abs=1e-5)

    ignoring = read_scores(folder.score("ignoring", with_twins, diversity__ignore_duplicates="true").scores)
    for id_, ids in zip(ignoring["id"].to_pylist(), ignoring["knn_ids"].to_pylist(), strict=True):
        assert of[id_] not in [of[i] for i in ids]
    # Twins see the same others: the twin's own twins are out of sight, whichever of them one is.
    sims = np.asarray(ignoring["knn_sims"].to_pylist())
    np.testing.assert_allclose(sims[len(examples)], sims[0], atol=1e-5)


def test_the_hash_is_of_what_the_embedding_sees() -> None:
    tokens, targets, prompt = np.arange(8, dtype=np.int32), np.arange(8) >= 5, np.isin(np.arange(8), [2, 3])

    def hash_of(**changes: Any) -> str:
        base = {"tokens_n": tokens, "is_target_n": targets, "in_prompt_n": prompt}
        return prompt_hash(TokenizedExample("x", truncated=False, **{**base, **changes}))

    behind, before, marks = tokens.copy(), tokens.copy(), prompt.copy()
    behind[4], before[0], marks[1] = 99, 99, True
    assert hash_of() == hash_of(tokens_n=behind) == hash_of(is_target_n=~targets)
    assert len({hash_of(), hash_of(tokens_n=before), hash_of(in_prompt_n=marks)}) == 3
    assert count_duplicates("abaca") == {"n_groups": 1, "n_samples": 3}
    assert count_duplicates([]) == {"n_groups": 0, "n_samples": 0}


def test_the_reverse_ratio_is_of_the_prompt_with_and_without_its_response(
    folder: Folder, examples: list[Example]
) -> None:
    wanted = {"axes": ("diversity",), "scoring__readings": "[reverse_ifd]"}
    table = read_scores(folder.score("reverse", examples, **wanted).scores)
    prompt, ratio = as_floats(table, "prompt_nll"), as_floats(table, "reverse_ifd")
    assert np.isfinite(prompt).all()
    single = np.array([len([m for m in e.messages if m.role != "system"]) == 2 for e in examples])
    assert np.isfinite(ratio).tolist() == single.tolist()
    assert single.any()
    assert table["error"].null_count == len(examples)


def test_ifd_is_a_column(folder: Folder, examples: list[Example]) -> None:
    table = read_scores(folder.score("ifd", examples, axes=("diversity",), scoring__readings="[ifd]").scores)
    post, alone, ratio = (
        np.asarray(table[name].to_pylist(), float) for name in ("loss_post", "loss_unconditional", "ifd")
    )
    assert np.isfinite(alone).all()
    np.testing.assert_allclose(ratio, post / alone, rtol=1e-6)
    without = read_scores(folder.score("plain", examples, axes=("diversity",)).scores)
    for free in ("end_nll", "worst_decile_nll"):
        assert table[free].null_count == without[free].null_count == 0
        np.testing.assert_allclose(as_floats(without, free), as_floats(table, free), rtol=1e-5)
    assert without["ifd"].null_count == without["loss_unconditional"].null_count == len(examples)


def test_scores_that_hold_no_number_are_an_error_and_no_file(folder: Folder, examples: list[Example]) -> None:
    """Finite weights whose products are not: every loss is NaN."""
    broken = write_tiny_model(folder.root / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"] = np.full_like(tensors["model.norm.weight"], 3e38)
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    directory = RoundDir(folder.root / "null")
    write_dataset(directory, examples)
    with pytest.raises(RunError, match=r"none of the \d+ samples has a finite loss_post.*model\.dtype"):
        stages.score_stage(folder.session(), directory, broken, folder.base, ("complexity", "diversity"))
    with pytest.raises(
        RunError, match=r"finite loss_pre: .* The model before training, .*broken, computes NaN"
    ):
        stages.score_stage(folder.session(), directory, folder.base, broken, ("complexity",))
    assert not directory.scores.exists()
    assert "score" not in directory.stages()
    with pytest.raises(RunError, match=r"the held-out loss under base .* is nan"):
        stages.measure_heldout(folder.session(), RunDir(folder.root), {"base": broken}, examples)


@pytest.mark.parametrize(
    ("name", "axis"), [("loss_post", "complexity"), ("knn_mean_sim", "diversity"), ("quality", "quality")]
)
def test_a_column_that_an_axis_needs_may_not_be_empty(folder: Folder, name: str, axis: str) -> None:
    numbers = {"loss_post": [1.0, 2.0], "knn_mean_sim": [0.1, 0.2], "quality": [5.0, None]}
    _require_scores(folder.session(), pa.table(numbers), {axis}, None)
    empty = pa.table(numbers | {name: pa.nulls(2, pa.float64())})
    with pytest.raises(RunError, match=f"none of the 2 samples has a finite {name}"):
        _require_scores(folder.session(), empty, {axis}, None)
