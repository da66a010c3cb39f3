"""Checks before a run's folder is created, for errors that would otherwise stop the run later."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from middo_jax.config import Config, SampledRating, affecting, load, replayed_file
from middo_jax.data.example import Example, Message
from middo_jax.models.attention import Workload, choose
from middo_jax.models.attention.placement import platform, shards
from middo_jax.models.config import read_config
from middo_jax.models.loading import tokenizer_directory
from middo_jax.models.lora import from_settings
from middo_jax.models.model import abstract_model
from middo_jax.parallel.mesh import batch_divisor
from middo_jax.refinement.acceptance.language import load_identifier
from middo_jax.refinement.endpoint.preflight import preflight
from middo_jax.refinement.endpoint.recording import read_recording
from middo_jax.refinement.words import read_words
from middo_jax.rundir import RoundDir, chain, read_jsonl
from middo_jax.session import Session
from middo_jax.signals.judge.rubrics import read_rubric
from middo_jax.stages.endpoint import named_endpoint
from middo_jax.stages.ratings import Asked
from middo_jax.stages.shared_tokens import SharedTokens
from middo_jax.stages.train import check_evaluations
from middo_jax.training.checkpoint import another_training
from middo_jax.training.checks import check_batch, check_examples, check_fill
from middo_jax.training.facts import ExampleFacts
from middo_jax.training.plan import plan_training
from middo_jax.training.trackers import require_trackers


def check_continues(session: Session, directory: RoundDir, examples: Sequence[Example]) -> None:
    """Checks that a checkpoint in the folder, if any, belongs to a training on these examples and settings.

    Call it before anything is written to the folder, so that a refused training leaves the folder unchanged.

    Raises:
      AnotherTraining: the checkpoint belongs to another training.
    """
    settings = directory.path / "config.yaml"
    if not all(path.exists() for path in (directory.checkpoint, settings, directory.dataset)):
        return
    before, now = (affecting(c, chain.AFFECTED_BY["train"]) for c in (load(settings), session.config))
    rows = json.loads(json.dumps([example.to_json() for example in examples]))
    if before != now or rows != read_jsonl(directory.dataset):
        raise another_training(directory.checkpoint)


def check_training(session: Session, examples: Sequence[Example], heldout: Sequence[Example]) -> None:
    """Checks that a dataset can be trained on with these settings and devices. All processes must call it.

    Raises:
      ConfigError: the mesh does not fit the devices, the model or the batch; the examples do not fill a batch
        or do not fit its rows; `train.eval_every` is set and nothing is held out; or a package is missing.
      TrainingDataError: the examples cannot be trained on, see `check_examples`.
    """
    config, mesh = session.config, session.mesh
    settings, pack_length = config.train, config.model.max_length
    check_evaluations(config, heldout)
    check_batch(settings, mesh)
    require_trackers(settings)
    decoder = dataclasses.replace(read_config(session.base), lora=from_settings(config.lora))
    abstract_model(decoder, mesh)
    facts = ExampleFacts.of(SharedTokens.of(session, examples))
    check_examples(facts, pack_length, decoder.vocab_size)
    once = settings.model_copy(update={"num_epochs": 1})
    steps = plan_training(facts.length_n.tolist(), once, config.seed, pack_length)
    check_fill(len(examples), sum(len(rows) for _, rows in steps), settings, mesh)


def check_attention(session: Session) -> None:
    """Checks that the kernel of `model.attention` can be used here.

    Raises:
      AttentionError: the message says why it cannot.
    """
    config, decoder, mesh = session.config.model, read_config(session.base), session.mesh
    with jax.set_mesh(mesh):
        workload = Workload(
            platform(),
            batch_divisor(mesh),
            config.max_length,
            decoder.num_heads,
            decoder.num_kv_heads,
            decoder.head_dim,
            jnp.dtype(config.dtype),
            batch_shards=shards("batch"),
            head_shards=shards("heads"),
        )
        choose(workload, config.attention)


def check_judge(session: Session) -> None:
    """Checks that the tokenizer and `model.max_length` allow the questions about quality.

    Raises:
      JudgeError: see `Asked.of`.
    """
    if not isinstance(session.config.quality.rating, SampledRating):
        longest = session.config.model.max_length
        too_long = "word " * longest  # a shortened text contains a mark, which takes tokens too
        example = Example((Message("user", too_long), Message("assistant", too_long)))
        Asked.of([example], session.tokenizer, longest, read_rubric(session.config.quality.rubric))


def check_refiner(config: Config, asks: bool = False) -> list[str]:
    """Checks the refiner's settings; with `asks`, also requests one token from each named server.

    Returns warnings.

    Raises:
      RunError: an endpoint is set, but `refine.model` is not.
      RefinerError: a server cannot be used.
      CheckpointError: no endpoint is set, and there is no model `refine.model` for the embedded one.
      ConfigError: a gate needs a package that is not installed.
    """
    served, warnings = named_endpoint(config), list[str]()
    if asks and served is not None and config.refine.preflight:
        warnings = preflight(served.url, served.model, config.refine)
    if (file := replayed_file(config.refine.base_url)) is not None:
        read_recording(file)
    if served is None and config.refine.model:
        tokenizer_directory(config.refine.model)
    if config.refine.accept != "none" and config.refine.gates.value("language"):
        load_identifier()
    return warnings


def check_own_texts(config: Config) -> None:
    """Raises ConfigError if a file of `refine.prompts` or `quality.rubric` cannot be used."""
    read_words(config.refine.prompts)
    read_rubric(config.quality.rubric)
