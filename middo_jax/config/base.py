"""What all groups of settings share."""

from __future__ import annotations

import pydantic


class ConfigError(ValueError):
    """A setting is unknown, malformed or out of range; the message names it and what to do."""


class Settings(pydantic.BaseModel):
    """Base of all groups: frozen; an unknown key is an error, and so is a number that is not finite."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
