"""What all groups of settings share."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal, get_args

import pydantic

# The start of a URL, also of gs:/bucket, which pathlib makes of gs://bucket; a drive letter is one letter.
URL = r"[A-Za-z][A-Za-z0-9+.-]+:/"

# What a setting affects. The first five change no result; each of the others makes the stages that depend on
# it stale (rundir/chain.py says which do).
Effect = Literal[
    "place",  # where something lies, or who does it
    "speed",  # time and memory; results up to rounding
    "cost",  # what may be spent
    "shown",  # what can be watched, and which state is kept beside the last
    "rounds",  # how many rounds there are
    "data",  # which rows are used, and which are held out
    "text",  # how a row becomes tokens
    "model",  # which model, in which dtype
    "training",
    "scores",
    "selection",
    "rewrites",  # what the refiner is asked
    "acceptance",  # which of its answers are taken
    "growth",  # what makes room for additions
]
RESULTLESS: frozenset[Effect] = frozenset(("place", "speed", "cost", "shown", "rounds"))


class ConfigError(ValueError):
    """A setting is unknown, malformed or out of range; the message names it and what to do."""


@dataclasses.dataclass(frozen=True)
class Affects:
    """The mark of a setting: what changes with it.

        remat: Annotated[Literal["none", "layer"], Affects("speed")] = "layer"
        top_k: Annotated[int, Affects("scores", only_if=("quality.method", "sample"))] = 50

    Attributes:
      effects: all that it affects.
      only_if: (dotted name, value) of another setting that must have this value for it to affect anything.
    """

    effects: frozenset[Effect]
    only_if: tuple[str, Any] | None = None

    def __init__(self, *effects: Effect, only_if: tuple[str, Any] | None = None) -> None:
        if unknown := set(effects) - set(get_args(Effect)):
            raise TypeError(f"not an effect: {', '.join(sorted(unknown))}")
        object.__setattr__(self, "effects", frozenset(effects))
        object.__setattr__(self, "only_if", only_if)


class Settings(pydantic.BaseModel):
    """Base of all groups: frozen; an unknown key is an error, and so is a number that is not finite.

    Every setting is marked with what it affects: in its annotation, or by `affects` of its group, where all
    settings of the group affect the same.
    """

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    affects: ClassVar[Affects | None] = None
