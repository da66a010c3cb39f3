"""Checks of examples and batch size that run before anything is compiled."""

from __future__ import annotations

import logging
import math

import numpy as np
from jax.sharding import Mesh

from middo_jax.config import ConfigError, TrainSettings
from middo_jax.parallel.mesh import batch_divisor
from middo_jax.training.facts import ExampleFacts

_log = logging.getLogger(__name__)


class TrainingDataError(ValueError):
    """The examples cannot be trained on; the message names the example and the reason."""


def check_examples(facts: ExampleFacts, pack_length: int, vocab_size: int) -> None:
    """Checks the examples and warns about those without a target token.

    Raises:
      TrainingDataError: there are no examples, none has a target token, all were truncated, or one has a
        token ID outside the model's vocabulary.
      ConfigError: an example is longer than a row.
    """
    n = len(facts.ids)
    if not n:
        raise TrainingDataError("there are no examples to train on")
    longest = int(facts.length_n.argmax())
    most = int(facts.length_n[longest])
    if most > pack_length:
        count = int((facts.length_n > pack_length).sum())
        raise ConfigError(
            f"config: {count} of {n} examples are longer than model.max_length={pack_length} "
            f"(the longest, {facts.ids[longest]}, has {most} tokens); raise it, or lower model.max_length"
        )
    cut = int(facts.truncated_n.sum())
    untaught = np.flatnonzero(facts.n_targets_n == 0)
    if len(untaught) == n:
        raise TrainingDataError(
            f"none of the {n} examples has a token to learn ({cut} were cut at "
            "model.max_length): responses are empty or cut off; look at the data, model.template and "
            "model.max_length"
        )
    if cut == n:
        raise TrainingDataError(
            f"all {cut} examples are longer than model.max_length and were cut (to {most} tokens at "
            "most): no response would be learnt to its end; raise model.max_length"
        )
    if len(untaught):
        _log.warning(
            "%d of %d examples have no token to learn, such as %s: their responses are empty or cut off",
            len(untaught),
            n,
            facts.ids[untaught[0]],
        )
    unknown = facts.highest_n >= vocab_size
    if unknown.any():
        first = int(unknown.argmax())
        raise TrainingDataError(
            f"example {facts.ids[first]} has token {facts.highest_n[first]}, but the model's vocabulary "
            f"has {vocab_size} tokens: the tokenizer belongs to another model"
        )


def check_batch(settings: TrainSettings, mesh: Mesh) -> None:
    """Raises ConfigError unless every micro-batch divides evenly over the mesh."""
    parts, divisor = settings.micro_batches, batch_divisor(mesh)
    if settings.batch_size % (parts * divisor):
        fitting = math.ceil(settings.batch_size / (parts * divisor)) * parts * divisor
        raise ConfigError(
            f"config: train.batch_size={settings.batch_size} is not a multiple of "
            f"train.gradient_accumulation={parts} times the {divisor} devices along mesh.data and mesh.fsdp; "
            f"{fitting} would fit"
        )


def check_fill(n_examples: int, rows_of_epoch: int, settings: TrainSettings, mesh: Mesh) -> None:
    """Checks that the dataset fills a batch. Warns of padding if the mesh does not allow a smaller batch.

    Args:
      n_examples: number of examples in the dataset.
      rows_of_epoch: number of packed rows that they fill.
      settings: training settings; `batch_size`, `gradient_accumulation` and `examples_per_step` are used.
      mesh: device mesh; it determines the smallest possible batch.

    Raises:
      ConfigError: the dataset does not fill a batch, and a smaller batch is possible.
    """
    if settings.examples_per_step is not None:
        if n_examples < settings.examples_per_step:
            raise ConfigError(
                f"config: the dataset has {n_examples} examples, less than one step of "
                f"train.examples_per_step={settings.examples_per_step}; lower it"
            )
        return
    if rows_of_epoch >= settings.batch_size:
        return
    fills = f"the dataset fills {rows_of_epoch} of the {settings.batch_size} rows of a batch"
    least, parts = batch_divisor(mesh), settings.micro_batches
    parts = parts if rows_of_epoch >= least * parts else 1
    fitting = max(1, rows_of_epoch // (least * parts)) * least * parts
    if fitting < settings.batch_size:
        also = "" if parts == settings.micro_batches else f" with train.gradient_accumulation={parts}"
        raise ConfigError(
            f"config: {fills}; set train.batch_size={fitting}{also}, lower model.max_length, or add data"
        )
    _log.warning(
        "%s, and the %d devices along mesh.data and mesh.fsdp allow no smaller one: the rest of each step is "
        "padding; lower model.max_length, or use fewer devices",
        fills,
        least,
    )
