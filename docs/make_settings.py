"""Writes docs/settings.md from the settings themselves: `python docs/make_settings.py`."""

from __future__ import annotations

import inspect
import sys
import typing
from pathlib import Path
from typing import get_args

import pydantic

from middo_jax.config import RESULTLESS, Config, Effect, marks


def page() -> str:
    """The page: one table per group, in the order of a round."""
    resultless = ", ".join(f"`{effect}`" for effect in get_args(Effect) if effect in RESULTLESS)
    parts = [
        "# Settings\n\nGiven in YAML, or last on the command line as `group.name=value`.\n"
        "Made from `middo_jax/config/` by `python docs/make_settings.py`.\n\n"
        "The third column says what a setting affects. After a change, `middo run` redoes the stages that "
        f"depend on it, and no others. {resultless} affect no result: nothing is redone.\n"
    ]
    plain = {n: f for n, f in Config.model_fields.items() if not _is_group(f)}
    parts.append("## At the top\n\n" + _table("", plain))
    for name, field in Config.model_fields.items():
        if _is_group(field):
            parts.append(_group(name, _class(field)))
    return "\n".join(parts)


def _group(name: str, group: type[pydantic.BaseModel]) -> str:
    fields = {n: f for n, f in group.model_fields.items() if not _is_group(f)}
    nested = [_group(f"{name}.{n}", _class(f)) for n, f in group.model_fields.items() if _is_group(f)]
    return "\n".join(
        [f"## {name}\n\n{inspect.cleandoc(group.__doc__ or '')}\n\n{_table(f'{name}.', fields)}", *nested]
    )


def _is_group(field: typing.Any) -> bool:
    return isinstance(field.annotation, type) and issubclass(field.annotation, pydantic.BaseModel)


def _class(field: typing.Any) -> type[pydantic.BaseModel]:
    """The class of a group's settings."""
    assert _is_group(field)
    return field.annotation


def _table(prefix: str, fields: dict[str, typing.Any]) -> str:
    rows = ["| setting | default | affects | |", "|---|---|---|---|"]
    for name, field in fields.items():
        default = "*required*" if field.is_required() else f"`{_yaml(field.default)}`"
        choices = (
            typing.get_args(field.annotation) if typing.get_origin(field.annotation) is typing.Literal else ()
        )
        text = field.description or ""
        if choices and not all(str(choice) in text for choice in choices):
            text = f"{', '.join(f'`{choice}`' for choice in choices)}. {text}"
        rows.append(f"| `{prefix}{name}` | {default} | {_effects(prefix + name)} | {text.strip()} |")
    return "\n".join(rows) + "\n"


def _effects(name: str) -> str:
    mark = dict(marks())[name]
    return ", ".join(e for e in get_args(Effect) if mark and e in mark.effects)


def _yaml(value: object) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(_yaml, value))}]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


if __name__ == "__main__":
    target = Path(__file__).parent / "settings.md"
    target.write_text(page(), encoding="utf-8")
    print(target, file=sys.stderr)
