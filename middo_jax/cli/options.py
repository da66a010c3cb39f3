"""What the commands share: common options, the job of several processes, and printing a result."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[a.b=c]...", help="Settings or YAML files of settings; later ones take precedence."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
RunFolder = Annotated[Path, typer.Argument(help="A run's folder, such as runs/quickstart.")]
ScoredFolder = Annotated[
    Path, typer.Argument(help="A folder that `middo score --out` wrote, or a round of a run.")
]
Data = Annotated[str, typer.Option(help="A file, a dataset directory, tfds:NAME:SPLIT or hf:NAME:SPLIT.")]
MODEL_HELP = "A Hugging Face directory, a checkpoint, a LoRA adapter, a .gguf file or a hub id."
Model = Annotated[str, typer.Option(help=MODEL_HELP)]

DATA_HELP = (
    "A file, folder, pattern, tfds:NAME:SPLIT or hf:NAME:SPLIT; or "
    "data.sources=[...], or a YAML file of settings with the data."
)
EXIT_FAULTS = 3  # of `middo inspect`: more rows have a fault than a limit allows
JOB: dict[str, Any] = {}  # what the program's own options say of the job that this process belongs to


@contextlib.contextmanager
def in_job(shared: str | Path, overrides: list[str] | None, config: Path | None = None) -> Iterator[None]:
    """The block runs in all processes of a job, if there is one; all see the folder or bucket `shared`."""
    from middo_jax.config import load
    from middo_jax.parallel.cluster import find_job, joined
    from middo_jax.progress import for_stderr

    unnamed = [] if config else [{"model.path": "-", "data.path": "-"}]
    hosts = load(config, [*unnamed, *(overrides or ())]).hosts
    with joined(find_job(os.environ, **JOB), for_stderr(), shared, hosts, print_error):
        yield


def beside(out: Path) -> str | Path:
    """The folder that contains OUT; of one in a bucket its URL."""
    from middo_jax.buckets import Place

    url = Place.of(out)
    return out.absolute().parent if url is None else str(url.parent)


def inside(out: Path, name: str = "") -> str:
    """A file of OUT, or OUT itself, for people."""
    from middo_jax.buckets import Place

    url = Place.of(out)
    if url is None:
        return str(out / name)
    return str(url / name if name else url)


def print_error(error: BaseException) -> None:
    """Prints an error; one that is meant for the user without its traceback, and with URLs of buckets."""
    from middo_jax.buckets import with_urls

    if not isinstance(error, (ValueError, OSError, RuntimeError)) or os.environ.get("MIDDO_TRACEBACK"):
        traceback.print_exception(error)
        return
    print(with_urls(f"middo: {error}"), file=sys.stderr)
    print("(MIDDO_TRACEBACK=1 shows the traceback)", file=sys.stderr)


def with_data(data: str, settings: Sequence[str]) -> list[str | dict[str, str]]:
    """Settings with an argument DATA: a path, `data.sources=[...]`, or a YAML file of settings.

    A dataset replaces that of a file among the settings; the settings replace those of DATA, if it is a file.

    Raises:
      ConfigError: one of the settings is another dataset.
    """
    if data.endswith((".yaml", ".yml")):
        return [data, *settings]
    if any(setting.startswith(("data.path=", "data.sources=")) for setting in settings):
        from middo_jax.config import ConfigError

        raise ConfigError(f"config: the dataset is {data}; give data.path or data.sources, not both")
    return [*settings, data if data.startswith("data.") and "=" in data else {"data.path": data}]


def names_in(text: str) -> list[str]:
    """The names of a comma-separated option."""
    return [name.strip() for name in text.split(",") if name.strip()]


def show(as_json: bool, value: Any, text: str) -> None:
    """Prints a result, once per job: as JSON, or as text."""
    from middo_jax.rundir.files import is_reader

    if is_reader():  # another process of the job prints it
        return
    print(json.dumps(value, ensure_ascii=False, indent=2) if as_json else text)
