"""YAML files, `a.b=c` overrides and mappings -> settings; what is wrong with them, in words."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pydantic
import yaml

from middo_jax.config.base import ConfigError
from middo_jax.config.settings import Config

_ALTERNATIVE = {"m": "fraction", "fraction": "m"}  # settings of a threshold that exclude each other
# Settings as a caller gives them: {"train.learning_rate": 1e-4, "complexity": {"fraction": 0.05}}, texts as a
# command takes them, or a whole tree.
SettingsLike = Mapping[str, Any] | Sequence[str | Mapping[str, Any]] | Config | None


def setting_names(settings: type[pydantic.BaseModel] = Config, prefix: str = "") -> Iterator[str]:
    """Dotted names of all settings below a group: `train.learning_rate`, ..."""
    for name, field in settings.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, pydantic.BaseModel):
            yield from setting_names(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name


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
    layers = [_parse(override) for override in overrides]
    given = {key for key, value in layers if key is not None and value is not None}
    for key, value in layers:
        if key is None:
            _lay_over(tree, value)
        else:
            _override(tree, key, value, given)
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


def _nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    """{"train.seed": 2, "train": {"keep": 4}}  ->  {"train": {"seed": 2, "keep": 4}}"""
    tree: dict[str, Any] = {}
    for name, value in _leaves(settings):
        *groups, last = name.split(".")
        inside: Any = tree
        for group in groups:
            inside = inside.setdefault(group, {})
            if not isinstance(inside, dict):
                raise ConfigError(f"config: {name} is not a setting: {group} holds no settings of its own")
        inside[last] = value
    return tree


def _leaves(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _lay_over(tree: dict[str, Any], other: dict[str, Any]) -> None:
    """Lays settings over others; one of two alternatives takes the place of the other."""
    for key, value in other.items():
        if isinstance(value, dict) and isinstance(tree.get(key), dict):
            _lay_over(tree[key], value)
            continue
        alternative = _ALTERNATIVE.get(key)
        if alternative and value is not None and other.get(alternative) is None:
            tree.pop(alternative, None)
        tree[key] = value


def _parse(override: str | Mapping[str, Any]) -> tuple[str | None, Any]:
    """(dotted name, value) of `a.b=value`; (None, settings) of a YAML file or a mapping."""
    if isinstance(override, Mapping):
        return None, _nested(override)
    key, equals, text = override.partition("=")
    if not equals and override.endswith((".yaml", ".yml")):
        return None, read_tree(override)
    if not equals or not key:
        raise ConfigError(f"config: {override!r} is not of the form a.b=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as e:
        raise ConfigError(f"config: the value of {override!r} is not valid YAML: {e}") from e
    if isinstance(value, str):  # YAML 1.1 reads 1e-4 as text.
        with contextlib.suppress(ValueError):
            value = float(value)
    return key, value


def _override(tree: dict[str, Any], key: str, value: Any, given: Collection[str]) -> None:
    """Sets one setting; its alternative goes, unless it is among the names that are `given` too."""
    *groups, last = key.split(".")
    for group in groups:
        tree = tree.setdefault(group, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"config: {key} is not a setting: {group} holds no settings of its own")
    alternative = _ALTERNATIVE.get(last)
    if alternative and value is not None and ".".join([*groups, alternative]) not in given:
        tree.pop(alternative, None)
    tree[last] = value


def _explain(error: Any) -> str:
    name = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(
            name, list(setting_names()) + list(Config.model_fields), n=1, cutoff=0.5
        )
        hint = f" Did you mean {near[0]}?" if near else ""
        return f"config: {name} is not a setting.{hint}"
    if error["type"] == "missing":
        return f"config: {name} is missing; set it in the file or as {name}=... on the command line"
    message = error["msg"].removeprefix("Value error, ")
    return f"config: {name}: {message}" if name else f"config: {message}"
