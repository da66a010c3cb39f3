"""The valid values of `data.format`; `data.formats` defines them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, get_args

from middo_jax.config.settings import Config, DataSettings

BUILT_IN_FORMATS: tuple[str, ...] = tuple(
    name for name in get_args(DataSettings.model_fields["format"].annotation) if name != "auto"
)


def name_formats(names: Iterable[str]) -> None:
    """Makes `auto` and these names the valid values of `data.format`."""
    field = DataSettings.__pydantic_fields__["format"]
    field.annotation = Literal["auto", *names]  # pyright: ignore[reportAttributeAccessIssue]
    for group in (DataSettings, Config):
        group.model_rebuild(force=True)
