"""The one walk over all settings, and which of them affect what."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

from pydantic.fields import FieldInfo

from middo_jax.config.base import GIVEN, Affects, Condition, Effect, Settings
from middo_jax.config.settings import Config
from middo_jax.config.unions import members_of, union_of

_ABSENT = object()


class Leaf(NamedTuple):
    """A setting that a user can write.

    Attributes:
      name: dotted, `quality.score`.
      field: its declaration.
      mark: what it affects; None where it has no mark.
      default: None also where it has none.
      alternative: the setting and the value without which it does not exist, ("quality.method", "expected").
      excludes: other settings of which only one of them can be given: `complexity.m`, `complexity.fraction`.
    """

    name: str
    field: FieldInfo
    mark: Affects | None
    default: Any
    alternative: Condition | None = None
    excludes: tuple[str, ...] = ()


def leaves(group: type[Settings] = Config, prefix: str = "") -> Iterator[Leaf]:
    """All settings below a group, those of all alternatives, in the order of their declaration."""
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
            yield Leaf(prefix + name, field, own[0] if own else group.affects, default)


def affecting(settings: Settings, effects: Collection[Effect]) -> dict[str, Any]:
    """Dotted names and values, as in JSON, of the settings that affect at least one of `effects`.

    A setting of an alternative that was not chosen is None where nothing else names the alternative
    (`complexity.m` beside `complexity.fraction`), and is left out otherwise.

    Conditions name settings from the top of the tree: in a group taken alone they hold for none.
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
    """A setting's default, as in JSON; None if it has none, or if there is no such setting."""
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
            elif leaf.name in others:  # of several alternatives, as the one that names them
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
    return value not in (None, _ABSENT) if wanted is GIVEN else value == wanted
