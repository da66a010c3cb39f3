"""The scoring stage: a round's dataset -> scores and embeddings. Axes: docs/contributing.md#axes."""

from __future__ import annotations

import dataclasses
import gc
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from middo_jax.config import SampledRating
from middo_jax.config.axis_table import scored_axes
from middo_jax.data.example import Example
from middo_jax.data.own_columns import with_user_ids
from middo_jax.data.tokenize import end_of_turn_token
from middo_jax.models.lora import without_adapters
from middo_jax.models.model import Model
from middo_jax.passes.losses import ExampleScores
from middo_jax.rundir import RoundDir, RunError, chain
from middo_jax.rundir.files import is_reader
from middo_jax.rundir.leftovers import remove
from middo_jax.rundir.link import Link
from middo_jax.session import Session, read_dataset
from middo_jax.signals.axes import with_computed
from middo_jax.signals.duplicates import count_duplicates, groups
from middo_jax.signals.embeddings import write_embeddings
from middo_jax.signals.ifd import ifd
from middo_jax.signals.judge.rubrics import COLUMNS
from middo_jax.signals.neighbours.incremental import Earlier, updated_neighbours
from middo_jax.signals.neighbours.nearest import Neighbours
from middo_jax.signals.readings import end_nll
from middo_jax.signals.table import Measured, as_floats, with_columns, write_scores
from middo_jax.stages.before import Before, Wanted, measure_before
from middo_jax.stages.passes import Conditioned, Passes, Texts, conditioned, describe
from middo_jax.stages.ratings import ratings
from middo_jax.stages.standing import Standing


class Scored(NamedTuple):
    """Scores and embeddings of a dataset.

    Attributes:
      table: one row per sample, with the columns of `signals.table.SCHEMA` and of registered axes.
      embedding_nd: float32 embeddings in the same order.
      facts: facts of the measurement, for the manifest.
    """

    table: pa.Table
    embedding_nd: np.ndarray
    facts: dict[str, Any]


class Known(NamedTuple):
    """A folder whose samples may be measured already.

    Attributes:
      folder: the folder.
      by_both: whether its scores are of the same model after training, and the same settings; else only those
        of the model before training are reused, if that is the same.
    """

    folder: RoundDir
    by_both: bool


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
      directory: contains dataset.jsonl.
      model: M_t, whose loss after training, embeddings and ratings are taken.
      pre_model: whose loss is loss_pre; None leaves it null.
      axes: the axes to measure; None: those of the settings. The loss under `model` comes with any of them.
      earlier: an earlier round's folder. Its samples that are still the same are not measured again under
        `pre_model`, if that is the same too. If it is `directory`, its scores are of the same models and
        settings, and these samples are not measured again at all.
      own: the user's columns of the same samples, to be written beside the scores.
    """
    began = time.monotonic()
    axes = scored_axes(session.config) if axes is None else axes
    check_embedder(session, pre_model, axes)
    begun = scoring(session, directory, model, pre_model).begin()
    examples = read_dataset(directory)
    known = None if earlier is None else Known(earlier, earlier.path == directory.path)
    scored = measure_samples(
        session, examples, model, pre_model, axes, known=known, parts=directory.scoring_parts
    )
    columns = with_user_ids(pa.table({}) if own is None else own, examples)
    if columns.column_names:
        scored = scored._replace(table=with_columns(scored.table, columns))
    for stage in ("score", "select"):  # of the scores that are replaced now, and a stop may come between
        directory.forget(stage)
    write_scores(directory.scores, scored.table)
    write_embeddings(directory.embeddings, scored.table["id"].to_pylist(), scored.embedding_nd)
    begun.finish(session.config, time.monotonic() - began, **scored.facts, columns=columns.column_names)
    if not is_reader():
        remove(directory.scoring_parts)
    return scored


def scoring(session: Session, directory: RoundDir, model: Path, pre_model: Path | None) -> Link:
    """The stage that scores in a folder. Outside of a run, a model's base is among its inputs."""
    base = None if directory.run is not None else session.locate(model).base
    rubric = chain.own_file(session.config.quality.rubric)
    base = None if base == model else base
    return chain.score(directory, model, pre_model, base, rubric, session.base)


def check_embedder(session: Session, pre_model: Path | None, axes: Collection[str]) -> None:
    """Raises RunError if `diversity.embedder=pre` needs the model before training and there is none."""
    if "diversity" in axes and session.config.diversity.embedder == "pre" and pre_model is None:
        raise RunError(
            "config: diversity.embedder=pre, but there is no model before training: give --pre-model, or set "
            "diversity.embedder=post"
        )


def measure_samples(
    session: Session,
    examples: Sequence[Example],
    model: Path,
    pre_model: Path | None,
    axes: Collection[str],
    *,
    known: Known | None = None,
    parts: Path | None = None,
) -> Scored:
    """Measures samples; the other arguments are those of `score_stage`.

    Args:
      known: the scores that some samples may have.
      parts: folder where the passes keep results until all is measured, so that they go on after a stop; None
        writes no file.

    Raises:
      RunError: see `check_embedder`.
    """
    check_embedder(session, pre_model, axes)
    passes, before, base = Passes(session, parts), None, None
    embeds = "diversity" in axes and session.config.diversity.embedder == "pre"
    wanted = Wanted(loss="complexity" in axes, embeddings=embeds)
    with session.stage():
        texts = Texts.of(session, examples)
        if pre_model is not None and any(wanted):
            pre = session.load_model(pre_model)
            earlier = None if known is None else known.folder
            before = measure_before(session, pre, pre_model, texts, wanted, earlier, passes)
            base = _shared_base(session, pre, pre_model, model)
            del pre
            gc.collect()
        loaded, standing = session.load_model(model, base=base), _standing(session, known, texts)
        table, embedding_nd, n_searched = _under_model(session, passes, loaded, texts, axes, before, standing)
    for name, facts in passes.facts.items():
        session.progress.say(f"  {describe(name, facts)}")
    of_measuring = {
        "n": len(examples),
        "axes": sorted(axes),
        "model": str(model.absolute()),
        "embedder": str((pre_model if pre_model and embeds else model).absolute()),
        "n_searched": n_searched,
        "duplicates": count_duplicates(texts.hashes),
        **({} if before is None else {"pre_identity": before.identity, "n_kept": before.n_kept}),
        **({"n_kept": standing.n_kept} if standing.n_kept else {}),
        "passes": {name: dataclasses.asdict(facts) for name, facts in passes.facts.items()},
    }
    _require_scores(session, table, axes, pre_model)
    return Scored(with_computed(table, axes), embedding_nd, of_measuring)


def _require_scores(session: Session, table: pa.Table, axes: Collection[str], pre_model: Path | None) -> None:
    """Raises RunError if a column that an axis needs holds no number for any sample.

    Without `pre_model` there is no loss_pre, and complexity is not selected by.

    Single samples without a number are named in the column `error`, and no axis selects them. Sampled ratings
    may all be unreadable, as a small model's often are: then a line reports that quality selects nothing.
    """
    n, wanted = len(table), ["loss_post"]
    wanted += ["knn_mean_sim"] if "diversity" in axes and n > 1 else []
    wanted += ["quality"] if "quality" in axes else []
    wanted += ["loss_pre"] if "complexity" in axes and pre_model is not None else []
    for name in wanted:
        if not n or table[name].null_count < n:
            continue
        if name == "quality" and isinstance(session.config.quality.rating, SampledRating):
            session.progress.say(
                f"none of the judge's ratings of {n:,} samples can be read: none is low_quality"
            )
            continue
        model = f"The model before training, {pre_model}," if name == "loss_pre" else "The model"
        raise RunError(
            f"none of the {n:,} samples has a finite {name}: nothing can be selected by such scores, and "
            f"nothing was written. {model} computes NaN for all of them; try model.dtype=float32"
        )


def _standing(session: Session, known: Known | None, texts: Texts) -> Standing:
    """Returns and reports what a folder has of the same models and settings."""
    if known is None or not known.by_both:
        return Standing.nothing(len(texts.examples))
    standing = Standing.of(known.folder, texts, embeddings=True)
    session.progress.say(
        f"{standing.n_kept:,} of {len(texts.examples):,} samples are measured already; only the others are"
    )
    return standing


def _under_model(
    session: Session,
    passes: Passes,
    model: Model,
    texts: Texts,
    axes: Collection[str],
    before: Before | None,
    standing: Standing,
) -> tuple[pa.Table, np.ndarray, int]:
    """Returns (the table of scores, the embeddings [n, d], the number of samples compared with all others).

    Losses, embeddings and ratings are computed by the loaded model; `before` has those before training, and
    `standing` those of the samples that this model has measured before.
    """
    config, new = session.config, standing.new
    readings = {*config.scoring.readings, *(("ifd",) if "consistency" in axes else ())}
    with_prompts = "prompt_nll" in readings or "reverse_ifd" in readings
    tokenized = texts.tokenized.chosen(new) if standing.n_kept else texts.tokenized
    examples = [texts.examples[i] for i in new]
    after = passes("loss and embeddings", model, tokenized, prompts=with_prompts)
    embedding_nd, known = after.embedding_nd, None
    if before is not None and before.embedding_nd is not None:
        known, embedding_nd = before.earlier, before.embedding_nd
    else:
        if "diversity" in axes and texts.raw is not None:
            raw = [texts.raw[i] for i in new]
            embedding_nd = passes("embeddings of raw prompts", model, raw).embedding_nd
        embedding_nd = standing.of_all(embedding_nd, standing.embedding_od)
    neighbours, n_searched = None, 0
    if "diversity" in axes:
        known = known or standing.earlier(config.diversity.k)
        neighbours = _neighbours(session, embedding_nd, known, texts.hashes)
        n_searched = int(known.to_search().sum())
    more = conditioned(session, passes, model, examples, tokenized, readings)
    end_n = end_nll(after.last_nll_n, texts.last_target_n[new], end_of_turn_token(session.tokenizer))
    measured = Measured(
        ids=texts.ids,
        n_target_tokens=standing.column("n_target_tokens", after.n_targets_n),
        truncated=texts.truncated_n,
        loss_pre=None if before is None else before.loss_n,
        loss_post=standing.column("loss_post", after.loss_n),
        neighbours=neighbours,
        ratings=_ratings(session, passes, model, texts, standing) if "quality" in axes else None,
        prompt_hashes=texts.hashes,
        loss_unconditional=standing.column("loss_unconditional", more.response_alone_n),
        end_nll=standing.column("end_nll", end_n),
        worst_decile_nll=standing.column("worst_decile_nll", after.worst_decile_nll_n),
        prompt_nll=standing.column("prompt_nll", after.prompt_nll_n),
        reverse_ifd=standing.column("reverse_ifd", _reverse_ifd(more, after)),
        ranked="consistency" in axes,
    )
    return measured.to_table(), embedding_nd, n_searched


def _reverse_ifd(more: Conditioned, after: ExampleScores) -> np.ndarray | None:
    """Returns `reverse_ifd` of the samples that were measured; None if it was not asked for."""
    if more.prompt_behind_response_n is None or after.prompt_nll_n is None:
        return None
    return ifd(more.prompt_behind_response_n, after.prompt_nll_n)


def _ratings(session: Session, passes: Passes, model: Model, texts: Texts, standing: Standing) -> np.ndarray:
    """Returns [n, 6] ratings. Sampled ones depend on the place of their sample, so all are sampled again."""
    examples, parts = texts.examples, passes.parts("ratings", model)
    if isinstance(session.config.quality.rating, SampledRating) or not standing.n_kept:
        standing = Standing.nothing(len(examples))
    rated, facts = ratings(session, model, [examples[i] for i in standing.new], parts)
    passes.facts |= {"ratings": facts} if facts else {}
    if standing.table is None:
        return rated
    return standing.of_all(rated, np.stack([as_floats(standing.table, name) for name in COLUMNS], axis=1))


def _shared_base(session: Session, pre: Model, pre_model: Path, model: Path) -> Model | None:
    """Returns the loaded base weights if both models share them: adapters do not change their base."""
    return (
        without_adapters(pre) if session.locate(pre_model).weights == session.locate(model).weights else None
    )


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
