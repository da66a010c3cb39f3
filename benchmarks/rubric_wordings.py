"""Do the judge's ratings say so little for the rubric's wording, or for how they are read? Prints tables.

    python -m benchmarks rubric_wordings --data alpaca.json --model models/SmolLM2-135M-Instruct

Clean rows stand in five versions each: as they are, with another's response, with the prompt's words
shuffled, with the response cut, and with its numbers wrong (see planting.py). The model rates them all by
`middo score`'s own judge, once in every wording of the rubric. Printed are, for each wording,

  ROC-AUC      of the faulty against the clean rows, by the mean of the six ratings, 0.5 being chance, for
               every way of reading an answer: the expected rating at three temperatures, and log-odds
  lower        faulty rows with a lower mean than their own clean version (the expected rating)
  on ratings   probability of the eleven ratings among all that the model might say
  likeliest    the likeliest rating, and the share of the answers in which it is that
  spread       standard deviation over the rows of the mean of the six, in points
  alike        least and largest correlation, over the rows, of two questions about the same part

and the AUC of the answer's length.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.planting import MIN_PROMPT_WORDS, shuffled
from middo_jax.config import load
from middo_jax.data.example import Example, Message
from middo_jax.data.sources import read
from middo_jax.data.tokenize import load_tokenizer
from middo_jax.evaluation.contrast import MIN_WORDS, cut, has_numbers, with_other_numbers
from middo_jax.models.decoder import Decoder
from middo_jax.models.model import Model
from middo_jax.passes import ratings
from middo_jax.progress import Progress, for_stderr
from middo_jax.session import Session
from middo_jax.signals.judge.questions import RatingTokens
from middo_jax.signals.judge.readout import Readout
from middo_jax.signals.judge.rubrics import COLUMNS, SHIPPED, Questions, Rubric
from middo_jax.stages.ratings import Asked, judge

FAULTS = ("swapped", "shuffled", "cut", "numbers")
READOUTS = {
    "expected": Readout(),
    "expected, temperature 0.3": Readout(temperature=0.3),
    "expected, temperature 3": Readout(temperature=3.0),
    "log-odds": Readout("log_odds"),
}
LONGEST = 120  # words of a response; a longer one would take the time of several
_NEARER = {
    "clarity": Questions(
        prompt="Is the instruction well written, with its words in a sensible order?",
        response="Is the response well written and about the instruction?",
    ),
    "completeness": Questions(
        prompt="Can the instruction be followed as it stands?",
        response="Is the response a whole answer to the instruction, with nothing missing at its end?",
    ),
    "factuality": Questions(
        prompt="Is what the instruction says true and free of mistakes?",
        response="Is the response correct, with every fact and number right?",
    ),
}
_YES_OR_NO = (
    "Below is a sample of training data and a question about it. Answer with a number from 0 to 10: "
    "0 means no, not at all; 10 means yes, entirely."
)
_STRICT = (
    "You are a strict grader of training data for a language model. Below is a sample and a question about "
    "it. Answer with one whole number from 0 to 10. 0: nonsense, off topic or wrong. 5: usable, with faults. "
    "10: without any fault."
)
_GRADED = (
    "You grade training data for a language model with one whole number from 0 (worst) to 10 (best).\n\n"
    "### Instruction\nName the capital of Italy and one sight there.\n\n### Response\nThe capital of Italy "
    "is Rome; the Colosseum is one of its sights.\n\nRating: 10\n\n"
    "### Instruction\nsleep of Give better two tips for\n\n### Response\nWhisk four eggs with sugar and then "
    "bake the\n\nRating: 0\n\n"
    "### Instruction\nHow many days has a week?\n\n### Response\nA week has 9 days.\n\nRating: 2\n\n"
    "Now grade this sample the same way."
)
WORDINGS: dict[str, Rubric] = {
    "as shipped": SHIPPED,
    "questions nearer to the faults": SHIPPED.model_copy(update={"opening": _YES_OR_NO, **_NEARER}),
    "a strict grader": SHIPPED.model_copy(update={"opening": _STRICT}),
    "graded samples before it": SHIPPED.model_copy(update={"opening": _GRADED}),
}


class Unread(Readout):
    """Gives back what it was to read."""

    def __call__(self, log_p: jax.Array) -> jax.Array:
        """[..., 11] as it is."""
        return log_p


def versions(data: str, count: int, seed: int) -> list[list[Example]]:
    """`count` clean rows, and for each fault the same rows with it: [1 + fault][row].

    Raises:
      ValueError: too few rows can carry every fault.
    """

    def suits(e: Example) -> bool:
        words = len(e.response.split())
        return (
            len(e.messages) == 2
            and MIN_WORDS <= words <= LONGEST
            and MIN_PROMPT_WORDS <= len(set(e.prompt.split())) <= LONGEST
            and has_numbers(e.response)
        )

    rng = np.random.default_rng(seed)
    suited = [e for e in read(data)[0] if suits(e)]
    if len(suited) < count:
        raise ValueError(f"{data}: only {len(suited)} rows can carry every fault, {count} are wanted")
    clean = [suited[i] for i in rng.permutation(len(suited))[:count]]

    def row(prompt: str, response: str) -> Example:
        return Example((Message("user", prompt), Message("assistant", response)))

    return [
        clean,
        [row(e.prompt, clean[(i + 1) % count].response) for i, e in enumerate(clean)],
        [row(shuffled(e.prompt, rng), e.response) for e in clean],
        [row(e.prompt, cut(e.response)) for e in clean],
        [row(e.prompt, with_other_numbers(e.response, rng)) for e in clean],
    ]


def log_probabilities(
    session: Session, model: Model, examples: Sequence[Example], rubric: Rubric
) -> np.ndarray:
    """What `judge` finds of every rating: [n, 6, 11] float32 log-probabilities among all tokens."""
    found: dict[int, np.ndarray] = {}

    def among_all(model: Decoder, hidden_brd: jax.Array, spelling: RatingTokens) -> jax.Array:
        d = hidden_brd.shape[-1]
        first_brd = hidden_brd[:, : len(COLUMNS)]
        logits_brv = model.unembed(first_brd.reshape(-1, d)).reshape(*first_brd.shape[:2], -1)
        return up_to_a_constant(model, hidden_brd, spelling) - jax.nn.logsumexp(
            logits_brv, axis=-1, keepdims=True
        )

    def run(one: ratings.Pass, model: Model, _: Any, progress: Progress, name: str) -> ratings.PassFacts:
        def keep_all(index_m: np.ndarray, log_p_mcr: np.ndarray) -> None:
            found.update(zip(index_m.tolist(), log_p_mcr, strict=True))

        return plain_run(one, model, keep_all, progress, name)

    up_to_a_constant, plain_run = ratings.rating_log_p, ratings.Pass.run
    with mock.patch.object(ratings, "rating_log_p", among_all), mock.patch.object(ratings.Pass, "run", run):
        judge(
            model,
            Asked.of(examples, session.tokenizer, session.config.model.max_length, rubric),
            batch_tokens=2048,
            readout=Unread(),
            progress=session.progress,
        )
    return np.stack([found[i] for i in range(len(examples))])


def auc(faulty: np.ndarray, clean: np.ndarray) -> float:
    """Probability that a faulty row [n] is rated lower than a clean one [n], ties half."""
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(np.r_[np.ones(len(faulty)), np.zeros(len(clean))], -np.r_[faulty, clean]))


def report(name: str, log_p_vn6r: np.ndarray) -> None:
    """Prints what one wording found of [version, row, column, rating]."""
    print(f"\n{name}\n\n| ROC-AUC | {' | '.join(FAULTS)} |\n|---|{'---:|' * len(FAULTS)}")
    for readout_name, readout in READOUTS.items():
        mean_vn = np.asarray(readout(jnp.asarray(log_p_vn6r))).mean(axis=-1)
        cells = [f"{auc(faulty, mean_vn[0]):.2f}" for faulty in mean_vn[1:]]
        print(f"| {readout_name} | {' | '.join(cells)} |")
    expected_vn6 = np.asarray(READOUTS["expected"](jnp.asarray(log_p_vn6r)))
    mean_vn = expected_vn6.mean(axis=-1)
    lower = [f"{(faulty < mean_vn[0]).sum()}" for faulty in mean_vn[1:]]
    print(f"| lower, of {mean_vn.shape[1]} | {' | '.join(lower)} |")
    likeliest = log_p_vn6r.argmax(axis=-1).ravel()
    mode = np.bincount(likeliest).argmax()
    alike = []
    for part in range(2):
        of_part = np.corrcoef(expected_vn6[..., part::2].reshape(-1, 3).T)
        alike += [of_part[0, 1], of_part[0, 2], of_part[1, 2]]
    print(
        f"\non ratings {np.exp(log_p_vn6r).sum(axis=-1).mean():.2f}; likeliest {mode} in "
        f"{(likeliest == mode).mean():.0%}; spread {mean_vn.std():.2f}; "
        f"alike {min(alike):.2f} to {max(alike):.2f}",
        flush=True,
    )


def main() -> None:
    """Rates and prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="clean rows, in any format that middo reads")
    parser.add_argument("--model", required=True, help="a Hugging Face directory")
    parser.add_argument("--rows", type=int, default=30)
    parser.add_argument("--seed", type=int, default=7)
    arguments = parser.parse_args()
    rows = versions(arguments.data, arguments.rows, arguments.seed)
    flat = [e for version in rows for e in version]
    settings = (
        f"model.path={arguments.model}",
        "data.path=none",
        "model.dtype=float32",
        "model.max_length=1024",
    )
    session = Session(load(None, settings), for_stderr())
    model = session.load_model(Path(arguments.model))
    tokenizer = load_tokenizer(arguments.model)
    length_vn = np.array([[len(tokenizer(e.response).input_ids) for e in version] for version in rows])
    cells = [
        f"{fault} {auc(faulty, length_vn[0]):.2f}"
        for fault, faulty in zip(FAULTS, length_vn[1:], strict=True)
    ]
    n = arguments.rows
    by_chance = ((2 * n + 1) / (12 * n * n)) ** 0.5
    print(f"{n} rows in {len(rows)} versions; by chance an AUC scatters by {by_chance:.3f}")
    print(f"short answers as a detector: {', '.join(cells)}")
    for name, rubric in WORDINGS.items():
        log_p_n6r = log_probabilities(session, model, flat, rubric)
        report(name, log_p_n6r.reshape(len(rows), n, *log_p_n6r.shape[1:]))


if __name__ == "__main__":
    main()
