"""People judge rewrites: what Argilla and Label Studio are given, and what is taken of their verdicts."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.command import Middo
from support.loop_fixture import Finished, contents, rows_by_id
from test_chain import own, reasons

import middo_jax as middo
from middo_jax.config import load
from middo_jax.data.example import Example, Lineage, Message
from middo_jax.data.formats import DataError
from middo_jax.loop import run_loop
from middo_jax.preferences import preference_pairs
from middo_jax.progress import Silent
from middo_jax.refinement.review import Judgement, ReviewFormat, judgements, review_rows
from middo_jax.refinement.tasks import Outcome, Task
from middo_jax.report.acceptance import PEOPLE
from middo_jax.report.build import page
from middo_jax.report.card import card
from middo_jax.report.lineage import trace
from middo_jax.report.status import render_status, status
from middo_jax.report.verdicts import describe
from middo_jax.rundir import RoundDir, RunDir, RunError, read_jsonl, write_jsonl

pytest_plugins = ["support.command", "support.loop_fixture"]


@pytest.fixture
def command(middo: Middo) -> Middo:
    """The program; this module calls the package `middo`."""
    return middo


@pytest.fixture
def here(finished: Finished, tmp_path: Path) -> RoundDir:
    finished.copy(tmp_path)
    return RunDir(tmp_path / "run").round(0)


def accepted(here: RoundDir) -> dict[str, dict[str, Any]]:
    rows = (row for row in read_jsonl(here.refined) if row["accepted"])
    return {f"{row['task_id']}@{row['example']['id']}": row for row in rows}


def test_every_accepted_rewrite_is_written_beside_its_original(here: RoundDir, tmp_path: Path) -> None:
    n = middo.write_review(here.path, tmp_path / "a.jsonl")
    rows = {row["id"]: row for row in read_jsonl(tmp_path / "a.jsonl")}
    assert n == len(rows)
    assert rows.keys() == accepted(here).keys()
    assert {row["metadata"]["op"] for row in rows.values()} >= {"rewrite", "synthesize"}
    for id_, row in rows.items():
        task = accepted(here)[id_]
        fields, turns = row["fields"], task["example"]["messages"]
        assert [fields["prompt"], fields["answer"]] == [turn["content"] for turn in turns]
        assert row["suggestions"]["new_answer"]["value"] == fields["answer"]
        assert (fields["original_prompt"] == "") == (task["op"] == "synthesize")
    compile((tmp_path / "a.jsonl.py").read_text(), "a", "exec")
    middo.write_review(here.path, tmp_path / "l.json", "label-studio")
    tasks = json.loads((tmp_path / "l.json").read_text())
    assert [task["data"]["review_id"] for task in tasks] == list(rows)
    # Whatever the labelling interface shows is in every task.
    shown = ET.parse(tmp_path / "l.json.xml").iter()
    names = {element.get("value", "")[1:] for element in shown if element.tag == "Text"}
    original = {"original_context", "original_prompt", "original_answer"}
    assert names == {*original, "context", "prompt", "answer"} == rows[next(iter(rows))]["fields"].keys()
    assert all(names <= task["data"].keys() for task in tasks)
    before = contents(tmp_path)
    for taken in ("a.jsonl", "l.json"):
        with pytest.raises(RunError, match=r"exists, and may have been filled in"):
            middo.write_review(here.path, tmp_path / taken)
    for taken in (here.verdicts, here / "new.jsonl"):
        with pytest.raises(RunError, match=r"would be among the files that are read"):
            middo.write_review(here.path, taken)
    with pytest.raises(middo.ConfigError, match="no review format 'csv'; there are argilla, label-studio"):
        middo.write_review(here.path, tmp_path / "b", "csv")
    assert contents(tmp_path) == before


def test_verdicts_are_taken_before_merging_and_the_run_notices(
    here: RoundDir, finished: Finished, tmp_path: Path
) -> None:
    rewrites = {id_: task for id_, task in accepted(here).items() if task["replaces"]}
    bad, worse, *_ = rewrites
    addition = next(id_ for id_, task in accepted(here).items() if not task["replaces"])
    path = tmp_path / "verdicts.jsonl"
    middo.write_review(here.path, path)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:  # as Argilla's to_json gives them back
        if row["id"] in (bad, addition):
            said = {"verdict": "reject", "comment": "dull"}
        elif row["id"] == worse:
            said = {"verdict": "accept", "new_prompt": "What is a number for?", "new_answer": "To count."}
        else:
            continue
        row["responses"] = {name: [{"value": value, "user_id": "7"}] for name, value in said.items()}
    write_jsonl(path, rows)
    plain = rows_by_id(middo.refine(here.path).merged)
    refined, found = middo.read_review(here.path, [path])
    assert found == {"reject": 2, "edit": 1, "none": len(rows) - 3}
    assert describe(found) == (
        f"1 accepted with other words, 2 rejected, {len(rows) - 3} not judged, which stay accepted"
    )
    merged = rows_by_id(refined.merged)
    assert rewrites[bad]["source_id"] in merged  # the original stays
    assert bad.rpartition("@")[2] in plain.keys() - merged.keys()
    assert addition.rpartition("@")[2] in plain.keys() - merged.keys()
    [edited] = [row for id_, row in merged.items() if id_ not in plain and id_ != rewrites[bad]["source_id"]]
    assert [turn["content"] for turn in edited["messages"]] == ["What is a number for?", "To count."]
    assert edited["lineage"]["refiner"] == "fake+person"
    assert (edited["lineage"]["scores_after"], edited["lineage"]["op"]) == (None, rewrites[worse]["op"])
    pairs = {pair["middo_id"]: pair for pair in preference_pairs(RunDir(tmp_path / "run"))}
    assert bad.rpartition("@")[2] not in pairs
    assert pairs[edited["id"]]["chosen"][0]["content"] == "To count."
    found = own(reasons(RunDir(tmp_path / "run"), finished.settings(runs_dir=tmp_path)))
    assert found == {("round_00", "merge"), ("round_01", "prepare")}
    shows_verdicts(RunDir(tmp_path / "run"), len(rows), bad, edited["id"])


def test_rewrites_are_judged_by_commands(here: RoundDir, command: Middo, tmp_path: Path) -> None:
    review, tasks = tmp_path / "review.jsonl", tmp_path / "tasks.json"
    n = len(accepted(here))
    assert command("refine", here.path, "--write-review", review).out == f"{n} rewrites to review\n{review}\n"
    told = command("refine", here.path, "--write-review", tasks, "--review-format", "label-studio", "--json")
    assert told.json == {"rewrites": n, "review": str(tasks)}
    again = command("refine", here.path, "--write-review", review)
    assert (again.code, again.out) == (1, "")
    assert f"{review} exists, and may have been filled in" in again.err
    both = command("refine", here.path, "--write-review", tmp_path / "x", "--read-review", review)
    assert (both.code, "give --write-review or --read-review, not both" in both.err) == (1, True)

    first, second, *_ = rows = read_jsonl(review)
    first["verdict"], second["verdict"], second["new_answer"] = "reject", "accept", ""
    write_jsonl(review, rows)
    emptied = command("refine", here.path, "--read-review", review)
    assert emptied.code == 1
    assert f"{review}:2: {second['id']} is accepted, and its new_answer is empty" in emptied.err
    assert not here.verdicts.exists()
    second["new_answer"] = "For counting sheep."
    write_jsonl(review, rows)
    write_jsonl(tmp_path / "more.jsonl", [{"review_id": rows[2]["id"], "verdict": "accept"}])
    judged = command("refine", here.path, "--read-review", review, "--read-review", tmp_path / "more.jsonl")
    merged = here.path / "merged.jsonl"
    assert judged.out.splitlines() == [
        f"1 accepted, 1 accepted with other words, 1 rejected, {n - 3} not judged, which stay accepted",
        "`middo run` now makes again what depends on the merged dataset",
        str(merged),
    ]
    answers = {row["messages"][-1]["content"] for row in read_jsonl(merged)}
    assert "For counting sheep." in answers
    assert second["fields"]["answer"] not in answers
    told = command("refine", here.path, "--read-review", review, "--json").json
    assert told == {"verdicts": {"reject": 1, "edit": 1, "accept": 1, "none": n - 3}, "merged": str(merged)}


def shows_verdicts(run: RunDir, n: int, bad: str, edited: str) -> None:
    """Of `n` accepted rewrites, people rejected two, `bad` among them, and edited one."""
    told = status(run)
    first = told["rounds"][0]
    assert (first["accepted"], first["people"]) == (n - 2, {"reject": 2, "edit": 1, "none": n - 3})
    assert f"round_00: people's verdicts: 1 accepted with other words, 2 rejected, {n - 3}" in render_status(
        told
    )
    text = page(run).replace("&#39;", "'")
    funnel = text[text.index(f">{PEOPLE}</th>") :]
    cells = re.findall(r"(\d+) of (\d+)", funnel[: funnel.index("</tr>")])
    assert [sum(map(int, column)) for column in zip(*cells, strict=True)] == [n - 2, n]
    assert "rejected by a person: dull" in text
    assert ", edited by a person" in text
    run.round(1).dataset.unlink()  # made before the verdicts, so that it has what they rejected
    [lost] = [s for s in trace(run, bad.rpartition("@")[2]) if s["relation"] == "self"]
    assert (lost["accepted"], lost["verdict"]) == (False, "rejected by a person: dull")
    assert [s["prompt"] for s in trace(run, edited) if s["relation"] == "self"] == ["What is a number for?"]
    assert f"2 rejected, {n - 3} not judged" in card(run, {"train": "train.jsonl"}, "messages")


def test_a_second_call_adds_its_verdicts_and_replaces_those_on_the_same(
    here: RoundDir, tmp_path: Path
) -> None:
    one, two, *_ = accepted(here)

    def judge(**verdicts: str) -> dict[str, str]:
        rows = [{"review_id": {"one": one, "two": two}[name], "verdict": v} for name, v in verdicts.items()]
        write_jsonl(tmp_path / "v.jsonl", rows)
        middo.read_review(here.path, [tmp_path / "v.jsonl"])
        rows = read_jsonl(here.verdicts)
        return {row["id"]: row["verdict"] for row in rows if row["verdict"] != "none"}

    assert judge(one="reject") == {one: "reject"}
    assert judge(two="accept") == {one: "reject", two: "accept"}
    assert judge(one="accept", two="reject") == {one: "accept", two: "reject"}


def test_a_run_waits_until_every_rewrite_is_judged(
    here: RoundDir, finished: Finished, tmp_path: Path
) -> None:
    here.forget("merge")
    waiting = load(None, finished.settings(runs_dir=tmp_path, refine__wait_for_review=True))
    first, *others = accepted(here)
    write_jsonl(tmp_path / "v.jsonl", [{"review_id": first, "verdict": "accept"}])
    middo.read_review(here.path, [tmp_path / "v.jsonl"])
    here.forget("merge")
    with pytest.raises(RunError, match=rf"{len(others)} rewrites wait for a review"):
        run_loop(waiting, Silent())


def test_a_run_waits_for_verdicts_if_it_is_told(here: RoundDir, finished: Finished, tmp_path: Path) -> None:
    here.forget("merge")
    waiting = load(None, finished.settings(runs_dir=tmp_path, refine__wait_for_review=True))
    with pytest.raises(
        RunError, match=rf"{len(accepted(here))} rewrites wait for a review: .*--write-review"
    ):
        run_loop(waiting, Silent())
    assert "merge" not in here.stages()


def test_people_see_both_conversations_whole() -> None:
    long = "Is it wide? " * 1000
    system, asked = Message("system", "Be brief. " * 300), Message("user", long)
    before = (system, asked, Message("assistant", "No."))
    original = Example((*before, Message("user", "Why?"), Message("assistant", "It is not.")))
    child = original.replace_text("Why is it?", long, Lineage(op="rewrite"))
    rewrite = Task("rewrite", ("quality",), original)
    [row] = review_rows([Outcome(rewrite, child)], "argilla")
    assert row["fields"] == {
        "original_context": "",
        "original_prompt": "Why?",
        "original_answer": "It is not.",
        "context": f"[system] {system.content}\n\n[user] {long}\n\n[assistant] No.",
        "prompt": "Why is it?",
        "answer": long,
    }
    answered = (system, asked, Message("assistant", "Yes, very."))  # as with `refine.turns: all`
    every = original.replace_text("Why is it?", "It grew.", Lineage(op="rewrite"), answered)
    [row] = review_rows([Outcome(rewrite, every)], "label-studio")
    assert row["data"]["original_context"] == f"[system] {system.content}\n\n[user] {long}\n\n[assistant] No."
    assert row["data"]["context"] == (
        f"[system] {system.content}\n\n[user] {long}\n\n[assistant, rewritten] Yes, very."
    )
    added = original.replace_text("Name a lake.", "Como.", Lineage(op="synthesize"))
    [row] = review_rows([Outcome(Task("synthesize", ("diversity",), original), added)], "argilla")
    assert (row["fields"]["original_context"], row["fields"]["original_answer"]) == ("", "")
    assert row["fields"]["context"] == f"[system] {system.content}"


@pytest.mark.parametrize(
    "row",
    [
        {"responses": {"verdict": [{"value": "accept", "user_id": "u"}],
                       "new_answer": [{"value": " ", "user_id": "u"}]}},
        {"data": {"review_id": "t@c"}, "annotations": [{"result": [
            {"from_name": "verdict", "value": {"choices": ["accept"]}},
            {"from_name": "new_answer", "value": {"text": []}}]}]},
        {"verdict": "accept", "new_answer": ""},
    ],
    ids=["argilla", "label studio", "by hand"],
)  # fmt: skip
def test_an_accepted_rewrite_may_not_be_emptied(row: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=r"f:1: t@c is accepted, and its new_answer is empty: reject it, or"):
        judgements({"id": "t@c", **row}, "f:1")
    unjudged = json.loads(json.dumps(row).replace('"accept"', '""'))
    assert judgements({"id": "t@c", **unjudged}, "f:1") == []
    rejected = json.loads(json.dumps(row).replace("accept", "reject"))
    assert [j.verdict for j in judgements({"id": "t@c", **rejected}, "f:1")] == ["reject"]


@pytest.mark.parametrize(
    "row",
    [
        {"id": "t@c", "responses": {"verdict": [{"value": "reject", "user_id": "u"}],
                                    "comment": [{"value": "no", "user_id": "u"}]}},
        {"id": "t@c", "verdict.responses": ["reject", "accept"], "verdict.responses.users": ["u", "v"],
         "verdict.responses.status": ["submitted", "draft"], "comment.responses": ["no"],
         "comment.responses.users": ["u"], "comment.responses.status": ["submitted"]},
        {"data": {"review_id": "t@c"}, "annotations": [
            {"completed_by": "u", "result": [
                {"from_name": "verdict", "type": "choices", "value": {"choices": ["reject"]}},
                {"from_name": "comment", "type": "textarea", "value": {"text": ["no"]}}]},
            {"completed_by": "w", "was_cancelled": True, "result": [
                {"from_name": "verdict", "type": "choices", "value": {"choices": ["accept"]}}]}]},
        {"review_id": "t@c", "verdict": "reject", "comment": "no", "annotator": "u"},
        {"id": "t@c", "fields": {}, "responses": {}, "verdict": "reject", "comment": "no", "annotator": "u"},
    ],
    ids=["argilla", "argilla flat", "label studio", "label studio min", "by hand"],
)  # fmt: skip
def test_a_verdict_is_read_from_every_form(row: dict[str, Any]) -> None:
    assert judgements(row, "f:1") == [Judgement("t@c", "reject", comment="no", by="u")]


@pytest.mark.parametrize("people", [["u"], ["u", "v"]])
def test_an_export_that_does_not_tell_drafts_is_refused_where_there_may_be_some(people: list[str]) -> None:
    """Argilla's `to_json` has the status of a record, not of an answer."""
    answers = {"verdict": [{"value": "reject", "user_id": person} for person in people]}
    row = {"id": "t@c", "responses": answers}
    with pytest.raises(DataError, match=r"f:1: this export does not say which answers are drafts.*flatten"):
        judgements({**row, "status": "pending"}, "f:1")
    if len(people) > 1:
        with pytest.raises(DataError, match="drafts"):
            judgements({**row, "status": "completed"}, "f:1")
    else:
        assert len(judgements({**row, "status": "completed"}, "f:1")) == 1
    stated = {"verdict": [answer | {"status": "submitted"} for answer in answers["verdict"]]}
    assert len(judgements({"id": "t@c", "status": "pending", "responses": stated}, "f:1")) == len(people)


def test_a_line_that_is_not_json_is_named(here: RoundDir, tmp_path: Path) -> None:
    (tmp_path / "r.jsonl").write_text('{"id": "a@b"}\n\n{"id": \n', encoding="utf-8")
    with pytest.raises(DataError, match=r"r\.jsonl:3: not JSON"):
        middo.read_review(here.path, [tmp_path / "r.jsonl"])


def test_a_row_that_nobody_judged_gives_nothing() -> None:
    assert judgements({"id": "t@c", "responses": {}}, "f:1") == []
    assert judgements({"data": {"review_id": "t@c"}, "annotations": []}, "f:1") == []
    assert judgements({"id": "t@c", "responses": None}, "f:1") == []


@pytest.mark.parametrize(
    ("row", "error"),
    [
        ({"responses": {"verdict": "accept"}}, "`responses.verdict` must be a list of objects"),
        ({"responses": {"verdict": ["accept"]}}, "`responses.verdict` must be a list of objects"),
        ({"responses": ["accept"]}, "`responses` must be an object"),
        ({"verdict.responses": 5}, "`verdict.responses` must be a list"),
        (
            {"verdict.responses": ["accept"], "verdict.responses.users": 7},
            "`verdict.responses` must be a list",
        ),
        ({"annotations": [5]}, "`annotations` must be a list of objects"),
        ({"annotations": {}}, "`annotations` must be a list of objects"),
        ({"annotations": [{"result": [7]}]}, "`result` must be a list of objects"),
        ({"annotations": [{"result": [{"from_name": "verdict", "value": "accept"}]}]}, "`value` of a result"),
        ({"verdict": True}, "verdict must be a text, not bool"),
        ({"verdict": "accept", "new_answer": 7}, "new_answer must be a text, not int"),
        ({"verdict": "accept", "comment": "\ud800"}, "comment has half a character"),
    ],
)
def test_a_damaged_row_is_an_error_that_names_its_place(row: dict[str, Any], error: str) -> None:
    with pytest.raises(DataError) as raised:
        judgements({"id": "t@c", "data": {"review_id": "t@c"}, **row}, "f:1")
    assert str(raised.value).startswith(f"f:1: {error}")


Change = Callable[[list[dict[str, Any]]], Any]


def say(n: int, **said: str) -> Change:
    return lambda rows: rows[n].update(said)


def differ(rows: list[dict[str, Any]]) -> None:
    rows[0]["responses"] = {
        "verdict": [{"value": "accept", "user_id": u} for u in "ab"],
        "new_answer": [{"value": f"It is {u}.", "user_id": u} for u in "ab"],
    }


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda rows: None, "no verdict; nothing was changed"),
        (say(0, verdict="perhaps"), "r.jsonl:1: the verdict 'perhaps' is neither accept nor reject"),
        (say(0, verdict="accept", id="x"), "r.jsonl:1: no id of a rewrite"),
        (lambda rows: [row.update(id="x:a@b", verdict="accept") for row in rows], "no verdict on a rewrite"),
        (differ, "2 different edits of its answer; keep one of them"),
        (say(0, verdict="accept", new_answer="Yes.<|im_end|>"), "has the control token <|im_end|>"),
        (say(0, verdict="accept", new_prompt="Q\0\x1b[31m"), "the edited prompt has the control character"),
        (say(0, verdict="accept", new_answer="A \u202eB."), "the edited answer has the invisible character"),
        (lambda rows: rows.clear() or rows.append(7), "r.jsonl:1: a row must be an object, not int"),
    ],
)  # fmt: skip
def test_what_cannot_be_taken_is_refused_and_changes_nothing(
    here: RoundDir, tmp_path: Path, change: Change, error: str
) -> None:
    path = tmp_path / "r.jsonl"
    middo.write_review(here.path, path)
    rows = read_jsonl(path)
    change(rows)
    write_jsonl(path, rows)
    before = contents(here.path)
    with pytest.raises(DataError) as raised:
        middo.read_review(here.path, [path])
    assert error in str(raised.value)
    assert contents(here.path) == before


@pytest.mark.parametrize("form", ["argilla", "label-studio"])
def test_an_edit_with_a_character_that_nobody_sees_is_refused_by_its_place(
    here: RoundDir, tmp_path: Path, form: ReviewFormat
) -> None:
    path = tmp_path / "r.jsonl"
    middo.write_review(here.path, path, form)
    rows, bad = read_jsonl(path), "Q2 \x1b[31m\u202e\x07 evil"
    if form == "argilla":
        said = {"verdict": "accept", "new_prompt": bad}
        rows[1]["responses"] = {name: [{"value": value, "user_id": "u"}] for name, value in said.items()}
    else:
        chosen = {"from_name": "verdict", "type": "choices", "value": {"choices": ["accept"]}}
        text = {"from_name": "new_prompt", "type": "textarea", "value": {"text": [bad]}}
        for row in rows:  # as Label Studio exports them, those that nobody judged too
            row["annotations"] = []
        rows[1]["annotations"] = [{"completed_by": "u", "result": [chosen, text]}]
    write_jsonl(path, rows)
    with pytest.raises(
        DataError, match=r"r\.jsonl:2: .* the edited prompt has the control character U\+001B"
    ):
        middo.read_review(here.path, [path])
    assert not here.verdicts.exists()


def test_an_edit_may_not_bring_back_what_is_known(here: RoundDir, tmp_path: Path) -> None:
    original = next(task for task in accepted(here).values() if task["replaces"])["original"]["messages"]
    held = json.loads((tmp_path / "run" / "heldout.jsonl").read_text().splitlines()[0])["messages"]
    for turns, why in ((original, "is in the dataset already"), (held, "is held out")):
        path = tmp_path / f"{why}.jsonl"
        middo.write_review(here.path, path)
        rows = read_jsonl(path)
        said = {"verdict": "accept", "new_prompt": turns[-2]["content"], "new_answer": turns[-1]["content"]}
        row = next(row for row in rows if not row["fields"]["context"] and row["fields"]["original_prompt"])
        row.update(said)
        write_jsonl(path, rows)
        with pytest.raises(DataError, match=why):
            middo.read_review(here.path, [path])
