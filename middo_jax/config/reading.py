"""YAML files, `a.b=c` overrides and mappings -> settings; what is wrong with them, in words."""

from __future__ import annotations

import contextlib
import difflib
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pydantic
import yaml

from middo_jax.config.base import ConfigError, Settings
from middo_jax.config.effects import Leaf, leaves
from middo_jax.config.renamed import RENAMED
from middo_jax.config.settings import Config
from middo_jax.config.unions import OTHER_ALTERNATIVE, is_inline, union_of

# Settings as a caller gives them: {"train.learning_rate": 1e-4, "complexity": {"fraction": 0.05}}, texts as a
# command takes them, or a whole tree.
SettingsLike = Mapping[str, Any] | Sequence[str | Mapping[str, Any]] | Config | None


def layers_of(settings: SettingsLike) -> list[str | Mapping[str, Any]]:
    """What `load` takes as overrides; of a whole tree, the settings that were given when it was made."""
    if settings is None:
        return []
    if isinstance(settings, Config):
        return [settings.model_dump(mode="json", exclude_unset=True)]
    return [settings] if isinstance(settings, str | Mapping) else list(settings)


def load(path: str | Path | None, overrides: Sequence[str | Mapping[str, Any]] = ()) -> Config:
    """Reads a YAML file and applies what follows, the last one winning.

    Args:
      path: the YAML file; None starts from the defaults alone.
      overrides: `train.learning_rate=1e-4`, values read as YAML; further YAML files, whose settings are laid
        over those before, such as `hardware/v5e-64.yaml`; or mappings of dotted names or groups.

    Raises:
      ConfigError: a file is missing or no mapping, a key is unknown (with the nearest valid one), a value has
        the wrong type or range.
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
    """The settings of a stored config.yaml, or None if they are another version's."""
    try:
        return Config.model_validate(tree)
    except pydantic.ValidationError:
        return None


def read_tree(path: str | Path) -> dict[str, Any]:
    """A YAML file of settings as a plain tree, not validated.

    Raises:
      ConfigError: it cannot be read, or holds no mapping.
    """
    try:
        tree = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except OSError as e:
        raise ConfigError(f"config: cannot read {path}: {e.strerror}") from e
    except yaml.YAMLError as e:
        raise ConfigError(f"config: {path} is not valid YAML: {e}") from e
    if not isinstance(tree, dict):
        raise ConfigError(f"config: {path} must hold settings as `name: value`, not a {type(tree).__name__}")
    return tree


class _Names(NamedTuple):
    """What has to be known of settings' names when some are laid over others.

    Attributes:
      groups: dotted names of groups, and of alternatives that have settings of their own.
      leaves: all settings by name.
    """

    groups: frozenset[str]
    leaves: Mapping[str, Leaf]

    @classmethod
    def known(cls) -> _Names:
        """Those of the settings as they are declared now: a gate may have added one."""
        by_name = {leaf.name: leaf for leaf in leaves()}
        parts = [name.split(".") for name in by_name]
        groups = frozenset(".".join(of[:n]) for of in parts for n in range(1, len(of)))
        return cls(groups, by_name)

    def displaced(self, name: str, value: Any) -> set[str]:
        """The settings of other alternatives than the one that this setting chooses, when it is given."""
        leaf = self.leaves.get(name)
        if leaf is None or value is None:
            return set()
        conditions = ((other.name, other.alternative) for other in self.leaves.values() if other.alternative)
        others = {other for other, (by, wanted) in conditions if by == name and wanted != value}
        return others | set(leaf.excludes)

    def as_group(self, name: str, value: Any) -> Any:
        """`{name: adamw}` for `adamw`, the short form of an alternative; anything else as it is."""
        return {"name": value} if isinstance(value, str) and f"{name}.name" in self.leaves else value

    def inside(self, tree: dict[str, Any], name: str) -> tuple[dict[str, Any], str]:
        """(the mapping that contains a setting, the setting's own name); groups are made where missing.

        Raises:
          ConfigError: a part of the name is no group.
        """
        *groups, last = name.split(".")
        for depth, group in enumerate(groups, start=1):
            path, below = ".".join(groups[:depth]), tree.get(group)
            is_unset = below is None and (group not in tree or path in self.groups)
            tree[group] = {} if is_unset else self.as_group(path, below)
            tree = tree[group]
            if not isinstance(tree, dict):
                raise ConfigError(f"config: {name} is not a setting: {group} holds no settings of its own")
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
    """Lays settings over others; one of several alternatives takes the place of the others."""
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
    """(dotted name, value) of `a.b=value`; (None, settings) of a YAML file or a mapping."""
    if isinstance(override, Mapping):
        return None, _nested(override, names)
    key, equals, text = override.partition("=")
    if not equals and override.endswith((".yaml", ".yml")):
        return None, read_tree(override)
    if not equals or not key:
        raise ConfigError(f"config: {re.sub('//[^@]*@', '//***@', override)!r} is not of the form a.b=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as e:  # without the value, which may contain a password
        problem = getattr(e, "problem", None) or type(e).__name__
        raise ConfigError(f"config: the value of {key} is not valid YAML: {problem}") from None
    if isinstance(value, str):  # YAML 1.1 reads 1e-4 as text.
        with contextlib.suppress(ValueError):
            value = float(value)
    return key, value


def _override(tree: dict[str, Any], key: str, value: Any, names: _Names, given: Collection[str]) -> None:
    """Sets one setting; those of other alternatives go, unless they are `given` too."""
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
        return f"config: {name} is missing; set it in the file or as {name}=... on the command line"
    if error["type"] == OTHER_ALTERNATIVE:
        of = error["ctx"]
        by = f"{name.rpartition('.')[0]}.{of['by']}"
        return f"config: {name} is a setting of {by}={of['of']}, and {by} is {of['chosen']}"
    message = error["msg"].removeprefix("Value error, ")
    return f"config: {name}: {message}" if name else f"config: {message}"


def not_a_setting(name: str) -> str:
    """What to say of a name that is no setting: the new spelling of an old one, or the nearest valid name."""
    if name in RENAMED:
        return f"config: {name} is now {RENAMED[name]}"
    names = _Names.known()
    near = difflib.get_close_matches(name, [*names.leaves, *names.groups], n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]}?" if near else ""
    return f"config: {name} is not a setting.{hint}"


def _written(loc: Sequence[int | str]) -> Iterator[str]:
    """The parts of a name as a user writes them.

    Fields that are written in their group, and what pydantic appends to a setting's name, are left out.
    """
    group: Any = Config
    for part in loc:
        is_group = isinstance(group, type) and issubclass(group, Settings)
        field = group.model_fields.get(str(part)) if is_group else None
        if field is None:
            yield str(part)
            continue
        if not is_inline(field):
            yield str(part)
        group = field.annotation
        if union_of(field) is None and not (isinstance(group, type) and issubclass(group, Settings)):
            return
