"""An exported tokenizer names the end of turn that was learnt: some servers stop at no other token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.tiny_model import CHAT_TEMPLATE, write_tiny_model
from transformers import AutoTokenizer

from middo_jax.data.tokenize import load_tokenizer
from middo_jax.models.hf.companions import ChatFormat, write_companions, write_tokenizer

EOT = "<|im_end|>"


def base_with(path: Path, template: str | None = CHAT_TEMPLATE, **fields: Any) -> Path:
    """A tiny model whose tokenizer ends texts with <|endoftext|>."""
    directory = write_tiny_model(path)
    config = directory / "tokenizer_config.json"
    tree = json.loads(config.read_text()) | {"eos_token": "<|endoftext|>", "chat_template": template} | fields
    config.write_text(json.dumps({name: value for name, value in tree.items() if value is not None}))
    return directory


def exported_eos(directory: Path) -> str:
    return str(AutoTokenizer.from_pretrained(directory).eos_token)


def test_the_bases_own_template(tmp_path: Path) -> None:
    write_companions(base_with(tmp_path / "base"), tmp_path, "float32", ChatFormat())
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["eos_token"] == EOT
    assert exported_eos(tmp_path) == EOT


def test_the_template_of_the_training(tmp_path: Path) -> None:
    base = base_with(tmp_path / "base", template=None)
    template = str(load_tokenizer(base, "chatml").chat_template)
    write_companions(base, tmp_path, "float32", ChatFormat(template))
    assert exported_eos(tmp_path) == EOT


def test_behind_white_space(tmp_path: Path) -> None:
    template = CHAT_TEMPLATE.replace("'<|im_end|>' + ", "'\n<|im_end|>' + ")
    write_companions(base_with(tmp_path / "base", template), tmp_path, "float32", ChatFormat())
    assert exported_eos(tmp_path) == EOT


def test_an_adapter_and_the_map_of_special_tokens(tmp_path: Path) -> None:
    token = {"content": "<|endoftext|>", "lstrip": False, "normalized": False, "rstrip": False}
    base = base_with(tmp_path / "base")
    (base / "special_tokens_map.json").write_text(json.dumps({"eos_token": token}))
    write_tokenizer(base, tmp_path)
    assert json.loads((tmp_path / "special_tokens_map.json").read_text())["eos_token"] == token | {
        "content": EOT
    }
    assert exported_eos(tmp_path) == EOT


@pytest.mark.parametrize(
    "template",
    [
        CHAT_TEMPLATE.replace("'<|im_end|>' + ", "eos_token + "),  # it teaches the tokenizer's own
        CHAT_TEMPLATE.replace("'<|im_end|>' + ", ""),  # it teaches none
        CHAT_TEMPLATE
        + "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}",  # it needs the old one
    ],
    ids=["own", "none", "both"],
)
def test_an_end_token_that_stays(tmp_path: Path, template: str) -> None:
    base = base_with(tmp_path / "base", template)
    write_companions(base, tmp_path, "float32", ChatFormat())
    assert (tmp_path / "tokenizer_config.json").read_bytes() == (base / "tokenizer_config.json").read_bytes()
