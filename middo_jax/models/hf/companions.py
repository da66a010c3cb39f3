"""The files of a model directory besides its weights: configs, tokenizer, chat template."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

from transformers import AutoTokenizer

from middo_jax.data.templates import TemplateError
from middo_jax.data.tokenize import end_of_turn_token, load_tokenizer
from middo_jax.models.hf.files import CheckpointError
from middo_jax.rundir import write_json, write_text
from middo_jax.rundir.nesting import require_flat

_GENERATION_CONFIG = "generation_config.json"
_TOKENIZER_CONFIG = "tokenizer_config.json"
_TOKENS_MAP = "special_tokens_map.json"
_TOKENIZER = ("tokenizer*", _TOKENS_MAP, "added_tokens.json", "vocab.*", "merges.txt", "*.model")
_CHAT_TEMPLATES = ("chat_template*", "additional_chat_templates/*.jinja")


class ChatFormat(NamedTuple):
    """How training formatted conversations, where that may differ from the base model's files.

    Attributes:
      chat_template: chat template used in training; None: the base's own.
      eos_token_ids: tokens that end an answer. Servers stop at the tokens in generation_config.json, so
        missing ones are added to it.
    """

    chat_template: Any = None
    eos_token_ids: Collection[int] = ()


def write_companions(source: Path, directory: Path, dtype: str, chat: ChatFormat) -> None:
    """Copies a base model's companion files to another directory, with the changes that training made.

    Args:
      source: directory of the base model.
      directory: directory to write to.
      dtype: dtype of the weights, for config.json.
      chat: template and end tokens used in training.

    Raises:
      CheckpointError: the source has no config.json.
    """
    if not (source / "config.json").is_file():
        raise CheckpointError(f"{source}: no config.json there; an export needs one")
    config = _read_json(source / "config.json")
    # transformers 5 writes `dtype`, 4 wrote `torch_dtype`.
    config.update(dict.fromkeys(config.keys() & {"dtype", "torch_dtype"} or {"dtype"}, dtype))
    write_json(directory / "config.json", config)
    _write_generation_config(source, directory, config, chat.eos_token_ids)
    write_tokenizer(source, directory, chat.chat_template)


def write_tokenizer(source: Path, directory: Path, chat_template: str | None = None) -> None:
    """Copies the tokenizer's files and the chat template, or writes `chat_template` in its place.

    The written tokenizer's `eos_token` is the template's end of turn, because some servers stop at no other
    token.
    """
    _copy(source, directory, _TOKENIZER)
    if chat_template is None or chat_template == _own_template(source):
        _copy(source, directory, _CHAT_TEMPLATES)
    else:
        # In both places: readers from before 2025 read only the second; newer ones prefer the first.
        write_text(directory / "chat_template.jinja", chat_template)
        tokenizer = _read_json(directory / _TOKENIZER_CONFIG)
        write_json(directory / _TOKENIZER_CONFIG, tokenizer | {"chat_template": chat_template})
    _name_end_of_turn(directory)


def _name_end_of_turn(directory: Path) -> None:
    if not (directory / _TOKENIZER_CONFIG).is_file():
        return
    tokenizer = load_tokenizer(directory)
    try:
        end = end_of_turn_token(tokenizer)
    except TemplateError:  # training rejects a template that does not show answers
        return
    if end is None or end == tokenizer.eos_token_id:
        return
    # A template that uses `eos_token` would render another token there.
    if "eos_token" in str(tokenizer.chat_template):
        return
    eos_token = tokenizer.convert_ids_to_tokens(end)
    for name in (_TOKENIZER_CONFIG, _TOKENS_MAP):
        path = directory / name
        settings = _read_json(path) if path.is_file() else {}
        if "eos_token" in settings or name == _TOKENIZER_CONFIG:
            old = settings.get("eos_token")
            new = old | {"content": eos_token} if isinstance(old, dict) else eos_token
            write_json(path, settings | {"eos_token": new})


def _own_template(source: Path) -> Any:
    return AutoTokenizer.from_pretrained(source, local_files_only=True, trust_remote_code=False).chat_template


def _write_generation_config(
    source: Path, directory: Path, config: dict[str, Any], eos_token_ids: Collection[int]
) -> None:
    path = source / _GENERATION_CONFIG
    named = ("bos_token_id", "eos_token_id", "pad_token_id")
    # Without this file, transformers uses the ids in config.json.
    settings = _read_json(path) if path.is_file() else {k: config[k] for k in named if k in config}
    eos = settings.get("eos_token_id")
    known = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if missing := sorted(set(eos_token_ids).difference(known)):
        write_json(directory / _GENERATION_CONFIG, settings | {"eos_token_id": [*known, *missing]})
    elif path.is_file():
        shutil.copyfile(path, directory / _GENERATION_CONFIG)
    else:
        write_json(directory / _GENERATION_CONFIG, settings)


def _copy(source: Path, directory: Path, patterns: Collection[str]) -> None:
    for pattern in patterns:
        for file in source.glob(pattern):
            if file.is_file():
                target = directory / file.relative_to(source)
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, target)


def _read_json(path: Path) -> dict[str, Any]:
    """Raises CheckpointError if the file is not a JSON object."""
    text = path.read_bytes()
    try:
        require_flat(text)
        return dict(json.loads(text.decode()))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: not a JSON object: {error}") from error
