"""Reads settings from YAML files, `a.b=c` overrides and mappings, and explains errors in them."""

from __future__ import annotations

import contextlib
import difflib
import itertools
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_origin

import pydantic
import yaml

from middo_jax.config.base import ConfigError, Settings
from middo_jax.config.effects import Leaf, leaves
from middo_jax.config.renamed import RENAMED
from middo_jax.config.settings import Config
from middo_jax.config.unions import OTHER_ALTERNATIVE, is_inline, union_of

# Forms in which callers pass settings: {"train.learning_rate": 1e-4, "complexity": {"fraction": 0.05}},
# strings as on the command line, or a whole Config.
SettingsLike = Mapping[str, Any] | Sequence[str | Mapping[str, Any]] | Config | None


def layers_of(settings: SettingsLike) -> list[str | Mapping[str, Any]]:
    """Returns overrides for `load`; for a Config, the settings that were set explicitly."""
    if settings is None:
        return []
    if isinstance(settings, Config):
        return [settings.model_dump(mode="json", exclude_unset=True)]
    return [settings] if isinstance(settings, str | Mapping) else list(settings)


def load(path: str | Path | None, overrides: Sequence[str | Mapping[str, Any]] = ()) -> Config:
    """Reads a YAML file and applies overrides; the last one wins.

    Args:
      path: the YAML file; None starts from the defaults.
      overrides: `train.learning_rate=1e-4`, with values parsed as YAML; further YAML files, such as
        `hardware/v5e-64.yaml`; or mappings of dotted names or groups.

    Raises:
      ConfigError: a file is missing or not a mapping, a key is unknown (the message suggests the nearest
        valid one), or a value has the wrong type or range.
    """
    tree: dict[str, Any] = {} if path is None else read_tree(path)
    names = _Names.known()
    layers = [_parse(override, names) for override in overrides]
    given = {key for key, value in layers if key is not None and value is not None}
    for key, value in layers:
        if key is None:
            _lay_over(tree, value, names)
        else:
            _override(tree, key, value, names, given)
    try:
        return Config.model_validate(tree)
    except pydantic.ValidationError as e:
        raise ConfigError("\n".join(_explain(error) for error in e.errors())) from e


def stored(tree: Mapping[str, Any]) -> Config | None:
    """Returns the settings of a stored config.yaml; None if another version wrote it."""
    try:
        return Config.model_validate(tree)
    except pydantic.ValidationError:
        return None


def read_tree(path: str | Path) -> dict[str, Any]:
    """Reads a YAML file of settings as a plain tree, without validation.

    Raises:
      ConfigError: the file cannot be read or is not a mapping.
    """
    try:
        tree = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except OSError as e:
        raise ConfigError(f"config: cannot read {path}: {e.strerror}") from e
    except (yaml.YAMLError, ValueError, RecursionError) as e:  # a date such as 2026-99-99
        raise ConfigError(f"config: {path} is not valid YAML: {e}") from e
    if not isinstance(tree, dict):
        raise ConfigError(f"config: {path} must hold settings as `name: value`, not a {type(tree).__name__}")
    return tree


class _Names(NamedTuple):
    """The names of all settings, for applying overrides.

    Attributes:
      groups: dotted names of groups, and of alternatives that have settings of their own.
      leaves: all settings by name.
    """

    groups: frozenset[str]
    leaves: Mapping[str, Leaf]

    @classmethod
    def known(cls) -> _Names:
        """Returns the names as declared now, because registered gates and axes add settings."""
        by_name = {leaf.name: leaf for leaf in leaves()}
        parts = [name.split(".") for name in by_name]
        groups = frozenset(".".join(of[:n]) for of in parts for n in range(1, len(of)))
        return cls(groups, by_name)

    def displaced(self, name: str, value: Any) -> set[str]:
        """Returns the settings of other alternatives, which this setting removes when it is given."""
        leaf = self.leaves.get(name)
        if leaf is None or value in (None, "", []):
            return set()
        conditions = ((other.name, other.alternative) for other in self.leaves.values() if other.alternative)
        others = {other for other, (by, wanted) in conditions if by == name and wanted != value}
        return others | set(leaf.excludes)

    def as_group(self, name: str, value: Any) -> Any:
        """Expands the short form of an alternative, `adamw`, to `{name: adamw}`; leaves others unchanged."""
        return {"name": value} if isinstance(value, str) and f"{name}.name" in self.leaves else value

    def inside(self, tree: dict[str, Any], name: str) -> tuple[dict[str, Any], str]:
        """Returns (the mapping that contains a setting, the last part of its name); creates missing groups.

        Raises:
          ConfigError: a part of the name is not a group.
        """
        *groups, last = name.split(".")
        for depth, group in enumerate(groups, start=1):
            path, below = ".".join(groups[:depth]), tree.get(group)
            is_unset = below is None and (group not in tree or path in self.groups)
            tree[group] = {} if is_unset else self.as_group(path, below)
            tree = tree[group]
            if not isinstance(tree, dict):
                raise ConfigError(f"config: {name} is not a setting: {group} is not a group of settings")
        return tree, last


def _nested(settings: Mapping[str, Any], names: _Names) -> dict[str, Any]:
    """{"lora.rank": 8, "lora": {"alpha": 4}}  ->  {"lora": {"rank": 8, "alpha": 4}}"""
    tree: dict[str, Any] = {}
    for name, value in _leaves(settings):
        inside, last = names.inside(tree, name)
        inside[last] = value
    return tree


def _leaves(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _lay_over(tree: dict[str, Any], other: Mapping[str, Any], names: _Names, prefix: str = "") -> None:
    """Overrides settings by others; a given alternative replaces the other alternatives."""
    for key, value in other.items():
        name = f"{prefix}{key}"
        if name in names.groups and isinstance(value, dict) and tree.get(key) is not None:
            tree[key] = names.as_group(name, tree[key])
            if isinstance(tree[key], dict):
                _lay_over(tree[key], value, names, f"{name}.")
                continue
        for gone in names.displaced(name, value):
            last = gone.rpartition(".")[2]
            if other.get(last) is None:
                tree.pop(last, None)
        tree[key] = value


def _parse(override: str | Mapping[str, Any], names: _Names) -> tuple[str | None, Any]:
    """Returns (dotted name, value) of `a.b=value`, or (None, settings) of a YAML file or a mapping."""
    if isinstance(override, Mapping):
        return None, _nested(override, names)
    key, equals, text = override.partition("=")
    if not equals and override.endswith((".yaml", ".yml")):
        return None, read_tree(override)
    if not equals or not key:
        raise ConfigError(f"config: {re.sub('//[^@]*@', '//***@', override)!r} is not of the form a.b=value")
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as e:  # without the value, which may hold a password
        problem = getattr(e, "problem", None) or type(e).__name__
        raise ConfigError(f"config: the value of {key} is not valid YAML: {problem}") from None
    if isinstance(value, str):  # YAML 1.1 parses 1e-4 as a string.
        with contextlib.suppress(ValueError):
            value = float(value)
    return key, value


def _override(tree: dict[str, Any], key: str, value: Any, names: _Names, given: Collection[str]) -> None:
    """Sets one setting; removes those of other alternatives, unless they are in `given`."""
    inside, last = names.inside(tree, key)
    for gone in names.displaced(key, value) - set(given):
        inside.pop(gone.rpartition(".")[2], None)
    inside[last] = value


def _explain(error: Any) -> str:
    if error["type"] == "extra_forbidden":
        *groups, last = error["loc"]
        return not_a_setting(".".join([*_written(groups), str(last)]))
    name = ".".join(_written(error["loc"]))
    if error["type"] == "missing":
        name = _required(name)
        return f"config: {name} is missing; set it in the file or as {name}=... on the command line"
    if error["type"] == OTHER_ALTERNATIVE:
        of = error["ctx"]
        by = f"{name.rpartition('.')[0]}.{of['by']}"
        return f"config: {name} is a setting of {by}={of['of']}, and {by} is {of['chosen']}"
    message = error["msg"].removeprefix("Value error, ")
    return f"config: {name}: {message}" if name else f"config: {message}"


def _required(name: str) -> str:
    """A missing setting's name; for a missing group, that of its path, which every such group needs."""
    field = Config.model_fields.get(name)
    group = None if field is None else field.annotation
    if isinstance(group, type) and issubclass(group, Settings):
        return f"{name}.path" if "path" in group.model_fields else name
    return name


def not_a_setting(name: str) -> str:
    """Returns the error for an unknown name: the new name of a renamed setting, or the nearest valid name."""
    if name in RENAMED:
        return f"config: {name} is now {RENAMED[name]}"
    names = _Names.known()
    near = difflib.get_close_matches(name, [*names.leaves, *names.groups], n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]}?" if near else ""
    return f"config: {name} is not a setting.{hint}"


def _written(loc: Sequence[int | str]) -> Iterator[str]:
    """Yields the parts of a name as users write them.

    Leaves out inline fields, and parts that pydantic appends to a setting's name, except the name of an item.
    """
    group: Any = Config
    parts = iter(loc)
    for part in parts:
        is_group = isinstance(group, type) and issubclass(group, Settings)
        field = group.model_fields.get(str(part)) if is_group else None
        if field is None:
            yield str(part)
            continue
        if not is_inline(field):
            yield str(part)
        group = field.annotation
        if union_of(field) is None and not (isinstance(group, type) and issubclass(group, Settings)):
            if get_origin(group) is dict:
                yield from map(str, itertools.islice(parts, 1))
            return
