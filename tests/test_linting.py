"""The linter: each fault is found, what only looks like it is not, and limits decide the exit code."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from middo_jax.data.example import Example, Message
from middo_jax.data.files import Rejection
from middo_jax.data.formats import DataError
from middo_jax.data.sources import read_rows
from middo_jax.linting import CHECKS, Found, lint, read_benchmarks, read_limits, render


def sample(prompt: str, response: str = "A wren is a small brown bird.") -> Example:
    return Example((Message("user", prompt), Message("assistant", response)))


def results(*examples: Example, **how: object) -> dict[str, Found]:
    places = [f"d.jsonl:{n}" for n in range(1, len(examples) + 1)]
    return {found.check: found for found in lint(examples, places, **how)}  # type: ignore[arg-type]


CLEAN = (
    sample("Name a bird."),
    sample("Was ist «Ärger»? Größe, Straße, naïve café, Ångström ±5 °C – “so” … €3"),
    sample(
        "What is NaN in Python?",
        "It is not a number. Write to me@example.com or see skip-list-of-words-here.",
    ),
    sample("Why does null exist?", "I can't say it better than Hoare did: it was a mistake."),
    sample("日本の首都はどこですか。", "東京です。"),
)


def test_a_doubtful_text_does_not_say_which_language_most_rows_are_in() -> None:
    key = sample("Key?", "sk-proj-abcdefghijklmnopqrstuvwxyz0123456789ABCD and me@example.com")
    german = sample("Warum?", "Der Mond zieht das Wasser der Meere an, darum entstehen die Gezeiten.")
    english = sample("How many?", "Natalia sold clips to 48 of her friends in April, and then half as many.")
    assert results(key, german, english)["languages"].first == [("d.jsonl:2", "de, most rows are en")]


def test_a_benchmark_that_says_nothing_is_an_error_and_no_pass(tmp_path: Path) -> None:
    for name, text, why in (
        ("empty.jsonl", "", "no"),
        ("blank.jsonl", '{"question": "", "n": 5}\n', "no text there to compare with"),
        ("torn.jsonl", '{"question": "Why?"}\n{"question": \n', "torn.jsonl:2: .*half of a benchmark"),
    ):
        (tmp_path / name).write_text(text, encoding="utf-8")
        with pytest.raises(DataError, match=why):
            read_benchmarks([str(tmp_path / name)])


def test_a_quotation_is_found_in_a_script_without_spaces() -> None:
    text = "小明有三个苹果,他又买了五个苹果,然后给了小红两个苹果,请问小明现在还有几个苹果?"
    found = results(sample(f"请看这道题:{text}"), sample("小明有几个苹果?"), benchmarks={"b": [text]})
    assert found["benchmarks"].n == 1


def test_a_clean_dataset_has_no_fault() -> None:
    assert {name: found.first for name, found in results(*CLEAN, strict=True).items() if found.n} == {}


@pytest.mark.parametrize(
    ("check", "example", "detail"),
    [
        ("missing", sample("nan"), "the user's text is 'nan'"),
        ("missing", sample("Name a sea.", " NULL "), "the assistant's text is 'NULL'"),
        ("missing", sample("Name a sea.", "None"), "the assistant's text is 'None'"),
        (
            "missing",
            dataclasses.replace(sample("Add.\nnan"), prompt_columns={"instruction": "Add.", "input": "nan"}),
            "column 'input' is 'nan'",
        ),
        ("secrets", dataclasses.replace(sample("Name a sea."), user_id="bob@corp.com"), "e-mail address"),
        ("mojibake", sample("Was ist GrÃ¶ÃŸe?"), "'Ã¶ÃŸ' was 'öß'"),
        ("mojibake", sample("Name a sea.", "It isnâ€™t one."), "'â€™' was '’'"),
        ("mojibake", sample("Name a sea.", "It isn\ufffdt one."), "U+FFFD"),
        ("refusals", sample("Name a sea.", "I'm sorry, but I can't help with that."), "refuses"),
        ("near_duplicates", sample("Name a bird, please."), "1.00 like d.jsonl:5"),
        ("secrets", sample("Use AKIAIOSFODNN7EXAMPLE."), "an AWS key"),
        ("secrets", sample("Use it.", "token = ghp_" + "a1" * 18), "a GitHub token"),
        ("secrets", sample("Use it.", "OPENAI_API_KEY=sk-proj-" + "a1B2" * 8), "an OpenAI or Anthropic key"),
        ("secrets", sample("Use it.", "-----BEGIN RSA PRIVATE KEY-----"), "a private key"),
        ("secrets", sample("Who?", "Ask jane.doe@company.co.uk."), "an e-mail address"),
        (
            "languages",
            sample("Nombra un río.", "El río más largo de España que desemboca en el Atlántico es el Tajo."),
            "es, most rows are en",
        ),
    ],
)
def test_each_fault_is_found(check: str, example: Example, detail: str) -> None:
    long = "This is a sentence in English that is long enough to be told from other languages."
    others = [sample(f"Tell me about the number {n}.", long) for n in ("one", "two", "three", "four")]
    found = results(*others, sample("Name a bird please!"), example)
    assert {name for name, result in found.items() if result.n} == {check}
    [(where, said)] = found[check].first
    assert where == "d.jsonl:6"
    assert detail in said
    assert found[check].share == pytest.approx(1 / 6)


def test_every_learnt_answer_may_refuse() -> None:
    first = sample("How do I pick my own lock?", "I'm sorry, but I can't help with that.").messages
    then = sample("It is mine.", "Take a pick, and go slowly.").messages
    unlearnt = (first[0], dataclasses.replace(first[1], learnt=False))
    found = results(Example(first + then), Example(unlearnt + then))["refusals"]
    assert (found.n, found.first) == (1, [("d.jsonl:1", "the answer in turn 2 refuses")])


def test_a_secret_is_not_printed() -> None:
    key = "ghp_" + "a1" * 18
    assert key not in "\n".join(render(list(results(sample("Use it.", key)).values())))


def test_the_users_other_columns_and_tools_may_hold_secrets_too() -> None:
    key = "ghp_" + "a1" * 18
    column = dataclasses.replace(sample("Use it."), extra={"meta": {"by": ["jane.doe@company.com"]}})
    tool = dataclasses.replace(sample("Use it now."), tools=json.dumps([{"name": "x", "description": key}]))
    behind = (Message("assistant", f"Keep {key}.", learnt=False),)
    field = Message("assistant", "Yes.", fields=json.dumps({"reasoning_content": key}))
    carried = (
        Example((Message("user", "May I?"), field)),
        dataclasses.replace(sample("And I?"), behind=behind),
    )
    assert [detail for _, detail in results(column, tool)["secrets"].first] == [
        "an e-mail address",
        "a GitHub token",
    ]
    assert results(*carried)["secrets"].n == 2


def test_rows_that_are_refused_or_repaired_are_in_a_check(tmp_path: Path) -> None:
    def chat(*texts: str | None, role: str = "user") -> dict[str, list[dict[str, str | None]]]:
        return {"messages": [{"role": (role, "assistant")[n % 2], "content": t} for n, t in enumerate(texts)]}

    rows = [
        chat("Name a bird.", "Wren."),
        chat("Name a bird.", "Wren."),
        chat("Name a sea.", "North.", "And?", "", "Then?", "South."),
        chat("Name a lake.", None),
        chat("Name a hill.", " "),
        chat("Name a town.", "Bern.", role="wizard"),
        {"messages": [*chat("Name a wood.")["messages"], *chat("", "Arden.", "", "No.")["messages"]]},
    ]
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = read_rows(str(path))
    found = lint(data.examples, data.places, data.rejections, strict=True, repairs=data.repairs)
    assert {each.check: each.n for each in found}["empty"] == 4  # the first three are shown
    assert {
        each.check: [int(where.rpartition(":")[2]) for where, _ in each.first] for each in found if each.n
    } == {
        "empty": [4, 5, 3],
        "unusable": [6],
        "near_duplicates": [2],
    }
    assert all(each.is_over for each in found if each.n)


def test_near_duplicates_of_many_rows_are_counted_once_each() -> None:
    text = "Write a short story about a lighthouse keeper who finds a letter in a bottle one stormy night."
    found = results(sample(text), sample(text + " Please."), sample(text.upper()), sample("Name a bird."))
    assert found["near_duplicates"].n == 2


def test_quotations_of_a_benchmark(tmp_path: Path) -> None:
    question = "A farmer has seventeen sheep and all but nine of them run away, how many are left over?"
    rows = [{"question": question, "answer": "9"}, {"question": "What is the capital of France?", "n": 3}]
    (tmp_path / "bench.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = read_benchmarks([str(tmp_path / "bench.jsonl")])
    assert [question in each for each in texts.values()] == [True]
    quoting = sample("Solve this: " + question.upper() + " Think first.")
    short = sample("Please: what is the capital of France")
    found = results(quoting, short, sample("A farmer has nine cows."), sample("9"), benchmarks=texts)
    assert found["benchmarks"].n == 2
    assert "a farmer has seventeen sheep" in found["benchmarks"].first[0][1]


def test_limits_and_strict() -> None:
    bad = [sample("Name a bird."), sample("Name a sea.", "null")]
    assert not any(found.is_over for found in results(*bad).values())
    assert [n for n, f in results(*bad, strict=True).items() if f.is_over] == ["missing"]
    assert not any(f.is_over for f in results(*bad, strict=True, limits={"missing": 0.5}).values())
    assert results(*bad, limits={"missing": 0.49})["missing"].is_over
    empty = [Rejection("d.jsonl:9", "empty response", None), Rejection("d.jsonl:10", "no response", None)]
    assert [results(*bad, rejections=empty)[check].n for check in ("empty", "unusable")] == [1, 1]
    assert read_limits(["refusals=0.01", "secrets=0"]) == {"refusals": 0.01, "secrets": 0.0}
    for wrong in ("refusals", "refusals=many", "refusals=2"):
        with pytest.raises(ValueError, match="--max refusals"):
            read_limits([wrong])
    with pytest.raises(ValueError, match="there is no check 'refusal'; there are: empty"):
        results(*bad, limits={"refusal": 0})
    assert set(results(*bad, benchmarks={"b": ["Name a hill."]})) == set(CHECKS)
    assert set(results(*bad)) == set(CHECKS) - {"benchmarks"}  # what was not compared did not pass
    with pytest.raises(ValueError, match="--max benchmarks: name what is compared"):
        results(*bad, limits={"benchmarks": 0})
