"""What a wheel holds, and the command that needs nothing else."""

from __future__ import annotations

import importlib.metadata
import tomllib
from pathlib import Path
from typing import Any

import pytest

import middo_jax
from middo_jax import api, quickstart
from middo_jax.models.hf import CheckpointError

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_the_wheel_holds_what_the_quickstart_reads_and_the_types(project: dict[str, Any]) -> None:
    included = project["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    assert included == {
        f"configs/{name}": f"middo_jax/configs/{name}" for name in (quickstart.CONFIG, quickstart.DATA)
    }
    assert all((ROOT / name).is_file() for name in included)
    assert (ROOT / "middo_jax" / "py.typed").is_file()


def test_the_version_is_one(project: dict[str, Any]) -> None:
    assert middo_jax.__version__ == project["project"]["version"]
    assert importlib.metadata.version("middo-jax") == middo_jax.__version__


def test_the_quickstart_is_found_in_a_wheel_and_in_a_clone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert quickstart.shipped() == Path(middo_jax.__file__).parent.parent / "configs"
    installed = tmp_path / "middo_jax"
    (installed / "configs").mkdir(parents=True)
    monkeypatch.setattr(quickstart.importlib.resources, "files", lambda package: installed)
    assert quickstart.shipped() == installed / "configs"


def test_the_quickstart_runs_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its settings are those of configs/quickstart.yaml, its data and model do not depend on the folder."""
    monkeypatch.chdir(tmp_path)
    config = api.load_config(*api.quickstart(["train.num_epochs=2"]))
    stored = api.load_config(ROOT / "configs" / "quickstart.yaml", ["train.num_epochs=2"])
    moved = {"model.path": config.model.path, "data.path": config.data.path}
    assert config == api.load_config(settings=[*api.layers_of(stored), moved])
    assert Path(config.data.path).is_file()

    def missing() -> Path:
        raise CheckpointError("not installed")

    monkeypatch.setattr(quickstart, "demo_model_path", missing)
    assert api.load_config(*api.quickstart()).model.path == "HuggingFaceTB/SmolLM2-135M-Instruct"
