"""Writes docs/settings.md from the settings themselves: `python docs/make_settings.py`."""

from __future__ import annotations

import inspect
import sys
import typing
from pathlib import Path
from typing import Any, get_args

import pydantic

from middo_jax.config import GIVEN, RESULTLESS, AnyOf, Config, Contains, Effect, Leaf, leaves


def page() -> str:
    """The page: one table per group, in the order of a round."""
    resultless = ", ".join(f"`{effect}`" for effect in get_args(Effect) if effect in RESULTLESS)
    parts = [
        "# Settings\n\nGiven in YAML, or last on the command line as `group.name=value`.\n"
        "Made from `middo_jax/config/` by `python docs/make_settings.py`.\n\n"
        "The third column says what a setting affects. After a change, `middo run` redoes the stages that "
        f"depend on it, and no others. {resultless} affect no result of a stage: existing results "
        "stay valid. (`rounds`: a change adds or removes stages.)\n\n"
        "*Only with* names the alternative that a setting is part of; with another one it is an error. "
        "*Either ... or*: only one of them can be given; given later, it takes the place of the other.\n"
    ]
    of_group: dict[str, list[Leaf]] = {}
    for leaf in leaves():
        of_group.setdefault(_group_of(leaf.name), []).append(leaf)
    parts.append("## At the top\n\n" + _table(of_group.pop("")))
    for name, rows in of_group.items():
        docstring = inspect.cleandoc(_class_of(name).__doc__ or "")
        parts.append(f"## {name}\n\n{docstring}\n\n{_table(rows)}")
    return "\n".join(parts)


def _group_of(name: str) -> str:
    """The group of a setting; the settings of an alternative are shown in the group around it."""
    groups = name.split(".")[:-1]
    while groups and not _is_group(_annotation(groups)):
        groups.pop()
    return ".".join(groups)


def _class_of(name: str) -> type[pydantic.BaseModel]:
    group = _annotation(name.split("."))
    assert _is_group(group)
    return group


def _annotation(groups: list[str]) -> Any:
    found: Any = Config
    for part in groups:
        found = found.model_fields[part].annotation
    return found


def _is_group(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, pydantic.BaseModel)


def _table(rows: list[Leaf]) -> str:
    lines = ["| setting | default | affects | |", "|---|---|---|---|"]
    for leaf in rows:
        default = (
            "*required*" if leaf.field.is_required() and not leaf.excludes else f"`{_yaml(leaf.default)}`"
        )
        if leaf.alternative is not None:
            default = f"`{_yaml(leaf.field.default)}`"
        lines.append(f"| `{leaf.name}` | {default} | {_effects(leaf)} | {_description(leaf)} |")
    return "\n".join(lines) + "\n"


def _description(leaf: Leaf) -> str:
    annotation, text = leaf.field.annotation, leaf.field.description or ""
    choices = get_args(annotation) if typing.get_origin(annotation) is typing.Literal else ()
    if choices and not all(str(choice) in text for choice in choices):
        text = f"{', '.join(f'`{choice}`' for choice in choices)}. {text}".strip()
    if leaf.alternative is not None:
        by, value = leaf.alternative
        text = f"*Only with `{by}: {value}`.* {text}"
    if leaf.excludes:
        text = f"*Either this or {', '.join(f'`{name}`' for name in leaf.excludes)}.* {text}"
    return text


def _effects(leaf: Leaf) -> str:
    found = []
    for effect, condition in leaf.mark.effects.items() if leaf.mark else ():
        if condition is None:
            found.append(effect)
        elif condition[1] is GIVEN:
            found.append(f"{effect} (with `{condition[0]}`)")
        elif isinstance(condition[1], AnyOf):
            found.append(f"{effect} (with `{condition[0]}: {' or '.join(condition[1].values)}`)")
        elif isinstance(condition[1], Contains):
            found.append(f"{effect} (with `{condition[1].entry}` in `{condition[0]}`)")
        else:
            value = "null" if condition[1] is None else condition[1]
            found.append(f"{effect} (with `{condition[0]}: {value}`)")
    return ", ".join(found)


def _yaml(value: object) -> str:
    if isinstance(value, pydantic.BaseModel):
        return _yaml(value.model_dump())
    if isinstance(value, tuple):
        return f"[{', '.join(map(_yaml, value))}]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


if __name__ == "__main__":
    target = Path(__file__).parent / "settings.md"
    target.write_text(page(), encoding="utf-8")
    print(target, file=sys.stderr)
