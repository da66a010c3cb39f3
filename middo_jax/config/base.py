"""The base of all groups of settings, and the marks of what a setting affects."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, get_args

import pydantic

# The start of a URL, also gs:/bucket, into which pathlib turns gs://bucket. A drive letter does not match.
URL = r"[A-Za-z][A-Za-z0-9+.-]+:/"
# The start of a folder or file in a bucket.
BUCKET = r"(gs|s3):/{1,2}[^/]"

# What a setting affects. The first five change no result. A change of any other makes the stages that depend
# on it stale (rundir/chain.py lists them).
Effect = Literal[
    "place",  # paths, devices, servers
    "speed",  # time and memory; results change only by rounding
    "cost",  # limits of spending
    "shown",  # what is displayed or kept in addition
    "rounds",  # which rounds and stages a run has
    "data",  # the rows that are used or held out
    "text",  # how a row becomes tokens
    "model",  # the model and its dtype
    "training",
    "scores",
    "selection",
    "rewrites",  # what the refiner is asked
    "acceptance",  # which of its answers are taken
    "growth",  # what makes room for additions
    "benchmarks",  # which are run, and how
    "contrast",  # whether the contrast margin is measured
]
RESULTLESS: frozenset[Effect] = frozenset(("place", "speed", "cost", "shown", "rounds"))


class ConfigError(ValueError):
    """A setting is unknown, malformed or out of range; the message has its name and what to do."""


@dataclasses.dataclass(frozen=True)
class Excludes:
    """The mark of a setting that cannot be given together with another one, of the same group.

    Of two layers of settings, such as a file and the command line, the later one's replaces the other's.
    """

    name: str


class _Given:
    """Matches any value but null."""

    def __repr__(self) -> str:
        return "GIVEN"


GIVEN = _Given()


@dataclasses.dataclass(frozen=True)
class Contains:
    """Matches a list that contains `entry`."""

    entry: str


@dataclasses.dataclass(frozen=True)
class AnyOf:
    """Matches each of `values`."""

    values: tuple[str, ...]


# Dotted name of a setting, and the value that it must have: itself, GIVEN, `Contains` or `AnyOf`.
Condition = tuple[str, Any]


@dataclasses.dataclass(frozen=True)
class Affects:
    """The mark of a setting: what it affects, always or on a condition.

        remat: Annotated[Literal["none", "layer"], Affects("speed")] = "layer"
        max_context: Annotated[int, Affects("rewrites", scores=("quality.method", "sample"))] = 2048

    Attributes:
      effects: effect -> its condition; None: always. Conditions contain full names of settings.
    """

    effects: Mapping[Effect, Condition | None]

    def __init__(self, *always: Effect, **only_if: Condition) -> None:
        effects = dict.fromkeys(always) | only_if
        if unknown := effects.keys() - set(get_args(Effect)):
            raise TypeError(f"not an effect: {', '.join(sorted(unknown))}")
        object.__setattr__(self, "effects", effects)

    def only_if(self, condition: Condition) -> Affects:
        """The same effects, all on this condition. Raises TypeError if one has a condition already."""
        if any(known is not None for known in self.effects.values()):
            raise TypeError(f"{self} has a condition, and its group another one")
        return Affects(**dict.fromkeys(self.effects, condition))


class Settings(pydantic.BaseModel):
    """Base of all groups: frozen; unknown keys and numbers that are not finite are errors.

    Every setting has a mark of what it affects: in its annotation, or in `affects` of its group if all
    settings of the group affect the same. `only_if` is a condition on all effects of the group's settings.
    """

    # Inputs are hidden: an error of pydantic would show a password in a URL.
    model_config = pydantic.ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, hide_input_in_errors=True
    )
    affects: ClassVar[Affects | None] = None
    only_if: ClassVar[Condition | None] = None
