"""A candidate as the gates see it: what is known of it at each phase of the table. Values only."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

from middo_jax.data.example import Example
from middo_jax.refinement.tasks import Task
from middo_jax.rundir.rows import MeasurementRow


@dataclasses.dataclass(frozen=True)
class Measurement:
    """What the model under training, M_t, says of one candidate. None is a number that is not finite.

    Attributes:
      loss: mean NLL of its response's tokens, in nats.
      similarity: cosine of its prompt's embedding and that of the sample it was made of.
      nearest: cosine to the nearest sample of the dataset; one that it replaces is left out.
      knn_similarity: mean cosine to the k nearest, likewise: its own s.
      core_similarity: the s that a sparse sample would have with this one beside it.
      truncated: whether it is over the model's length.
      quality: the judge's q, None where nobody asked for it.
    """

    loss: float | None
    similarity: float | None
    nearest: float | None
    knn_similarity: float | None
    core_similarity: float | None
    truncated: bool = False
    quality: float | None = None

    def to_json(self) -> MeasurementRow:
        """As a row of candidates.jsonl has it."""
        return {
            "loss": self.loss,
            "similarity": self.similarity,
            "nearest": self.nearest,
            "knn_similarity": self.knn_similarity,
            "core_similarity": self.core_similarity,
            "truncated": self.truncated,
            "quality": self.quality,
        }


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a round's dataset sets as bars; None is no bar.

    Attributes:
      loss: over it a sample is called hard.
      context: similarity that only a small share of pairs of samples reach.
      novelty: similarity that only a small share of samples have to their nearest neighbour.
      prompt_chars: (fewest, most) characters of a prompt; `response_chars` of a response.
    """

    loss: float | None = None
    context: float | None = None
    novelty: float | None = None
    prompt_chars: tuple[float, float] | None = None
    response_chars: tuple[float, float] | None = None


class Finding(NamedTuple):
    """Why a gate does not let a candidate pass: `detail` for people, `fault` where the gate has several."""

    detail: str
    fault: str = ""


@dataclasses.dataclass(frozen=True)
class Candidate:
    """What the refiner made of a task. Each phase of the table fills in more; what is unknown yet is empty.

    Attributes:
      task: what was to be done with which sample.
      special_tokens: the tokenizer's control tokens, which as text would end a turn or start another.
      reply: from phase `prompt` on: what the refiner said.
      prompt: the new prompt in it; None if none can be read.
      finish_reason: the server's word for how the reply or the answer ended; see `endpoint.ending`.
      response: from phase `answer` on: the answer to the new prompt.
      example: from phase `dataset` on: both as a conversation.
      truncated: whether that is over model.max_length.
      limits: the bars that the dataset sets.
      measured: from phase `measurement` on, with the judge's rating from phase `rating` on.
      repeats: in phase `accepted`: which known conversation this one repeats, in words; None if none.
    """

    task: Task
    special_tokens: Collection[str] = ()
    reply: str = ""
    prompt: str | None = None
    finish_reason: str = "stop"
    response: str = ""
    example: Example | None = None
    truncated: bool = False
    limits: Limits = dataclasses.field(default_factory=lambda: Limits())
    measured: Measurement | None = None
    repeats: str | None = None


# (a candidate, the value of the gate's setting or None) -> what is wrong with it, or None
Check = Callable[[Candidate, Any], Finding | None]
