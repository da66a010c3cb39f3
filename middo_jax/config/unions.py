"""Settings with several alternatives, of which only one can be given.

    optimizer: Annotated[AdamW | Adafactor, OneOf(by="name")] = AdamW()
    threshold: Annotated[Deviations | Fraction, OneOf(inline=True)] = Deviations()

The first is written `optimizer: {name: adamw, betas: [0.9, 0.99]}`, or `optimizer: adamw` for short. The
settings of the second are written in the group that contains it: `complexity: {m: 1}`.
"""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pydantic
from pydantic.fields import FieldInfo
from pydantic_core import InitErrorDetails, PydanticCustomError, core_schema

from middo_jax.config.base import Settings

OTHER_ALTERNATIVE = "other_alternative"  # the type of pydantic's error for a setting of another alternative


class Alternative(Settings):
    """One of several alternative groups of settings. The chosen one counts as set, defaults included."""

    def model_post_init(self, context: Any, /) -> None:
        """Marks all settings as set, so that overrides replace the whole alternative."""
        self.model_fields_set.update(type(self).model_fields)


@dataclasses.dataclass(frozen=True)
class OneOf:
    """The mark of a field whose type is a union of alternatives; the first is the default.

    Attributes:
      by: name of the setting whose value chooses the alternative. None: the given settings determine it.
      inline: whether its settings are written in the group that contains the field.
    """

    by: str | None = None
    inline: bool = False

    def __get_pydantic_core_schema__(
        self, source: Any, handler: pydantic.GetCoreSchemaHandler
    ) -> core_schema.CoreSchema:
        is_optional = type(None) in typing.get_args(source)
        choose = functools.partial(self._choose, _members(source), is_optional)
        return core_schema.no_info_before_validator_function(choose, handler(source))

    def named(self, alternative: type[Alternative]) -> str | None:
        """Returns the value of `by` that chooses an alternative."""
        if self.by is None:
            return None
        return typing.get_args(alternative.model_fields[self.by].annotation)[0]

    def _choose(self, members: tuple[type[Alternative], ...], is_optional: bool, value: Any) -> Any:
        """Converts a mapping or a name to the alternative."""
        if self.by is not None and isinstance(value, str):
            value = {self.by: value}
        if not isinstance(value, Mapping):
            if isinstance(value, Settings) or (value is None and is_optional):
                return value
            raise ValueError(f"must be {self._forms(members)}")
        if self.by is None:
            return _by_settings(members, value)
        return self._by_name(members, value)

    def _forms(self, members: Sequence[type[Alternative]]) -> str:
        """Returns `adamw or adafactor`, or `{usd: ...} or {tokens: ...}`."""
        forms = (self.named(member) or f"{{{next(iter(member.model_fields))}: ...}}" for member in members)
        return " or ".join(forms)

    def _by_name(self, members: tuple[type[Alternative], ...], value: Mapping[str, Any]) -> Any:
        assert self.by is not None
        of_name = {self.named(member): member for member in members}
        name = value.get(self.by, self.named(members[0]))
        if not isinstance(name, str) or name not in of_name:
            expected = " or ".join(f"'{known}'" for known in of_name)
            raise _invalid(_detail("literal_error", self.by, name, {"expected": expected}))
        chosen = of_name[name]
        foreign = []
        for key in [key for key in value if key not in chosen.model_fields]:
            for other in (other for other, member in of_name.items() if key in member.model_fields):
                context = {"by": self.by, "of": other, "chosen": name}
                words = "is a setting of {by}: {of}, and {by} is {chosen}"
                foreign.append(
                    _detail(PydanticCustomError(OTHER_ALTERNATIVE, words, context), key, value[key])
                )
                break
        if foreign:
            raise _invalid(*foreign)
        return chosen.model_validate({self.by: name, **value})


def union_of(field: FieldInfo) -> OneOf | None:
    """Returns the `OneOf` mark of a field, None if it has none."""
    return next((entry for entry in field.metadata if isinstance(entry, OneOf)), None)


def members_of(field: FieldInfo) -> tuple[type[Alternative], ...]:
    """Returns the alternatives of a field with such a mark."""
    return _members(field.annotation)


def is_inline(field: FieldInfo) -> bool:
    """Whether the settings of a field are written in the group that contains it."""
    union = union_of(field)
    return union is not None and union.inline


class Inlining(Settings):
    """A group that has fields marked `OneOf(inline=True)`."""

    @pydantic.model_validator(mode="before")
    @classmethod
    def _gathered(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        rest = dict(data)
        for name, field in _inlined(cls):
            if name in rest and not isinstance(rest[name], Settings):
                raise _invalid(_detail("extra_forbidden", name, rest[name]))  # the name is internal
            own = {key for member in members_of(field) for key in member.model_fields}
            given = {key: rest.pop(key) for key in data if key in own}
            if given and name in rest:
                raise ValueError(f"give either {name} or {', '.join(given)}, not both")
            if given:
                rest[name] = given
        return rest

    @pydantic.model_serializer(mode="wrap")
    def _spread(self, handler: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        inside = {name for name, _ in _inlined(type(self))}
        tree: dict[str, Any] = {}
        for name, value in handler(self).items():
            tree |= value if name in inside else {name: value}
        return tree


def _inlined(group: type[Settings]) -> Iterator[tuple[str, FieldInfo]]:
    return ((name, field) for name, field in group.model_fields.items() if is_inline(field))


def _by_settings(members: tuple[type[Alternative], ...], value: Mapping[str, Any]) -> Any:
    given = {key: of for key, of in value.items() if of is not None}
    chosen = [member for member in members if member.model_fields.keys() & given.keys()]
    if len(chosen) > 1:
        names = " or ".join(next(iter(member.model_fields)) for member in members)
        raise ValueError(f"give either {names}, not both")
    return (chosen or members)[0].model_validate(given)


def _detail(kind: str | PydanticCustomError, name: str, value: Any, context: Any = None) -> InitErrorDetails:
    return InitErrorDetails(type=kind, loc=(name,), input=value, ctx=context or {})


def _invalid(*details: InitErrorDetails) -> ValueError:
    return pydantic.ValidationError.from_exception_data("settings", [*details])


def _members(annotation: Any) -> tuple[type[Alternative], ...]:
    parts = typing.get_args(annotation)
    return tuple(part for part in parts if isinstance(part, type) and issubclass(part, Alternative))
