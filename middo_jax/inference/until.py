"""Answers that end before given texts, by the engine's ordinary requests.

The engine ends an answer at tokens. A text may be spread over several tokens, or be the middle of one. So an
answer is asked for in blocks: after each block the text so far is searched, and an unfinished answer is asked
for again, behind its prompt. All answers are in progress together, and none waits for another one's block.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
from collections.abc import Callable, Sequence

from middo_jax.inference.engine import Completion, Engine
from middo_jax.inference.sampling import Request
from middo_jax.progress import Advance

# Fewer tokens: more prompts are read again. More: more is decoded behind the end of an answer.
BLOCK = 64


@dataclasses.dataclass
class _Answer:
    """A request, the texts that end its answer, and the answer so far."""

    request: Request
    until: Sequence[str]
    tokens: list[int] = dataclasses.field(default_factory=list)

    def next_block(self) -> Request:
        """What is asked for now. Sampled tokens depend on how many blocks there were before."""
        done = len(self.tokens)
        return dataclasses.replace(
            self.request,
            prompt_tokens=[*self.request.prompt_tokens, *self.tokens],
            max_tokens=min(BLOCK, self.request.max_tokens - done),
            seed=self.request.seed + done,
        )


def cut(text: str, until: Sequence[str]) -> str | None:
    """The text before the first occurrence of any of the texts; None if none occurs."""
    places = [place for stop in until if (place := text.find(stop)) >= 0]
    return text[: min(places)] if places else None


def answers_until(
    engine: Engine,
    requests: Sequence[Request],
    until: Sequence[Sequence[str]],
    decode: Callable[[list[int]], str],
    advance: Advance,
) -> list[str]:
    """The answer to each request, in order, without the text that ended it.

    Args:
      engine: whose context is enough for each prompt with its answer.
      requests: what is asked.
      until: for each request, the texts before which its answer ends; none of them empty.
      decode: tokens as text.
      advance: is told how many requests are answered.

    Raises:
      ValueError: see `Engine.submit`.
    """
    answers = [_Answer(request, stops) for request, stops in zip(requests, until, strict=True)]
    texts: list[str] = [""] * len(answers)
    waiting: dict[concurrent.futures.Future[Completion], int] = {}
    try:
        for i, answer in enumerate(answers):
            waiting[engine.submit(answer.next_block())] = i
        while waiting:
            ready, _ = concurrent.futures.wait(waiting, return_when=concurrent.futures.FIRST_COMPLETED)
            for future in ready:
                i, completion = waiting.pop(future), future.result()
                answer = answers[i]
                answer.tokens += completion.tokens
                texts[i] = decode(answer.tokens)
                shortened = cut(texts[i], answer.until)
                if shortened is not None:
                    texts[i] = shortened
                elif _goes_on(answer, completion, engine.max_context):
                    waiting[engine.submit(answer.next_block())] = i
                    continue
                advance(len(answers) - len(waiting), len(answers))
    finally:
        for future in waiting:  # empty unless something has failed
            future.cancel()
    return texts


def _goes_on(answer: _Answer, completion: Completion, max_context: int) -> bool:
    """Whether the answer has not ended: neither by itself, nor by its limit, nor by the context's."""
    read = len(answer.request.prompt_tokens) + len(answer.tokens)
    return (
        completion.finish_reason == "length"
        and len(answer.tokens) < answer.request.max_tokens
        and read < max_context
    )
