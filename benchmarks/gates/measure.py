"""What a model says of originals, of their expert revisions, of planted bad ones and of its own answers.

    python -m benchmarks gates.measure --revisions coachlm_expert_revisions.json \\
        --model models/SmolLM2-135M-Instruct --part planted --out benchmarks/gates/pairs.json
    python -m benchmarks gates.measure ... --part self --answers benchmarks/gates/self_answers.jsonl ...

`planted`: the first PLANTED rows of `gates.ask`, each in these versions:

  original   the row as it was
  expert     its revision
  swapped    the revised prompt with another row's revised answer
  cut        the revision with its answer cut
  numbers    the revision with other numbers in its answer, where that has any
  nonsense   the revised prompt with sentences of other rows' answers, each of another row

`self`: the rows of --answers, as `original` if that is not there yet, and with the model's own answer.

The file has a list per column: numbers, no texts. Rows of the other part stay. `gates.roc` and the tests of
the gates read it.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.gates.ask import Revision, chosen, revisions
from benchmarks.gates.pairs import conversation
from middo_jax.config import load
from middo_jax.data.example import Example
from middo_jax.data.tokenize import end_of_turn_token, tokenize_all
from middo_jax.evaluation.contrast import MIN_WORDS, cut, has_numbers, with_other_numbers
from middo_jax.progress import for_stderr
from middo_jax.rundir import read_jsonl
from middo_jax.session import Session
from middo_jax.signals.readings import end_nll, last_targets
from middo_jax.stages.passes import Passes, conditioned

HERE = Path(__file__).parent
ANSWERS = HERE / "self_answers.jsonl"
PLANTED = 72  # rows in all versions
SEED = 0
DIGITS = 5  # that are kept of a number


class Text(NamedTuple):
    """One conversation to be measured."""

    row: int
    kind: str
    example: Example


def planted(rows: Sequence[Revision]) -> Iterator[Text]:
    """All versions of each row but the model's own answer."""
    rng = np.random.default_rng(SEED)
    others = [*rows[1:], rows[0]]
    for row, other in zip(rows, others, strict=True):
        prompt, response = row.revised_prompt, row.revised_response
        yield Text(row.row, "original", row.original)
        yield Text(row.row, "expert", row.revised)
        yield Text(row.row, "swapped", conversation(prompt, other.revised_response))
        if len(response.split()) >= MIN_WORDS:
            yield Text(row.row, "cut", conversation(prompt, cut(response)))
        if has_numbers(response):
            yield Text(row.row, "numbers", conversation(prompt, with_other_numbers(response, rng)))
        strangers = [one for one in rows if one.row != row.row]
        yield Text(row.row, "nonsense", conversation(prompt, mixed(response, strangers, rng)))


def mixed(response: str, rows: Sequence[Revision], rng: np.random.Generator) -> str:
    """As many sentences as a response has, two at least, each of another row's answer."""
    count = max(2, len(sentences(response)))
    givers = rng.choice(len(rows), count, replace=False)
    found = [sentences(rows[i].revised_response) for i in givers]
    return " ".join(one[rng.integers(len(one))] for one in found)


def sentences(text: str) -> list[str]:
    """A text split behind the ends of its sentences and at line breaks."""
    return [part.strip() for part in re.split(r"(?<=[.!?])\s+|\n+", text) if part.strip()]


def own(
    rows: Mapping[int, Revision], answers: Sequence[dict[str, Any]], known: Collection[int]
) -> Iterator[Text]:
    """The rows that the model answered itself; `known` rows have their original measured already."""
    for said in answers:
        row = rows[said["row"]]
        if row.row not in known:
            yield Text(row.row, "original", row.original)
        yield Text(row.row, "self", conversation(row.prompt, said["answer"]))


def measured(session: Session, model: Path, examples: Sequence[Example]) -> dict[str, np.ndarray]:
    """The numbers of each conversation, by the names of `acceptance.candidate.Measurement`."""
    passes, loaded = Passes(session), session.load_model(model)
    tokenized = tokenize_all(examples, session.tokenizer, session.config.model.max_length)
    scores = passes("loss", loaded, tokenized, prompts=True)
    more = conditioned(session, passes, loaded, examples, tokenized, ("pmi", "reverse_ifd"))
    assert more.response_alone_n is not None
    assert more.prompt_behind_response_n is not None
    assert scores.prompt_nll_n is not None
    for name, facts in passes.facts.items():
        print(f"{name}: {facts.real_tokens:,} tokens in {facts.seconds:.0f} s")
    return {
        "n_targets": scores.n_targets_n,
        "loss": scores.loss_n,
        "end_nll": end_nll(scores.last_nll_n, last_targets(tokenized), end_of_turn_token(session.tokenizer)),
        "worst_decile_nll": scores.worst_decile_nll_n,
        "prompt_nll": scores.prompt_nll_n,
        "loss_unconditional": more.response_alone_n,
        "prompt_behind_response": more.prompt_behind_response_n,
    }


def main() -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--revisions", required=True, type=Path)
    parser.add_argument("--model", required=True, help="A Hugging Face directory.")
    parser.add_argument("--part", required=True, choices=("planted", "self"))
    parser.add_argument("--answers", type=Path, default=ANSWERS)
    parser.add_argument("--out", required=True, type=Path)
    arguments = parser.parse_args()

    settings = (f"model.path={arguments.model}", "data.path=none", "model.dtype=float32")
    session = Session(load(None, settings), for_stderr())
    before: dict[str, list[Any]] = {"part": [], "row": []}
    if arguments.out.exists():
        before = json.loads(arguments.out.read_text(encoding="utf-8"))
    kept = [i for i, part in enumerate(before["part"]) if part != arguments.part]
    if arguments.part == "planted":
        found = list(planted(chosen(arguments.revisions, session.tokenizer, PLANTED)))
    else:
        rows = {revision.row: revision for revision in revisions(arguments.revisions)}
        found = list(own(rows, read_jsonl(arguments.answers), {before["row"][i] for i in kept}))
    numbers = measured(session, Path(arguments.model), [text.example for text in found])
    columns: dict[str, list[Any]] = {
        "part": [arguments.part] * len(found),
        "row": [text.row for text in found],
        "kind": [text.kind for text in found],
    }
    columns |= {
        name: [float(f"{value:.{DIGITS}g}") if np.isfinite(value) else None for value in values.tolist()]
        for name, values in numbers.items()
    }
    if kept:
        columns = {name: [before[name][i] for i in kept] + values for name, values in columns.items()}
    lines = ",\n".join(f" {json.dumps(name)}: {json.dumps(values)}" for name, values in columns.items())
    arguments.out.write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")
    print(f"{len(found)} conversations")


if __name__ == "__main__":
    main()
