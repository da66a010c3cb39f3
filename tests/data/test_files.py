"""Files of data in all their forms: tables, compressed files, patterns, folders of shards, saved datasets."""

from __future__ import annotations

import dataclasses
import gzip
import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from middo_jax.config.settings import DataSettings
from middo_jax.data.example import Lineage
from middo_jax.data.files import inputs_of, require_not_read
from middo_jax.data.reading import Reading
from middo_jax.data.sources import DataError, read, read_rows, write

ROWS = [{"instruction": "Add.", "output": "5"}, {"instruction": "Name a sea.", "output": "North"}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def prompts(path: Path | str) -> list[str]:
    examples, rejections = read(str(path))
    assert rejections == []
    return [example.prompt for example in examples]


def zstd(path: Path, text: str) -> Path:
    with path.open("wb") as raw, pa.CompressedOutputStream(raw, "zstd") as packed:
        packed.write(text.encode())
    return path


@pytest.mark.parametrize(("ending", "delimiter"), [("csv", ","), ("tsv", "\t"), ("CSV", ",")])
def test_tables_with_a_header(tmp_path: Path, ending: str, delimiter: str) -> None:
    path = tmp_path / f"rows.{ending}"
    lines = (
        ["instruction", "output", "level"],
        ['"Add\n""2"" and 3."', "5", "1"],
        ["Name a sea.", "North", ""],
    )
    path.write_text("\ufeff" + "".join(delimiter.join(cells) + "\r\n" for cells in lines), encoding="utf-8")
    data = read_rows(str(path))
    assert [e.prompt for e in data.examples] == ['Add\n"2" and 3.', "Name a sea."]
    assert [e.extra for e in data.examples] == [{"level": "1"}, {"level": ""}]
    assert list(data.places) == [f"{path}:2", f"{path}:4"]


def test_cells_with_lists_of_turns(tmp_path: Path) -> None:
    turns = json.dumps([{"role": "user", "content": "q"}, {"role": "assistant", "content": "[1]"}])
    path = tmp_path / "rows.csv"
    path.write_text('messages,note\n"' + turns.replace('"', '""') + '","[1, 2]"\n', encoding="utf-8")
    [example] = read(str(path))[0]
    assert (example.prompt, example.response, example.extra) == ("q", "[1]", {"note": "[1, 2]"})


def test_an_empty_cell_of_history_is_no_history(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('instruction,output,history\nq,a,\nr,b,"[[""x"", ""y""]]"\n', encoding="utf-8")
    assert [len(e.messages) for e in read(str(path))[0]] == [2, 4]


def test_broken_tables_name_the_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("instruction,output\nAdd.,5\nName a sea.,North,East\n")
    [kept], [rejected] = read(str(path))
    assert (kept.prompt, rejected.where) == ("Add.", f"{path}:3")
    assert rejected.reason == "the row has 3 cells, and the header has 2"
    for content, message in (
        (b"output,output\n1,2\n", "two columns are called 'output'"),
        (b"instruction,output\n\xff,5\n", "not UTF-8"),
        (b'instruction,output\n"a"b,5\n', "rows.csv:2: broken CSV"),
    ):
        path.write_bytes(content)
        with pytest.raises(DataError, match=message):
            read(str(path))


def test_compressed_files(tmp_path: Path) -> None:
    expected = ["Add.", "Name a sea."]
    with gzip.open(tmp_path / "rows.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write(LINES)
    with gzip.open(tmp_path / "rows.csv.gz", "wt", encoding="utf-8") as file:
        file.write("instruction,output\nAdd.,5\nName a sea.,North\n")
    assert prompts(tmp_path / "rows.jsonl.gz") == expected
    assert prompts(tmp_path / "rows.csv.gz") == expected
    assert prompts(zstd(tmp_path / "rows.jsonl.zst", LINES)) == expected
    assert prompts(zstd(tmp_path / "rows.json.zst", json.dumps(ROWS))) == expected
    assert (
        prompts(zstd(tmp_path / "rows.csv.zst", "instruction,output\nAdd.,5\nName a sea.,North\n"))
        == expected
    )


def test_compressed_parquet_is_refused_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "rows.parquet.gz").write_bytes(gzip.compress(b"PAR1"))
    with pytest.raises(DataError, match="Parquet is compressed inside; unpack the file"):
        read(str(tmp_path / "rows.parquet.gz"))


@pytest.mark.parametrize("ending", ["gz", "zst"])
def test_a_damaged_compressed_file_is_named(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"rows.jsonl.{ending}"
    if ending == "gz":
        path.write_bytes(gzip.compress((LINES * 100).encode()))
    else:
        zstd(path, "".join(json.dumps({"instruction": str(n**9), "output": "5"}) + "\n" for n in range(9999)))
    whole = path.read_bytes()
    for damaged in (b"no archive\n" * 9, whole[: len(whole) // 2]):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=rf"rows.jsonl.{ending}: the compressed file is damaged or cut"):
            read(str(path))


def test_a_pattern_reads_all_files_that_match_in_order(tmp_path: Path) -> None:
    for n, row in enumerate(ROWS):
        pq.write_table(pa.Table.from_pylist([row]), tmp_path / f"part-{n}.parquet")
    data = read_rows(str(tmp_path / "part-*.parquet"))
    assert [e.prompt for e in data.examples] == ["Add.", "Name a sea."]
    assert list(data.places) == [f"{tmp_path / f'part-{n}.parquet'} row 1" for n in (0, 1)]
    with pytest.raises(DataError, match="no file matches"):
        read(str(tmp_path / "shard-*.parquet"))
    literal = tmp_path / "a[1].jsonl"
    literal.write_text(LINES)
    assert prompts(literal) == ["Add.", "Name a sea."]


def test_a_folder_of_shards_without_its_test_split(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "set" / "data"
    folder.mkdir(parents=True)
    for name, row in (
        ("train-00000-of-2", ROWS[0]),
        ("train-00001-of-2", ROWS[1]),
        ("test-00000-of-1", ROWS[0]),
    ):
        (folder / f"{name}.jsonl").write_text(json.dumps(row | {"name": name}) + "\n")
    (folder.parent / "dataset_infos.json").write_text("{}")
    assert prompts(folder.parent) == prompts(folder) == ["Add.", "Name a sea."]
    assert "not read are test-00000-of-1.jsonl" in caplog.text
    (folder / "latest.jsonl").write_text("")  # "test" is a part of this word only
    for file in folder.glob("train-*"):
        file.unlink()
    with pytest.raises(DataError, match="has no rows"):
        read(str(folder))


def test_saved_datasets_are_read_without_the_package_that_saved_them(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_list(ROWS)
    table.save_to_disk(str(tmp_path / "one"), num_shards=2)
    datasets.DatasetDict({"train": table, "test": table.select([0])}).save_to_disk(str(tmp_path / "several"))
    datasets.DatasetDict({"test": table}).save_to_disk(str(tmp_path / "other"))
    code = (
        "import sys; sys.modules['datasets'] = None\n"
        "from middo_jax.data.sources import read\n"
        "print([e.prompt for path in sys.argv[1:] for e in read(path)[0]])"
    )
    paths = [str(tmp_path / "one"), str(tmp_path / "several"), f"hf:{tmp_path / 'several'}:test"]
    said = subprocess.run([sys.executable, "-c", code, *paths], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == str([*["Add.", "Name a sea."] * 2, "Add."])
    with pytest.raises(DataError, match=r"has no split train; give one of hf:.*other:test"):
        read(str(tmp_path / "other"))
    next((tmp_path / "one").glob("*.arrow")).write_bytes(b"damaged")
    with pytest.raises(DataError, match="not a readable Arrow file"):
        read(str(tmp_path / "one"))


def test_the_files_of_a_dataset_are_inputs_of_the_run(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl", "held.jsonl"):
        (tmp_path / name).write_text(LINES)
    settings = DataSettings(path=str(tmp_path / "[ab].jsonl"), eval_path=str(tmp_path / "held.jsonl"))
    assert inputs_of(settings) == {
        "data": tmp_path / "a.jsonl",
        "data_2": tmp_path / "b.jsonl",
        "eval_data": tmp_path / "held.jsonl",
    }
    assert inputs_of(DataSettings(path="hf:someone/some:train")) == {}


# The user's ids


def with_ids(tmp_path: Path, ids: list[object], column: str = "id", name: str = "ids.jsonl") -> str:
    rows = [{"instruction": f"Name {n}.", "output": "5", column: value} for n, value in enumerate(ids)]
    (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(tmp_path / name)


def test_unique_ids_are_kept_as_ids_and_written_back(tmp_path: Path) -> None:
    examples, _ = read(with_ids(tmp_path, [17, 4, None]))
    assert [e.user_id for e in examples] == [17, 4, None]
    assert examples[0].extra == {}
    for form, ending in (("alpaca", "json"), ("messages", "jsonl"), ("parquet", "parquet"), ("tfds", "")):
        out = tmp_path / f"out{form}{'.' + ending if ending else ''}"
        write(examples, out, form)
        assert read(str(out))[0] == examples
    assert [row["id"] for row in json.loads((tmp_path / "outalpaca.json").read_text())] == [17, 4, None]


def test_ids_that_are_not_unique_are_an_ordinary_column(tmp_path: Path) -> None:
    path = with_ids(tmp_path, ["a", "a"])
    assert [(e.user_id, e.extra) for e in read(path)[0]] == [(None, {"id": "a"})] * 2
    with pytest.raises(DataError, match=r"data.id_column=id: the id 'a' of .*:2 is also that of .*:1"):
        read_rows(path, reading=Reading(id_column="id"))
    with pytest.raises(DataError, match=r"data\.id_column=uid: no row has such a column"):
        read_rows(path, reading=Reading(id_column="uid"))


def test_an_empty_cell_is_no_id_and_a_column_with_one_may_hold_floats(tmp_path: Path) -> None:
    path = tmp_path / "d.csv"
    path.write_text('id,instruction,output\na,One?,1\n,Two?,2\n" ",Three?,3\n', encoding="utf-8")
    assert [(e.user_id, e.extra) for e in read(str(path))[0]] == [("a", {}), (None, {}), (None, {})]
    rows = [{"id": id_, "instruction": f"{id_}?", "output": "x"} for id_ in (1.0, 2.0, None, float("nan"))]
    assert [e.user_id for e in read_rows(rows).examples] == [1, 2, None, None]
    assert [e.user_id for e in read_rows([{**rows[0], "id": 1.5}]).examples] == [None]


def test_an_addition_has_no_id_of_its_core_in_any_place(tmp_path: Path) -> None:
    (core, _), _ = read(with_ids(tmp_path, ["a", "a"]))
    lineage = Lineage((core.id,), core.id, 1, "synthesize")
    added = core.replace_text("Name a sea.", "North.", lineage)
    assert (added.user_id, added.extra) == (None, {"id": None})
    rewritten = core.replace_text("Name a sea.", "North.", dataclasses.replace(lineage, op="rewrite"))
    assert rewritten.extra == {"id": "a"}


def test_an_id_column_of_another_name(tmp_path: Path) -> None:
    path = with_ids(tmp_path, ["x", "y"], "uid")
    examples = read_rows(path, reading=Reading(id_column="uid")).examples
    assert [e.user_id for e in examples] == ["x", "y"]
    write(examples, tmp_path / "out.jsonl", "alpaca", id_column="uid")
    assert json.loads((tmp_path / "out.jsonl").read_text().splitlines()[0])["uid"] == "x"


def test_an_output_that_is_read_as_data_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(LINES)
    for source in (str(path), str(tmp_path), str(tmp_path / "*.jsonl")):
        with pytest.raises(DataError, match=r"rows\.jsonl is read as data and would be overwritten"):
            require_not_read(source, [tmp_path / "out" / "other.jsonl", path])
        require_not_read(source, [tmp_path / "out" / "rows.jsonl", tmp_path / "notes.txt"])
    for source in (str(tmp_path), str(tmp_path / "*.jsonl")):
        with pytest.raises(DataError, match=r"other\.jsonl would be among the files of"):
            require_not_read(source, [tmp_path / "other.jsonl"])
    require_not_read("hf:someone/some:train", [path])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "hard").hardlink_to(path)
    (tmp_path / "out" / "soft").symlink_to(path)
    for name in ("hard", "soft", "../rows.jsonl"):
        with pytest.raises(DataError, match=r"is read as data and would be overwritten"):
            require_not_read(str(path), [tmp_path / "out" / name])
    for source in (f"hf:{tmp_path}:train", f"hf:{tmp_path}:default:train", f"tfds:{tmp_path}:train"):
        with pytest.raises(DataError, match=r"rows\.jsonl is read as data"):
            require_not_read(source, [path])


def test_an_output_that_the_next_reading_would_take_for_data_is_refused(tmp_path: Path) -> None:
    data = tmp_path / "shards" / "data"
    data.mkdir(parents=True)
    (data / "a.jsonl").write_text(LINES)
    (tmp_path / "link").symlink_to(tmp_path / "shards")
    for source, name in (
        ("shards", "shards/new.jsonl"),  # read in place of those in shards/data
        ("**/*.jsonl", "b/c/new.jsonl"),
        ("*/data/*.jsonl", "other/data/new.jsonl"),
        ("shards/**/n*.jsonl", "shards/new.jsonl"),
        ("link/data/*", "shards/data/new.jsonl"),
        ("shards/data/*.jsonl", "link/data/new.jsonl"),
    ):
        with pytest.raises(DataError, match=r"new\.jsonl would be among the files of"):
            require_not_read(str(tmp_path / source), [tmp_path / name])
        require_not_read(str(tmp_path / source), [tmp_path / "new.txt", tmp_path / "b" / "new.csv"])


def test_a_refused_row_is_named_by_its_line_and_its_id(tmp_path: Path) -> None:
    path = with_ids(tmp_path, ["a", "b"], "uid")
    rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
    Path(path).write_text(json.dumps(rows[0]) + "\n" + json.dumps(rows[1] | {"output": ""}) + "\n")
    [rejected] = read_rows(path, reading=Reading(id_column="uid")).rejections
    assert rejected.where == f"{path}:2, id b"
