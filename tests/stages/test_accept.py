"""Acceptance by measurement over a round of a tiny model: what is accepted is better, and nothing is lost."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import runpy
import shutil
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.loop_fixture import contents, fake_refiner, rows_by_id, settings

from middo_jax import stages
from middo_jax.config import Config, GateSettings, load
from middo_jax.config.gates import PHASES, gate, gates
from middo_jax.data.example import Example
from middo_jax.loop import run_loop
from middo_jax.passes.losses import score_examples
from middo_jax.progress import Silent
from middo_jax.refinement import AnswerCache
from middo_jax.refinement.acceptance import table
from middo_jax.refinement.acceptance.candidate import Candidate, Check, Finding, Measurement
from middo_jax.rundir import RoundDir, RunDir, RunError, read_jsonl, write_json, write_jsonl
from middo_jax.session import Session
from middo_jax.signals.embeddings import read_embeddings
from middo_jax.signals.table import SCHEMA, read_scores, write_scores
from middo_jax.stages.measure import Rewrite, UnderTraining

TOPICS = ("the sea", "a cat", "fractions", "Paris", "rain", "bread", "the moon", "a train")
MEASURED = {
    "rounds": 1,
    "complexity__fraction": 0.3,
    "diversity__fraction": 0.3,
    "quality__fraction": 0.3,
    "refine__accept": "measured",
    "refine__gates__open": "[information, ending, floor]",  # what a random model says of an answer is noise
    "refine__gates__context": 0.9,  # of so few and so short prompts of a random model
}


def answer(text: str) -> str:
    """A refiner that does worse at first: a third of its rewrites are nonsense, and all its new samples are.

    Told why they were not accepted, it keeps to the words of the dataset.
    """
    topic = next((topic for topic in TOPICS if topic in text), "a cat")
    if "<prompt>" in text:
        told = any(feedback in text for row in gates() for feedback in row.feedback.values())
        tag = "core" if "<core>" in text else "original"
        [source] = re.findall(rf"<{tag}>\n(.*?)\n</{tag}>", text, re.DOTALL)
        if tag == "core":
            new = source.replace(topic, f"{topic} and the wind") if told else f"zq {len(source)} xv " * 5
        else:
            good = told or int(hashlib.sha256(source.encode()).hexdigest(), 16) % 3
            new = f"{source} {'Keep it short.' if good else 'qq zz vv.'}"
        return f"<prompt>{new}</prompt>"
    if "Keep it" in text or "wind" in text:
        return f"{topic.capitalize()} has 7 sides."
    return f"xq {len(text)} zvk?!# wqpl zx, {topic} kk jj vv."


class Measured(NamedTuple):
    """A finished run of one round, never changed by a test."""

    config: Config
    run: RunDir
    requests: list[dict[str, Any]]

    @property
    def round(self) -> RoundDir:
        return self.run.round(0)

    def candidates(self) -> list[dict[str, Any]]:
        return read_jsonl(self.round.candidates)

    def again(self, to: Path, **more: Any) -> RoundDir:
        """The round refined and merged once more, in a copy below `to`, with other settings of `refine`."""
        directory = RoundDir(to / "round_00")
        if not directory.path.exists():
            shutil.copytree(self.round.path, directory.path)
            directory.forget("refine")
        shutil.copy(self.run.llm_cache, to / "cache.sqlite")
        refine = self.config.refine.model_copy(update=more)
        session = Session(self.config.model_copy(update={"refine": refine}), Silent())
        heldout = [Example.from_json(row) for row in read_jsonl(self.run.heldout)]
        cache = AnswerCache(to / "cache.sqlite")
        try:
            stages.refine_stage(session, directory, 0, cache, heldout)
        finally:
            cache.close()
        write_jsonl(to / "merged.jsonl", (e.to_json() for e in stages.merge_stage(session, directory)))
        return directory


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Measured]:
    root = tmp_path_factory.mktemp("measured")
    with fake_refiner(answer=answer) as (url, requests):
        config = load(None, settings(root, url, **MEASURED))
        yield Measured(config, run_loop(config, Silent()), requests)


def test_what_is_accepted_is_better_on_its_own_axis_and_what_is_not_is_not(measured: Measured) -> None:
    threshold = json.loads(measured.round.selection.read_text(encoding="utf-8"))["axes"]["complexity"]
    bar, seen = threshold["threshold"]["loss_post"], set()
    for row in measured.candidates():
        if (m := row["measured"]) is None:
            continue
        before, axes = row["before"], row["axes"]
        helps = (
            ("complexity" not in axes or (m["loss"] < before["loss_post"] and m["loss"] <= bar))
            and ("quality" not in axes or (m["quality"] or 0) > before["quality"])
            and ("diversity" not in axes or m["core_similarity"] > before["knn_mean_sim"])
        )
        assert helps or not row["accepted"]
        if row["gate"] in ("loss", "coverage", "quality"):
            assert not helps
        assert (m["quality"] is not None) <= ("quality" in axes)  # nothing else is rated
        seen.add((row["op"], row["accepted"]))
    assert seen == {(op, kept) for op in ("simplify", "rewrite", "synthesize") for kept in (True, False)}


def test_a_measurement_is_what_scoring_would_say(measured: Measured) -> None:
    """Losses by a pass of its own over the accepted; similarities by comparing all with all."""
    directory, table = measured.round, read_scores(measured.round.scores)
    ids, k = table["id"].to_pylist(), measured.config.diversity.k
    known = {row["candidate_id"]: row for row in measured.candidates() if row["accepted"]}
    refined = [row for row in read_jsonl(directory.refined) if row["accepted"]]
    children = [Example.from_json(row["example"]) for row in refined]
    session = Session(measured.config, Silent())
    model = session.load_model(directory.checkpoint)
    scores, _ = score_examples(model, session.tokenize(children), batch_tokens=512, chunk=64)
    unit_nd = read_embeddings(directory.embeddings, ids)
    unit_nd /= np.linalg.norm(unit_nd, axis=1, keepdims=True)
    assert len(children) == len(known)
    for child, row, loss, embedding_d in zip(
        children, refined, scores.loss_n, scores.embedding_nd, strict=True
    ):
        m, source = known[child.id]["measured"], ids.index(row["source_id"])
        sims = unit_nd @ (embedding_d / np.linalg.norm(embedding_d))
        assert m["similarity"] == pytest.approx(sims[source], abs=1e-5)
        assert m["loss"] == pytest.approx(loss, rel=1e-4)
        if row["replaces"]:
            near = np.sort(np.delete(sims, source))[::-1][:k]
        else:
            near = np.sort(sims)[::-1][:k]
            own = np.sort(np.delete(unit_nd @ unit_nd[source], source))[::-1][:k]
            with_child = np.sort([*own, sims[source]])[::-1][:k].mean()
            assert m["core_similarity"] == pytest.approx(with_child, abs=1e-5)
        assert (m["nearest"], m["knn_similarity"]) == pytest.approx((near[0], near.mean()), abs=1e-5)
        assert child.lineage.scores_after == {
            "loss_pre": None,
            "loss_post": m["loss"],
            "knn_mean_sim": m["knn_similarity"],
            "quality": m["quality"],
        }


def test_a_rewrite_and_its_original_are_measured_in_the_same_way(measured: Measured) -> None:
    """The original in the place of its rewrite, then with another's answer; a new sample has no original."""
    tasks = stages.plan_refinement(measured.round)
    originals = list({task.original.id: task.original for task in tasks}.values())[:4]
    others = [*originals[1:], originals[0]]
    same = [Rewrite(one, one.id, "rewrite") for one in originals]
    strange = [
        Rewrite(one.replace_text(one.prompt, other.response, one.lineage), one.id, "rewrite")
        for one, other in zip(originals, others, strict=True)
    ]
    rewrites = [*same, *strange, Rewrite(originals[0], originals[0].id, "synthesize")]

    def found(gates: GateSettings) -> list[Measurement]:
        refine = measured.config.refine.model_copy(update={"gates": gates})
        session = Session(measured.config.model_copy(update={"refine": refine}), Silent())
        return UnderTraining(session, measured.round, measured.round.checkpoint).measure(rewrites)

    informed, plain = found(GateSettings()), found(measured.config.refine.gates)
    scored = {row["id"]: row for row in read_scores(measured.round.scores).to_pylist()}
    for original, own, other in zip(originals, informed, informed[4:], strict=False):
        assert own.end_nll == pytest.approx(scored[original.id]["end_nll"], rel=1e-4)
        assert None not in (own.pmi, own.reverse_ifd)
        assert own.pmi == pytest.approx(own.original_pmi, abs=1e-3)
        assert own.reverse_ifd == pytest.approx(own.original_reverse_ifd, rel=1e-4)
        assert other.original_pmi == pytest.approx(own.pmi, abs=1e-3)
        assert other.pmi != pytest.approx(own.pmi, abs=1e-3)
    assert informed[-1].pmi is informed[-1].original_reverse_ifd is None
    for known, less in zip(informed, plain, strict=True):
        assert (less.pmi, less.original_pmi) == (None, None)
        assert less.end_nll == pytest.approx(known.end_nll, rel=1e-4)


def test_rejected_rewrites_are_tried_again_and_told_why_and_then_the_original_stays(
    measured: Measured,
) -> None:
    rows = measured.candidates()
    first, second = ({r["task_id"]: r for r in rows if r["attempt"] == n} for n in (0, 1))
    assert len(first) + len(second) == len(rows)
    assert second.keys() == {task_id for task_id, row in first.items() if not row["accepted"]}
    assert {row["accepted"] for row in second.values()} == {True, False}
    asked = [row for row in read_jsonl(measured.round.requests) if row["step"] == "prompt"]
    for request in asked:
        told = request["messages"][-1]["content"]
        rejected_by = first[request["task_id"]]["gate"] if request["attempt"] else None
        given = {text for row in gates() for text in row.feedback.values() if text in told}
        assert len(given) == (rejected_by is not None)
        assert given <= set(gate(rejected_by).feedback.values() if rejected_by else ())
    refined = {row["task_id"]: row for row in read_jsonl(measured.round.refined)}
    final = rows_by_id(measured.run.final.dataset)
    for task_id, row in refined.items():
        assert row["attempts"] == 1 + (task_id in second)
        assert row["usage"]["requests"] == sum(
            r["task_id"] == task_id for r in read_jsonl(measured.round.requests)
        )
        if not row["accepted"] and row["op"] != "synthesize":
            assert row["source_id"] in final
    assert {r["example"]["id"] for r in refined.values() if r["accepted"]} <= final.keys()
    assert read_jsonl(measured.round.dropped) == []


def test_a_resumed_round_ends_with_the_same_bytes_and_measures_nothing_twice(
    measured: Measured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("candidates.jsonl", "requests.jsonl", "refined.jsonl", "dropped.jsonl")
    wanted, asked = contents(measured.round.path, *names), len(measured.requests)
    passes: list[int] = []
    measure = UnderTraining.measure

    def counted(self: UnderTraining, outcomes: Any) -> Any:
        passes.append(len(outcomes))
        return measure(self, outcomes)

    monkeypatch.setattr(UnderTraining, "measure", counted)
    rows = measured.candidates()
    first = {(r["task_id"], r["candidate_id"]): r["attempt"] for r in reversed(rows) if r["measured"]}
    by_attempt = [list(first.values()).count(n) for n in (0, 1)]  # what is written again is not new
    stale = [r | {"measured_under": "0" * 16} for r in rows]
    for kept, measured_now in (
        (rows, []),  # killed before the manifest was written
        ([r for r in rows if not r["attempt"]], by_attempt[1:]),  # during the second attempt
        ([], by_attempt),  # during the first
        (stale, by_attempt),  # scored by another model since
    ):
        place = tmp_path / str(len(list(tmp_path.iterdir())))
        shutil.copytree(measured.round.path, place / "round_00")
        directory = RoundDir(place / "round_00")
        directory.forget("refine")
        write_jsonl(directory.candidates, kept)
        passes.clear()
        measured.again(place)
        assert contents(directory.path, *names) == wanted
        assert passes == measured_now
    assert len(measured.requests) == asked  # every answer was in the cache


def test_a_stage_asks_each_gate_once_in_the_tables_order_and_none_after_the_one_that_rejects(
    measured: Measured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    met: defaultdict[tuple[str, int], list[str]] = defaultdict(list)

    def recorded(name: str, check: Check) -> Check:
        def recording(candidate: Candidate, value: Any) -> Finding | None:
            met[candidate.task.task_id, candidate.task.attempt].append(name)
            phase = PHASES.index(gate(name).needs)
            assert name == "readable" or candidate.prompt
            assert phase < PHASES.index("answer") or name == "answer_readable" or candidate.response
            assert phase < PHASES.index("dataset") or candidate.example
            assert phase < PHASES.index("measurement") or candidate.measured
            return check(candidate, value)

        return recording

    for name, check in list(table._CHECKS.items()):
        monkeypatch.setitem(table._CHECKS, name, recorded(name, check))
    directory = measured.again(tmp_path)
    order = [row.name for row in gates()]
    rows = read_jsonl(directory.candidates)
    assert len(rows) == len(met)
    for row in rows:
        names = met[row["task_id"], row["attempt"]]
        assert names == [name for name in order if name in names]
        assert names[-1] == (row["gate"] or "duplicate")
    assert {row["gate"] for row in rows} > {None, "coverage"}


def test_a_round_of_a_run_is_measured_as_the_loop_measured_it(measured: Measured, tmp_path: Path) -> None:
    """By its own checkpoint and among the run's held-out rows, wherever the run lies by now."""
    shutil.copytree(measured.run.path, tmp_path / "run")
    directory = RunDir(tmp_path / "run").round(0)
    record = directory.stages()["refine"]
    directory.forget("refine")
    directory.candidates.unlink()  # all is measured again
    stages.refine_round(Session(measured.config, Silent()), directory)
    names = ("candidates.jsonl", "requests.jsonl", "refined.jsonl")
    assert contents(directory.path, *names) == contents(measured.round.path, *names)
    again = directory.stages()["refine"]
    for name in ("reads", "inputs", "settings", "limits"):
        assert again[name] == record[name]
    assert {"checkpoint/metadata.json", "embeddings.parquet", "../heldout.jsonl"} <= again["reads"].keys()


def test_accept_none_takes_whatever_can_be_trained_on(measured: Measured, tmp_path: Path) -> None:
    directory = measured.again(tmp_path, accept="none", max_attempts=1)
    rows = read_jsonl(directory.refined)
    # But no conversation can stand twice in a dataset.
    rejected = [row for row in rows if not row["accepted"]]
    assert {(row["gate"], row["detail"].split()[0]) for row in rejected} <= {("duplicate", "equals")}
    accepted = [row for row in rows if row["accepted"]]
    assert len(accepted) > sum(row["accepted"] and not row["attempt"] for row in measured.candidates())
    assert all(row["measured"] is None for row in read_jsonl(directory.candidates))
    assert all(row["example"]["lineage"]["scores_after"] is None for row in accepted)
    added = sum(row["op"] == "synthesize" for row in accepted)
    assert len(read_jsonl(tmp_path / "merged.jsonl")) == len(rows_by_id(directory.dataset)) + added


def test_sane_looks_at_the_text_alone(measured: Measured, tmp_path: Path) -> None:
    directory = measured.again(tmp_path, accept="sane")
    rows = read_jsonl(directory.candidates)
    assert all(row["measured"] is None for row in rows)
    strict = {row["task_id"] for row in measured.candidates() if row["accepted"]}
    loose = {row["task_id"] for row in rows if row["accepted"]}
    assert strict < loose


@pytest.mark.parametrize("growth", ["keep", 0.05])
def test_growth_holds_the_size_and_names_what_goes(measured: Measured, tmp_path: Path, growth: Any) -> None:
    directory = measured.again(tmp_path, accept="none", max_attempts=1, growth=growth)
    before, merged = rows_by_id(directory.dataset), rows_by_id(tmp_path / "merged.jsonl")
    dropped = {row["id"]: row for row in read_jsonl(directory.dropped)}
    replaced = {row["replaces"] for row in read_jsonl(directory.refined) if row["accepted"]}
    assert len(merged) == len(before) + (0 if growth == "keep" else int(len(before) * growth))
    assert dropped
    for id_ in before:
        assert (id_ in merged) + (id_ in dropped) + (id_ in replaced) == 1
    table = pq.read_table(directory.selected).to_pylist()
    flagged = {row["id"] for row in table if row["hard"] or row["sparse"] or row["low_quality"]}
    for id_, row in dropped.items():
        assert row["reason"].startswith("redundant: " if id_ in before else "no room: ")
        assert id_ not in flagged
        assert row["example"]["lineage"]["root_id"]


def test_without_neighbours_nothing_can_make_room(measured: Measured, tmp_path: Path) -> None:
    directory = measured.again(tmp_path, accept="none", max_attempts=1)
    table = read_scores(directory.scores)
    at = table.schema.get_field_index("knn_ids")
    unknown = pa.nulls(len(table), SCHEMA.field("knn_ids").type)
    write_scores(directory.scores, table.set_column(at, SCHEMA.field("knn_ids"), unknown))
    refine = measured.config.refine.model_copy(update={"growth": "keep"})
    session = Session(measured.config.model_copy(update={"refine": refine}), Silent())
    with pytest.raises(RunError, match=r"refine\.growth=keep .* score the diversity axis too"):
        stages.merge_stage(session, directory)


def test_the_model_that_scored_is_named_or_the_error_says_what_to_do(
    measured: Measured, tmp_path: Path
) -> None:
    shutil.copytree(measured.round.path, tmp_path / "round_00")
    directory = RoundDir(tmp_path / "round_00")
    directory.forget("refine")
    manifest = json.loads(directory.manifest.read_text(encoding="utf-8"))
    del manifest["checksum"]
    for change, words in (
        ({"model": str(tmp_path / "none")}, "none is gone"),
        ({"model": None}, "not in its manifest"),
    ):
        manifest["stages"]["score"] |= change
        write_json(directory.manifest, manifest)
        with pytest.raises(RunError, match=rf"{words}.* run `middo score` again.*refine\.accept=sane"):
            measured.again(tmp_path)


def test_the_other_processes_load_the_model_when_process_0_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where an attempt has nothing to measure and something to rate."""
    told: list[bool] = []

    def together(value: Any) -> contextlib.AbstractContextManager[None]:
        told.append(value["loads"])
        return contextlib.nullcontext()

    monkeypatch.setattr(Session, "load_model", lambda self, path: path)
    monkeypatch.setattr("middo_jax.stages.measure.ratings", lambda session, model, examples: ({}, None))
    monkeypatch.setattr("middo_jax.stages.measure.quality", lambda answers: [])
    session = Session(load(None, ["model.path=none", "data.path=none"]), Silent())
    for _ in range(2):  # two attempts
        under = UnderTraining(session, RoundDir(tmp_path), tmp_path, together)
        under.rate([])
        under.rate([])
    assert told == [True, False, True, False]


def test_raw_prompts_are_measured_as_the_dataset_was(measured: Measured, tmp_path: Path) -> None:
    """With diversity.text=raw a sample's own prompt is as similar to it as can be."""
    shutil.copytree(measured.round.path, tmp_path / "round_00")
    directory = RoundDir(tmp_path / "round_00")
    diversity = measured.config.diversity.model_copy(update={"text": "raw"})
    session = Session(measured.config.model_copy(update={"diversity": diversity}), Silent())
    stages.score_stage(session, directory, directory.checkpoint, None, ["diversity"])
    tasks = stages.plan_refinement(measured.round)
    rewrites = [Rewrite(task.original, task.original.id, "rewrite") for task in tasks[:4]]
    for m in UnderTraining(session, directory, directory.checkpoint).measure(rewrites):
        assert m.similarity == pytest.approx(1.0, abs=1e-5)
        assert m.nearest is not None
        assert m.nearest < 1 - 1e-5


def test_the_benchmark_tells_ends_and_shows_the_pairs_with_the_smallest_ids(
    measured: Measured, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    script = Path(__file__).parents[2] / "benchmarks" / "refine_examples.py"
    monkeypatch.setattr("sys.argv", [str(script), str(measured.round.path)])
    runpy.run_path(str(script), run_name="__main__")
    told = capsys.readouterr().out
    rows = read_jsonl(measured.round.refined)
    ids = sorted(row["example"]["id"] for row in rows if row["accepted"])
    assert re.findall(r"^### `(\w+)`", told, re.MULTILINE) == ids[:10]
    assert f"## {len(ids)} of {len(rows)} samples accepted" in told
    counts = re.findall(r"^\| ([a-z ]+) \|.* (\d+) \| [\d.]+% \|$", told, re.MULTILINE)
    assert sum(int(n) for _, n in counts) == len(measured.candidates())
    assert ("accepted", str(len(ids))) in counts
