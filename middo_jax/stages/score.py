"""The scoring stage: a round's dataset -> scores and embeddings."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from middo_jax.config.axis_table import axis_names
from middo_jax.data.example import Example
from middo_jax.data.own_columns import user_ids
from middo_jax.data.tokenize import TokenizedExample, response_header
from middo_jax.models.lora import without_adapters
from middo_jax.models.model import Model
from middo_jax.models.source import locate
from middo_jax.rundir import RoundDir, RunError, chain
from middo_jax.session import Session, read_dataset
from middo_jax.signals.axes import with_computed
from middo_jax.signals.duplicates import count_duplicates, groups
from middo_jax.signals.embeddings import write_embeddings
from middo_jax.signals.ifd import mean_by_example, responses_alone
from middo_jax.signals.neighbours.incremental import Earlier, updated_neighbours
from middo_jax.signals.neighbours.nearest import Neighbours
from middo_jax.signals.table import Measured, with_columns, write_scores
from middo_jax.stages.before import Before, Wanted, measure_before
from middo_jax.stages.passes import Passes, Texts, describe
from middo_jax.stages.ratings import ratings


class Scored(NamedTuple):
    """What was measured of a dataset.

    Attributes:
      table: one row per sample, of `signals.table.SCHEMA`, and the columns that registered axes compute.
      embedding_nd: float32, the same rows.
      facts: of the measuring, for the manifest.
    """

    table: pa.Table
    embedding_nd: np.ndarray
    facts: dict[str, Any]


def score_stage(
    session: Session,
    directory: RoundDir,
    model: Path,
    pre_model: Path | None,
    axes: Collection[str] | None = None,
    *,
    earlier: RoundDir | None = None,
    own: pa.Table | None = None,
) -> Scored:
    """Measures the folder's dataset: scores.parquet and embeddings.parquet.

    Args:
      session: settings, tokenizer, mesh.
      directory: holds dataset.jsonl.
      model: M_t, whose loss after training, embeddings and ratings are taken.
      pre_model: whose loss is loss_pre; None leaves it null.
      axes: what to measure, None is all; the loss under `model` comes with any of them.
      earlier: an earlier round's folder. Its samples that are still the same are not measured again under
        `pre_model`, if that is the same too.
      own: the user's columns of the same samples, to be written beside the scores.
    """
    began = time.monotonic()
    axes = axis_names() if axes is None else axes
    check_embedder(session, pre_model, axes)
    begun = chain.score(directory, model, pre_model).begin()
    examples = read_dataset(directory)
    scored = measure(session, examples, model, pre_model, axes, earlier=earlier)
    own = user_ids(examples) if own is None else own
    if own is not None:
        scored = scored._replace(table=with_columns(scored.table, own))
    directory.forget("select")  # it is of the scores that are replaced now
    write_scores(directory.scores, scored.table)
    write_embeddings(directory.embeddings, scored.table["id"].to_pylist(), scored.embedding_nd)
    begun.finish(session.config, time.monotonic() - began, **scored.facts)
    return scored


def check_embedder(session: Session, pre_model: Path | None, axes: Collection[str]) -> None:
    """Raises RunError if the model before training is to embed, and there is none."""
    if "diversity" in axes and session.config.diversity.embedder == "pre" and pre_model is None:
        raise RunError(
            "config: diversity.embedder=pre, and there is no model before training: give --pre-model, or set "
            "diversity.embedder=post"
        )


def measure(
    session: Session,
    examples: Sequence[Example],
    model: Path,
    pre_model: Path | None,
    axes: Collection[str],
    *,
    earlier: RoundDir | None = None,
) -> Scored:
    """Measures samples and writes nothing; the arguments are those of `score_stage`.

    Raises:
      RunError: the model before training is to embed, and there is none.
    """
    check_embedder(session, pre_model, axes)
    passes, before, base = Passes(session), None, None
    embeds = "diversity" in axes and session.config.diversity.embedder == "pre"
    wanted = Wanted(loss="complexity" in axes, embeddings=embeds)
    with session.stage():
        texts = Texts.of(session, examples)
        if pre_model is not None and any(wanted):
            pre = session.load_model(pre_model)
            before = measure_before(session, pre, pre_model, texts, wanted, earlier, passes)
            base = _shared_base(pre, pre_model, model)
            del pre
            gc.collect()
        loaded = session.load_model(model, base=base)
        table, embedding_nd, n_searched = _under_model(session, passes, loaded, texts, axes, before)
    for name, facts in passes.facts.items():
        session.progress.say(f"  {describe(name, facts)}")
    of_measuring = {
        "n": len(examples),
        "model": str(model.absolute()),
        "embedder": str((pre_model if pre_model and embeds else model).absolute()),
        "n_searched": n_searched,
        "duplicates": count_duplicates(texts.hashes),
        **({} if before is None else {"pre_identity": before.identity, "n_kept": before.n_kept}),
        "passes": {name: dataclasses.asdict(facts) for name, facts in passes.facts.items()},
    }
    return Scored(with_computed(table, axes), embedding_nd, of_measuring)


def _under_model(
    session: Session,
    passes: Passes,
    model: Model,
    texts: Texts,
    axes: Collection[str],
    before: Before | None,
) -> tuple[pa.Table, np.ndarray, int]:
    """(the table of scores, the embeddings [n, d], how many samples were compared with all).

    Losses, embeddings and ratings are those under the loaded model; `before` are those before training.
    """
    config, n = session.config, len(texts.examples)
    after = passes("loss and embeddings", model, texts.tokenized)
    known, embedding_nd = Earlier.nothing(n, config.diversity.k), after.embedding_nd
    if before is not None and before.embedding_nd is not None:
        known, embedding_nd = before.earlier, before.embedding_nd
    elif "diversity" in axes and texts.raw is not None:
        embedding_nd = passes("embeddings of raw prompts", model, texts.raw).embedding_nd
    neighbours, n_searched = None, 0
    if "diversity" in axes:
        neighbours = _neighbours(session, embedding_nd, known, texts.hashes)
        n_searched = int(known.to_search().sum())
    unconditional_n = None
    if config.scoring.ifd:
        unconditional_n = _loss_of_responses(session, passes, model, texts.tokenized)
    rated = None
    if "quality" in axes:
        rated, facts = ratings(session, model, texts.examples)
        passes.facts |= {"ratings": facts} if facts else {}
    measured = Measured(
        ids=texts.ids,
        n_target_tokens=after.n_targets_n,
        truncated=np.asarray([t.truncated for t in texts.tokenized]),
        loss_pre=None if before is None else before.loss_n,
        loss_post=after.loss_n,
        neighbours=neighbours,
        ratings=rated,
        prompt_hashes=texts.hashes,
        loss_unconditional=unconditional_n,
    )
    return measured.to_table(), embedding_nd, n_searched


def _shared_base(pre: Model, pre_model: Path, model: Path) -> Model | None:
    """The loaded weights that a second model stands on too: adapters leave their base as it is."""
    return without_adapters(pre) if locate(pre_model).weights == locate(model).weights else None


def _neighbours(
    session: Session, embedding_nd: np.ndarray, known: Earlier, hashes: Sequence[str]
) -> Neighbours:
    diversity = session.config.diversity
    with session.progress.task("neighbours") as advance:
        return updated_neighbours(
            embedding_nd,
            diversity.k,
            session.mesh,
            known,
            group_n=groups(hashes) if diversity.ignore_duplicates else None,
            on_progress=advance,
        )


def _loss_of_responses(
    session: Session, passes: Passes, model: Model, tokenized: Sequence[TokenizedExample]
) -> np.ndarray:
    """[n] loss of the responses without what they answer, for IFD."""
    header_n = response_header(session.tokenizer)
    alone = [responses_alone(example, header_n) for example in tokenized]
    scores = passes("loss of responses alone", model, list(itertools.chain(*alone)))
    return mean_by_example(list(map(len, alone)), scores.loss_n, scores.n_targets_n)
