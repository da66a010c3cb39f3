"""What the engine keeps per request and per row of its cache."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import itertools
from collections.abc import Callable
from typing import Literal, NamedTuple

from middo_jax.inference.logprobs import TokenLogprob
from middo_jax.inference.programs import CHUNK
from middo_jax.inference.sampling import Request


@dataclasses.dataclass(frozen=True)
class Completion:
    """An answer.

    Attributes:
      tokens: without the stop token.
      finish_reason: "stop": a stop token ended it; "length": max_tokens or the context did.
      logprobs: one per token, if the request asks for them.
      prompt_logprobs: one per token of the prompt, if the request asks for them; None for the first, which
        follows no token.
      stop: the stop token that ended the answer, if the request asks for log-probabilities.
    """

    tokens: list[int]
    finish_reason: Literal["stop", "length"]
    logprobs: list[TokenLogprob] | None = None
    prompt_logprobs: list[TokenLogprob | None] | None = None
    stop: Step | None = None


class Step(NamedTuple):
    """A token of an answer, as it comes; its log-probability if the request asks for it."""

    token: int
    logprob: TokenLogprob | None = None


OnStep = Callable[[Step], None]


@dataclasses.dataclass(eq=False)  # two answers are never the same one
class RequestState:
    """A request that is queued or being answered, and its answer so far.

    Attributes:
      request: what is asked.
      future: gets the answer.
      on_step: is called with each new token, on the engine's thread.
      alone: it is answered while no other is, because a failure happened when it was answered with others.
      steps: the answer so far.
      n_reported: steps that `on_step` has got; more than `steps` after a restart.
      of_prompt: log-probabilities of the prompt's tokens but the first, as far as it is read.
    """

    request: Request
    future: concurrent.futures.Future[Completion]
    on_step: OnStep | None = None
    alone: bool = False
    steps: list[Step] = dataclasses.field(default_factory=list)
    n_reported: int = 0
    of_prompt: list[TokenLogprob] = dataclasses.field(default_factory=list)

    @property
    def chunks(self) -> list[tuple[int, ...]]:
        """The prompt's whole chunks, less what has to be read in any case: its last token."""
        prompt = tuple(self.request.prompt_tokens)
        return [prompt[start : start + CHUNK] for start in range(0, len(prompt) - CHUNK, CHUNK)]

    def restart(self) -> None:
        """Begins again, alone. The tokens will be the same ones and are not reported twice."""
        self.alone, self.steps, self.of_prompt = True, [], []

    def add(self, step: Step, max_context: int) -> bool:
        """Adds a token; hands the answer over if it ends, and returns whether it did."""
        if step.token in self.request.stop_ids:
            self.finish("stop", step)
            return True
        self.steps.append(step)
        if len(self.steps) > self.n_reported:
            self.n_reported += 1
            if self.on_step is not None:
                self.on_step(step)
        room = max_context - len(self.request.prompt_tokens)
        if len(self.steps) < min(self.request.max_tokens, room):
            return False
        self.finish("length")
        return True

    def finish(self, reason: Literal["stop", "length"], stop: Step | None = None) -> None:
        """Hands the answer over, unless nobody waits for it."""
        has_logprobs = self.request.logprobs
        completion = Completion(
            [step.token for step in self.steps],
            reason,
            [step.logprob for step in self.steps if step.logprob] if has_logprobs else None,
            [None, *self.of_prompt] if self.request.prompt_logprobs else None,
            stop if has_logprobs else None,
        )
        if self.future.set_running_or_notify_cancel():
            self.future.set_result(completion)

    def fail(self, error: BaseException) -> None:
        """Hands an error over, unless nobody waits or the answer is there."""
        if not self.future.done() and self.future.set_running_or_notify_cancel():
            self.future.set_exception(error)


@dataclasses.dataclass(eq=False)  # two slots are never the same one
class Slot:
    """A row of the cache.

    Attributes:
      answer: what it is used for, None if free.
      n_read: tokens of its prompt that are in the cache.
      chunks: the whole chunks at the row's start, of this prompt or of the one before.
      used: when it was last given to a request.
    """

    answer: RequestState | None = None
    n_read: int = 0
    chunks: list[tuple[int, ...]] = dataclasses.field(default_factory=list)
    used: int = 0

    @property
    def decoding(self) -> RequestState | None:
        """Its answer, if its prompt is read."""
        return self.answer if self.answer is not None and self.answer.steps else None

    def shared(self, chunks: list[tuple[int, ...]]) -> int:
        """How many chunks it has in common with a prompt, from the start."""
        pairs = zip(self.chunks, chunks, strict=False)
        return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
