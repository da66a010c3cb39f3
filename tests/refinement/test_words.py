"""The refiner's words and the judge's questions by file: what may be in it, and what depends on it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from support.scripted_refiner import HARD, refine, sample

from middo_jax.config import ConfigError, RefineSettings, load
from middo_jax.refinement import prompts
from middo_jax.refinement.rewrite import first_request
from middo_jax.refinement.tasks import Task
from middo_jax.refinement.words import SHIPPED, VERSION, Words, read_words
from middo_jax.rundir import RoundDir, chain
from middo_jax.rundir.link import Link
from middo_jax.signals.judge.rubrics import SHIPPED as SHIPPED_RUBRIC
from middo_jax.signals.judge.rubrics import judge_message, read_rubric

MINE = """\
simplify:
  instruction: |
    Machs einfacher.
  example: {prompt: Beweise es., response: Ja., new_prompt: "Was ist eine gerade Zahl?"}
in_context: Davor wurde gesagt
"""


def written(folder: Path, text: str) -> str:
    path = folder / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_a_file_replaces_what_it_names_and_leaves_the_rest(tmp_path: Path) -> None:
    own = read_words(written(tmp_path, MINE))
    assert own.simplify.instruction == "Machs einfacher."
    assert own.in_context == "Davor wurde gesagt"
    assert (own.rewrite, own.synthesize, own.complete) == (
        SHIPPED.rewrite,
        SHIPPED.synthesize,
        SHIPPED.complete,
    )
    half = read_words(written(tmp_path, "synthesize: {instruction: Noch eins.}"))
    assert half.synthesize.example == SHIPPED.synthesize.example
    task = Task("simplify", ("complexity",), sample("Warum?", "Darum."), words=own)
    asked, shown, last = first_request(task, RefineSettings())
    assert asked["content"].startswith("Machs einfacher.\n\n")
    assert "Beweise es." in asked["content"]
    assert shown["content"] == "<prompt>Was ist eine gerade Zahl?</prompt>"
    assert last["content"].startswith("Machs einfacher.\n\n")
    assert last["content"].endswith(prompts.FORMS["text"])  # what the reading depends on stays


def test_other_words_are_other_requests_and_comments_are_none(tmp_path: Path) -> None:
    own = read_words(written(tmp_path, MINE))
    same = read_words(written(tmp_path, f"# mine\n{MINE}"))
    other = read_words(written(tmp_path, MINE.replace("einfacher", "leichter")))
    assert SHIPPED.version == VERSION
    assert own.version == same.version == f"{VERSION}-{own.hash}"

    def key(words: Words) -> str:
        return prompts.requests("m", RefineSettings(), words=words).build([]).key

    assert len({key(SHIPPED), key(own), key(other)}) == 3
    assert key(own) == key(same)
    outcome, _ = refine(
        Task("simplify", ("complexity",), HARD.original, words=own), "<prompt>Leicht?</prompt>", "Ja, so."
    )
    assert outcome.example is not None
    assert outcome.example.lineage.prompt_version == own.version


def test_an_echo_of_ones_own_example_is_none_of_the_shipped_ones(tmp_path: Path) -> None:
    own = read_words(written(tmp_path, MINE))
    task = Task("simplify", ("complexity",), HARD.original, words=own)
    echo = "<prompt>Was ist eine gerade Zahl?</prompt>"
    outcome, _ = refine(task, echo, settings={"gates": {"open": ["language"]}})
    assert str(outcome.verdict).startswith("sane: echo of Was ist eine gerade Zahl?")
    outcome, _ = refine(HARD, echo, "Zwei.", settings={"gates": {"open": ["language"]}})
    assert outcome.example is not None


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("simplfy: {instruction: x}", "simplfy is not known. Did you mean simplify?"),
        ("simplify: {instruktion: x}", "simplify.instruktion is not known. Did you mean instruction?"),
        ("simplify: {instruction: ' '}", "simplify.instruction is empty"),
        ("simplify: {instruction: [x]}", "simplify.instruction must be text, not ['x']"),
        ("rewrite: {example: {prompt: x, response: y}}", "rewrite.example.new_prompt is missing"),
        ("rewrite: {example: {prompt: x, response: y, new_prompt: x}}", "new_prompt repeats prompt"),
        (
            'both: {example: {prompt: x, response: y, new_prompt: "<prompt>z</prompt>"}}',
            "both.example.new_prompt cannot be read from a reply",
        ),
        (
            "synthesize: {example: {core: x, neighbours: [], new_prompt: z}}",
            "synthesize.example.neighbours is empty",
        ),
        ("rewrite: x", "rewrite must be a group of texts, not 'x'"),
        ("[1, 2]", "must name texts, some of simplify, rewrite"),
        ("", "must name texts"),
        ("a: [", "not YAML in line 1"),
        (
            "rewrite: {instruction: x}\nboth:\n  instruction: x\nrewrite: {instruction: y}",
            "in line 4: rewrite occurs",
        ),
        (None, "No such file"),
    ],
)
def test_a_file_that_cannot_be_used_is_an_error_that_names_the_place(
    tmp_path: Path, text: str | None, error: str
) -> None:
    path = str(tmp_path / "none.yaml") if text is None else written(tmp_path, text)
    with pytest.raises(ConfigError) as raised:
        read_words(path)
    assert str(raised.value).startswith(f"refine.prompts={path}: ")
    assert error in str(raised.value)


def test_the_rubric_by_file(tmp_path: Path) -> None:
    own = read_rubric(written(tmp_path, 'opening: Rate.\nclarity: {response: "Is it short?"}'))
    message = judge_message("clarity", "response", "Say {response}", "No", own)
    assert message == (
        "Rate.\n\n### Instruction\nSay {response}\n\n### Response\nNo\n\n### Question\nIs it short?"
    )
    assert own.clarity.prompt == SHIPPED_RUBRIC.clarity.prompt
    with pytest.raises(
        ConfigError, match=r"quality\.rubric=.*: depth is not known\. There are opening, clarity"
    ):
        read_rubric(written(tmp_path, "depth: {prompt: x}"))


@pytest.mark.parametrize("role", ["prompts", "rubric"])
def test_a_changed_file_makes_its_stage_stale_and_a_moved_one_does_not(tmp_path: Path, role: str) -> None:
    setting = {"prompts": "refine.prompts", "rubric": "quality.rubric"}[role]
    folder = RoundDir(tmp_path / "round_00")

    def link(path: str) -> Link:
        made = (
            chain.score(folder, tmp_path / "checkpoint", None, rubric=Path(path))
            if role == "rubric"
            else chain.refine(folder, None, None, data={"prompts": Path(path)})
        )
        return dataclasses.replace(made, files=(), writes=(), models={})

    path = written(tmp_path, "x: y")
    config = load(None, ["model.path=m", "data.path=d", f"{setting}={path}"])
    made = link(path)
    made.begin().finish(config, 0.0)
    assert made.why_stale(config) is None
    moved = tmp_path / "moved.yaml"
    Path(path).rename(moved)
    elsewhere = load(None, ["model.path=m", "data.path=d", f"{setting}={moved}"])
    there = link(str(moved))
    assert there.why_stale(elsewhere) is None
    moved.write_text("x: z")
    assert str(there.why_stale(elsewhere)) == f"{role} has changed: {moved}"
    without = load(None, ["model.path=m", "data.path=d"])
    none = dataclasses.replace(there, data={})
    assert str(none.why_stale(without)) == f"{setting} was {path}, is null"
