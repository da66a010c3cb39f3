"""Where a training's numbers are shown beside metrics.jsonl, if asked for: TensorBoard, Weights & Biases."""

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
    """Shows numbers of a step."""

    def __call__(self, step: int, scalars: Mapping[str, float], /) -> None:
        """`scalars` by names such as "train/loss"."""
        ...


def require_trackers(settings: TrainSettings) -> None:
    """Raises ConfigError if the settings ask for a tracker whose package is missing."""
    for tracker in settings.trackers:
        _package(tracker)


@contextlib.contextmanager
def trackers(settings: TrainSettings, out_dir: Path, done: int, identity: str) -> Iterator[Track]:
    """All trackers that the settings ask for, as one; nothing is imported for those that they do not.

    Args:
      settings: of the training.
      out_dir: gets tensorboard/ and wandb/.
      done: steps behind us; what was shown of later ones is of steps that are done again.
      identity: of the training: the same one goes on as the same run.
    """
    shows: list[Track] = []
    first = jax.process_index() == 0  # of several processes, one shows
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
                    # Its names tell seconds apart, and a restart may take less.
                    filename_suffix=f".{done:08}",
                )
                stack.callback(writer.close)
                shows.append(functools.partial(_to_tensorboard, writer))

        def track(step: int, scalars: Mapping[str, float], /) -> None:
            for show in shows:
                show(step, scalars)

        yield track


def tracking(track: Track) -> Hook:
    """A hook that shows the metrics of each step."""
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
