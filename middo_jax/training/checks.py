"""Checks of examples and batch size that run before anything is compiled."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

from jax.sharding import Mesh

from middo_jax.config import ConfigError, TrainSettings
from middo_jax.data.tokenize import TokenizedExample
from middo_jax.parallel.mesh import batch_divisor

_log = logging.getLogger(__name__)


class TrainingDataError(ValueError):
    """The examples cannot be trained on; the message names the example and the reason."""


def check_examples(tokenized: Sequence[TokenizedExample], pack_length: int, vocab_size: int) -> None:
    """Checks the examples and warns about those without a target token.

    Raises:
      TrainingDataError: there are no examples, none has a target token, all were truncated, or one has a
        token ID outside the model's vocabulary.
      ConfigError: an example is longer than a row.
    """
    if not tokenized:
        raise TrainingDataError("there are no examples to train on")
    longest = max(tokenized, key=len)
    if len(longest) > pack_length:
        count = sum(len(example) > pack_length for example in tokenized)
        raise ConfigError(
            f"config: {count} of {len(tokenized)} examples are longer than model.max_length={pack_length} "
            f"(the longest, {longest.id}, has {len(longest)} tokens); raise it, or lower model.max_length"
        )
    cut = sum(example.truncated for example in tokenized)
    # The first token of an example is never a target: no token precedes it to predict it from.
    untaught = [example for example in tokenized if not example.is_target_n[1:].any()]
    if len(untaught) == len(tokenized):
        raise TrainingDataError(
            f"none of the {len(tokenized)} examples has a token to learn ({cut} were cut at "
            "model.max_length): responses are empty or cut off; look at the data, model.template and "
            "model.max_length"
        )
    if cut == len(tokenized):
        raise TrainingDataError(
            f"all {cut} examples are longer than model.max_length and were cut (to {len(longest)} tokens at "
            "most): no response would be learnt to its end; raise model.max_length"
        )
    if untaught:
        _log.warning(
            "%d of %d examples have no token to learn, such as %s: their responses are empty or cut off",
            len(untaught),
            len(tokenized),
            untaught[0].id,
        )
    for example in tokenized:
        if len(example) and int(example.tokens_n.max()) >= vocab_size:
            raise TrainingDataError(
                f"example {example.id} has token {int(example.tokens_n.max())}, but the model's vocabulary "
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
