"""What a page that may be published calls models and datasets: never the place of a folder of one's own."""

from __future__ import annotations

import json
import re
from pathlib import Path

from middo_jax.config.base import BUCKET
from middo_jax.models.resolve import repo_of

_REPO = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_KIND = re.compile(r"(?:(?:hf|tfds):)?")  # of hf:NAME:SPLIT, where NAME may be a folder
# Folders of a run, whose own names say nothing.
_OF_RUNS = frozenset({"huggingface", "checkpoint"})


def without_folders(name: str) -> str:
    """The last name of an absolute path or a URL of a bucket; any other name as it is.

    /home/me/chat.json  ->  chat.json        hf:/home/me/chat:train  ->  hf:chat:train
    """
    kind = _KIND.match(name)
    assert kind is not None  # it may be empty
    place = name[kind.end() :]
    is_place = Path(place).expanduser().is_absolute() or re.match(BUCKET, place)
    return kind[0] + Path(place).name if is_place else name


def model_name(path: str) -> str:
    """The model that a setting such as `model.path` names, for people who do not have one's own folders.

    Qwen/Qwen2.5-0.5B                                       ->  Qwen/Qwen2.5-0.5B
    ~/.cache/.../models--Qwen--Qwen2.5-0.5B/snapshots/1a2b  ->  Qwen/Qwen2.5-0.5B
    models/mine, which was made from it                     ->  mine (its config.json names Qwen/Qwen2.5-0.5B)
    runs/first/final/huggingface                            ->  first/final/huggingface
    """
    if (repo := repo_of(path)) is not None:
        return repo
    folder = Path(path).expanduser()
    if not (folder.exists() or folder.is_absolute() or path.startswith(".") or re.match(BUCKET, path)):
        return path  # a repository, or the name that a server gives its model
    name = "/".join(folder.parts[-3:]) if folder.name in _OF_RUNS else folder.name
    named = _named_by(folder / "config.json")
    return name if named is None else f"{name} (its config.json names {named})"


def _named_by(config: Path) -> str | None:
    """The hub's name of the model that a config.json was read from, if it says."""
    try:
        fields = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    named = fields.get("_name_or_path") if isinstance(fields, dict) else None
    return named if isinstance(named, str) and _REPO.fullmatch(named) else None
