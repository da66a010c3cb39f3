"""The date that a chat template prints: it is pinned for a run and recorded in its settings."""

from __future__ import annotations

import datetime
from collections.abc import Iterable
from pathlib import Path

from middo_jax.config import Config
from middo_jax.config.reading import read_tree
from middo_jax.data.templates import asks_for_date
from middo_jax.data.tokenize import load_tokenizer
from middo_jax.models.resolve import resolve


def pin(config: Config, recorded: Iterable[Path]) -> Config:
    """Returns the settings with `model.template_date` set, if the chat template prints the date.

    Args:
      config: the settings; returned unchanged if they have a date.
      recorded: files of settings, such as those of the run's earlier start. The date is taken from the first
        file that has one; without any it is today.

    Raises:
      ConfigError: a recorded file cannot be read.
      CheckpointError, TemplateError: see `resolve` and `load_tokenizer`.
    """
    if config.model.template_date is not None or not _is_asked(config):
        return config
    trees = (read_tree(path) for path in recorded if path.is_file())
    dates = ((tree.get("model") or {}).get("template_date") for tree in trees)
    date = next((date for date in dates if date), datetime.date.today())
    model = config.model.model_dump() | {"template_date": date}
    return Config.model_validate(config.model_dump() | {"model": model})


def _is_asked(config: Config) -> bool:
    base, template = resolve(config.model.path), config.model.template
    files = [Path(template)] if template else [*base.glob("*.jinja"), *base.glob("*.json")]
    # Loading a tokenizer takes long, so the files are searched first.
    texts = (file.read_bytes() for file in files if file.is_file() and file.name != "tokenizer.json")
    return any(b"strftime_now" in text for text in texts) and asks_for_date(load_tokenizer(base, template))
