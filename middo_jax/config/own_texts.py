"""Texts that users may replace by those of a YAML file: the refiner's prompts, the judge's rubric.

What the file does not name stays as it is shipped.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

import pydantic
import yaml

from middo_jax.config.base import ConfigError, Settings

Text = Annotated[str, pydantic.StringConstraints(strip_whitespace=True, min_length=1)]


WHOLE = ("example",)  # groups that are replaced as a whole: half of an example is none


class _Loader(yaml.SafeLoader):
    """Refuses a name that occurs twice in a mapping, as YAML does; PyYAML takes the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for n, name in enumerate(names):
            if name in names[:n]:
                raise yaml.constructor.ConstructorError(
                    problem=f"{name} occurs twice", problem_mark=node.value[n][0].start_mark
                )
        return super().construct_mapping(node, deep)


class OwnTexts(Settings):
    """A group of texts."""

    @property
    def hash(self) -> str:
        """12 hex digits that identify the texts."""
        return hashlib.sha256(json.dumps(self.model_dump(), sort_keys=True).encode()).hexdigest()[:12]


Texts = TypeVar("Texts", bound=OwnTexts)


def read_texts(setting: str, path: str, shipped: Texts) -> Texts:
    """The shipped texts with those of a file in their place.

    Args:
      setting: the name of the setting that names the file, for messages.
      path: a YAML file.
      shipped: the texts that hold otherwise.

    Raises:
      ConfigError: the file cannot be read, or a text has an unknown name, or is missing or no text.
    """
    where = f"{setting}={path}"
    try:
        tree = yaml.load(Path(path).expanduser().read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise ConfigError(f"{where}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where}: not UTF-8 ({error.reason} at byte {error.start})") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = "" if mark is None else f" in line {mark.line + 1}"
        raise ConfigError(f"{where}: not YAML{line}: {getattr(error, 'problem', None) or error}") from None
    except (ValueError, RecursionError) as error:  # an impossible date; nested too deep
        raise ConfigError(f"{where}: not YAML: {error}") from None
    if not isinstance(tree, Mapping) or not tree:
        raise ConfigError(
            f"{where}: must name texts, some of {', '.join(type(shipped).model_fields)}, as `NAME: TEXT`"
        )
    laid = _laid_over(shipped.model_dump(), tree)
    try:
        return type(shipped).model_validate(laid)
    except pydantic.ValidationError as error:
        raise ConfigError(
            "\n".join(f"{where}: {_explain(e, laid, shipped)}" for e in error.errors())
        ) from None


def _laid_over(texts: Mapping[str, Any], own: Mapping[Any, Any]) -> dict[str, Any]:
    merged = dict(texts)
    for name, value in own.items():
        below = merged.get(name)
        if isinstance(value, Mapping) and isinstance(below, Mapping) and name not in WHOLE:
            value = _laid_over(below, value)
        merged[str(name)] = value
    return merged


def _explain(error: Any, laid: Any, shipped: OwnTexts) -> str:
    *groups, last = error["loc"] or ("",)
    name = ".".join(map(str, error["loc"]))
    if error["type"] == "extra_forbidden":
        known: Any = shipped.model_dump()
        for group in groups:
            known = known[group]
        near = difflib.get_close_matches(str(last), list(known), n=1, cutoff=0.5)
        hint = f"Did you mean {near[0]}?" if near else f"There are {', '.join(known)}."
        return f"{name} is not known. {hint}"
    if error["type"] == "missing":
        return f"{name} is missing"
    if error["type"] in ("string_too_short", "too_short"):
        return f"{name} is empty"
    if error["type"] in ("model_type", "string_type", "tuple_type"):
        wanted = {"model_type": "a group of texts", "string_type": "text", "tuple_type": "a list of texts"}
        return f"{name} must be {wanted[error['type']]}, not {error['input']!r:.40}"
    message = error["msg"].removeprefix("Value error, ")
    return f"{name}: {message}" if name else message
