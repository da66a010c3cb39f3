"""Laws of the chain: a change makes stale what depends on it, and nothing else; redone, it is as before."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from support.local_tasks import write_local_tasks
from support.loop_fixture import Finished, begun, contents, settings
from support.said import Said

from middo_jax import stages
from middo_jax.config import ConfigError, affecting, load
from middo_jax.data.formats import DataError
from middo_jax.exporting import export_data
from middo_jax.loop import run_loop
from middo_jax.models.hf import CheckpointError
from middo_jax.progress import Silent
from middo_jax.report.build import build
from middo_jax.report.lineage import trace
from middo_jax.report.status import render_status, status
from middo_jax.rundir import (
    Manifest,
    RoundDir,
    RunDir,
    RunError,
    fingerprint,
    read_jsonl,
    write_json,
    write_jsonl,
)
from middo_jax.rundir.chain import chain
from middo_jax.rundir.link import assess
from middo_jax.rundir.manifest import Reason
from middo_jax.rundir.schemas import CONTRAST_ROWS
from middo_jax.rundir.tables import arrow_schema
from middo_jax.session import Session
from middo_jax.stages.measure import scored_as

SETTINGS_BEFORE = Path(__file__).parent / "config" / "settings_before_unions.yaml"
pytest_plugins = ["support.command", "support.loop_fixture"]

ROUND = ("train", "score", "select", "refine", "merge")
ALL = [("round_00", s) for s in ROUND] + [("round_01", s) for s in ROUND]
ALL += [("final", s) for s in ("train", "evaluate", "export")]
# What says when, where and how fast.
OF_THIS_RUN = ("config.yaml", "events.jsonl", "manifest.json", "report.html", "llm_cache.sqlite")


def reasons(run: RunDir, settings: list[str]) -> dict[tuple[str, str], str]:
    """Why stages of a finished run are stale under these settings."""
    config = load(None, settings)
    states = assess(chain(run, config), config)
    return {(link.folder.path.name, link.name): state.why.text for link, state in states if state.why}


def own(stale: dict[tuple[str, str], str]) -> set[tuple[str, str]]:
    """The stale ones but those that only follow."""
    return {key for key, why in stale.items() if not why.startswith("follows ")}


def results(run: RunDir) -> dict[str, bytes]:
    """Bytes of a run's results; of a training's metrics all but its speeds, which are the machine's."""
    found = {}
    for name, data in contents(run.path).items():
        if Path(name).name in OF_THIS_RUN or "/checkpoint/" in name:
            continue
        if name.endswith("metrics.jsonl"):
            rows = [json.loads(line) for line in data.splitlines()]
            data = json.dumps([{k: v for k, v in row.items() if k != "speed"} for row in rows]).encode()
        found[name] = data
    return found


@contextlib.contextmanager
def replaced(path: Path, text: str) -> Iterator[None]:
    before = path.read_bytes()
    path.write_text(text, encoding="utf-8")
    try:
        yield
    finally:
        path.write_bytes(before)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("train__gradient_accumulation", 8),  # as the advice for a step that does not fit the memory says
        ("train__remat", "none"),
        ("train__eval_every", 2),
        ("train__save_every", 7),
        ("model__attention", "xla"),
        ("mesh__fsdp", 1),
        ("scoring__batch_tokens", 4096),
        ("scoring__unembed_chunk", 64),
        ("serve__max_batch", 2),
        ("refine__concurrency", 2),
        ("refine__budget", "{usd: 3}"),
        ("train__trackers", "[tensorboard]"),
        ("refine__base_url", "http://127.0.0.1:9/v1"),
        # Of an axis that is not scored, and of gates that do not run with refine.accept=sane.
        ("consistency__m", 0.5),
        ("consistency__fraction", 0.5),
        ("refine__gates__context", 0.5),
        ("refine__gates__novelty", 0.5),
        ("refine__gates__agreement", 0.5),
    ],
)
def test_what_no_stage_depends_on_makes_nothing_stale(finished: Finished, name: str, value: object) -> None:
    assert reasons(finished.run, finished.settings(**{name: value})) == {}


def of_every(*stages: str) -> set[tuple[str, str]]:
    return {(folder, stage) for folder, stage in ALL if stage in stages}


@pytest.mark.parametrize(
    ("name", "value", "stale"),
    [
        ("train__learning_rate", 0.02, of_every("train")),
        ("train__optimizer", "adafactor", of_every("train")),
        ("train__optimizer__weight_decay", 0.5, of_every("train")),
        ("train__on_bad_step", "{skip: 9}", of_every("train")),
        ("seed", 9, {("round_00", "prepare"), *of_every("train", "refine")}),  # no score: nothing is sampled
        ("quality__method", "sample", of_every("score")),
        ("lora__rank", 2, of_every("train")),
        ("diversity__k", 3, of_every("score")),
        ("scoring__readings", "[ifd]", of_every("score")),
        ("complexity__fraction", 0.3, of_every("select")),
        ("complexity__normalise", "length", of_every("select")),
        ("refine__max_tokens", 777, of_every("refine")),
        ("refine__gates__duplicate", 0.7, of_every("refine")),
        ("refine__gates__open", "[numbers, code]", of_every("refine")),
        ("refine__growth", "keep", of_every("merge") | {("round_01", "prepare"), ("final", "prepare")}),
        ("data__limit", 20, {("round_00", "prepare")}),
        ("model__dtype", "bfloat16", of_every("train", "score", "refine", "evaluate", "export")),
        ("model__max_length", 500, {("round_00", "prepare"), *of_every("train", "score", "refine"),
                                    *of_every("evaluate")}),
        ("rounds", 3, {("final", "prepare"), ("final", "evaluate")}),
    ],
)  # fmt: skip
def test_a_setting_makes_stale_what_depends_on_it_and_what_follows(
    finished: Finished, name: str, value: object, stale: set[tuple[str, str]]
) -> None:
    found = reasons(finished.run, finished.settings(**{name: value}))
    assert own(found) == stale
    dotted = name.replace("__", ".")
    assert all(dotted in why for key, why in found.items() if key in own(found)) or name == "rounds"
    # Everything after the first stale stage follows from it, here where each stage reads the one before.
    order = [("round_00", "prepare"), *ALL]
    order.insert(order.index(("round_01", "train")), ("round_01", "prepare"))
    order.insert(order.index(("final", "train")), ("final", "prepare"))
    first = min(order.index(key) for key in found)
    assert set(found) == set(order[first:])


def test_the_context_of_the_embedded_endpoint_matters_where_it_is_used(finished: Finished) -> None:
    assert reasons(finished.run, finished.settings(serve__max_context=777)) == {}  # nothing is sampled either
    embedded = affecting(load(None, settings(finished.root)), {"rewrites"})
    assert "serve.max_context" in embedded


def test_the_threshold_of_an_optional_axis_makes_its_selection_stale_where_it_is_scored(
    tmp_path: Path,
) -> None:
    of_axis = {"scoring__readings": "[consistency]"}
    scored(tmp_path / "run", settings(tmp_path, **of_axis))
    config = load(None, settings(tmp_path, **of_axis))
    link = chain(RunDir(tmp_path / "run"), config)[3]
    for path in link.writes:
        path.write_text("x")
    link.begin().finish(config, 1.0)

    def why(**more: Any) -> str | None:
        config = load(None, settings(tmp_path, **more))
        reason = chain(RunDir(tmp_path / "run"), config)[3].why_stale(config)
        return None if reason is None else reason.text

    assert why(**of_axis) is None
    assert why(**of_axis, consistency__m=0.5) == "consistency.m was 1.0, is 0.5"
    assert why(consistency__m=0.5) is None


def test_the_other_threshold_makes_stale_the_selection_also_with_its_default(finished: Finished) -> None:
    other = {"complexity__fraction": "null", "complexity__m": 1.0}
    found = reasons(finished.run, finished.settings(**other))
    assert own(found) == of_every("select")
    assert found["round_00", "select"] == "complexity.m was null, is 1.0"


def test_the_seed_of_a_sampled_rating_is_one_of_scoring(tmp_path: Path) -> None:
    sampled = {"quality__method": "sample"}
    folder = scored(tmp_path / "run", settings(tmp_path, **sampled))
    assert folder.stages()["score"]["settings"]["seed"] == 3

    def why(**more: Any) -> str | None:
        config = load(None, settings(tmp_path, **sampled, **more))
        reason = chain(RunDir(tmp_path / "run"), config)[2].why_stale(config)
        return None if reason is None else reason.text

    assert why() is None
    assert why(seed=9) == "seed was 3, is 9"
    assert why(serve__max_context=777) == "serve.max_context was 1024, is 777"
    assert why(quality__temperature=0.5) == "quality.temperature was 0.1, is 0.5"


def test_one_more_round_continues_and_ends_like_a_run_of_two(finished: Finished, tmp_path: Path) -> None:
    def of(rounds: int) -> list[str]:
        return finished.settings(rounds=rounds, runs_dir=tmp_path)

    run = run_loop(load(None, of(1)), Silent())
    first, events = contents(run.round(0).path), len(read_jsonl(run.events))
    said = Said()
    run_loop(load(None, of(2)), said)
    assert begun(run, events) == [key for key in ALL if key[0] != "round_00"]
    assert contents(run.round(0).path) == first  # the manifest too
    assert results(run) == results(finished.run)
    assert "final prepare will be redone: it reads ../round_01/dataset.jsonl now" in said.lines


def flip(path: Path) -> None:
    """Changes one byte in the middle, and neither name nor size."""
    data = bytearray(path.read_bytes())
    at = data.find(b" a ")  # within a text, where there is any: what is damaged must be seen by its hash
    data[at + 1 if at >= 0 else len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def tear(path: Path) -> None:
    """Leaves a file that cannot be parsed."""
    path.write_bytes(path.read_bytes()[:-20] + b"{")


def weights(directory: RoundDir) -> Path:
    files = [p for p in (directory.checkpoint / "params").rglob("*") if p.is_file()]
    return max(files, key=lambda p: p.stat().st_size)


@pytest.mark.parametrize(
    ("damage", "redone", "why"),
    [
        (lambda run: run.round(1).dataset.unlink(), [], "dataset.jsonl is missing"),
        (lambda run: flip(run.round(1).scores), [("round_01", "score"), ("round_01", "select")],
         "scores.parquet is not as it was written"),
        (lambda run: flip(run.round(1).refined), [("round_01", "refine")],
         "refined.jsonl is not as it was written"),
        (lambda run: flip(weights(run.round(1))), [("round_01", "train")], "is not as it was written"),
        (lambda run: run.heldout_losses.unlink(), [("final", "evaluate")], "heldout_losses.json is missing"),
        (lambda run: run.final.own_format.unlink(), [], "train.jsonl is missing"),
        (lambda run: tear(run.round(1).selection), [("round_01", "select")],
         "selection.json is not as it was written"),
        (lambda run: tear(run.round(1).refined), [("round_01", "refine")],
         "refined.jsonl is not as it was written"),
        (lambda run: tear(run.heldout_losses), [("final", "evaluate")],
         "heldout_losses.json is not as it was written"),
        (lambda run: flip(run.final / "huggingface" / "model.safetensors"), [("final", "export")],
         "huggingface/model.safetensors is not as it was written"),
    ],
)  # fmt: skip
def test_what_is_damaged_is_made_again_with_the_same_bytes_and_nothing_else(
    finished: Finished,
    tmp_path: Path,
    damage: Callable[[RunDir], None],
    redone: list[tuple[str, str]],
    why: str,
) -> None:
    config = load(None, finished.settings(runs_dir=finished.copy(tmp_path)))
    run, asked = RunDir(tmp_path / "run"), len(finished.requests)
    before, events = results(run), len(read_jsonl(run.events))
    damage(run)
    state = status(run)
    told = {(r["name"], s): w for r in [*state["rounds"], state["final"]] for s, w in r["stale"].items()}
    assert not state["complete"]
    assert [w for w in told.values() if why in w]
    shown = render_status(state)
    assert "stale" in shown
    said = Said()
    run_loop(config, said)
    assert any("will be redone: " in line and why in line for line in said.lines)
    # A stage that follows is spared where what it reads came out the same.
    assert begun(run, events) == redone
    assert results(run) == before
    assert len(finished.requests) == asked
    assert status(run)["complete"]


def test_a_damaged_checkpoint_without_its_record_is_trained_again(finished: Finished, tmp_path: Path) -> None:
    """The record would have told; without it the files look finished."""
    runs_dir, said = finished.copy(tmp_path), Said()
    run = RunDir(tmp_path / "run")
    run.round(0).manifest.unlink()
    flip(run.round(0).checkpoint / "params" / "manifest.ocdbt")
    run_loop(load(None, finished.settings(runs_dir=runs_dir)), said)
    assert any("round_00/checkpoint is damaged; training starts again" in line for line in said.lines)
    assert results(run) == results(finished.run)
    assert status(run)["complete"]


def test_a_run_from_before_train_jsonl_gets_it_and_nothing_else_is_done_again(
    finished: Finished, tmp_path: Path
) -> None:
    config = load(None, finished.settings(runs_dir=finished.copy(tmp_path)))
    run = RunDir(tmp_path / "run")
    before, events = results(run), len(read_jsonl(run.events))
    manifest = json.loads(run.final.manifest.read_text(encoding="utf-8"))
    del manifest["checksum"], manifest["stages"]["prepare"]["files"]["train.jsonl"]
    write_json(run.final.manifest, manifest)
    run.final.own_format.unlink()
    said = Said()
    run_loop(config, said)
    assert "final prepare will be redone: it writes train.jsonl now" in said.lines
    assert begun(run, events) == []
    assert results(run) == before


def test_changed_data_makes_all_stale_and_missing_data_nothing(finished: Finished) -> None:
    data, given = finished.root / "data.json", finished.settings()
    with replaced(data, data.read_text(encoding="utf-8").replace("bread", "toast")):
        found = reasons(finished.run, given)
        assert own(found) == {("round_00", "prepare")}
        assert found["round_00", "prepare"] == f"data has changed: {data.resolve()}"
        assert {("round_00", "train"), ("final", "export")} <= found.keys()
    assert reasons(finished.run, given) == {}  # the same bytes at another time
    data.rename(data.with_name("away.json"))
    try:
        assert reasons(finished.run, given) == {}
    finally:
        data.with_name("away.json").rename(data)


def test_edited_data_stops_the_run_and_changes_nothing(finished: Finished) -> None:
    data, before = finished.root / "data.json", contents(finished.run.path)
    with (
        replaced(data, data.read_text(encoding="utf-8").replace("bread", "toast")),
        pytest.raises(RunError, match=r"was edited \(data has changed: .*name=NEW.*data\.if_changed=redo"),
    ):
        run_loop(load(None, finished.settings()), Silent())
    assert contents(finished.run.path) == before


def test_what_the_run_itself_writes_is_no_input_of_it(finished: Finished) -> None:
    run, before = finished.run, contents(finished.run.path)
    anywhere = run.path.parent / "**" / "*.jsonl"
    for name, path, why in (
        ("data.path", run.final.own_format, "is read as data and would be overwritten"),
        ("data.eval_path", run.heldout, "is read as data and would be overwritten"),
        ("data.path", run.round(1).dataset, "is read as data and would be overwritten"),
        ("data.path", anywhere, "is read as data and would be overwritten"),
        ("model.path", run.final.checkpoint, "the model is in this run's own folder"),
    ):
        given = [*finished.settings(), {name: str(path), "data.if_changed": "redo"}]
        with pytest.raises((DataError, RunError), match=why):
            run_loop(load(None, given), Silent())
    assert contents(run.path) == before


def test_a_changed_base_model_makes_stale_what_reads_it(finished: Finished) -> None:
    config = finished.root / "model" / "config.json"
    with replaced(config, config.read_text(encoding="utf-8").replace("{", "{ ", 1)):
        found = reasons(finished.run, finished.settings())
        assert own(found) == {
            ("round_00", "prepare"),
            *of_every("train", "score", "refine", "evaluate", "export"),
        }
    assert reasons(finished.run, finished.settings()) == {}


def test_a_touched_file_is_hashed_and_an_untouched_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RoundDir(tmp_path / "round_00")
    write_jsonl(folder.dataset, [1])
    write_jsonl(folder.selection, [2])
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "rows").write_text("rows")
    manifest = Manifest(folder.path)
    seen = manifest.see([folder.dataset], {"data": tmp_path / "data"})
    manifest.finish("select", [folder.selection], 1.0, seen=seen)
    hashed: list[Path] = []
    fingerprint = sys.modules["middo_jax.rundir.manifest"].fingerprint
    monkeypatch.setattr(
        "middo_jax.rundir.manifest.fingerprint",
        lambda path, *rest: hashed.append(path) or fingerprint(path, *rest),
    )
    assert manifest.why_stale("select") is None
    assert hashed == []
    folder.dataset.touch()
    assert manifest.why_stale("select") is None
    assert [path.name for path in hashed] == ["dataset.jsonl"]
    write_jsonl(folder.dataset, [3])
    assert manifest.why_stale("select") == Reason("dataset.jsonl has changed")
    write_jsonl(folder.dataset, [1])
    (tmp_path / "data" / "rows").write_text("other")
    assert manifest.why_stale("select") == Reason(f"data has changed: {tmp_path / 'data'}", input="data")


def test_an_edit_while_a_stage_runs_makes_it_stale(tmp_path: Path) -> None:
    config = load(None, settings(tmp_path))
    link = chain(RunDir(tmp_path / "run"), config)[3]
    write_jsonl(link.folder.scores, [1])
    begun = link.begin()
    write_jsonl(link.folder.scores, [2])
    for path in link.writes:
        write_jsonl(path, [3])
    begun.finish(config, 1.0)
    assert link.where == "round_00 select"
    assert link.why_stale(config) == Reason("scores.parquet has changed")


def test_a_large_file_is_known_by_its_size_and_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("middo_jax.rundir.manifest._WHOLE", 1 << 16)
    folder = RoundDir(tmp_path)
    weights = tmp_path / "weights"
    weights.write_bytes(bytes(range(256)) * 20_000)
    folder.finish("train", [weights], 1.0)
    assert folder.stages()["train"]["files"]["weights"].startswith("sampled:")
    assert folder.is_done("train")
    weights.touch()
    assert folder.is_done("train")
    with weights.open("ab") as file:
        file.write(b"x")
    assert not folder.is_done("train")
    weights.write_bytes(bytes(range(255, -1, -1)) * 20_000)
    assert not folder.is_done("train")


def test_embeddings_without_ids_are_measured_again(finished: Finished, tmp_path: Path) -> None:
    """A folder of the previous version has embeddings.npy, and a record that names it."""
    config = load(None, finished.settings(runs_dir=finished.copy(tmp_path), refine__accept="measured"))
    run = RunDir(tmp_path / "run")
    for here in run.rounds():
        here.embeddings.unlink()
        (here / "embeddings.npy").write_bytes(b"without ids")
        manifest = json.loads(here.manifest.read_text(encoding="utf-8"))
        del manifest["checksum"]
        record = manifest["stages"]["score"]
        del record["files"]["embeddings.parquet"], record["stats"]
        record["files"]["embeddings.npy"] = fingerprint(here / "embeddings.npy")
        write_json(here.manifest, manifest)
    states = {link.where: state.why for link, state in assess(chain(run, config), config)}
    assert states["round_00 train"] is None
    assert states["round_00 score"] == Reason("it writes embeddings.parquet now")
    session = Session(config, Silent())
    with pytest.raises(RunError, match=r"embeddings\.npy was written by an earlier version.*`middo score`"):
        stages.refine_round(session, run.round(0))
    render_status(status(run))
    assert trace(run, read_jsonl(run.round(0).dataset)[0]["id"])
    assert build(run).exists()


def test_a_setting_back_to_its_old_value_is_no_change(finished: Finished, tmp_path: Path) -> None:
    """The settings of a start that was broken off bind nothing that was done under others."""
    runs_dir = finished.copy(tmp_path)
    run = RunDir(tmp_path / "run")
    stale = status_under(run, finished.settings(runs_dir=runs_dir, train__num_epochs=2))
    assert stale
    assert status_under(run, finished.settings(runs_dir=runs_dir)) == set()


def status_under(run: RunDir, settings: list[str]) -> set[str]:
    """What `middo status` calls stale once config.yaml holds these settings."""
    run.config.write_text(load(None, settings).to_yaml(), encoding="utf-8")
    state = status(run)
    return {f"{r['name']} {s}" for r in [*state["rounds"], state["final"]] for s in r["stale"]}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"train__batch_size": 512}, r"the dataset fills \d+ of the 512 rows of a batch"),
        ({"train__eval_every": 2, "data__eval_fraction": 0}, "train.eval_every needs examples"),
        ({"model__max_length": 4}, "were cut"),
        ({"refine__model": "null"}, "refine.model is missing"),
        ({"mesh__fsdp": 3}, "does not fit"),
        ({"model__attention": "splash"}, "model.attention=splash cannot be used for a cpu"),
        ({"data__path": "none.json"}, "there is no file none.json"),
        ({"model__path": "./none"}, "no such file or directory"),
        ({"model__max_length": 192}, "quality: a question takes [0-9,]+ tokens, over model.max_length=192"),
    ],
)
def test_a_refused_start_leaves_no_folder(
    finished: Finished, tmp_path: Path, wrong: dict[str, Any], message: str
) -> None:
    config = load(None, finished.settings(runs_dir=tmp_path / "runs", **wrong))
    with pytest.raises((ConfigError, RunError, ValueError), match=message):
        run_loop(config, Silent())
    assert list(tmp_path.iterdir()) == []


def test_an_embedded_refiner_that_is_missing_leaves_no_folder(tmp_path: Path) -> None:
    (tmp_path / "made").mkdir()
    wrong = settings(tmp_path / "made", refine__model=tmp_path / "none", runs_dir=tmp_path / "runs")
    with pytest.raises(CheckpointError, match="none: no such file or directory"):
        run_loop(load(None, wrong), Silent())
    assert not (tmp_path / "runs").exists()


def test_a_refused_start_changes_nothing_of_a_finished_run(finished: Finished, tmp_path: Path) -> None:
    runs_dir = finished.copy(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(ConfigError, match="rows of a batch"):
        run_loop(load(None, finished.settings(runs_dir=runs_dir, train__batch_size=512)), Silent())
    assert contents(tmp_path) == before


def test_a_training_under_way_with_other_settings_is_begun_anew(finished: Finished, tmp_path: Path) -> None:
    more = {"runs_dir": finished.copy(tmp_path), "rounds": 2}
    run = RunDir(tmp_path / "run")
    run.final.forget("train")  # as if it had been killed before its record was written
    said = Said()
    run_loop(load(None, finished.settings(**more, train__learning_rate=0.02)), said)
    assert (
        read_jsonl(run.final.metrics)[-1]["learning_rate"]
        != read_jsonl(finished.run.final.metrics)[-1]["learning_rate"]
    )
    assert any("belongs to another training; training starts again" in line for line in said.lines)
    assert status(run)["complete"]


def scored(folder: Path, overrides: list[str]) -> RoundDir:
    """A round with a record of scoring, and no more in its files than a letter."""
    config = load(None, overrides)
    link = chain(RunDir(folder), config)[2]
    assert link.where == "round_00 score"
    (link.folder.checkpoint).mkdir(parents=True)
    for path in (*link.files, *link.writes, link.folder.checkpoint / "metadata.json"):
        path.write_text("x")
    link.begin().finish(config, 1.0)
    return link.folder


def test_a_record_names_the_settings_that_its_stage_depends_on_and_no_others(tmp_path: Path) -> None:
    named = scored(tmp_path / "run", settings(tmp_path)).stages()["score"]["settings"]
    assert {"diversity.k", "quality.method", "model.max_length"} <= named.keys()
    assert not [n for n in named if n.startswith(("train.", "refine.", "mesh.")) or n.endswith(".fraction")]


def test_measurements_are_of_no_use_to_other_scores(tmp_path: Path) -> None:
    """Embeddings before training are the same under every model: the name must tell models apart."""
    first = scored(tmp_path / "a", settings(tmp_path))
    same = scored(tmp_path / "b", settings(tmp_path, train__num_epochs=2))
    other = scored(tmp_path / "c", settings(tmp_path, quality__score="log_odds"))
    assert scored_as(first) == scored_as(same) != scored_as(other)
    (same.checkpoint / "metadata.json").write_text("another training")
    config = load(None, settings(tmp_path))
    chain(RunDir(tmp_path / "b"), config)[2].begin().finish(config, 1.0)
    assert scored_as(same) not in (scored_as(first), scored_as(other))


def test_margins_are_added_to_a_finished_run_and_taken_away_again(finished: Finished, tmp_path: Path) -> None:
    def of(wanted: bool) -> list[str]:
        return finished.settings(runs_dir=tmp_path, evaluate__contrast=wanted)

    finished.copy(tmp_path)
    events = len(read_jsonl(finished.run.events))
    run = run_loop(load(None, of(True)), Silent())
    assert begun(run, events) == [("final", "evaluate")]
    assert pq.read_schema(run.contrast_rows).equals(arrow_schema(CONTRAST_ROWS), check_metadata=True)
    assert run.heldout_rows.read_bytes() == finished.run.heldout_rows.read_bytes()
    state = status(run)
    assert state["complete"]
    assert [of_fault["fault"] for of_fault in state["contrast"]] == ["cut", "numbers", "swapped"]
    for of_fault in state["contrast"]:
        margins = of_fault["margins"]
        assert list(margins) == ["base", "round_00", "round_01", "final"]
        assert of_fault["change"] == pytest.approx(margins["final"] - margins["round_00"])
        assert of_fault["interval"][0] <= of_fault["change"] <= of_fault["interval"][1]
    assert "contrast margin, cut (" in render_status(state)
    assert "Contrast margin" in run.report.read_text(encoding="utf-8")
    assert export_data(run, tmp_path / "out").warning is None
    run_loop(load(None, of(False)), Silent())
    assert status(run)["contrast"] == []
    assert "Contrast margin" not in run.report.read_text(encoding="utf-8")


def test_benchmarks_are_added_to_a_finished_run_and_redone_alone(finished: Finished, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    folder = write_local_tasks(tmp_path / "tasks")

    def of(**more: Any) -> list[str]:
        tasks = {"evaluate__tasks": "[capitals]", "evaluate__include_path": folder}
        return finished.settings(runs_dir=tmp_path, **tasks, **more)

    finished.copy(tmp_path)
    run = run_loop(load(None, of()), Silent())
    folders = [*run.rounds(), run.final]
    events = len(read_jsonl(run.events))
    names = [[model["name"] for model in of_file["models"]] for of_file in map(read, folders)]
    assert names == [["base", "round_00"], ["round_01"], ["final"]]
    unchanged = {name: data for name, data in results(run).items() if not name.endswith("benchmarks.json")}
    assert unchanged == results(finished.run)
    assert [d.path.name for d in folders if "benchmark" in d.stages()] == [d.path.name for d in folders]
    state = status(run)
    assert state["benchmarks"]["models"] == ["base", "round_00", "round_01", "final"]
    assert "capitals  answer_p  log-likelihood  5" in render_status(state)
    assert "Benchmarks after each training" in run.report.read_text(encoding="utf-8")
    run_loop(load(None, of(evaluate__limit=3)), Silent())
    assert begun(run, events) == [(d.path.name, "benchmark") for d in folders]
    assert {row["n"] for row in read(run.final)["models"][0]["scores"]} == {3}


def read(folder: RoundDir) -> Any:
    return json.loads(folder.benchmarks.read_text(encoding="utf-8"))
