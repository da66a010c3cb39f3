"""A progress display that keeps what was said."""

from __future__ import annotations

from middo_jax.progress import Silent


class Said(Silent):
    """Its `lines` are what was said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)
