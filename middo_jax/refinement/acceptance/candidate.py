"""The gates' input: a candidate, with the values that are available in each phase of the table."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

from middo_jax.data.example import Example
from middo_jax.refinement.tasks import Task
from middo_jax.rundir.rows import MeasurementRow


@dataclasses.dataclass(frozen=True)
class Measurement:
    """The measurement of one candidate with the model under training, M_t. None: the number is not finite.

    Attributes:
      loss: mean NLL of the response's tokens, in nats.
      similarity: cosine between the embeddings of its prompt and of the original's prompt.
      nearest: cosine to the nearest sample of the dataset, without the sample that it replaces.
      knn_similarity: mean cosine to the k nearest samples, likewise: its own s.
      core_similarity: the s of a sparse sample if this candidate is added.
      truncated: whether it exceeds model.max_length.
      quality: the judge's q; None if it was not rated.
      end_nll, pmi, reverse_ifd: see `signals.readings`; None also where they were not asked for.
      original_pmi, original_reverse_ifd: the same of the original, measured beside it.
    """

    loss: float | None
    similarity: float | None
    nearest: float | None
    knn_similarity: float | None
    core_similarity: float | None
    truncated: bool = False
    quality: float | None = None
    end_nll: float | None = None
    pmi: float | None = None
    reverse_ifd: float | None = None
    original_pmi: float | None = None
    original_reverse_ifd: float | None = None

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
            "end_nll": self.end_nll,
            "pmi": self.pmi,
            "reverse_ifd": self.reverse_ifd,
            "original_pmi": self.original_pmi,
            "original_reverse_ifd": self.original_reverse_ifd,
        }


@dataclasses.dataclass(frozen=True)
class Limits:
    """The limits that a round's dataset sets; None: no limit.

    Attributes:
      loss: samples with a higher loss are hard.
      context: a similarity that only a small share of all pairs of samples reach.
      novelty: a similarity that only a small share of samples have to their nearest neighbour.
      prompt_chars: (minimum, maximum) characters of a prompt.
      response_chars: (minimum, maximum) characters of a response.
      end_nll: an end of turn that is less likely is that of a broken answer.
      floor: answers with a lower loss are too easy.
      refines_itself: the refiner is the model under training.
    """

    loss: float | None = None
    context: float | None = None
    novelty: float | None = None
    prompt_chars: tuple[float, float] | None = None
    response_chars: tuple[float, float] | None = None
    end_nll: float | None = None
    floor: float | None = None
    refines_itself: bool = False


class Finding(NamedTuple):
    """Why a candidate does not pass a gate: `detail` for people, `fault` if the gate has several faults."""

    detail: str
    fault: str = ""


@dataclasses.dataclass(frozen=True)
class Candidate:
    """The refiner's result for a task. Each phase of the table fills in more values.

    Attributes:
      task: the task.
      special_tokens: the tokenizer's control tokens, which in a text would end a turn or start another one.
      reply: from phase `prompt` on: the refiner's reply.
      prompt: from phase `prompt` on: the new prompt in the reply; None if it is not readable.
      finish_reason: of the reply, later of the answer, see `endpoint.ending`.
      response: from phase `answer` on: the answer to the new prompt.
      again: in phase `again`: the refiner's answer to the original's prompt; None if that is not whole.
      example: from phase `dataset` on: prompt and response as a conversation.
      truncated: from phase `dataset` on: whether the conversation exceeds model.max_length.
      limits: the limits that the dataset sets.
      measured: from phase `measurement` on; includes the judge's rating from phase `rating` on.
      repeats: in phase `accepted`: the known conversation that this one repeats, in words; None if none.
    """

    task: Task
    special_tokens: Collection[str] = ()
    reply: str = ""
    prompt: str | None = None
    finish_reason: str = "stop"
    response: str = ""
    again: str | None = None
    example: Example | None = None
    truncated: bool = False
    limits: Limits = dataclasses.field(default_factory=lambda: Limits())
    measured: Measurement | None = None
    repeats: str | None = None


# (candidate, value of the gate's setting or None) -> why the candidate does not pass, or None
Check = Callable[[Candidate, Any], Finding | None]
