"""`middo inspect` as a linter for CI: what is printed, and the exit code."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from support.command import Middo

from middo_jax.data import hf_format
from middo_jax.data.every_split import every_split
from middo_jax.data.formats import DataError
from middo_jax.data.sources import read_rows

pytest_plugins = ["support.command"]

SHEEP = "A farmer has seventeen sheep and all but nine of them run away, how many are left over?"
TRAIN = "Mary picks four apples in the morning and six in the evening, how many does she have at night?"


def write_rows(path: Path, *rows: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def asked(*questions: str) -> list[dict[str, str]]:
    return [{"instruction": question, "output": "Nine are left."} for question in questions]


def save_to_disk(folder: Path, **splits: str) -> None:
    """A folder as `datasets` writes it, with one question per split."""
    (folder / "train").mkdir(parents=True)
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": list(splits)}))
    for split, question in splits.items():
        table = pa.table({"question": [question]})
        (folder / split).mkdir(exist_ok=True)
        (folder / split / "state.json").write_text(json.dumps({"_data_files": [{"filename": "d.arrow"}]}))
        with pa.ipc.new_stream(str(folder / split / "d.arrow"), table.schema) as stream:
            stream.write_table(table)


@pytest.mark.parametrize("kind", ["shards", "nested", "saved", "pattern"])
def test_all_splits_of_a_benchmark_are_compared(middo: Middo, tmp_path: Path, kind: str) -> None:
    data = write_rows(tmp_path / "d.jsonl", *asked("Solve it. " + SHEEP, "Name a sea.", TRAIN))
    bench = tmp_path / "bench"
    if kind == "saved":
        save_to_disk(bench, train=TRAIN, test=SHEEP)
        names = {"train": bench / "train", "test": bench / "test"}
    else:
        folder = bench / "main" if kind == "nested" else bench
        names = {"train": folder / "train-0.jsonl", "test": folder / "test-0.jsonl"}
        write_rows(names["train"], {"question": TRAIN})
        write_rows(names["test"], {"question": SHEEP})
    against = bench / "*.jsonl" if kind == "pattern" else bench
    found = middo("inspect", data, "--against", against, "--max", "benchmarks=0.5")
    assert found.code == 3, found.err
    lines = [" ".join(line.split()) for line in found.out.splitlines()]
    assert "FAIL benchmarks 2 66.67% limit 50.00%" in lines
    quoted = "a farmer has seventeen sheep and all but nine of them run away"
    assert f"{data}:1: {quoted!r} of {names['test']}" in lines
    assert any(line.startswith(f"{data}:3: ") and line.endswith(f" of {names['train']}") for line in lines)
    assert f"--against {names['test']}: 1 texts" in found.err
    if kind == "saved":  # only comparing reads all splits
        write_rows(names["train"] / "state.json", {"_data_files": []})
        with pytest.raises(DataError, match="has no rows"):
            read_rows(str(bench))


def test_a_text_of_several_splits_names_them_all(middo: Middo, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "d.jsonl", *asked(SHEEP))
    save_to_disk(tmp_path / "bench", train=SHEEP, test=SHEEP)
    found = middo("inspect", data, "--against", tmp_path / "bench", "--json").json
    (check,) = (check for check in found["checks"] if check["check"] == "benchmarks")
    assert check["first"][0]["detail"].endswith(f" of {tmp_path}/bench/train, {tmp_path}/bench/test")


def test_a_benchmark_of_one_file_is_not_named(middo: Middo, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "d.jsonl", *asked(SHEEP))
    bench = write_rows(tmp_path / "bench.jsonl", {"question": SHEEP})
    found = middo("inspect", data, "--against", bench)
    assert (found.code, found.err) == (0, "")  # without a limit, faults are only shown
    assert "run away'\n" in found.out
    missing = middo("inspect", data, "--against", tmp_path / "gsm8k")
    assert (missing.code, "there is no file" in missing.err) == (1, True)
    (tmp_path / "none").mkdir()
    empty = middo("inspect", data, "--against", tmp_path / "none")
    assert (empty.code, "and no folder in it has one" in empty.err) == (1, True)


def test_the_splits_of_a_folder_of_tfds(tmp_path: Path) -> None:
    (tmp_path / "features.json").write_text("{}")
    (tmp_path / "dataset_info.json").write_text(json.dumps({"splits": [{"name": "train"}, {"name": "test"}]}))
    names = [name for name, _ in every_split(str(tmp_path))]
    assert names == [f"tfds:{tmp_path}:train", f"tfds:{tmp_path}:test"]


def test_a_split_of_the_hub_is_compared(
    middo: Middo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked_for = []

    def rows(name: str, split: str) -> Iterator[dict[str, str]]:
        asked_for.append((name, split))
        yield {"question": SHEEP}

    monkeypatch.setattr(hf_format, "rows", rows)
    data = write_rows(tmp_path / "d.jsonl", *asked(SHEEP))
    assert middo("inspect", data, "--against", "hf:gsm8k:main:test", "--max", "benchmarks=0").code == 3
    assert asked_for == [("gsm8k:main", "test")]


def test_a_link_to_a_folder_above_is_not_followed(tmp_path: Path) -> None:
    write_rows(tmp_path / "a" / "test.jsonl", {"question": SHEEP})
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    assert [name for name, _ in every_split(str(tmp_path))] == [str(tmp_path / "a" / "test.jsonl")]


@pytest.mark.parametrize(
    ("check", "row"),
    [
        ("empty", {"instruction": "Name a sea.", "output": ""}),
        ("unusable", {"instruction": "Name a sea.", "output": 5}),
        ("missing", {"instruction": "Name a sea.", "output": "nan"}),
        ("mojibake", {"instruction": "Was ist GrÃ¶ÃŸe?", "output": "Ein Maß."}),
        ("refusals", {"instruction": "Name a sea.", "output": "I'm sorry, but I can't help with that."}),
        ("near_duplicates", {"instruction": "Name a bird.", "output": "A wren."}),
        ("secrets", {"instruction": "Use AKIAIOSFODNN7EXAMPLE.", "output": "Done."}),
    ],
)
def test_strict_fails_for_each_fault_and_says_where(
    middo: Middo, tmp_path: Path, check: str, row: dict[str, Any]
) -> None:
    bird = {"instruction": "Name a bird.", "output": "A wren."}
    data = write_rows(tmp_path / "d.jsonl", bird, row)
    found = middo("inspect", data, "--strict")
    assert found.code == 3, found.err
    lines = found.out.splitlines()
    failed = [number for number, line in enumerate(lines) if line.startswith("FAIL")]
    assert [lines[number].split()[1:3] for number in failed] == [[check, "1"]]
    assert lines[failed[0] + 1].strip().startswith(f"{data}:2: ")
    assert middo("inspect", data).code == 0
    assert middo("inspect", data, "--strict", "--max", f"{check}=0.5").code == 0
    as_json = middo("inspect", data, "--strict", "--json")
    checks = {each["check"]: each for each in json.loads(as_json.out)["checks"]}
    assert (as_json.code, [name for name, each in checks.items() if each["over"]]) == (3, [check])


def test_strict_passes_a_clean_dataset_in_two_languages(middo: Middo, tmp_path: Path) -> None:
    german = "Der Mond zieht das Wasser der Meere an, darum entstehen die Gezeiten."
    english = "Natalia sold clips to 48 of her friends in April, and then half as many."
    rows = [{"instruction": q, "output": a} for q, a in (("Why?", english), ("How?", english + "."))]
    data = write_rows(tmp_path / "d.jsonl", *rows, {"instruction": "Warum?", "output": german})
    found = middo("inspect", data, "--strict")
    assert (found.code, "FAIL" in found.out) == (0, False)
    assert middo("inspect", data, "--strict", "--max", "languages=0").code == 3
    wrong = middo("inspect", data, "--max", "refusal=0")
    assert (wrong.code, "there is no check 'refusal'" in wrong.err) == (1, True)
