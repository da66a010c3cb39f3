"""The recipes of docs/contributing.md, run for real: what is registered from outside is used everywhere."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pydantic
import pytest
from support.forward import forward
from support.loop_fixture import write_data
from support.synthetic_run import write_run
from support.tiny_model import VOCAB_SIZE, write_tiny_model

import middo_jax as middo
from middo_jax.config import Config, ConfigError, leaves, load
from middo_jax.config.axis_table import Axis
from middo_jax.data import formats
from middo_jax.data.example import Example, Message
from middo_jax.data.layout import to_rows
from middo_jax.data.sources import DataError, read, write
from middo_jax.models import families
from middo_jax.models.config import UnsupportedModel, read_config
from middo_jax.models.hf import load as load_model
from middo_jax.refinement.acceptance import table as gate_table
from middo_jax.refinement.acceptance.candidate import Candidate
from middo_jax.refinement.tasks import Task, Verdict
from middo_jax.report.axes import shown_axes
from middo_jax.report.build import page
from middo_jax.report.terminal import render_selection
from middo_jax.rundir import RoundDir, RunDir, read_jsonl, write_json
from middo_jax.rundir.chain import chain
from middo_jax.rundir.link import assess
from middo_jax.signals import axes as axis_columns
from middo_jax.signals.select import schema, select
from middo_jax.signals.table import SCHEMA, as_floats, read_scores
from middo_jax.stages import plan_refinement

PAGE = Path(__file__).parents[2] / "docs" / "contributing.md"
NEEDED = ["model.path=m", "data.path=d"]
EXAMPLE = Example((Message("user", "Why?"), Message("assistant", "So.")))


def recipe(title: str) -> str:
    """The one code block of a section of the page."""
    section = PAGE.read_text(encoding="utf-8").split(f"\n## {title}\n")[1].split("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    return code


def test_every_code_block_of_the_page_is_a_recipe_that_is_run_here() -> None:
    titles = re.findall(r"\n## (.*)\n(?:(?!\n## )[\s\S])*?```python", PAGE.read_text(encoding="utf-8"))
    assert titles == ["A model family", "A gate", "An axis", "A data format", "A setting"]


# A model family


@pytest.fixture
def ministral(tmp_path: Path) -> Path:
    """A directory of a family that the package does not have."""
    directory = write_tiny_model(tmp_path / "ministral", model_type="mistral", tie=False, sliding_window=24)
    fields = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    write_json(
        directory / "config.json",
        {**fields, "model_type": "ministral", "architectures": ["MinistralForCausalLM"]},
    )
    return directory


@pytest.fixture
def with_family() -> Iterator[None]:
    try:
        exec(recipe("A model family"), {})
        yield
    finally:
        families.unregister("ministral")


def logits(directory: Path, tokens: np.ndarray) -> np.ndarray:
    loaded = load_model(directory)
    row = jnp.asarray(tokens[None])
    hidden_btd = forward(
        loaded.graphdef, loaded.params, row, jnp.ones_like(row), jnp.arange(len(tokens))[None]
    )
    return np.asarray(hidden_btd[0] @ jnp.asarray(loaded.params["lm_head"]).T)


def test_a_family_is_loaded_once_it_is_registered(ministral: Path) -> None:
    with pytest.raises(UnsupportedModel, match="model_type 'ministral' is not supported"):
        read_config(ministral)
    try:
        exec(recipe("A model family"), {})
        with pytest.raises(ValueError, match="there is a family with model_type 'ministral' already"):
            exec(recipe("A model family"), {})
        config = read_config(ministral)
        assert [kind.window for kind in config.kinds] == [24]
    finally:
        families.unregister("ministral")
    with pytest.raises(UnsupportedModel, match="ministral"):
        read_config(ministral)


@pytest.mark.parity
@pytest.mark.usefixtures("with_family")
def test_the_logits_of_the_family_are_those_of_transformers(ministral: Path) -> None:
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    tokens = np.random.default_rng(0).integers(0, VOCAB_SIZE, 60).astype(np.int32)
    theirs = AutoModelForCausalLM.from_pretrained(ministral, dtype=torch.float32)
    with torch.no_grad():
        wanted = theirs(torch.tensor(tokens[None], dtype=torch.long)).logits[0].numpy()
    np.testing.assert_allclose(logits(ministral, tokens), wanted, atol=1e-4)


@pytest.mark.usefixtures("with_family")
def test_the_family_computes_what_its_row_says(ministral: Path, tmp_path: Path) -> None:
    """The layers of Mistral: the same weights under its name give the same logits."""
    same = write_tiny_model(tmp_path / "mistral", model_type="mistral", tie=False, sliding_window=24)
    tokens = np.arange(60, dtype=np.int32)
    np.testing.assert_array_equal(logits(ministral, tokens), logits(same, tokens))
    wider = write_tiny_model(tmp_path / "wider", model_type="mistral", tie=False, sliding_window=64)
    assert np.abs(logits(ministral, tokens) - logits(wider, tokens)).max() > 1e-4


# A gate


def test_the_gate_rejects_and_its_setting_opens_it() -> None:
    def verdict(answer: str, *settings: str) -> Verdict | None:
        candidate = Candidate(Task("rewrite", ("quality",), EXAMPLE), response=answer)
        refine = load(None, [*NEEDED, *settings]).refine
        return gate_table.first_verdict(candidate, "answer", refine)

    linked = "The forecast for the whole week is at https://example.org/week and it is sunny."
    assert verdict(linked) is None
    try:
        exec(recipe("A gate"), {})
        found = verdict(linked)
        assert found == Verdict("no_link", "links to https://example.org/week")
        assert found is not None
        assert found.feedback is not None
        assert "contained a link" in found.feedback
        assert verdict("The forecast for the whole week says that it will be sunny.") is None
        assert verdict(linked, "refine.gates.open=[no_link]") is None
    finally:
        gate_table.unregister("no_link")
    with pytest.raises(ConfigError, match="no gate called"):
        load(None, [*NEEDED, "refine.gates.open=[no_link]"])


# An axis


@pytest.fixture
def with_axis() -> Iterator[None]:
    try:
        exec(recipe("An axis"), {})
        yield
    finally:
        if "progress" in {row.name for row in axis_columns.axes()}:
            axis_columns.unregister("progress")


@pytest.mark.usefixtures("with_axis")
def test_the_axis_is_scored_selected_and_refined(tmp_path: Path) -> None:
    for name, seed in (("base", 0), ("tuned", 1)):
        write_tiny_model(tmp_path / name, seed=seed)
    rows = json.loads(write_data(tmp_path / "data.json").read_text(encoding="utf-8"))
    folder = tmp_path / "scored"
    settings = {"model.max_length": 512, "complexity": {"fraction": 0.1}}
    scores = middo.score(
        rows, tmp_path / "tuned", tmp_path / "base", ("complexity", "progress"), out=folder, settings=settings
    )
    fall = as_floats(scores.table, "loss_pre") - as_floats(scores.table, "loss_post")
    np.testing.assert_allclose(as_floats(scores.table, "loss_fall"), fall, atol=1e-6)

    chosen = middo.select(folder, settings={"progress": {"fraction": 0.2}})
    ids, count = scores.table["id"].to_pylist(), round(0.2 * len(rows))
    worst = {ids[i] for i in np.argsort(fall)[:count]}
    assert set(chosen.ids("progress")) == worst
    assert len(worst) == count >= 2
    assert {row["id"] for row in chosen.table.to_pylist() if row["unlearnt"]} == worst
    assert "hard&unlearnt" in chosen.facts["overlap"]
    files = RoundDir(folder)
    assert json.loads(files.selection.read_text(encoding="utf-8"))["axes"]["progress"]["n_selected"] == count
    written = pq.read_table(files.selected)
    assert written.schema == schema()
    assert {row["id"] for row in written.to_pylist() if row["unlearnt"]} == worst
    assert re.search(
        rf"^unlearnt +{count} of {len(rows)}  m [\d.]+  loss_fall < ", render_selection(chosen.facts), re.M
    )

    tasks = {task.original.id: task for task in plan_refinement(files)}
    assert tasks.keys() == worst | set(chosen.ids("complexity"))
    hard = set(chosen.ids("complexity"))
    assert {task.axes for id_, task in tasks.items() if id_ in worst - hard} == {("progress",)}
    assert {task.op for id_, task in tasks.items() if id_ in worst} == {"rewrite"}
    one = next(iter(worst - hard))
    assert tasks[one].scores["loss_fall"] == pytest.approx(fall[ids.index(one)], abs=1e-6)


@pytest.mark.usefixtures("with_axis")
def test_the_report_shows_the_axis_also_where_it_is_not_registered(tmp_path: Path) -> None:
    run = write_run(tmp_path / "demo", n_rows=60)
    folder = RoundDir(run.path / "round_00")
    assert "unlearnt" in page(run)  # as an axis that has no scores yet
    table = axis_columns.with_computed(read_scores(folder.scores), ("progress",))
    pq.write_table(table, folder.scores)
    _, selection = select(table, load(None, [*NEEDED, "progress.fraction=0.1"]))
    assert selection["axes"]["progress"]["n_selected"] > 0
    write_json(folder.selection, selection)
    registered = page(run)
    assert "Progress: what training gained" in registered
    assert "fall of the loss in training, nats per token" in registered
    assert re.search(
        rf'unlearnt</td><td data-label="chosen">{selection["axes"]["progress"]["n_selected"]}<', registered
    )

    above = shown_axes([selection])["progress"].above
    axis_columns.unregister("progress")
    assert shown_axes([selection])["progress"].above is above is False
    elsewhere = page(run)
    assert "Progress: what training gained" not in elsewhere
    assert "<code>loss_fall</code>" in elsewhere
    assert "loss_fall < " in render_selection(selection)


@pytest.mark.usefixtures("with_axis")
def test_an_axis_that_was_not_scored_is_null_and_the_others_are_selected() -> None:
    rows = [{"id": str(i), "loss_pre": float(i), "loss_post": float(i)} for i in range(5)]
    table = pa.Table.from_pylist(rows, SCHEMA)
    chosen, selection = select(table, load(None, NEEDED))
    assert selection["axes"].keys() == {"complexity"}
    assert chosen["hard"].to_pylist() == [False] * 4 + [True]
    assert chosen["unlearnt"].null_count == chosen["progress_z"].null_count == 5
    scored = middo.select(axis_columns.with_computed(table, ("progress",)))
    assert scored.facts["axes"].keys() == {"complexity", "progress"}


@pytest.mark.parametrize(
    ("changed", "columns", "message"),
    [
        ({"name": "quality"}, {}, "there is a setting of that name already"),
        ({"name": "train"}, {}, "there is a setting of that name already"),
        ({"set_name": "hard"}, {}, "there is a set called 'hard' already"),
        ({"name": "a b"}, {}, "must be letters, digits and underscores"),
        ({"columns": ("fall",), "label": ("fall",)}, {}, "nothing computes its column 'fall'"),
        ({}, {"ifd": len}, "computes 'ifd', which is measured or none of its columns"),
        ({"columns": ("ifd",) * 3}, {}, "one or two columns, and a label for each"),
        ({"op": "synthesize"}, {}, "belongs to a built-in axis"),
    ],
)
def test_a_row_that_cannot_be_an_axis_is_refused(changed: dict[str, Any], columns: Any, message: str) -> None:
    known = axis_columns.axes()
    given = {"name": "wordy", "set_name": "wordy", "columns": ("ifd",), "label": ("IFD",), "heading": "IFD"}
    with pytest.raises(ValueError, match=message):
        axis_columns.register(Axis(**{"bad": "high", **given, **changed}), columns)
    assert axis_columns.axes() == known
    load(None, NEEDED)


def test_a_function_of_a_column_must_return_a_number_per_row() -> None:
    row = Axis("one", "alone", ("one",), bad="low", label=("one",), heading="One")
    try:
        axis_columns.register(row, {"one": lambda table: np.zeros(len(table) + 1)})
        with pytest.raises(ValueError, match=r"column 'one' returned the shape \(1,\), not one number"):
            axis_columns.with_computed(SCHEMA.empty_table(), ("one",))
    finally:
        axis_columns.unregister("one")


# A data format


def test_the_format_is_read_and_recognised(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    rows = [{"question": f"Why {i}?", "best_answer": f"So {i}.", "tag": i} for i in range(3)]
    path.write_text(
        "\n".join(json.dumps(row) for row in [*rows, {"question": "No answer?"}]), encoding="utf-8"
    )
    with pytest.raises(DataError, match="fit no format"):
        read(str(path))
    with pytest.raises(ConfigError, match=r"data\.format"):
        load(None, [*NEEDED, "data.format=qa"])
    try:
        exec(recipe("A data format"), {})
        assert load(None, [*NEEDED, "data.format=qa"]).data.format == "qa"
        for form in ("auto", "qa"):
            examples, rejections = read(str(path), form)
            assert [(e.prompt, e.response, e.extra) for e in examples] == [
                (f"Why {i}?", f"So {i}.", {"tag": i}) for i in range(3)
            ]
            assert [(r.where.endswith(":4"), r.reason) for r in rejections] == [
                (True, "column 'best_answer' is missing or null")
            ]
        with pytest.raises(DataError, match="qa can be read and not written; write messages"):
            write(examples, tmp_path / "out.jsonl", "qa")
        write(examples, tmp_path / "out.jsonl", "messages")
        assert [row["tag"] for row in read_jsonl(tmp_path / "out.jsonl")] == [0, 1, 2]
        with pytest.raises(ValueError, match="there is a format called 'qa' already"):
            exec(recipe("A data format"), {})
    finally:
        formats.unregister("qa")
    with pytest.raises(ConfigError, match=r"data\.format"):
        load(None, [*NEEDED, "data.format=qa"])


def test_a_format_without_a_place_for_weights_is_not_given_answers_that_have_one() -> None:
    def row(messages: Any) -> dict[str, Any]:
        return {"q": messages[0].content, "a": messages[-1].content}

    unlearnt = Example(
        (
            *(Message("user", "Why?"), Message("assistant", "So.", False)),
            *(Message("user", "How?"), Message("assistant", "Thus.")),
        )
    )
    form = formats.RowFormat(frozenset({"q", "a"}), frozenset(), lambda row: [], row, keeps_weights=False)
    try:
        formats.register("pairs", form)
        assert list(to_rows([EXAMPLE], "pairs")) == [{"id": EXAMPLE.id, "q": "Why?", "a": "So."}]
        with pytest.raises(DataError, match="pairs has no field for answers of weight 0"):
            to_rows([unlearnt], "pairs")
    finally:
        formats.unregister("pairs")
    with pytest.raises(KeyError):
        formats.unregister("alpaca")


# A setting


def test_the_test_that_the_page_names_for_a_setting_exists() -> None:
    section = PAGE.read_text(encoding="utf-8").split("\n## A setting\n")[1]
    (name,) = re.findall(r"`(test_\w+)`", section)
    (path,) = re.findall(r"`(tests/\S+\.py)`", section)
    assert f"def {name}(" in (PAGE.parents[1] / path).read_text(encoding="utf-8")


def test_a_setting_makes_stale_what_its_mark_says_and_nothing_else(tmp_path: Path) -> None:
    found: dict[str, Any] = {}
    # The page's code. This file's flags would turn its annotations into texts that pydantic cannot read.
    exec(compile(recipe("A setting"), str(PAGE), "exec", dont_inherit=True), found)
    WithTone = pydantic.create_model(
        "WithTone", __base__=Config, tone=(found["ToneSettings"], found["ToneSettings"]())
    )
    tree = load(None, NEEDED).model_dump()

    def config(method: str = "expected", **tone: Any) -> Config:
        return WithTone.model_validate(tree | {"quality": {"method": method}, "tone": tone})

    def stale(before: Config, now: Config) -> set[str]:
        """The stages of a run with `before` that are stale by themselves with `now`."""
        run = RunDir(tmp_path / "run")
        shutil.rmtree(run.path, ignore_errors=True)
        for link in chain(run, before):
            for path in (*link.files, *link.writes):
                place = path / "metadata.json" if path.name == "checkpoint" else path
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_text("x")
            link.begin().finish(before, 1.0)
        states = assess(chain(run, now), now)
        return {link.where for link, state in states if state.why and not state.why.is_forecast}

    assert stale(config(), config()) == set()
    assert stale(config(), config(formality=2)) == {"round_00 refine"}
    assert stale(config(), config(warmth=0.5)) == set()
    assert stale(config("sample"), config("sample", warmth=0.5)) == {"round_00 score"}
    assert stale(config(), config(width=100)) == set()
    assert [leaf.name for leaf in leaves(WithTone) if leaf.mark is None] == []
