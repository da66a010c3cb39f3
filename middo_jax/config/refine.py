"""The refiner's settings: endpoint, costs, and acceptance of its answers."""

from __future__ import annotations

import re
import urllib.parse
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import pydantic
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic.fields import FieldInfo

from middo_jax.config.base import URL, Affects, AnyOf, Settings
from middo_jax.config.gates import Gate, Switch, gate, gates, levels_from
from middo_jax.config.unions import Alternative, OneOf

Turns = Literal["skip", "last", "all"]


class Prices(Settings):
    """The endpoint's prices, in US dollars per million tokens."""

    affects: ClassVar[Affects | None] = Affects("cost")

    prompt: NonNegativeFloat = Field(default=0.0, description="US dollars per million prompt tokens.")
    cached: NonNegativeFloat | None = Field(
        default=None,
        description="US dollars per million prompt tokens from the server's cache. None: as `prompt`.",
    )
    completion: NonNegativeFloat = Field(default=0.0, description="US dollars per million completion tokens.")


class Dollars(Alternative):
    """The budget of a run in US dollars, by refine.prices."""

    affects: ClassVar[Affects | None] = Affects("cost")

    usd: PositiveFloat = Field(
        description="Refinement stops before a run, with all its rounds and starts, costs more US dollars."
    )


class Tokens(Alternative):
    """The budget of a run in tokens."""

    affects: ClassVar[Affects | None] = Affects("cost")

    tokens: PositiveInt = Field(
        description="Refinement stops before a run uses more tokens, of prompts and completions together; "
        "instead of `usd`."
    )


class RequestRate(Alternative):
    """An account's limit of requests."""

    affects: ClassVar[Affects | None] = Affects("speed")

    requests: PositiveInt = Field(
        description="The account's limit of requests per minute, retries included. Give the limit that is "
        "reached first; refusals by the server also slow requests down."
    )


class TokenRate(Alternative):
    """An account's limit of tokens."""

    affects: ClassVar[Affects | None] = Affects("speed")

    tokens: PositiveInt = Field(
        description="The account's limit of tokens per minute, of prompts and completions together."
    )


class GateSettings(Settings):
    """The bars (thresholds) of the gates that have one, and the gates left open (disabled).

    docs/refine.md lists the gates in the order in which they run. A bar given as a share is converted to a
    similarity from the dataset: cosines of mean states are high even between unrelated prompts, and differ
    between models. `null` opens a gate that has a bar.
    """

    if TYPE_CHECKING:  # the bars are those of the table of gates, see `declare`

        def __init__(self, **values: Any) -> None: ...

    # Always: a registered gate may run with any refine.accept.
    open: Annotated[tuple[str, ...], Affects("acceptance")] = Field(
        default=(), description="Gates without a bar that do not run, such as [numbers, code]."
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
        """Returns a gate's bar; for a gate without a bar, whether it runs.

        A gate that was declared after these settings were created has its default.
        """
        switch = gate(name).switch
        if isinstance(switch, Switch) and not switch.has_bar:
            return switch.default and name not in self.open
        return getattr(self, name, type(self).model_fields[name].default)

    def values(self) -> dict[str, Any]:
        """Returns name -> value of all gates that have a setting."""
        return {row.name: self.value(row.name) for row in gates() if isinstance(row.switch, Switch)}


def declare(rows: Iterable[Gate], users: Iterable[type[Settings]] = ()) -> None:
    """Adds the bars of gates as fields of `GateSettings`; `users` are the groups that contain it."""
    for row in rows:
        if isinstance(row.switch, Switch) and row.switch.has_bar:
            bounds = {name: getattr(row.switch, name) for name in ("gt", "ge", "lt", "le")}
            given = {name: value for name, value in bounds.items() if value is not None}
            field = Field(default=row.switch.default, description=row.rule, **given)
            counts = ("refine.accept", AnyOf(levels_from(row.switch.accept or row.accept)))
            kind: Any = Annotated[float | None, Affects(acceptance=counts)]
            GateSettings.__pydantic_fields__[row.name] = FieldInfo.from_annotated_attribute(kind, field)
    _rebuild(users)


def withdraw(name: str, users: Iterable[type[Settings]] = ()) -> None:
    """Removes a gate's setting."""
    if name in GateSettings.__pydantic_fields__:  # a gate without a bar has no field
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
        description="One URL, or a list of URLs of servers with the same model, which share the load. "
        "replay:FILE: recorded answers; the embedded endpoint answers what the file lacks. "
        "None: $OPENAI_BASE_URL, else the embedded endpoint is started. Only $OPENAI_BASE_URL may contain a "
        "user, a password or a query.",
    )
    model: Annotated[str | None, Affects("rewrites")] = Field(
        default=None,
        description="Model name in requests, or the model that the embedded endpoint serves. None: the base "
        "model.",
    )
    model_revision: Annotated[str | None, Affects("rewrites")] = Field(
        default=None,
        description="Part of the cache's key: change it when the served weights change but not their name.",
    )
    api_key_env: Annotated[str, Affects("place")] = Field(
        default="OPENAI_API_KEY", description="NAME of the environment variable that contains the key."
    )
    temperature: Annotated[NonNegativeFloat, Affects("rewrites")] = Field(
        default=1.0, description="Sampling temperature. 0: greedy, hence repeatable."
    )
    max_tokens: Annotated[PositiveInt, Affects("rewrites")] = Field(
        default=1024,
        description="Maximum completion tokens per request; a truncated answer is requested once more with "
        "twice the maximum.",
    )
    response_format: Annotated[Literal["auto", "text", "json"], Affects("rewrites")] = Field(
        default="auto",
        description="Format of the refiner's new prompts. json: a schema that the server enforces; text: "
        "between tags; auto: json if the server supports schemas, which is probed once and cached.",
    )
    preflight: Annotated[bool, Affects("place")] = Field(
        default=True,
        description="Ask the server for one token before the first training, so that a wrong address, key or "
        "model name is known before time is spent.",
    )
    concurrency: Annotated[PositiveInt, Affects("speed")] = Field(
        default=64,
        description="Maximum number of requests in flight. The number starts at 4, grows while answers "
        "arrive, and shrinks by a quarter when the server refuses or slows down.",
    )
    per_minute: Annotated[RequestRate | TokenRate | None, OneOf()] = None
    max_retries: Annotated[NonNegativeInt, Affects("speed")] = Field(
        default=5, description="Maximum retries of a request after a temporary error."
    )
    timeout: Annotated[PositiveFloat, Affects("speed")] = Field(
        default=300.0,
        description="Maximum seconds per request. The embedded refiner has an hour: on a slow machine an "
        "answer takes long, and a retry would begin it again.",
    )
    max_corrections: Annotated[NonNegativeInt, Affects("rewrites")] = Field(
        default=2, description="Maximum correction turns if an answer cannot be parsed."
    )
    budget: Annotated[Dollars | Tokens | None, OneOf()] = None
    cache: Annotated[str | None, Affects("place")] = Field(
        default=None,
        description="SQLite file for all answers. None: in the run's folder; several runs may share a file.",
    )
    show_response: Annotated[bool, Affects("rewrites")] = Field(
        default=True,
        description="Whether the refiner's prompt also contains the original response; false as published.",
    )
    prompts: Annotated[str | None, Affects("rewrites")] = Field(
        default=None,
        description="YAML file with your own instructions and worked examples, see docs/refine.md. None: "
        "those of the package.",
    )
    turns: Annotated[Turns, Affects("rewrites")] = Field(
        default="last",
        description="What is rewritten of a conversation of several turns. last: its last user turn, which "
        "is answered in the context of the others; all: every answer that is learnt is also written anew; "
        "skip: nothing, it stays as it is.",
    )
    accept: Annotated[Literal["measured", "sane", "none"], Affects("acceptance")] = Field(
        default="measured",
        description="measured: sane, and better on its axis under the model in training; sane: only the text "
        "is checked; none: any readable text is accepted, as published.",
    )
    wait_for_review: Annotated[bool, Affects("place")] = Field(
        default=False,
        description="Whether a run stops before each merge until `middo refine RUN/round_00 --read-review` "
        "has read people's verdicts on the accepted rewrites.",
    )
    take_back: Annotated[bool, Affects("rounds")] = Field(
        default=False,
        description="Whether a rewrite is taken back if its sample is worse in the next round than the "
        "original was, on the axes that selected it; see docs/experiments.md.",
    )
    max_attempts: Annotated[PositiveInt, Affects("acceptance")] = Field(
        default=2,
        description="Maximum attempts per sample; each later prompt says why the last rewrite was rejected. "
        "If all fail, the original stays. 1 as published.",
    )
    growth: Annotated[Literal["free", "keep"] | NonNegativeFloat, Affects("growth")] = Field(
        default="free",
        description="free: the dataset grows by all additions, as published; keep, or a maximum share of "
        "growth: the most redundant samples that were never selected are dropped.",
    )
    prices: Prices = Prices()
    gates: GateSettings = GateSettings()

    @pydantic.field_validator("cache")
    @classmethod
    def _on_this_machine(cls, path: str | None) -> str | None:
        if path is not None and re.match(URL, path):
            raise ValueError(
                f"{path}: SQLite needs a file on this machine; null keeps it in the run, also in a bucket"
            )
        return path

    @pydantic.field_validator("growth", mode="before")
    @classmethod
    def _growth(cls, value: Any) -> Any:
        if value in ("free", "keep") or (isinstance(value, (int, float)) and value >= 0):
            return value
        raise ValueError("must be free, keep, or a share of the dataset such as 0.05")

    @pydantic.field_validator("api_key_env")
    @classmethod
    def _is_name(cls, name: str) -> str:
        if not _VARIABLE.fullmatch(name) or _may_be_key(name):  # not shown: it may be a key
            raise ValueError(
                "must be the name of an environment variable, such as OPENAI_API_KEY, and not the key "
                "itself: settings are written to files. Set the variable to the key"
            )
        return name

    @pydantic.field_validator("base_url")
    @classmethod
    def _http(cls, base_url: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
        urls = (base_url,) if isinstance(base_url, str) else base_url
        if urls is not None and not urls:
            raise ValueError("give at least one URL, or null")
        if replayed_file(base_url) is not None:
            if base_url == _REPLAY:
                raise ValueError("replay: must be followed by a file of recorded answers")
            return base_url
        if not all(url.startswith(("http://", "https://")) for url in urls or ()):
            raise ValueError("must start with http:// or https://, or be one replay:FILE")
        if any(_has_secret(url) for url in urls or ()):
            raise ValueError(
                "must contain no user, password, query, # or ;: settings are written to files. Give the URL "
                "in $OPENAI_BASE_URL, and a key in the variable that refine.api_key_env names"
            )
        return base_url


_REPLAY = "replay:"
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SHORTEST_KEY = 20  # characters


def replayed_file(base_url: str | tuple[str, ...] | None) -> Path | None:
    """The file of recorded answers that `refine.base_url` names; None if it names servers or nothing."""
    if not isinstance(base_url, str) or not base_url.startswith(_REPLAY):
        return None
    return Path(base_url.removeprefix(_REPLAY)).expanduser()


def _has_secret(url: str) -> bool:
    """Whether a URL has a part that may be secret. A version, as Azure expects it, is none."""
    if any(character in url for character in "@#;"):  # a user, a fragment, parameters of the path
        return True
    try:
        query = urllib.parse.parse_qsl(urllib.parse.urlsplit(url).query, keep_blank_values=True)
    except ValueError:  # an address that cannot be read; the client says so
        return False
    return any(name != "api-version" for name, _ in query)


def _may_be_key(name: str) -> bool:
    """Whether a text of letters, digits and _ is rather a key than a variable's name."""
    is_mixed = any(c.isdigit() for c in name) and any(c.islower() for c in name)
    return len(name) >= _SHORTEST_KEY and is_mixed
