"""Accepted rewrites for people to judge, in the formats of Argilla and Label Studio, and their verdicts.

A person sees both conversations whole and answers four questions about each rewrite: `verdict` (accept or
reject), `new_prompt` and `new_answer` (the texts as they should be; unchanged ones are no edit, empty ones an
error) and `comment`. The id of a row is `TASK@CANDIDATE`.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Literal

from middo_jax.data.example import Message
from middo_jax.data.formats import DataError
from middo_jax.refinement.tasks import Outcome

ReviewFormat = Literal["argilla", "label-studio"]
QUESTIONS = ("verdict", "new_prompt", "new_answer", "comment")
ACCEPT, REJECT = "accept", "reject"

# Beside a file for Label Studio: the labelling interface of a new project.
LABELLING = """\
<View>
  <Header value="The original; its earlier turns, if some of them are rewritten"/>
  <Text name="original_context" value="$original_context"/>
  <Text name="original_prompt" value="$original_prompt"/>
  <Text name="original_answer" value="$original_answer"/>
  <Header value="The rewrite, behind the turns before it"/>
  <Text name="context" value="$context"/>
  <Text name="prompt" value="$prompt"/> <Text name="answer" value="$answer"/>
  <Choices name="verdict" toName="answer" choice="single-radio" required="true">
    <Choice value="accept"/> <Choice value="reject"/>
  </Choices>
  <TextArea name="new_prompt" toName="prompt" maxSubmissions="1" editable="true" rows="3"/>
  <TextArea name="new_answer" toName="answer" maxSubmissions="1" editable="true" rows="8"/>
  <TextArea name="comment" toName="answer" maxSubmissions="1" placeholder="Comment"/>
</View>
"""
# Beside a file for Argilla: a script that makes the dataset.
ARGILLA = '''\
"""Puts rewrites into Argilla, whose address and key are in ARGILLA_API_URL and ARGILLA_API_KEY."""

import json
import os

import argilla as rg

client = rg.Argilla(api_url=os.environ["ARGILLA_API_URL"], api_key=os.environ["ARGILLA_API_KEY"])
texts = ("original_context", "original_prompt", "original_answer", "context", "prompt", "answer")
settings = rg.Settings(
    fields=[rg.TextField(name=name, required=name in ("prompt", "answer")) for name in texts],
    questions=[
        rg.LabelQuestion(name="verdict", labels=["accept", "reject"]),
        rg.TextQuestion(name="new_prompt", required=False),
        rg.TextQuestion(name="new_answer", required=False),
        rg.TextQuestion(name="comment", required=False),
    ],
    metadata=[rg.TermsMetadataProperty(name=name) for name in ("op", "axes")],
    allow_extra_metadata=True,
)
dataset = rg.Dataset(name="middo-review", settings=settings, client=client)
dataset.create()
with open({name}, encoding="utf-8") as file:
    text = file.read()
rows = json.loads(text) if text.startswith("[") else map(json.loads, text.strip().split("\\n"))
dataset.records.log([rg.Record.from_dict(row) for row in rows])
# Later, and then `middo refine DIR --read-review verdicts.json`:
# json.dump(dataset.records.to_list(flatten=True), open("verdicts.json", "w"))
'''


def review_id(outcome: Outcome) -> str:
    """The name of an accepted rewrite in review files."""
    assert outcome.example is not None
    return f"{outcome.task.task_id}@{outcome.example.id}"


def review_rows(outcomes: Sequence[Outcome], form: ReviewFormat) -> Iterator[dict[str, Any]]:
    """One row per accepted rewrite, for Argilla's `Record.from_dict` or as a task of Label Studio."""
    for outcome in outcomes:
        if outcome.example is not None:
            yield _argilla(outcome) if form == "argilla" else _label_studio(outcome)


def _texts(outcome: Outcome) -> dict[str, str]:
    child, original = outcome.example, outcome.task.original
    assert child is not None
    is_addition, before = outcome.task.op == "synthesize", original.context
    is_same, pairs = is_addition or child.context == before, zip(child.context, before, strict=False)
    rewritten = [] if is_same else [n for n, (turn, earlier) in enumerate(pairs) if turn != earlier]
    return {
        "original_context": "" if is_same else _conversation(before),
        "original_prompt": "" if is_addition else original.question,
        "original_answer": "" if is_addition else original.response,
        "context": _conversation(child.context, rewritten),
        "prompt": child.question,
        "answer": child.response,
    }


def _conversation(turns: Sequence[Message], rewritten: Collection[int] = ()) -> str:
    """Turns whole, the system turn among them; those with a number in `rewritten` say that they are."""
    return "\n\n".join(
        f"[{turn.role}{', rewritten' if n in rewritten else ''}] {turn.text}" for n, turn in enumerate(turns)
    )


def _facts(outcome: Outcome) -> dict[str, Any]:
    child = outcome.example
    assert child is not None
    after = child.lineage.scores_after or {}
    facts: dict[str, Any] = {"op": outcome.task.op, "axes": "+".join(outcome.task.axes)}
    facts["id_user"] = child.user_id
    facts |= {f"{name}_before": value for name, value in outcome.task.scores.items()}
    facts |= {f"{name}_after": value for name, value in after.items()}
    return {name: value for name, value in facts.items() if value is not None}


def _argilla(outcome: Outcome) -> dict[str, Any]:
    texts, agent = _texts(outcome), outcome.example and outcome.example.lineage.refiner
    return {
        "id": review_id(outcome),
        "fields": texts,
        "metadata": _facts(outcome),
        "suggestions": {
            name: {"value": texts[field], "score": None, "agent": agent}
            for name, field in (("new_prompt", "prompt"), ("new_answer", "answer"))
        },
        "responses": {},
        "vectors": {},
    }


def _label_studio(outcome: Outcome) -> dict[str, Any]:
    texts, agent = _texts(outcome), outcome.example and outcome.example.lineage.refiner
    result = [
        {"from_name": name, "to_name": field, "type": "textarea", "value": {"text": [texts[field]]}}
        for name, field in (("new_prompt", "prompt"), ("new_answer", "answer"))
    ]
    return {
        "data": {"review_id": review_id(outcome), **texts, **_facts(outcome)},
        "predictions": [{"model_version": agent or "", "result": result}],
    }


@dataclasses.dataclass(frozen=True)
class Judgement:
    """One person's verdict on one rewrite.

    `prompt`, `answer`: as they should be; None: as they are. `where`: file and line, for messages.
    """

    id: str
    verdict: str
    prompt: str | None = None
    answer: str | None = None
    comment: str | None = None
    by: str | None = None
    where: str = dataclasses.field(default="", compare=False)


def judgements(row: Any, where: str) -> list[Judgement]:
    """People's verdicts in one row of Argilla, Label Studio or a file that was filled in by hand.

    Read are Argilla's `to_json` and `to_list(flatten=True)`, Label Studio's JSON and JSON_MIN, and rows with
    `id` or `review_id` and `verdict`. A row that nobody judged gives none. Drafts, discarded responses and
    cancelled annotations are none.

    Raises:
      DataError: the row is none of these, a verdict is neither `accept` nor `reject`, an answer is no text,
        or a rewrite is accepted with an empty one.
    """
    try:
        id_, found = _read(row)
        if not isinstance(id_, str) or "@" not in id_:
            raise DataError(
                "no id of a rewrite (TASK@CANDIDATE in id or review_id); give the file that Argilla or Label "
                "Studio exports of what --write-review wrote"
            )
        return [_judgement(id_, said, where) for said in found if _said(said, "verdict")]
    except DataError as error:
        raise DataError(f"{where}: {error}") from None


def _read(row: Any) -> tuple[Any, Sequence[Mapping[str, Any]]]:
    """(the id of a row, the answers of each person by question)."""
    if not isinstance(row, Mapping):
        raise DataError(f"a row must be an object, not {type(row).__name__}")
    own: list[Mapping[str, Any]] = [{**row, "by": row.get("annotator")}]
    by_hand = row.get("review_id", row.get("id")), own
    if _said(row, "verdict"):
        return by_hand
    if "annotations" in row and isinstance(row.get("data"), Mapping):
        return row["data"].get("review_id"), _annotated(row["annotations"])
    if "responses" in row:
        return row.get("id"), _by_person(row["responses"], row.get("status"))
    if any(name.endswith(".responses") for name in row):
        return row.get("id"), _by_person(_unflattened(row))
    return by_hand


def _judgement(id_: str, said: Mapping[str, Any], where: str) -> Judgement:
    verdict = _said(said, "verdict")
    if verdict not in (ACCEPT, REJECT):
        raise DataError(f"the verdict {verdict!r} is neither {ACCEPT} nor {REJECT}")
    prompt, answer, comment = (_said(said, question) for question in ("new_prompt", "new_answer", "comment"))
    for question, text in (("new_prompt", prompt), ("new_answer", answer)):
        if text == "" and verdict == ACCEPT:
            raise DataError(
                f"{id_} is accepted, and its {question} is empty: reject it, or leave out {question}, which "
                "keeps the text"
            )
    by = None if said.get("by") is None else str(said["by"]).encode(errors="replace").decode()
    return Judgement(id_, verdict, prompt, answer, comment or None, by, where)


def _said(said: Mapping[str, Any], question: str) -> str | None:
    """The text of an answer, "" of one that was emptied; Label Studio gives lists. None if there is none."""
    value = said.get(question)
    while isinstance(value, list):
        value = value[-1] if value else ""
    if value is None:
        return None
    if not isinstance(value, str):
        raise DataError(f"{question} must be a text, not {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise DataError(
            f"{question} has half a character (a lone surrogate), which no file can hold"
        ) from None
    return value.strip()


def _objects(value: Any, what: str) -> list[Mapping[str, Any]]:
    """A list of objects; [] for null.

    Raises:
      DataError: it is something else.
    """
    found = [] if value is None else value
    if not isinstance(found, list) or not all(isinstance(each, Mapping) for each in found):
        raise DataError(f"`{what}` must be a list of objects")
    return found


def _annotated(annotations: Any) -> list[Mapping[str, Any]]:
    """The answers of each annotation of Label Studio by question."""
    found = list[Mapping[str, Any]]()
    for annotation in _objects(annotations, "annotations"):
        if annotation.get("was_cancelled"):
            continue
        said: dict[str, Any] = {"by": annotation.get("completed_by")}
        for result in _objects(annotation.get("result"), "result"):
            value = result.get("value")
            if not isinstance(value, Mapping):
                raise DataError("`value` of a result must be an object")
            said[str(result.get("from_name"))] = value.get("choices", value.get("text"))
        found.append(said)
    return found


def _unflattened(row: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The responses of a flat row of Argilla, as in one that is not flat."""
    found = {}
    for question in QUESTIONS:
        name = f"{question}.responses"
        values, people, states = (row.get(f"{name}{end}") or [] for end in ("", ".users", ".status"))
        if not all(isinstance(each, list) for each in (values, people, states)):
            raise DataError(f"`{name}` must be a list, and so must its users and status")
        found[question] = [
            {"value": value, "user_id": person, "status": state}
            for value, person, state in itertools.zip_longest(values, people, states)
        ][: len(values)]
    return found


def _by_person(responses: Any, status: Any = None) -> list[Mapping[str, Any]]:
    """The answers of each person in Argilla's responses by question.

    Args:
      responses: question -> the answers to it.
      status: of the record, `pending` or `completed`; None: not known.

    Raises:
      DataError: an answer may be a draft. Argilla's `to_json` does not say of an answer whether it is one.
    """
    if not isinstance(responses or {}, Mapping):
        raise DataError("`responses` must be an object")
    people: dict[str, dict[str, Any]] = {}
    says_all = True
    for question in QUESTIONS:
        for response in _objects((responses or {}).get(question), f"responses.{question}"):
            says_all &= "status" in response
            if response.get("status") in ("draft", "discarded"):
                continue
            person = str(response.get("user_id"))
            people.setdefault(person, {"by": person})[question] = response.get("value")
    if not says_all and (status == "pending" or (status is not None and len(people) > 1)):
        raise DataError(
            "this export does not say which answers are drafts; export json.dumps(dataset.records"
            ".to_list(flatten=True)), which does"
        )
    return list(people.values())
