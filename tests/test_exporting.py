"""A run's dataset in the user's own shape, opened by other readers."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, get_args

import pyarrow.parquet as pq
import pytest
import yaml
from support.said import Said
from support.synthetic_run import write_run

from middo_jax import exporting
from middo_jax.data.example import Example, Lineage, Message, Op
from middo_jax.data.own_shape import OwnShape
from middo_jax.data.reading import Reading
from middo_jax.data.repair import TRAILING
from middo_jax.data.sources import DataError, read, read_rows, write
from middo_jax.exporting import export_data, write_as_it_came
from middo_jax.preferences import preference_pairs
from middo_jax.rundir import RunDir, RunError, read_jsonl, write_json, write_jsonl, write_text


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    return write_run(tmp_path_factory.mktemp("runs") / "demo", n_rows=60)


def originals(run: RunDir) -> list[Example]:
    return [Example.from_json(row) for row in read_jsonl(run.final.dataset)]


@pytest.mark.parametrize("form", ["alpaca", "sharegpt", "messages", "prompt_completion", "parquet"])
def test_every_format_reads_back_and_opens_elsewhere(run: RunDir, tmp_path: Path, form: str) -> None:
    datasets, pandas = pytest.importorskip("datasets"), pytest.importorskip("pandas")
    out = tmp_path / "out"
    done = export_data(run, out, form, heldout=True)
    ending = "parquet" if form == "parquet" else "jsonl"
    examples, rejections = read(str(out / f"train.{ending}"))
    wanted = [e.messages for e in originals(run)]
    # The synthetic run has additions of equal words, of which reading keeps one.
    assert [e.messages for e in examples] == list(dict.fromkeys(wanted))
    assert all("duplicate" in r.reason for r in rejections)
    assert (done.n, done.n_heldout) == (len(wanted), 20)
    assert len(read(str(out / f"heldout.{ending}"))[0]) == 20
    # As `datasets` reads a folder with a card, from its front matter.
    loaded = datasets.load_dataset(str(out), cache_dir=str(tmp_path / "cache"))
    assert {name: len(split) for name, split in loaded.items()} == {"train": done.n, "test": 20}
    table = (
        pandas.read_parquet(out / "train.parquet")
        if form == "parquet"
        else pandas.read_json(out / "train.jsonl", lines=True)
    )
    assert len(table) == done.n
    info = json.loads((out / "dataset_info.json").read_text())
    assert set(info) == {"demo", "demo_heldout"}
    columns = info["demo"]["columns"]
    assert set(columns.values()) <= set(table.columns)
    assert {"response", "messages"} & columns.keys()
    axolotl = yaml.safe_load((out / "axolotl.yaml").read_text())
    assert (out / axolotl["datasets"][0]["path"]).exists()
    compile((out / "trl.py").read_text(), "trl.py", "exec")


@pytest.mark.parametrize("form", ["alpaca", "sharegpt", "messages", "prompt_completion"])
def test_the_snippet_for_trl_makes_columns_that_trl_takes(
    run: RunDir, tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    export_data(run, tmp_path / "out", form)
    monkeypatch.chdir(tmp_path / "out")
    names: dict[str, Any] = {}
    exec((tmp_path / "out" / "trl.py").read_text(), names)
    columns = set(names["data"]["train"].column_names)
    assert columns >= {"prompt", "completion"} or "messages" in columns


def test_what_the_format_has_no_place_for_is_written_as_messages_and_said(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    progress = Said()
    monkeypatch.setattr(exporting, "own_shape", lambda run: OwnShape("alpaca"))
    plain = Example((Message("user", "Name a sea."), Message("assistant", "The North Sea.")))
    unlearnt = (Message("user", "Hi."), Message("assistant", "Hello.", learnt=False), *plain.messages)
    path = tmp_path / "train.jsonl"
    assert write_as_it_came(run, [plain], path, progress) == "alpaca"
    assert (read(str(path))[0], progress.lines) == ([plain], [])
    two = [plain, Example(unlearnt)]
    assert write_as_it_came(run, two, path, progress) == "messages"
    assert read(str(path))[0] == two
    assert "written as messages (alpaca has no field for answers of weight 0" in progress.lines[0]


def test_scores_and_lineage_are_columns(run: RunDir, tmp_path: Path) -> None:
    export_data(run, tmp_path / "out", "messages", scores=True, lineage=True)
    rows = read_jsonl(tmp_path / "out" / "train.jsonl")
    assert {row["middo_id"] for row in rows} == {e.id for e in originals(run)}
    scored = {row["id"]: row for folder in run.rounds() for row in pq.read_table(folder.scores).to_pylist()}
    seeds = [row for row in rows if row["middo_op"] == "seed"]
    assert [row["middo_loss_post"] for row in seeds] == [
        scored[row["middo_id"]]["loss_post"] for row in seeds
    ]
    assert any(row["middo_loss_post"] for row in seeds)
    rewritten = [row for row in rows if row["middo_op"] != "seed"]
    assert rewritten
    assert all(row["middo_parent_ids"] for row in rewritten)
    later = [row for row in rewritten if row["middo_id"] in scored]  # scored by a round after their own
    assert later
    for row in later:
        assert row["middo_loss_post"] == scored[row["middo_id"]]["loss_post"]


def test_a_run_that_is_not_up_to_date_is_exported_with_a_warning(tmp_path: Path) -> None:
    run = write_run(tmp_path / "mine", n_rows=60)
    assert export_data(run, tmp_path / "done").warning is None
    run.round(1).forget("train")
    warning = export_data(run, tmp_path / "out").warning
    assert warning is not None
    assert "is not up to date, train of round_01 is next: these are the rows of final as they are" in warning


def test_an_export_that_fails_leaves_the_folder_as_it_was(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*arguments: object) -> str:
        raise DataError("no place for it")

    monkeypatch.setattr(exporting, "card", fails)  # the last file that is written
    (tmp_path / "mine").mkdir()
    for out in (tmp_path / "out", tmp_path / "mine"):
        with pytest.raises(DataError, match="no place"):
            export_data(run, out)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    assert not any((tmp_path / "mine").iterdir())


def test_the_card_says_how_the_data_was_made_and_nothing_private(run: RunDir, tmp_path: Path) -> None:
    settings = yaml.safe_load(run.config.read_text())
    private = {"base_url": "http://user:secret@10.0.0.7/v1", "model": "gpt-4o-mini", "accept": "measured"}
    private |= {"prompts": "/home/me/words.yaml"}
    cached = "/home/me/.cache/huggingface/hub/models--Qwen--Qwen2.5-0.5B/snapshots/1a2b"
    placed = settings | {"refine": private, "runs_dir": "/home/me/runs", "model": {"path": cached}}
    placed["data"] = {"path": "hf:/home/me/mine:train", "sources": [{"path": "/home/me/other.json"}]}
    run.config.write_text(yaml.safe_dump(placed))
    try:
        export_data(run, tmp_path / "out")
    finally:
        run.config.write_text(yaml.safe_dump(settings))
    text = (tmp_path / "out" / "README.md").read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert front["configs"][0]["data_files"] == [{"split": "train", "path": "train.jsonl"}]
    assert front["license"] == "unknown"
    assert "gpt-4o-mini" in text
    assert "secret" not in text
    assert "/home/me" not in text
    assert "prompts: words.yaml" in text
    assert "| model | Qwen/Qwen2.5-0.5B |" in text
    assert "\n  path: Qwen/Qwen2.5-0.5B\n" in text  # of the settings, which repeat it
    assert "| original data | hf:mine:train |" in text
    counts = {op: sum(e.lineage.op == op for e in originals(run)) for op in ("seed", "synthesize")}
    assert f"| {counts['seed']:,} | the original rows, unchanged |" in text
    assert f"| {counts['synthesize']:,} | new rows near sparse ones (diversity) |" in text


def test_a_folder_with_files_and_a_run_without_data_are_refused(run: RunDir, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").touch()
    with pytest.raises(RunError, match="not an empty folder"):
        export_data(run, tmp_path / "full")
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunError, match="not a run"):
        export_data(RunDir(tmp_path / "empty"), tmp_path / "out")


def test_a_column_of_the_users_that_has_our_name(run: RunDir, tmp_path: Path) -> None:
    before = read_jsonl(run.final.dataset)
    write_jsonl(run.final.dataset, [{**before[0], "extra": {"middo_op": "mine"}}, *before[1:]])
    try:
        with pytest.raises(DataError, match="has a column 'middo_op' of its own"):
            export_data(run, tmp_path / "out", lineage=True)
    finally:
        write_jsonl(run.final.dataset, before)


def test_alpaca_keeps_instruction_and_input_apart(tmp_path: Path) -> None:
    row = {"instruction": "Add.", "input": "2 and 3", "output": "5", "id": "a1"}
    (tmp_path / "in.jsonl").write_text(json.dumps(row) + "\n")
    data = read_rows(str(tmp_path / "in.jsonl"))
    [example] = data.examples
    assert (example.prompt, data.format) == ("Add.\n2 and 3", "alpaca")
    example = Example.from_json(json.loads(json.dumps(example.to_json())))
    write([example], tmp_path / "out.jsonl", "alpaca")
    assert json.loads((tmp_path / "out.jsonl").read_text()) == row
    child = example.replace_text("Add 2 and 3.", "It is 5.", Lineage((example.id,), example.id, 1, "rewrite"))
    write([child], tmp_path / "out.jsonl", "alpaca")
    new = {"instruction": "Add 2 and 3.", "input": "", "output": "It is 5.", "id": "a1"}
    assert json.loads((tmp_path / "out.jsonl").read_text()) == new
    again = example.replace_text(example.question, "Five.", Lineage((example.id,), example.id, 1, "reanswer"))
    write([again], tmp_path / "out.jsonl", "alpaca")
    assert json.loads((tmp_path / "out.jsonl").read_text()) == {**row, "output": "Five."}
    added = example.replace_text("Name a sea.", "North.", Lineage((example.id,), example.id, 1, "synthesize"))
    assert (added.user_id, child.user_id) == (None, "a1")


OWN_SHAPES = {
    "alpaca": (
        {"columns": {"instruction": "question", "output": "answer"}, "id_column": "uid"},
        [{"question": "Add.", "answer": "5", "uid": "a", "output": "kept"},
         {"question": "Sum.", "answer": "6", "uid": "b", "output": "also"}],
    ),
    "sharegpt": (
        {"columns": {"conversations": "chat"}},
        [{"system_prompt": told, "chat": [{"from": "human", "value": "Hi."}, {"from": "gpt", "value": "I."}]}
         for told in ("Rhyme.", "")],
    ),
    "prompt_completion": (
        {},
        [{"completion": "5", "system": "Count.", "prompt": "Add."},
         {"completion": "6", "system": "", "prompt": "A"}],
    ),
    "alpaca: the parts of a prompt": (
        {},
        [{"instruction": "", "context": "It rains.", "output": "Yes.", "history": []},
         {"instruction": "Is it wet?", "context": "", "output": "Yes.", "history": [["Hi.", "Hello."]]}],
    ),
    "prompt_completion: context": (
        {"columns": {"context": "passage"}},
        [{"prompt": "Is it wet?", "passage": "It rains.", "completion": "Yes."},
         {"prompt": "Is it dry?", "passage": "", "completion": "No."}],
    ),
    "prompt_completion: context of turns": (
        {},
        [{"prompt": [{"role": "user", "content": "Is it wet?"}], "context": "It rains.",
          "completion": [{"role": "assistant", "content": "Yes."}]}],
    ),
    "messages: fields of turns": (
        {},
        [{"messages": [{"role": "user", "content": "Hi.", "name": "Ann"},
                       {"role": "assistant", "content": "I.", "reasoning_content": "Who?"}]}],
    ),
    "sharegpt: weight 1 everywhere": (
        {},
        [{"conversations": [{"from": "human", "value": "Hi.", "train": True},
                            {"from": "gpt", "value": "I.", "train": True}]}],
    ),
    "messages: turns that are not learnt at the end": (
        {},
        [{"messages": [{"role": "user", "content": "Hi.", "weight": None},
                       {"role": "assistant", "content": "I.", "weight": 1, "name": "Bo"},
                       {"role": "user", "content": "Ho.", "weight": None},
                       {"role": "assistant", "content": "No.", "weight": 0}]}],
    ),
    "sharegpt: two columns for the system text": (
        {},
        [{"system": told, "system_prompt": told,
          "conversations": [{"from": "human", "value": "Hi."}, {"from": "gpt", "value": "I."}]}
         for told in ("Rhyme.", "")],
    ),
    "alpaca: one of two columns for the system text": (
        {},
        [{"instruction": text, "output": "5", "system": "", "system_message": "Count."} for text in "ab"],
    ),
    "messages": (
        {"sources": [{"path": name, "columns": {"messages": "m"}} for name in "ab"]},
        [{"m": [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "I."}], "part": 1}],
    ),
    "sharegpt: names of roles": (
        {"roles": {"narrator": "system"}},
        [{"conversations": [{"from": "narrator", "value": "Rhyme."}, {"from": "User", "value": "Hi."},
                            {"from": "Bot", "value": "I."}]}],
    ),
    "sharegpt: a field called role, an answer that is not learnt": (
        {},
        [{"conversations": [{"from": "human", "value": "Hi.", "role": "Ann", "weight": None},
                            {"from": "gpt", "value": "No.", "role": "Bo", "weight": 0},
                            {"from": "human", "value": "Ho.", "role": "Ann", "weight": None},
                            {"from": "gpt", "value": "I.", "role": "Bo", "weight": 1}]}],
    ),
    "sharegpt: keys of messages": (
        {},
        [{"conversations": [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "I."}]}],
    ),
    "messages: text parts": (
        {},
        [{"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi."}]},
                       {"role": "assistant", "content": [{"type": "text", "text": "I."}]}]}],
    ),
    "messages: tools": (
        {},
        [{"tools": [{"type": "function", "function": {"name": "add"}}],
          "messages": [{"role": "user", "content": "Add."},
                       {"role": "assistant", "content": "", "tool_calls": [{"id": "c1", "type": "function",
                        "function": {"name": "add", "arguments": "{\"a\": 1}"}}]},
                       {"role": "tool", "content": "5", "tool_call_id": "c1"},
                       {"role": "assistant", "content": "5."}]},
         {"tools": None, "messages": [{"role": "user", "content": "Hi."},
                                      {"role": "assistant", "content": "I."}]}],
    ),
}  # fmt: skip


def _prepared(tmp_path: Path, form: str, data: dict[str, Any], rows: list[dict[str, Any]]) -> RunDir:
    """A run whose final dataset is the rows as they were read."""
    path = tmp_path / "in.jsonl"
    write_jsonl(path, rows)
    columns = data.get("columns") or data.get("sources", [{}])[0].get("columns") or {}
    reading = Reading(columns=columns, id_column=data.get("id_column"), roles=data.get("roles") or {})
    found = read_rows(str(path), reading=reading)
    assert found.format == form
    run = RunDir(tmp_path / "run")
    write_text(run.config, yaml.safe_dump({"name": "mine", "data": data}))
    record = {"format": form, "columns": found.columns, "files": {}, "seconds": 0}
    spelling = found.spelling.commonest(form).to_json()
    write_json(run.round(0).path / "manifest.json", {"stages": {"prepare": {**record, "spelling": spelling}}})
    write_jsonl(run.final.dataset, [example.to_json() for example in found.examples])
    return run


# What LLaMA-Factory's converter for these rows does not read.
UNREAD = {
    "messages: text parts": "text parts",
    "messages: tools": "`tool_calls`",
    "prompt_completion: context of turns": "prompts that are lists of turns",
}


@pytest.mark.parametrize("case", OWN_SHAPES)
def test_rows_come_back_in_the_users_own_shape(tmp_path: Path, case: str) -> None:
    datasets = pytest.importorskip("datasets")
    form, (data, rows) = case.split(":")[0], OWN_SHAPES[case]
    run = _prepared(tmp_path, form, data, rows)
    write_as_it_came(run, originals(run), tmp_path / "own.jsonl", Said())
    note = export_data(run, tmp_path / "out").note
    for path in (tmp_path / "own.jsonl", tmp_path / "out" / "train.jsonl"):
        found = read_jsonl(path)
        for row in found if "id" not in rows[0] and "id_column" not in data else ():
            del row["id"]  # ours
        assert [list(row.items()) for row in found] == [list(row.items()) for row in rows]
    info = tmp_path / "out" / "dataset_info.json"
    assert (case in UNREAD) == (not info.exists()) == (UNREAD.get(case, "-") in (note or ""))
    told = json.loads(info.read_text())["mine"]["columns"] if info.exists() else {}
    assert set(told.values()) <= rows[0].keys()
    assert ("system" in told) == any(name.startswith("system") for name in rows[0])
    with pytest.MonkeyPatch.context() as patch:  # the snippet gives TRL what the rows have
        patch.chdir(tmp_path / "out")
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        names: dict[str, Any] = {}
        exec((tmp_path / "out" / "trl.py").read_text(), names)
    made = names["data"]["train"][0]
    turns = made.get("messages")
    if turns is None and isinstance(made["prompt"], list):
        turns = made["prompt"] + made["completion"]
    if case == "prompt_completion: context of turns":
        assert "does not read `context`" in (tmp_path / "out" / "trl.py").read_text()
    elif turns is None:
        assert [made["prompt"], made["completion"]] == [m.content for m in originals(run)[0].messages]
    else:
        assert [(t["role"], t["content"]) for t in turns] == [
            (m.role, m.content) for m in (*originals(run)[0].messages, *originals(run)[0].behind)
        ]
    export_data(run, tmp_path / "usual", form)
    again, _ = read(str(tmp_path / "usual" / "train.jsonl"), form)
    assert [e.messages for e in again] == [e.messages for e in originals(run)]


@pytest.mark.parametrize("form", [None, "sharegpt", "messages", "prompt_completion", "parquet"])
def test_both_files_have_the_same_columns(tmp_path: Path, form: str | None) -> None:
    data, rows = OWN_SHAPES["messages: tools"]
    run = _prepared(tmp_path, "messages", data, rows)
    [with_tools, without] = read_jsonl(run.final.dataset)
    for kept, held in ((with_tools, without), (without, with_tools)):
        write_jsonl(run.final.dataset, [kept | {"user_id": "a"}])
        write_jsonl(run.heldout, [held])
        out = tmp_path / f"{kept['id']}"
        export_data(run, out, form, heldout=True)
        if form == "parquet":
            columns = [pq.read_schema(out / f"{name}.parquet").names for name in ("train", "heldout")]
        else:
            columns = [[*read_jsonl(out / f"{name}.jsonl")[0]] for name in ("train", "heldout")]
        assert columns[0] == columns[1]


def test_answers_of_weight_0_are_marked_for_axolotl_and_said_for_trl(tmp_path: Path) -> None:
    turns = [("user", "Hi."), ("assistant", "Bad."), ("user", "Ho."), ("assistant", "Good.")]
    row: dict[str, Any] = {"messages": [{"role": role, "content": text} for role, text in turns]}
    row["messages"][1] |= {"weight": 0}
    export_data(_prepared(tmp_path, "messages", {}, [row]), tmp_path / "out")
    [found] = read_jsonl(tmp_path / "out" / "train.jsonl")
    # axolotl learns every turn whose field is 1, and asks for the role where it is null.
    assert [turn["weight"] for turn in found["messages"]] == [None, 0, None, 1]
    source = yaml.safe_load((tmp_path / "out" / "axolotl.yaml").read_text())["datasets"][0]
    assert source["message_field_training"] == "weight"
    assert "does not read `weight: 0`" in (tmp_path / "out" / "trl.py").read_text()
    [again], _ = read(str(tmp_path / "out" / "train.jsonl"))
    assert [m.learnt for m in again.messages] == [True, False, True, True]


def test_a_format_that_cannot_be_written_is_refused_before_the_folder_exists(
    run: RunDir, tmp_path: Path
) -> None:
    for form in ("tfds", "csv"):
        with pytest.raises(DataError, match=f"cannot be written as '{form}'; there are alpaca"):
            export_data(run, tmp_path / "out", form)
    assert not (tmp_path / "out").exists()


def test_preference_pairs_of_accepted_rewrites(run: RunDir, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    done = export_data(run, tmp_path / "out", pairs=True)
    pairs = read_jsonl(tmp_path / "out" / "pairs.jsonl")
    tasks = [task for folder in run.rounds() for task in read_jsonl(folder.refined)]
    replaced = {t["example"]["id"]: t for t in tasks if t["accepted"] and t["replaces"]}
    assert done.n_pairs == len(pairs) > 0
    of_originals = [pair for pair in pairs if pair["rejected_from"] == "original"]
    assert {pair["middo_id"] for pair in of_originals} == replaced.keys()
    for pair in of_originals:
        child = Example.from_json(replaced[pair["middo_id"]]["example"])
        original = Example.from_json(replaced[pair["middo_id"]]["original"])
        assert pair["prompt"] == [{"role": m.role, "content": m.content} for m in child.messages[:-1]]
        assert pair["chosen"] == [{"role": "assistant", "content": child.response}]
        assert pair["id_user"] == child.user_id
        assert pair["rejected"] == [{"role": "assistant", "content": original.response}]
        assert pair["same_prompt"] == (child.prompt == original.prompt)
        assert pair["chosen_quality"] == (child.lineage.scores_after or {}).get("quality")
    export_data(run, tmp_path / "parquet", "parquet", pairs=True)
    for out in ("out", "parquet"):
        loaded = datasets.load_dataset(str(tmp_path / out), "pairs", cache_dir=str(tmp_path / "cache"))
        assert len(loaded["train"]) == len(pairs)


def test_a_losing_candidate_makes_a_pair_with_its_own_scores(tmp_path: Path) -> None:
    folder = RunDir(tmp_path / "run").round(0)
    original = Example((Message("user", "Name a sea."), Message("assistant", "A sea.")))
    lineage = Lineage((original.id,), original.id, 1, "rewrite", "quality", scores_after={"quality": 8.0})
    child = original.replace_text("Name a sea.", "The North Sea.", lineage)
    task = {
        "task_id": "t",
        "accepted": True,
        "replaces": original.id,
        "attempts": 3,
        "scores_before": {"quality": 3.0},
    }
    write_jsonl(folder.refined, [task | {"example": child.to_json(), "original": original.to_json()}])
    asked = [{"role": "user", "content": "Name a sea."}]
    answers = ("<think>Hm.</think>A big sea.<|im_end|>", "A sea.<|im_start|>user\nNo.", "The North Sea.")
    write_jsonl(
        folder.requests,
        [
            {"task_id": "t", "attempt": n, "step": "answer", "messages": asked, "answer": text}
            for n, text in enumerate(answers)
        ],
    )
    measured = {"loss": 1.5, "quality": 4.0}
    write_jsonl(folder.candidates, [{"task_id": "t", "attempt": 0, "measured": measured}])
    of_original, of_candidate = preference_pairs(RunDir(tmp_path / "run"))
    assert (of_original["rejected_from"], of_original["same_prompt"]) == ("original", True)
    assert (of_original["chosen_quality"], of_original["rejected_quality"]) == (8.0, 3.0)
    assert of_candidate["rejected"] == [{"role": "assistant", "content": "A big sea."}]
    assert (of_candidate["rejected_loss_post"], of_candidate["rejected_quality"]) == (1.5, 4.0)


def test_a_candidate_that_failed_at_an_earlier_turn_makes_no_pair(tmp_path: Path) -> None:
    """With `refine.turns: all`. Its last answer is to another question than the accepted one."""
    folder = RunDir(tmp_path / "run").round(0)
    texts = ("Name a sea.", "A sea.", "How deep is it?", "55 m.")
    turns = tuple(Message(role, text) for role, text in zip(("user", "assistant") * 2, texts, strict=True))
    child = Example(turns, lineage=Lineage(("o",), "o", 1, "rewrite", "quality"))
    task = {"task_id": "t", "accepted": True, "replaces": None, "attempts": 2, "original": child.to_json()}
    write_jsonl(folder.refined, [task | {"example": child.to_json()}])
    asked = [{"role": turn.role, "content": turn.content} for turn in turns[:3]]
    request = {"task_id": "t", "step": "answer", "attempt": 0, "answer": "I cannot say."}
    for messages, n in ((asked, 1), (asked[:1], 0)):
        write_jsonl(folder.requests, [request | {"messages": messages}])
        assert len(preference_pairs(RunDir(tmp_path / "run"))) == n


def test_the_card_has_no_html_or_links_of_others(run: RunDir, tmp_path: Path) -> None:
    settings = yaml.safe_load(run.config.read_text())
    run.config.write_text(yaml.safe_dump(settings | {"model": {"path": "/m/<img src=x>[a](http:b)"}}))
    try:
        export_data(run, tmp_path / "out")
    finally:
        run.config.write_text(yaml.safe_dump(settings))
    table = (tmp_path / "out" / "README.md").read_text().split("```yaml")[0]
    assert "<img" not in table
    assert "[a](" not in table.replace("\\[", "")


def test_the_card_counts_rows_of_every_kind(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "I."}]
    run = _prepared(tmp_path, "messages", {}, [{"messages": turns}])
    [example] = originals(run)
    kinds = get_args(Op)
    rows = [dataclasses.replace(example, lineage=Lineage(op=op)).to_json() for op in kinds]
    write_jsonl(run.final.dataset, rows)
    export_data(run, tmp_path / "out")
    made = (tmp_path / "out" / "README.md").read_text().split("how they were made")[1].split("Format:")[0]
    assert made.count("\n| 1 | ") == len(kinds)
    assert "| 1 | the original rows, unchanged |" in made
    manifest = run.round(0).path / "manifest.json"
    record = json.loads(manifest.read_text())
    record["stages"]["prepare"]["repairs"] = {TRAILING: 1200}
    write_json(manifest, record)
    export_data(run, tmp_path / "repaired")
    made = (tmp_path / "repaired" / "README.md").read_text()
    assert "| 1 | the original rows, unchanged but for the repairs below |" in made
    assert f"| 1,200 | {TRAILING} |" in made


def test_what_a_trainer_does_not_read_is_left_out_or_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    call = {"from": "function_call", "value": '{"name": "add", "arguments": {}}'}
    said = [{"from": "human", "value": "Add."}, {"from": "gpt", "value": "5."}]
    rows = [
        {
            "tools": '[{"name": "add"}]',
            "conversations": [said[0], call, {"from": "tool", "value": "5"}, said[1]],
        },
        {"tools": None, "conversations": [{"from": "human", "value": "Hi."}, said[1]]},
    ]
    run = _prepared(tmp_path / "calls", "sharegpt", {}, rows)
    assert export_data(run, tmp_path / "out").note is None  # LLaMA-Factory reads such calls
    monkeypatch.chdir(tmp_path / "out")
    names: dict[str, Any] = {}
    exec(Path("trl.py").read_text(), names)
    assert [row["messages"][0]["content"] for row in names["data"]["train"]] == ["Hi."]
    assert "# It does not read calls that are turns of their own" in Path("axolotl.yaml").read_text()
    system = [{"instruction": "Add.", "output": "5", "system": "Count."}]
    export_data(_prepared(tmp_path / "alpaca", "alpaca", {}, system), tmp_path / "with_system")
    source = yaml.safe_load((tmp_path / "with_system" / "axolotl.yaml").read_text())["datasets"][0]
    assert source["type"] == "alpaca_w_system.load_instruct"  # its `alpaca` reads no system texts
