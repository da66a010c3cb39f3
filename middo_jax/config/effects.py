"""Iterates over all settings, and finds those with given effects."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

from pydantic.fields import FieldInfo

from middo_jax.config.base import GIVEN, Affects, AnyOf, Condition, Contains, Effect, Excludes, Settings
from middo_jax.config.settings import Config
from middo_jax.config.unions import members_of, union_of

_ABSENT = object()


class Leaf(NamedTuple):
    """A setting that a user can write.

    Attributes:
      name: dotted name, such as `quality.score`.
      field: its declaration.
      mark: what it affects; None if it has no mark.
      default: its default; None also if it has none.
      alternative: the setting and value that it requires, such as ("quality.method", "expected").
      excludes: settings that cannot be given together with it: `complexity.m` and `complexity.fraction`.
    """

    name: str
    field: FieldInfo
    mark: Affects | None
    default: Any
    alternative: Condition | None = None
    excludes: tuple[str, ...] = ()


def leaves(group: type[Settings] = Config, prefix: str = "") -> Iterator[Leaf]:
    """Yields all settings below a group, those of all alternatives, in the order of declaration."""
    for leaf in _leaves(group, prefix):
        if group.only_if is not None and leaf.mark is not None:
            leaf = leaf._replace(mark=leaf.mark.only_if(group.only_if))
        yield leaf


def _leaves(group: type[Settings], prefix: str) -> Iterator[Leaf]:
    for name, field in group.model_fields.items():
        below = field.annotation
        union = union_of(field)
        if union is not None:
            yield from _leaves_of_union(field, prefix if union.inline else f"{prefix}{name}.")
        elif isinstance(below, type) and issubclass(below, Settings):
            yield from leaves(below, f"{prefix}{name}.")
        else:
            own = [entry for entry in field.metadata if isinstance(entry, Affects)]
            default = None if field.is_required() else field.default
            others = tuple(prefix + entry.name for entry in field.metadata if isinstance(entry, Excludes))
            yield Leaf(prefix + name, field, own[0] if own else group.affects, default, excludes=others)


def affecting(settings: Settings, effects: Collection[Effect]) -> dict[str, Any]:
    """Returns dotted names and JSON values of the settings that have at least one of `effects`.

    Settings of an alternative that was not chosen are left out. Where no setting names the alternative
    (`complexity.m` and `complexity.fraction`), they are None instead.

    Conditions contain full names of settings, so in a group on its own none of them is met.
    """
    tree = settings.model_dump(mode="json")
    found = {}
    for leaf in leaves(type(settings)):
        value = _at(tree, leaf.name)
        conditions = [leaf.mark.effects[e] for e in effects if e in leaf.mark.effects] if leaf.mark else []
        if (value is _ABSENT and not leaf.excludes) or not any(_holds(c, tree) for c in conditions):
            continue
        found[leaf.name] = None if value is _ABSENT else value
    return found


def default_of(name: str) -> Any:
    """Returns a setting's default as a JSON value; None if it has none, or if there is no such setting."""
    default = next((leaf.default for leaf in leaves() if leaf.name == name), None)
    return json.loads(json.dumps(default, default=lambda value: value.model_dump(mode="json")))


def _leaves_of_union(field: FieldInfo, prefix: str) -> Iterator[Leaf]:
    union, members = union_of(field), members_of(field)
    assert union is not None
    seen: set[str] = set()
    for member in members:
        others = tuple(prefix + name for m in members if m is not member for name in m.model_fields)
        for leaf in leaves(member, prefix):
            if leaf.name in seen:
                continue
            seen.add(leaf.name)
            default = leaf.default if isinstance(field.default, member) else None
            if union.by is None:
                yield leaf._replace(default=default, excludes=others)
            elif leaf.name in others:  # a setting of several alternatives, such as their name
                yield leaf._replace(default=default)
            else:
                of = (prefix + union.by, union.named(member))
                yield leaf._replace(default=default, alternative=of)


def _at(tree: Mapping[str, Any], name: str) -> Any:
    value: Any = tree
    for part in name.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return _ABSENT
        value = value[part]
    return value


def _holds(condition: Condition | None, tree: Mapping[str, Any]) -> bool:
    if condition is None:
        return True
    value, wanted = _at(tree, condition[0]), condition[1]
    if wanted is GIVEN:
        return value not in (None, _ABSENT)
    if isinstance(wanted, Contains):
        return value is not _ABSENT and wanted.entry in value
    if isinstance(wanted, AnyOf):
        return value in wanted.values
    return value == wanted
