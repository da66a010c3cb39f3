"""What a published page calls models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from middo_jax.report.names import model_name, without_folders


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-0.5B"),
        ("gpt-4o-mini", "gpt-4o-mini"),
        ("accounts/some/models/llama:free", "accounts/some/models/llama:free"),
        ("/home/me/hub/models--Qwen--Qwen2.5-0.5B/snapshots/1a2b", "Qwen/Qwen2.5-0.5B"),
        ("/home/me/hub/models--gpt2/snapshots/1a2b/", "gpt2"),
        ("/home/me/qwen.gguf", "qwen.gguf"),
        ("~/models/mine", "mine"),
        ("../mine", "mine"),
        ("gs://bucket/of/me/mine", "mine"),
        ("/home/me/runs/first/final/huggingface", "first/final/huggingface"),
    ],
)
def test_a_model_is_called_by_its_own_name(path: str, name: str) -> None:
    assert model_name(path) == name


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"_name_or_path": "Qwen/Qwen2.5-0.5B"}, " (its config.json names Qwen/Qwen2.5-0.5B)"),
        ({"_name_or_path": "/home/you/base"}, ""),
        ({"_name_or_path": 7}, ""),
        ([], ""),
    ],
)
def test_a_folder_is_called_by_what_it_was_made_from_too(tmp_path: Path, fields: Any, told: str) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text(json.dumps(fields))
    assert model_name(str(tmp_path / "mine")) == f"mine{told}"


def test_a_dataset_is_called_without_its_folder() -> None:
    assert without_folders("hf:/home/me/chat:config:train") == "hf:chat:config:train"
    assert without_folders("tfds:gs://bucket/of/me/chat:train") == "tfds:chat:train"
    assert without_folders("/home/me/part-*.parquet") == "part-*.parquet"
    assert without_folders("hf:yahma/alpaca-cleaned:train") == "hf:yahma/alpaca-cleaned:train"
    assert without_folders("data/alpaca.json") == "data/alpaca.json"
