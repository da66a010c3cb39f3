"""What all groups of settings share."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
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


class _Given:
    """Stands for any value but null."""

    def __repr__(self) -> str:
        return "GIVEN"


GIVEN = _Given()
Condition = tuple[str, Any]  # dotted name of a setting, and the value that it must have, or GIVEN


@dataclasses.dataclass(frozen=True)
class Affects:
    """The mark of a setting: what changes with it, always or on a condition.

        remat: Annotated[Literal["none", "layer"], Affects("speed")] = "layer"
        max_context: Annotated[int, Affects("rewrites", scores=("quality.method", "sample"))] = 2048

    Attributes:
      effects: all that it may affect, each with its condition; None: always. Conditions name settings from
        the top of the tree.
    """

    effects: Mapping[Effect, Condition | None]

    def __init__(self, *always: Effect, **only_if: Condition) -> None:
        effects = dict.fromkeys(always) | only_if
        if unknown := effects.keys() - set(get_args(Effect)):
            raise TypeError(f"not an effect: {', '.join(sorted(unknown))}")
        object.__setattr__(self, "effects", effects)


class Settings(pydantic.BaseModel):
    """Base of all groups: frozen; an unknown key is an error, and so is a number that is not finite.

    Every setting is marked with what it affects: in its annotation, or by `affects` of its group, where all
    settings of the group affect the same.
    """

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    affects: ClassVar[Affects | None] = None
