"""The refiner's settings: whom to ask, what it may cost, and what of its answers is taken."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import pydantic
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic.fields import FieldInfo

from middo_jax.config.base import Affects, Settings
from middo_jax.config.gates import Gate, Switch, gate, gates
from middo_jax.config.unions import Alternative, OneOf

Turns = Literal["skip", "last", "all"]


class Prices(Settings):
    """What the endpoint charges, in US dollars per million tokens."""

    affects: ClassVar[Affects | None] = Affects("cost")

    prompt: NonNegativeFloat = Field(default=0.0, description="US dollars per million tokens.")
    cached: NonNegativeFloat | None = Field(
        default=None, description="Of prompt tokens that the server had cached. None: as `prompt`."
    )
    completion: NonNegativeFloat = Field(default=0.0, description="US dollars per million tokens.")


class Dollars(Alternative):
    """What a run may cost, by refine.prices."""

    affects: ClassVar[Affects | None] = Affects("cost")

    usd: PositiveFloat = Field(
        description="Stop refining before a run, all its rounds and starts, costs more US dollars."
    )


class Tokens(Alternative):
    """How many tokens a run may take."""

    affects: ClassVar[Affects | None] = Affects("cost")

    tokens: PositiveInt = Field(
        description="The same in tokens, prompts and completions together, in place of `usd`."
    )


class RequestRate(Alternative):
    """An account's limit of requests."""

    affects: ClassVar[Affects | None] = Affects("speed")

    requests: PositiveInt = Field(
        description="An account's limit of requests per minute, retries included. Give the limit that is "
        "reached first: a server's refusals slow requests down too."
    )


class TokenRate(Alternative):
    """An account's limit of tokens."""

    affects: ClassVar[Affects | None] = Affects("speed")

    tokens: PositiveInt = Field(
        description="An account's limit of tokens per minute, of prompts and completions together."
    )


class GateSettings(Settings):
    """What a rewrite must pass under refine.accept: the bars of gates that have one, and the gates left open.

    docs/refine.md lists the gates in the order in which they are asked. A share sets the bar by the dataset's
    own similarities: cosines of mean states are high even between unrelated prompts, and how high differs
    from model to model. `null` opens a gate that has a bar.
    """

    affects: ClassVar[Affects | None] = Affects("acceptance")

    if TYPE_CHECKING:  # the bars are those of the table of gates, see `declare`

        def __init__(self, **values: Any) -> None: ...

    open: tuple[str, ...] = Field(
        default=(), description="Gates that are not asked, of those without a bar: [numbers, code]."
    )

    @pydantic.field_validator("open")
    @classmethod
    def _can_be_opened(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        openable = [row.name for row in gates() if isinstance(row.switch, Switch) and not row.switch.has_bar]
        for name in names:
            if name in openable:
                continue
            if name in cls.model_fields and name != "open":
                raise ValueError(f"{name} has a bar: refine.gates.{name}=null opens it")
            raise ValueError(f"no gate called {name!r} can be opened; these can: {', '.join(openable)}")
        return tuple(name for name in openable if name in names)

    def value(self, name: str) -> Any:
        """A gate's bar; of a gate without one, whether it is shut.

        A gate that was declared after these settings were made has its default.
        """
        switch = gate(name).switch
        if isinstance(switch, Switch) and not switch.has_bar:
            return switch.default and name not in self.open
        return getattr(self, name, type(self).model_fields[name].default)

    def values(self) -> dict[str, Any]:
        """All gates that have a setting, by name."""
        return {row.name: self.value(row.name) for row in gates() if isinstance(row.switch, Switch)}


def declare(rows: Iterable[Gate], users: Iterable[type[Settings]] = ()) -> None:
    """Makes the bars of gates fields of `GateSettings`; `users` are the groups that contain it."""
    for row in rows:
        if isinstance(row.switch, Switch) and row.switch.has_bar:
            bounds = {name: getattr(row.switch, name) for name in ("gt", "ge", "lt", "le")}
            given = {name: value for name, value in bounds.items() if value is not None}
            field = Field(default=row.switch.default, description=row.rule, **given)
            kind: Any = float | None
            GateSettings.__pydantic_fields__[row.name] = FieldInfo.from_annotated_attribute(kind, field)
    _rebuild(users)


def withdraw(name: str, users: Iterable[type[Settings]] = ()) -> None:
    """Takes a gate's setting back."""
    if name in GateSettings.__pydantic_fields__:  # it has none where the gate has no bar
        del GateSettings.__pydantic_fields__[name]
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
    max_tokens: Annotated[PositiveInt, Affects("rewrites")] = Field(
        default=1024,
        description="Completion tokens per request; an answer cut there is asked once more for twice.",
    )
    response_format: Annotated[Literal["auto", "text", "json"], Affects("rewrites")] = Field(
        default="auto",
        description="How new prompts are asked for. json: by a schema that the server enforces; text: "
        "between tags; auto: json if the server honours a schema, found out once and kept in the cache.",
    )
    preflight: Annotated[bool, Affects("place")] = Field(
        default=True,
        description="Ask the server for one token before the first training, so that a wrong address, key or "
        "model name is known before time is spent.",
    )
    concurrency: Annotated[PositiveInt, Affects("speed")] = Field(
        default=64,
        description="Most requests in flight. It starts at 4, grows while answers come, and shrinks by a "
        "quarter when the server refuses or slows down.",
    )
    per_minute: Annotated[RequestRate | TokenRate | None, OneOf()] = None
    max_retries: Annotated[NonNegativeInt, Affects("speed")] = Field(
        default=5, description="Retries of a request that may still succeed."
    )
    timeout: Annotated[PositiveFloat, Affects("speed")] = Field(
        default=300.0, description="Seconds per request."
    )
    max_corrections: Annotated[NonNegativeInt, Affects("rewrites")] = Field(
        default=2, description="Turns that ask again when an answer cannot be read."
    )
    budget: Annotated[Dollars | Tokens | None, OneOf()] = None
    cache: Annotated[str | None, Affects("place")] = Field(
        default=None,
        description="SQLite file of all answers. None: in the run's folder; runs may share one elsewhere.",
    )
    show_response: Annotated[bool, Affects("rewrites")] = Field(
        default=True,
        description="Whether the refiner also sees the original response; false is the published way.",
    )
    turns: Annotated[Turns, Affects("rewrites")] = Field(
        default="last",
        description="What is rewritten of a conversation of several turns. last: its last user turn, which "
        "is answered in the context of the others; all: every answer that is learnt is also written anew; "
        "skip: nothing, it stays as it is.",
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
