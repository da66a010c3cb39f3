"""Which settings affect what, read off their marks."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from middo_jax.config.base import Affects, Effect, Settings
from middo_jax.config.settings import Config


def marks(group: type[Settings] = Config, prefix: str = "") -> Iterator[tuple[str, Affects | None]]:
    """(dotted name, mark) of all settings below a group; None where a setting has no mark."""
    for name, field in group.model_fields.items():
        below = field.annotation
        if isinstance(below, type) and issubclass(below, Settings):
            yield from marks(below, f"{prefix}{name}.")
        else:
            own = [entry for entry in field.metadata if isinstance(entry, Affects)]
            yield prefix + name, own[0] if own else group.affects


def affecting(settings: Settings, effects: Collection[Effect]) -> dict[str, Any]:
    """Dotted names and values, as in JSON, of the settings that affect at least one of `effects`.

    `only_if` names settings from the top of the tree: in a group taken alone it holds for none.
    """
    values = flat(settings.model_dump(mode="json"))
    return {
        name: values[name]
        for name, mark in marks(type(settings))
        if mark is not None and name in values and mark.effects & set(effects) and _holds(mark, values)
    }


def default_of(name: str) -> Any:
    """A setting's default, as in JSON; None if it has none, or if there is no such setting."""
    *groups, last = name.split(".")
    group: Any = Config
    for part in groups:
        field = group.model_fields.get(part)
        group = None if field is None else field.annotation
        if not (isinstance(group, type) and issubclass(group, Settings)):
            return None
    field = group.model_fields.get(last)
    if field is None or field.is_required():
        return None
    return json.loads(json.dumps(field.default))


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"train": {"keep": 1}} -> {"train.keep": 1}."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return found


def _holds(mark: Affects, values: Mapping[str, Any]) -> bool:
    return mark.only_if is None or values.get(mark.only_if[0]) == mark.only_if[1]
