"""The training stage: a round's dataset -> checkpoint/, metrics.jsonl and optionally evaluations.jsonl."""

from __future__ import annotations

import dataclasses
import gc
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from middo_jax.config import Config, ConfigError
from middo_jax.data.example import Example
from middo_jax.models.checkpoint import DamagedCheckpoint
from middo_jax.models.lora import from_settings, with_fresh_adapters
from middo_jax.models.model import Model
from middo_jax.parallel.coordination import barrier, on_each_disk
from middo_jax.rundir import RoundDir, RunDir, RunError, chain, file_hash
from middo_jax.rundir.rows import SourceLossRow
from middo_jax.session import Session, read_dataset
from middo_jax.stages.evaluate import HeldOut
from middo_jax.stages.shared_tokens import SharedTokens
from middo_jax.training.checkpoint import AnotherTraining
from middo_jax.training.evaluations import Evaluate, Evaluation
from middo_jax.training.hooks import on_metrics
from middo_jax.training.metrics import StepMetrics
from middo_jax.training.plan import TrainingPlan
from middo_jax.training.sft import train


def train_stage(
    session: Session,
    directory: RoundDir,
    start: Path,
    heldout: Sequence[Example] = (),
    *,
    restart: bool = False,
    n_steps: int | None = None,
) -> None:
    """Fine-tunes `start` on the folder's dataset. Writes checkpoint/ and metrics.jsonl.

    With `train.eval_every`, measures the loss on `heldout` during training and writes evaluations.jsonl.

    Args:
      session: settings, tokenizer, mesh.
      directory: folder with the dataset.
      start: path of the model that training starts from.
      heldout: held-out examples for evaluation during training.
      restart: whether to remove the checkpoint of another training, or a damaged one; False: an error.
      n_steps: number of steps in the place of `train.num_epochs`.

    Raises:
      ConfigError: `train.eval_every` is set, but nothing is held out.
      AnotherTraining: the folder contains the checkpoint of another training.
      DamagedCheckpoint: the folder contains a finished checkpoint that cannot be read.
    """
    began = time.monotonic()
    check_evaluations(session.config, heldout)
    begun = chain.train(directory, start, session.base).begin()
    # A fact and no input: other held-out rows are no reason to train again, but to leave out the curve.
    rows = RunDir(directory.path.parent).heldout
    facts = {"heldout": file_hash(rows)} if session.config.train.eval_every and rows.exists() else {}
    with session.stage():
        try:
            _train(session, directory, start, heldout, n_steps)
        except (AnotherTraining, DamagedCheckpoint) as error:
            why = "belongs to another training"
            if isinstance(error, DamagedCheckpoint):
                why, restart = "is damaged", restart and error.directory == directory.checkpoint.absolute()
            if not restart:
                raise
            session.progress.say(f"{directory.checkpoint} {why}; training starts again")
            barrier("another training: found")  # all processes must find it before its files are removed
            on_each_disk("another training: remove", lambda: remove_training(directory))
            _train(session, directory, start, heldout, n_steps)
    gc.collect()
    begun.finish(session.config, time.monotonic() - began, **facts)
    barrier("train: written")  # the other processes read the manifest next


def remove_training(directory: RoundDir) -> None:
    """Removes a folder's checkpoint and the metrics and evaluations of its training."""
    shutil.rmtree(directory.checkpoint, ignore_errors=True)
    for path in (directory.metrics, directory.evaluations):
        path.unlink(missing_ok=True)


def check_evaluations(config: Config, heldout: Sequence[Example]) -> None:
    """Raises ConfigError if `train.eval_every` is set but nothing is held out."""
    if config.train.eval_every is not None and not heldout:
        raise ConfigError(
            "config: train.eval_every needs examples that are held out; set data.eval_fraction, such as 0.05"
        )


def count_steps(session: Session, examples: Sequence[Example]) -> int:
    """The number of steps of a training on these examples. All processes must call it."""
    config, tokenized = session.config, SharedTokens.of(session, examples)
    return len(TrainingPlan(tokenized, config.train, config.seed, config.model.max_length).steps)


def _train(
    session: Session, directory: RoundDir, start: Path, heldout: Sequence[Example], n_steps: int | None
) -> None:
    config = session.config
    model, metadata = load_start(session, start)
    tokenized = SharedTokens.of(session, read_dataset(directory))
    max_length = config.model.max_length
    plan = TrainingPlan(tokenized, config.train, config.seed, max_length, metadata, n_steps)
    with session.progress.task("train", "steps") as advance:

        def show(metrics: StepMetrics) -> None:
            advance(metrics.step, metrics.total_steps, metrics.note())

        train(
            model,
            plan,
            directory.path,
            chunk=config.scoring.unembed_chunk,
            evaluate=_evaluate(session, heldout) if config.train.eval_every else None,
            hooks=[on_metrics(show)],
        )


def _evaluate(session: Session, heldout: Sequence[Example]) -> Evaluate:
    """Returns the function model -> loss on the held-out examples, over all and by source."""
    held_out = HeldOut(session, heldout)

    def evaluate(model: Model) -> Evaluation:
        found = held_out.loss(model)
        by_source: dict[str, SourceLossRow] = {
            name: {"loss": of.loss, "n_target_tokens": of.n_target_tokens}
            for name, of in found.by_source.items()
        }
        session.progress.say(
            f"held-out loss {found.loss:.4f}"
            + "".join(f", {name or 'no source'} {of.loss:.4f}" for name, of in found.by_source.items())
        )
        return Evaluation(found.loss, found.n_target_tokens, by_source)

    return evaluate


def load_start(session: Session, path: Path) -> tuple[Model, dict[str, Any]]:
    """Returns (the model that training starts from, the metadata of its future checkpoint).

    Without `lora.rank` all parameters are loaded in `train.param_dtype` and trained. With it they are loaded
    in `model.dtype`, with the adapters of `path` if it has some, else with fresh ones.

    Raises:
      RunError: `path` is a checkpoint whose adapters, or lack of them, do not match the settings.
    """
    source, lora = session.locate(path), from_settings(session.config.lora)
    metadata: dict[str, Any] = {
        "base": str(source.base.resolve()),
        "chat_template": session.tokenizer.chat_template,  # exports must use the template of the training
    }
    if source.lora != lora and source.trained is not None:
        held = source.lora or "all of a model's weights"
        raise RunError(
            f"{path} holds {held}, the settings ask for {lora or 'no adapters'}: set lora.* to match, or "
            f"export it with `middo export {path} DIR` and start from the export"
        )
    if lora is None:
        return session.load_model(path, session.config.train.param_dtype), metadata
    metadata["lora"] = dataclasses.asdict(lora)
    model = session.load_model(path)
    if source.lora is None:
        model = with_fresh_adapters(model, lora, session.config.seed)
    return model, metadata
