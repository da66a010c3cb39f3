"""A refiner that answers from a list, without any endpoint, and one sample to rewrite."""

from __future__ import annotations

import asyncio
from typing import Any

from middo_jax.config import RefineSettings
from middo_jax.data.example import Example, Message
from middo_jax.refinement.endpoint.request import Answer, Messages, request_key
from middo_jax.refinement.rewrite import refine_tasks
from middo_jax.refinement.tasks import Outcome, Task


def sample(prompt: str, response: str = "Yes.", system: str | None = None, **extra: Any) -> Example:
    head = () if system is None else (Message("system", system),)
    return Example((*head, Message("user", prompt), Message("assistant", response)), extra=extra)


class Scripted:
    """A refiner that answers from a list of (text, finish_reason), without any endpoint."""

    def __init__(self, *replies: str | tuple[str, str]) -> None:
        self.model = "scripted"
        self.asked: list[list[dict[str, str]]] = []
        self.limits: list[int | None] = []
        self._replies = list(replies)

    async def honours(self, probe: Any) -> bool:
        return False

    async def refuse_schema(self, reason: str) -> None:
        raise AssertionError(f"no request has a schema: {reason}")

    async def close(self) -> None:
        pass

    async def complete(self, messages: Messages, **more: Any) -> Answer:
        self.asked.append(messages)
        self.limits.append(more["max_tokens"])
        reply = self._replies.pop(0)
        text, reason = (reply, "stop") if isinstance(reply, str) else reply
        return Answer(text, reason, 10, 5, key=request_key({"messages": messages}))


def refine(task: Task, *replies: str | tuple[str, str], **more: Any) -> tuple[Outcome, Scripted]:
    client = Scripted(*replies)
    chosen = RefineSettings(**{"concurrency": 1, "max_corrections": 1, **more.pop("settings", {})})
    [outcome] = asyncio.run(refine_tasks([task], client, chosen, round_index=2, **more))
    return outcome, client


HARD = Task("simplify", ("complexity",), sample("Prove it."), scores={"loss_pre": 3.5, "quality": None})
