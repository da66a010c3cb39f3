"""Answers of a small model to the original prompts of revised rows, to be labelled by hand.

    python -m benchmarks gates.ask --revisions coachlm_expert_revisions.json \\
        --model models/SmolLM2-135M-Instruct --out asked.jsonl

The rows are those of `chosen`, answered greedily by the embedded engine. An answer that reaches the limit of
tokens is dropped, as the gate `answer_readable` would drop it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.gates.pairs import conversation
from middo_jax.config import load
from middo_jax.data.example import Example, Message
from middo_jax.data.tokenize import (
    eos_token_ids,
    load_tokenizer,
    tokenize_all,
    tokenize_prompt,
)
from middo_jax.inference.engine import Engine
from middo_jax.inference.sampling import Request
from middo_jax.progress import for_stderr
from middo_jax.rundir import write_jsonl
from middo_jax.session import Session

ROWS = 160  # that are asked
MAX_TOKENS = 140  # of an original or revised conversation, rendered
MAX_ANSWER = 90  # tokens
SEED = 0


class Revision(NamedTuple):
    """A row that an expert revised; `row` is its place in the file."""

    row: int
    prompt: str
    response: str
    revised_prompt: str
    revised_response: str

    @property
    def original(self) -> Example:
        """The row as it was."""
        return conversation(self.prompt, self.response)

    @property
    def revised(self) -> Example:
        """The row as the expert left it."""
        return conversation(self.revised_prompt, self.revised_response)


def revisions(path: Path) -> list[Revision]:
    """All rows of the file whose answer was revised."""

    def joined(row: dict[str, str], prefix: str) -> str:
        instruction, text = row[f"{prefix}instruction"].strip(), row[f"{prefix}input"].strip()
        return f"{instruction}\n\n{text}" if text else instruction

    found = []
    for i, row in enumerate(json.loads(path.read_text(encoding="utf-8"))):
        before, after = row["output"].strip(), row["revised_output"].strip()
        if before and after and before != after:
            found.append(Revision(i, joined(row, ""), before, joined(row, "revised_"), after))
    return found


def chosen(path: Path, tokenizer: Any, count: int) -> list[Revision]:
    """So many rows, drawn by SEED, of those that are short before and after their revision."""
    rows = revisions(path)
    lengths = [
        [len(tokens) for tokens in tokenize_all([getattr(row, side) for row in rows], tokenizer)]
        for side in ("original", "revised")
    ]
    short = [row for row, *sizes in zip(rows, *lengths, strict=True) if max(sizes) <= MAX_TOKENS]
    order = np.random.default_rng(SEED).permutation(len(short))
    return [short[i] for i in order[:count]]


def answers(session: Session, model: Any, requests: Sequence[Request]) -> list[tuple[str, bool]]:
    """(text, whether it is whole) of each request."""
    tokenizer, found = session.tokenizer, []
    with (
        session.progress.task("answers") as advance,
        Engine(model.graphdef, model.params, 8, 512) as engine,
    ):
        futures = [engine.submit(request) for request in requests]
        for i, future in enumerate(futures):
            completion = future.result()
            text = str(tokenizer.decode(completion.tokens, skip_special_tokens=True))
            found.append((text.strip(), completion.finish_reason == "stop"))
            advance(i + 1, len(futures))
    return found


def main() -> None:
    """Asks and writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--revisions", required=True, type=Path)
    parser.add_argument("--model", required=True, help="A Hugging Face directory.")
    parser.add_argument("--out", required=True, type=Path)
    arguments = parser.parse_args()

    tokenizer = load_tokenizer(arguments.model)
    rows = chosen(arguments.revisions, tokenizer, ROWS)
    settings = (f"model.path={arguments.model}", "data.path=none", "model.dtype=float32")
    session = Session(load(None, settings), for_stderr())
    model = session.load_model(Path(arguments.model))
    stop_ids = eos_token_ids(arguments.model, tokenizer)
    asked = [tokenize_prompt([Message("user", row.prompt)], tokenizer).tolist() for row in rows]
    said = answers(session, model, [Request(tokens, MAX_ANSWER, stop_ids=stop_ids) for tokens in asked])
    kept = [
        {"row": row.row, "prompt": row.prompt, "answer": answer}
        for row, (answer, is_whole) in zip(rows, said, strict=True)
        if is_whole and answer
    ]
    write_jsonl(arguments.out, kept)
    print(f"{len(rows)} rows asked, {len(kept)} answers are whole")


if __name__ == "__main__":
    main()
