"""Laws of the Python interface: the numbers are those of the commands, whatever the rows come in."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.loop_fixture import contents, write_data
from support.tiny_model import write_tiny_model

import middo_jax as middo
from middo_jax.api import refine_by_batch
from middo_jax.comparing import side_by_side
from middo_jax.config import load
from middo_jax.data.example import Example
from middo_jax.data.formats import DataError
from middo_jax.data.in_memory import IN_MEMORY, rows_in_memory
from middo_jax.data.own_columns import own_columns, with_user_ids
from middo_jax.data.reading import Reading
from middo_jax.data.sources import read, read_rows, write
from middo_jax.rundir import RoundDir, chain, read_jsonl, write_jsonl
from middo_jax.signals.embeddings import read_embeddings
from middo_jax.signals.table import SCHEMA, as_floats

SMALL = {"model.max_length": 512, "train": {"batch_size": 8, "learning_rate": 0.01}}
AXES = ("complexity", "diversity")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with base/, tuned/ and data.json."""
    root = tmp_path_factory.mktemp("api")
    write_tiny_model(root / "base")
    write_tiny_model(root / "tuned", seed=1)
    write_data(root / "data.json")
    return root


@pytest.fixture(scope="module")
def rows(place: Path) -> list[dict[str, Any]]:
    return json.loads((place / "data.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def scores(place: Path, rows: list[dict[str, Any]]) -> middo.Scores:
    return middo.score(rows, place / "tuned", place / "base", AXES, settings=SMALL)


def python(script: str) -> str:
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


# Import


def test_importing_the_package_takes_no_time_and_no_jax() -> None:
    script = (  # time of this process alone: a busy machine is no failure
        "import time; began = time.process_time()\n"
        "import middo_jax as middo\n"
        "took = time.process_time() - began\n"
        "import json, sys\n"
        "heavy = {'jax', 'flax', 'numpy', 'pyarrow', 'pydantic', 'transformers'}\n"
        "print(json.dumps([took, sorted(heavy & sys.modules.keys()), dir(middo)]))"
    )
    took, loaded, names = json.loads(python(script))
    assert loaded == []
    assert took < 0.3
    assert set(middo.__all__) <= set(names)


def test_every_public_name_is_there_and_documented() -> None:
    for name in middo.__all__:
        assert getattr(middo, name) is not None
        if name != "__version__":
            assert getattr(middo, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'scoer'"):
        middo.scoer  # type: ignore[attr-defined]  # noqa: B018
    # What type checkers see is what is resolved on first use.
    block = next(
        node
        for node in ast.parse(Path(middo.__file__).read_text(encoding="utf-8")).body
        if isinstance(node, ast.If)
    )
    seen = [alias.name for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names]
    assert sorted(["__version__", *seen]) == sorted(middo.__all__)


def test_what_public_functions_return_is_public() -> None:
    """Every class of the package in a return type or in the fields of a returned value has a public name."""
    public = [getattr(middo, name) for name in middo.__all__]
    returned = [inspect.signature(f).return_annotation for f in public if inspect.isfunction(f)]
    fields = [a for c in public if hasattr(c, "__annotations__") and inspect.isclass(c) for a in fields_of(c)]
    named = set(re.findall(r"\b[A-Z]\w+", " ".join([*returned, *fields])))
    assert {"BenchmarksFile", "HeldoutLoss", "MetricsRow", "Scores"} <= named
    assert named - set(middo.__all__) - {"Any", "Counter", "Mapping", "None", "Path", "Table"} == set()


def fields_of(value: type) -> list[str]:
    is_value = dataclasses.is_dataclass(value) or hasattr(value, "_fields")
    annotations = inspect.get_annotations(value).values() if is_value else ()
    return [getattr(annotation, "__forward_arg__", annotation) for annotation in annotations]


def test_rows_have_one_public_type() -> None:
    for function in (middo.score, middo.train, middo.evaluate, middo.score_models):
        assert inspect.signature(function).parameters["rows"].annotation == "RowsLike"
    assert {str, Any} & set(get_args(middo.RowsLike)) == {str}


def test_select_works_without_jax(scores: middo.Scores, tmp_path: Path) -> None:
    pq.write_table(scores.table, tmp_path / "scores.parquet")
    script = (
        "import sys, pyarrow.parquet as pq, middo_jax as middo\n"
        f"chosen = middo.select(pq.read_table({str(tmp_path / 'scores.parquet')!r}), diversity={{'m': 1}})\n"
        "print(chosen.ids('diversity'), 'jax' in sys.modules, 'transformers' in sys.modules)"
    )
    expected = middo.select(scores, diversity={"m": 1}).ids("diversity")
    assert python(script).strip() == f"{expected} False False"


def test_the_command_select_does_not_load_jax(place: Path, tmp_path: Path) -> None:
    middo.score(
        place / "data.json", place / "tuned", None, ("diversity",), out=tmp_path / "s", settings=SMALL
    )
    script = (
        f"import sys; sys.argv = ['middo', 'select', {str(tmp_path / 's')!r}]\n"
        "from middo_jax.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code\n"
        "print('jax' in sys.modules)"
    )
    assert python(script).splitlines()[-1] == "False"
    assert (tmp_path / "s" / "selection.json").exists()


# Score


def test_scores_hold_the_columns_of_the_file_and_the_users_own(
    scores: middo.Scores, rows: list[dict[str, Any]]
) -> None:
    names = [*SCHEMA.names, "instruction", "input", "output", "source"]
    assert scores.table.column_names == names
    assert scores.table["source"].to_pylist() == [row["source"] for row in rows]
    assert scores.table["output"].to_pylist() == [row["output"] for row in rows]
    assert scores.embeddings.shape == (24, 32)
    assert scores.embeddings.dtype == np.float32
    assert scores.rejected == []
    assert scores.passes.keys() == {"loss before training", "loss and embeddings"}
    for name in ("loss_pre", "loss_post", "knn_mean_sim"):
        assert scores.table[name].null_count == 0
    assert scores.table["quality"].null_count == 24


def test_rows_of_the_table_and_of_the_embeddings_are_the_same(scores: middo.Scores) -> None:
    """The nearest neighbour by the embeddings is the one that the table names."""
    unit = scores.embeddings / np.linalg.norm(scores.embeddings, axis=1, keepdims=True)
    similarity = unit @ unit.T
    np.fill_diagonal(similarity, -2)
    ids = scores.table["id"].to_pylist()
    nearest = [near[0] for near in scores.table["knn_sims"].to_pylist()]
    np.testing.assert_allclose(similarity.max(axis=1), nearest, atol=1e-5)
    named = [ids.index(near[0]) for near in scores.table["knn_ids"].to_pylist()]
    np.testing.assert_allclose(similarity[range(24), named], nearest, atol=1e-5)


def test_nothing_is_written_unless_asked_and_the_folder_holds_the_same(
    place: Path,
    rows: list[dict[str, Any]],
    scores: middo.Scores,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    before = contents(place)
    again = middo.score(rows, place / "tuned", place / "base", AXES, settings=SMALL)
    assert contents(place) == before
    assert list(tmp_path.iterdir()) == []
    assert again.table.equals(scores.table)

    written = middo.score(rows, place / "tuned", place / "base", AXES, out="o", settings=SMALL)
    assert written.table.equals(scores.table)
    assert pq.read_table("o/scores.parquet").equals(scores.table)
    ids = scores.table["id"].to_pylist()
    np.testing.assert_array_equal(read_embeddings(Path("o/embeddings.parquet"), ids), scores.embeddings)
    # Selecting from the folder is selecting from the values, and keeps the user's columns.
    of_folder = middo.select("o", complexity={"m": 0.5}, diversity={"m": 1.5})
    of_values = middo.select(scores, complexity={"m": 0.5}, diversity={"m": 1.5})
    assert of_folder.facts == of_values.facts == json.loads(Path("o/selection.json").read_text())
    assert of_folder.table.equals(of_values.table)


def test_scores_of_the_same_content_are_reused_and_others_are_not_replaced(
    place: Path, rows: list[dict[str, Any]], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(place / "tuned", tmp_path / "tuned")
    out, axes = tmp_path / "o", ("complexity",)

    def score(rows: Any = rows, model: Path = tmp_path / "tuned", **more: Any) -> middo.Scores:
        return middo.score(rows, model, **{"axes": axes, "out": out, "settings": SMALL} | more)

    first = score()
    chosen = middo.select(out, complexity={"m": 0.5})
    written = {name: data for name, data in contents(out).items() if name.endswith(".parquet")}
    (tmp_path / "tuned").rename(tmp_path / "moved")
    capfd.readouterr()
    again = score(model=tmp_path / "moved")
    assert (first.reused, again.reused) == (False, True)
    assert "scored before, nothing is measured (--force measures again)" in capfd.readouterr().err
    assert again.table.equals(first.table)
    np.testing.assert_array_equal(again.embeddings, first.embeddings)
    assert {name: data for name, data in contents(out).items() if name.endswith(".parquet")} == written
    assert RoundDir(out).is_done("select")
    # Other columns of the user's beside the same scores.
    fewer = score(model=tmp_path / "moved", keep_columns=["source"])
    assert (fewer.reused, fewer.table.column_names) == (True, [*SCHEMA.names, "source"])
    assert pq.read_table(out / "scores.parquet").equals(fewer.table)
    assert not RoundDir(out).is_done("select")
    kept = contents(out)
    others: list[tuple[dict[str, Any], str]] = [
        ({"rows": rows[: len(rows) // 2]}, "the data differs"),
        ({"model": place / "base"}, "model has changed"),
        ({"pre_model": place / "base"}, "it reads pre_model now"),
        ({"axes": ("diversity",)}, "the axes were complexity, are diversity"),
        ({"settings": {**SMALL, "model.max_length": 40}}, "model.max_length was 512, is 40"),
    ]
    for more, why in others:
        with pytest.raises(middo.RunError, match=f"has other scores .*{why}.*--force"):
            score(**{"model": tmp_path / "moved"} | more)
        assert contents(out) == kept
    # Of data that was changed, only what is new is measured.
    changed = [*rows[1:], {**rows[0], "output": "Nobody can say."}]
    fresh = score(rows=changed, model=tmp_path / "moved", out=None)
    capfd.readouterr()
    updated = score(rows=changed, model=tmp_path / "moved")
    assert (updated.reused, updated.n_reused, fresh.n_reused) == (False, len(rows) - 1, 0)
    told = f"{len(rows) - 1:,} of {len(rows):,} samples are measured already; only the others are"
    assert told in capfd.readouterr().err
    assert updated.table["id"] == fresh.table["id"]
    np.testing.assert_allclose(*(as_floats(s.table, "loss_post") for s in (updated, fresh)), rtol=1e-5)
    assert pq.read_table(out / "scores.parquet").equals(updated.table)
    # A start that was stopped after it wrote the dataset.
    write_jsonl(out / "dataset.jsonl", read_jsonl(out / "dataset.jsonl")[1:])
    assert score(rows=changed[1:], model=tmp_path / "moved").n_reused == len(rows) - 1
    forced = score(rows=rows[1:], model=tmp_path / "moved", force=True)
    assert (forced.reused, len(forced.table)) == (False, len(rows) - 1)
    assert len(pq.read_table(out / "scores.parquet")) == len(rows) - 1
    (out / "scores.parquet").unlink()  # nothing is left that could be lost
    assert len(score(rows=rows, model=tmp_path / "moved").table) == len(chosen.table)


def test_an_adapter_on_another_base_is_another_model(tmp_path: Path) -> None:
    model, base = tmp_path / "adapter", tmp_path / "base"
    for path in (model, base):
        path.mkdir()
        (path / "weights").write_text(path.name)
    link = chain.score(RoundDir(tmp_path / "o"), model, None, base)
    write_jsonl(link.folder.dataset, [])
    seen = link.begin().seen
    assert seen.inputs.keys() == {"model", "base"}
    link.folder.finish("score", [], 0.0, seen=seen, settings={})
    (base / "weights").write_text("other")
    config = load(None, ["model.path=m", "data.path=d"])
    assert str(link.why_stale(config)) == f"base has changed: {base}"


def test_several_models_have_their_columns_side_by_side(
    place: Path, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    models = {"base": place / "base", "tuned": place / "tuned"}
    found = middo.score_models(rows, models, tmp_path / "o", axes=("complexity",), settings=SMALL)
    assert found.table.equals(pq.read_table(tmp_path / "o" / "by_model.parquet"))
    assert found.table["id"].to_pylist() == found.of["base"].table["id"].to_pylist()
    for name, scores in found.of.items():
        assert not scores.reused
        assert found.table[f"loss_post_{name}"].equals(scores.table["loss_post"])
    assert found.table["loss_post_base"] != found.table["loss_post_tuned"]
    assert found.table["source"].to_pylist() == [row["source"] for row in rows]
    assert not {"quality_base", "loss_pre_base", "knn_ids_base"} & set(found.table.column_names)
    assert middo.select(tmp_path / "o" / "models" / "base", complexity={"m": 0.5}).table.num_rows == len(rows)
    more = {"tuned": place / "tuned", "again": place / "tuned"}
    later = middo.score_models(rows, more, tmp_path / "o", axes=("complexity",), settings=SMALL)
    assert {name: scores.reused for name, scores in later.of.items()} == {"tuned": True, "again": False}
    with pytest.raises(middo.ConfigError, match="'a b' is no name of a model"):
        middo.score_models(rows, {"a b": place / "base"}, tmp_path / "o")
    for data in (tmp_path / "o", tmp_path / "o" / "by_model.parquet"):
        with pytest.raises(ValueError, match=r"by_model\.parquet is read as data and would be overwritten"):
            middo.score_models(data, models, tmp_path / "o")


def test_results_of_a_batch_are_not_overwritten_by_requests(tmp_path: Path) -> None:
    (tmp_path / "paid.jsonl").write_text("{}")
    with pytest.raises(middo.RunError, match=r"paid\.jsonl has results that are read"):
        refine_by_batch(tmp_path, [tmp_path / "paid.jsonl"], tmp_path / "x" / ".." / "paid.jsonl")


def test_tables_of_models_are_joined_by_id() -> None:
    one = pa.table({"id": ["a", "b"], "loss_post": [1.0, 2.0], "quality": [None, None], "own": ["x", "y"]})
    other = pa.table({"id": ["c", "b"], "loss_post": [3.0, 4.0], "own": ["z", "y"]})
    assert side_by_side({"m": one, "n": other}).to_pydict() == {
        "id": ["a", "b", "c"],
        "loss_post_m": [1.0, 2.0, None],
        "loss_post_n": [None, 4.0, 3.0],
        "own": ["x", "y", "z"],
    }


@pytest.mark.parametrize("kind", ["path", "arrow", "pandas", "datasets"])
def test_rows_may_come_in_any_table(place: Path, rows: list[dict[str, Any]], kind: str) -> None:
    source: Any = place / "data.json"
    if kind == "arrow":
        source = pa.Table.from_pylist(rows)
    elif kind == "pandas":
        source = pytest.importorskip("pandas").DataFrame(rows)
    elif kind == "datasets":
        source = pytest.importorskip("datasets").Dataset.from_list(rows)
    settings = {**SMALL, "data.limit": 6}
    listed = middo.score(rows, place / "tuned", axes=(), settings=settings)
    other = middo.score(source, place / "tuned", axes=(), settings=settings)
    assert len(listed.table) == 6
    assert other.table.equals(listed.table)
    np.testing.assert_array_equal(other.embeddings, listed.embeddings)


def test_no_package_of_tables_is_imported_to_tell_them() -> None:
    script = (
        "import sys\n"
        "from middo_jax.data.in_memory import rows_in_memory\n"
        "print(list(rows_in_memory([{'a': 1}])), {'pandas', 'datasets'} & sys.modules.keys())"
    )
    assert python(script).strip() == "[{'a': 1}] set()"


def test_what_is_no_table_is_refused_with_a_hint(rows: list[dict[str, Any]]) -> None:
    with pytest.raises(DataError, match="one split of it"):
        rows_in_memory({"train": rows})
    with pytest.raises(DataError, match="int is not a table; give a path, a list of dicts"):
        rows_in_memory(7)


def test_a_table_of_ours_is_read_back_from_memory(tmp_path: Path) -> None:
    """A column of several types is JSON in Parquet; in memory it is decoded too."""
    rows = [
        {"prompt": "a", "completion": "b", "tag": [1]},
        {"prompt": "c", "completion": "d", "tag": "x"},
    ]
    (tmp_path / "a.json").write_text(json.dumps(rows), encoding="utf-8")
    write(read(str(tmp_path / "a.json"))[0], tmp_path / "a.parquet", "parquet")
    table = pq.read_table(tmp_path / "a.parquet")
    assert [row["tag"] for row in rows_in_memory(table)] == [[1], "x"]


def test_rows_that_cannot_be_used_are_told_by_their_number(
    place: Path, rows: list[dict[str, Any]], capfd: pytest.CaptureFixture[str]
) -> None:
    given = [rows[0], {"instruction": "no output"}, rows[1], rows[0]]
    scores = middo.score(given, place / "tuned", axes=(), settings=SMALL)
    assert [(r.where, r.reason.split(" ")[0]) for r in scores.rejected] == [
        ("row 2", "column"),
        ("row 4", "duplicate"),
    ]
    assert scores.table["output"].to_pylist() == [rows[0]["output"], rows[1]["output"]]
    out, err = capfd.readouterr()
    assert out == ""
    assert f"{IN_MEMORY}: 2 samples, 0 held out, 2 rows refused" in err
    with pytest.raises(DataError, match=f"{IN_MEMORY}: none of its 1 rows can be used"):
        middo.score(given[1:2], place / "tuned", settings={**SMALL, "data.format": "alpaca"})


def test_an_axis_that_is_none_is_refused(rows: list[dict[str, Any]]) -> None:
    with pytest.raises(ValueError, match="axes: 'beauty' is none of complexity, diversity, quality"):
        middo.score(rows, "nowhere", axes=("beauty",))


# The user's columns


def examples_of(rows: list[dict[str, Any]], tmp_path: Path) -> list[Example]:
    (tmp_path / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    return read(str(tmp_path / "rows.json"))[0]


def test_a_name_that_is_taken_gets_a_suffix_and_nested_columns_stay_out(tmp_path: Path) -> None:
    rows = [
        {"id": "u1", "prompt": "a", "completion": "b", "quality": 3, "quality_user": "x", "tags": ["p"]},
        {"id": "u2", "prompt": "c", "completion": "d", "quality": 4, "quality_user": "y", "tags": []},
    ]
    examples = examples_of(rows, tmp_path)
    own = own_columns(examples, rows, None, SCHEMA.names)
    assert own.to_pydict() == {
        "id_user": ["u1", "u2"],
        "prompt": ["a", "c"],
        "completion": ["b", "d"],
        "quality_user_user": [3, 4],
        "quality_user": ["x", "y"],
    }
    assert own_columns(examples, rows, ["tags"], SCHEMA.names).to_pydict() == {"tags": [["p"], []]}
    assert own_columns(examples, rows, [], SCHEMA.names).num_columns == 0
    with pytest.raises(DataError, match="no column 'lable' to keep; there are: id, prompt, completion"):
        own_columns(examples, rows, ["lable"], SCHEMA.names)


def test_own_ids_are_called_alike_whichever_column_they_are_from(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text('[{"uid": 7, "prompt": "a", "completion": "b"}]')
    examples = read_rows(tmp_path / "rows.json", reading=Reading(id_column="uid")).examples
    own = own_columns(examples, [{"uid": 7, "prompt": "a"}], ["uid"], SCHEMA.names)
    assert with_user_ids(own, examples).to_pydict() == {"uid": [7], "id_user": ["7"]}
    assert with_user_ids(pa.table({}), examples).to_pydict() == {"id_user": ["7"]}
    assert with_user_ids(own, examples_of([{"prompt": "a", "completion": "b"}], tmp_path)).equals(own)


def test_columns_keep_their_type_or_become_text(tmp_path: Path) -> None:
    rows = [
        {"prompt": "a", "completion": "b", "n": 1, "mixed": 1, "gap": float("nan")},
        {"prompt": "c", "completion": "d", "mixed": "x", "gap": 0.5},
    ]
    own = own_columns(examples_of([{**row, "gap": None} for row in rows], tmp_path), rows, None, ())
    assert own["n"].to_pylist() == [1, None]
    assert own["mixed"].to_pylist() == ["1", "x"]
    assert own["gap"].to_pylist() == [None, 0.5]


def test_columns_that_a_dataset_of_ours_carries_are_the_users(tmp_path: Path) -> None:
    example = examples_of([{"prompt": "a", "completion": "b", "source": "s"}], tmp_path)[0]
    own = own_columns([example], [example.to_json()], None, SCHEMA.names)
    assert own.to_pydict() == {"source": ["s"]}


# Select


def test_select_takes_thresholds_and_says_what_is_wrong_with_them(scores: middo.Scores) -> None:
    chosen = middo.select(scores, diversity={"fraction": 0.25})
    assert len(chosen.ids("diversity")) == round(0.25 * 24)
    assert chosen.table.column_names[: len(scores.table.column_names)] == scores.table.column_names
    assert sum(chosen.table["sparse"].to_pylist()) == round(0.25 * 24)
    assert chosen.table["low_quality"].null_count == 24
    assert chosen.ids("quality") == []
    with pytest.raises(ValueError, match="'beauty' is none of complexity, diversity, quality"):
        chosen.ids("beauty")
    assert middo.select(scores.table, settings=["diversity.fraction=0.25"]).facts == chosen.facts
    with pytest.raises(middo.ConfigError, match="fracton is not a setting"):
        middo.select(scores, diversity={"fracton": 0.25})
    with pytest.raises(middo.ConfigError, match="give either m or fraction, not both"):
        middo.select(scores, diversity={"m": 1, "fraction": 0.25})
    with pytest.raises(ValueError, match="has no column id, only x"):
        middo.select(pa.table({"x": [1]}))
    with pytest.raises(ValueError, match="the columns of no axis: complexity needs loss_pre and loss_post;"):
        middo.select(pa.table({"id": ["a"], "loss_pre": [1.0]}))
    with pytest.raises(middo.RunError, match="there or above"):
        middo.select("nowhere")


def test_select_takes_a_table_with_the_columns_of_one_axis() -> None:
    table = pa.table({"id": list("abcd"), "knn_mean_sim": [0.9, 0.8, 0.1, 0.85], "mine": [1, 2, 3, 4]})
    chosen = middo.select(table, diversity={"m": 1})
    assert chosen.facts["axes"]["diversity"]["ids"] == ["c"]
    assert list(chosen.facts["axes"]) == ["diversity"]
    assert chosen.table["sparse"].to_pylist() == [False, False, True, False]
    assert chosen.table["mine"].to_pylist() == [1, 2, 3, 4]


# Settings


def test_settings_may_be_a_mapping_texts_or_a_whole_tree(place: Path, tmp_path: Path) -> None:
    given = {"model.path": "m", "data": {"path": "1e5"}, "train.num_epochs": 2, "train": {"batch_size": 4}}
    config = middo.load_config(settings=given)
    assert (config.data.path, config.train.num_epochs, config.train.batch_size) == ("1e5", 2, 4)
    (tmp_path / "c.yaml").write_text("model: {path: m}\ndata: {path: d}\n", encoding="utf-8")
    assert middo.load_config(tmp_path / "c.yaml", ["train.num_epochs=3"]).train.num_epochs == 3
    assert middo.load_config(tmp_path / "c.yaml", "train.num_epochs=3").train.num_epochs == 3
    with pytest.raises(middo.ConfigError, match="Did you mean"):
        middo.load_config(settings={**given, "train.learing_rate": 1})
    # A whole tree is laid under the model and the data of a call.
    tree = middo.load_config(settings={**given, "data.eval_fraction": 0.5, "model.max_length": 512})
    loss = middo.evaluate(place / "data.json", place / "base", settings=tree)
    assert loss == middo.evaluate(place / "data.json", place / "base", settings={"model.max_length": 512})
    assert loss.n == 24


# Refused calls leave everything as it was


def test_thresholds_lie_over_the_settings_that_hold_others(scores: middo.Scores) -> None:
    settings = {"diversity.fraction": 0.5}
    chosen = middo.select(scores, diversity={"fraction": 0.25}, settings=settings)
    assert len(chosen.ids("diversity")) == round(0.25 * 24)
    assert chosen.facts == middo.select(scores, diversity={"fraction": 0.25}).facts
    by_m = middo.select(scores, diversity={"m": 1.5}, settings=settings)
    assert by_m.facts == middo.select(scores, diversity={"m": 1.5}).facts


def test_a_refused_training_leaves_the_other_one_as_it_was(
    place: Path, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    trained = middo.train(rows, place / "base", tmp_path / "out", settings=SMALL)
    before = contents(tmp_path)
    other = {**SMALL, "train": {**SMALL["train"], "learning_rate": 0.02}}
    for changed, settings in ((rows[:-1], SMALL), (rows, other)):
        with pytest.raises(middo.RunError, match="another training"):
            middo.train(changed, place / "base", tmp_path / "out", settings=settings)
        assert contents(tmp_path) == before
    again = middo.train(rows, place / "base", tmp_path / "out", settings=SMALL)
    assert (again.checkpoint, again.metrics) == (trained.checkpoint, trained.metrics)


def test_refused_scores_leave_no_folder(place: Path, rows: list[dict[str, Any]], tmp_path: Path) -> None:
    settings = {**SMALL, "diversity.embedder": "pre"}
    with pytest.raises(middo.RunError, match="no model before training"):
        middo.score(rows, place / "tuned", axes=("diversity",), out=tmp_path / "o", settings=settings)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("inside", [".", "round_00"])
def test_a_run_is_not_overwritten_by_scores(
    place: Path, rows: list[dict[str, Any]], tmp_path: Path, inside: str
) -> None:
    (tmp_path / "run" / "round_00").mkdir(parents=True)
    (tmp_path / "run" / "config.yaml").write_text("name: run\n", encoding="utf-8")
    before = contents(tmp_path)
    for call in (
        lambda out: middo.score(rows, place / "tuned", axes=("diversity",), out=out, settings=SMALL),
        lambda out: middo.train(rows, place / "base", out, settings=SMALL),
    ):
        with pytest.raises(middo.RunError, match="holds a run"):
            call(tmp_path / "run" / inside)
        assert contents(tmp_path) == before
