"""The refiner's settings: whom to ask, what it may cost, and what of its answers is taken."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import pydantic
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic.fields import FieldInfo

from middo_jax.config.base import Affects, Settings
from middo_jax.config.gates import Gate, Switch, gates


class Prices(Settings):
    """What the endpoint charges, in US dollars per million tokens."""

    affects: ClassVar[Affects | None] = Affects("cost")

    prompt: NonNegativeFloat = Field(default=0.0, description="US dollars per million tokens.")
    cached: NonNegativeFloat | None = Field(
        default=None, description="Of prompt tokens that the server had cached. None: as `prompt`."
    )
    completion: NonNegativeFloat = Field(default=0.0, description="US dollars per million tokens.")


class GateSettings(Settings):
    """What a rewrite must pass under refine.accept; `false` or null opens a gate.

    They are asked in this order. Up to `length` the text alone is looked at, under `sane` and `measured`;
    from `context` to `quality` the model under training measures, under `measured` only. A share sets the bar
    by the dataset's own similarities: cosines of mean states are high even between unrelated prompts, and how
    high differs from model to model.
    """

    affects: ClassVar[Affects | None] = Affects("acceptance")

    if TYPE_CHECKING:  # the fields are those of the table of gates, see `declare`

        def __init__(self, **values: bool | float | None) -> None: ...

    def value(self, name: str) -> Any:
        """A gate's setting, its default if it was declared after these settings were made."""
        return getattr(self, name, type(self).model_fields[name].default)

    def values(self) -> dict[str, Any]:
        """All settings by name."""
        return {name: self.value(name) for name in type(self).model_fields}


def declare(rows: Iterable[Gate], users: Iterable[type[Settings]] = ()) -> None:
    """Makes the settings of gates fields of `GateSettings`; `users` are the groups that contain it."""
    for row in rows:
        if isinstance(row.switch, Switch):
            bounds = {name: getattr(row.switch, name) for name in ("gt", "ge", "lt", "le")}
            given = {name: value for name, value in bounds.items() if value is not None}
            field = Field(default=row.switch.default, description=row.rule, **given)
            kind = bool if isinstance(row.switch.default, bool) else float | None
            GateSettings.__pydantic_fields__[row.name] = FieldInfo.from_annotated_attribute(kind, field)
    _rebuild(users)


def withdraw(name: str, users: Iterable[type[Settings]] = ()) -> None:
    """Takes a gate's setting back."""
    GateSettings.__pydantic_fields__.pop(name, None)
    _rebuild(users)


def _rebuild(users: Iterable[type[Settings]]) -> None:
    for group in (GateSettings, *users):
        group.model_rebuild(force=True)


declare(gates())


class RefineSettings(Settings):
    """The refiner: a chat model behind an OpenAI-compatible endpoint."""

    base_url: Annotated[str | tuple[str, ...] | None, Affects("place")] = Field(
        default=None,
        description="One URL, or a list of servers of the same model that share the load. "
        "None: $OPENAI_BASE_URL, else the embedded endpoint is started.",
    )
    model: Annotated[str | None, Affects("rewrites")] = Field(
        default=None,
        description="Model to ask for, or to serve with the embedded endpoint. None: the base model.",
    )
    model_revision: Annotated[str | None, Affects("rewrites")] = Field(
        default=None,
        description="Part of the cache's key: change it when the served weights change and not their name.",
    )
    api_key_env: Annotated[str, Affects("place")] = Field(
        default="OPENAI_API_KEY", description="NAME of the environment variable that holds the key."
    )
    temperature: Annotated[NonNegativeFloat, Affects("rewrites")] = Field(
        default=1.0, description="0: greedy, hence repeatable."
    )
    top_p: Annotated[float, Affects("rewrites")] = Field(
        default=1.0, gt=0, le=1, description="Sample from this share of the probability."
    )
    max_tokens: Annotated[PositiveInt, Affects("rewrites")] = Field(
        default=1024,
        description="Completion tokens per request; an answer cut there is asked once more for twice.",
    )
    response_format: Annotated[Literal["auto", "text", "json"], Affects("rewrites")] = Field(
        default="auto",
        description="How new prompts are asked for. json: by a schema that the server enforces; text: "
        "between tags; auto: json if the server honours a schema, found out once and kept in the cache.",
    )
    concurrency: Annotated[PositiveInt, Affects("speed")] = Field(
        default=64,
        description="Most requests in flight. It starts at 4, grows while answers come, and shrinks by a "
        "quarter when the server refuses or slows down.",
    )
    requests_per_minute: Annotated[PositiveInt | None, Affects("speed")] = Field(
        default=None, description="An account's limit, retries included. None: as fast as concurrency allows."
    )
    tokens_per_minute: Annotated[PositiveInt | None, Affects("speed")] = Field(
        default=None, description="An account's limit, of prompts and completions together. None: no limit."
    )
    max_retries: Annotated[NonNegativeInt, Affects("speed")] = Field(
        default=5, description="Tries after the first, of what can succeed only."
    )
    timeout: Annotated[PositiveFloat, Affects("speed")] = Field(
        default=300.0, description="Seconds a request."
    )
    max_corrections: Annotated[NonNegativeInt, Affects("rewrites")] = Field(
        default=2, description="Turns that ask again when an answer cannot be read."
    )
    budget_usd: Annotated[PositiveFloat | None, Affects("cost")] = Field(
        default=None, description="Stop refining before a run, all its rounds and starts, passes this."
    )
    budget_tokens: Annotated[PositiveInt | None, Affects("cost")] = Field(
        default=None, description="The same in tokens, prompts and completions together."
    )
    cache: Annotated[str | None, Affects("place")] = Field(
        default=None,
        description="SQLite file of all answers. None: in the run's folder; runs may share one elsewhere.",
    )
    show_response: Annotated[bool, Affects("rewrites")] = Field(
        default=True, description="Whether the refiner also sees the original response."
    )
    accept: Annotated[Literal["measured", "sane", "none"], Affects("acceptance")] = Field(
        default="measured",
        description="measured: sane, and better on its axis under the model under training; sane: the text "
        "alone is looked at; none: readable is enough, the published way.",
    )
    max_attempts: Annotated[PositiveInt, Affects("acceptance")] = Field(
        default=2,
        description="Times that a sample is tried, told why the last rewrite was not accepted; then the "
        "original stays. 1 is the published way.",
    )
    growth: Annotated[Literal["free", "keep"] | NonNegativeFloat, Affects("growth")] = Field(
        default="free",
        description="free: additions come on top, the published way; keep, or a share to grow by at most: "
        "the most redundant samples that were never selected make room.",
    )
    prices: Prices = Prices()
    gates: GateSettings = GateSettings()

    @pydantic.field_validator("growth", mode="before")
    @classmethod
    def _growth(cls, value: Any) -> Any:
        if value in ("free", "keep") or (isinstance(value, (int, float)) and value >= 0):
            return value
        raise ValueError("must be free, keep, or a share of the dataset such as 0.05")

    @pydantic.field_validator("base_url")
    @classmethod
    def _http(cls, base_url: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
        urls = (base_url,) if isinstance(base_url, str) else base_url
        if urls is not None and not urls:
            raise ValueError("give at least one URL, or null")
        if not all(url.startswith(("http://", "https://")) for url in urls or ()):
            raise ValueError("must start with http:// or https://")
        return base_url
