"""Optional trackers that show a training's metrics: TensorBoard and Weights & Biases."""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import jax

from middo_jax.config import ConfigError, TrainSettings, WandB
from middo_jax.training.hooks import Hook, on_metrics


class Track(Protocol):
    """Function that sends a step's numbers to the trackers."""

    def __call__(self, step: int, scalars: Mapping[str, float], /) -> None:
        """`scalars` has keys such as "train/loss"."""
        ...


def require_trackers(settings: TrainSettings) -> None:
    """Raises ConfigError if the package of a tracker in the settings is missing."""
    for tracker in settings.trackers:
        _package(tracker)


@contextlib.contextmanager
def trackers(settings: TrainSettings, out_dir: Path, done: int, identity: str) -> Iterator[Track]:
    """Yields one function for all trackers in the settings. Packages of other trackers are not imported.

    Args:
      settings: training settings.
      out_dir: folder for tensorboard/ and wandb/.
      done: number of steps done; values of later steps are purged, because these steps are repeated.
      identity: identity of the training; a training with the same identity continues the same wandb run.
    """
    shows: list[Track] = []
    first = jax.process_index() == 0  # only the first process tracks
    with contextlib.ExitStack() as stack:
        for tracker in settings.trackers if first else ():
            package = _package(tracker)
            if isinstance(tracker, WandB):
                run = package.init(
                    project=tracker.wandb,
                    dir=str(out_dir),
                    id=identity[:16],
                    resume="allow",
                    config=settings.model_dump(mode="json"),
                )
                stack.callback(run.finish)
                shows.append(functools.partial(_to_wandb, run))
            else:
                writer = package.SummaryWriter(
                    str(out_dir / "tensorboard"),
                    purge_step=done + 1 if done else None,
                    # Its file names differ by the second, and a restart may take less.
                    filename_suffix=f".{done:08}",
                )
                stack.callback(writer.close)
                shows.append(functools.partial(_to_tensorboard, writer))

        def track(step: int, scalars: Mapping[str, float], /) -> None:
            for show in shows:
                show(step, scalars)

        yield track


def tracking(track: Track) -> Hook:
    """Returns a hook that sends the metrics of each step to the trackers."""
    return on_metrics(lambda metrics: track(metrics.step, metrics.scalars()))


def _to_tensorboard(writer: Any, step: int, scalars: Mapping[str, float]) -> None:
    for name, value in scalars.items():
        writer.add_scalar(name, value, step)


def _to_wandb(run: Any, step: int, scalars: Mapping[str, float]) -> None:
    run.log(dict(scalars), step=step)


def _package(tracker: str | WandB) -> ModuleType:
    name, extra = ("wandb", "wandb") if isinstance(tracker, WandB) else ("tensorboardX", "tensorboard")
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise ConfigError(
            f'config: {extra} in train.trackers needs the package {name}: pip install "middo-jax[{extra}]"'
        ) from error
