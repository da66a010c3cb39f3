"""The diagnosing stages: a round's dataset -> scores and embeddings -> the selection."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from middo_jax.data.example import Example
from middo_jax.data.tokenize import TokenizedExample, response_header
from middo_jax.rundir import RoundDir, RunError, chain, write_json
from middo_jax.rundir.rows import SelectionFile
from middo_jax.session import Session, read_dataset
from middo_jax.stages.before import measure_before
from middo_jax.stages.ratings import ratings

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

    from middo_jax.models.model import Model
    from middo_jax.passes.losses import ExampleScores
    from middo_jax.passes.runner import PassFacts
    from middo_jax.signals.neighbours.incremental import Earlier
    from middo_jax.signals.neighbours.nearest import Neighbours

AXES = ("complexity", "diversity", "quality")


class Scored(NamedTuple):
    """What was measured of a dataset.

    Attributes:
      table: one row per sample, of `signals.table.SCHEMA`.
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
    axes: Collection[str] = AXES,
    *,
    earlier: RoundDir | None = None,
    own: pa.Table | None = None,
) -> Scored:
    """Measures the folder's dataset: scores.parquet and embeddings.npy.

    Args:
      session: settings, tokenizer, mesh.
      directory: holds dataset.jsonl.
      model: M_t, whose loss after training, embeddings and ratings are taken.
      pre_model: whose loss is loss_pre; None leaves it null.
      axes: what to measure; the loss under `model` comes with any of them.
      earlier: an earlier round's folder. Its samples that are still the same are not measured again under
        `pre_model`, if that is the same too.
      own: the user's columns of the same samples, to be written beside the scores.
    """
    import numpy as np

    from middo_jax.rundir import atomic
    from middo_jax.signals.table import with_columns, write_scores

    began = time.monotonic()
    check_embedder(session, pre_model, axes)
    begun = chain.score(directory, model, pre_model).begin()
    scored = measure(session, read_dataset(directory), model, pre_model, axes, earlier=earlier)
    if own is not None:
        scored = scored._replace(table=with_columns(scored.table, own))
    directory.forget("select")  # it is of the scores that are replaced now
    write_scores(directory.scores, scored.table)
    with atomic(directory.embeddings, "wb") as file:
        np.save(file, scored.embedding_nd, allow_pickle=False)
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
    axes: Collection[str] = AXES,
    *,
    earlier: RoundDir | None = None,
) -> Scored:
    """Measures samples and writes nothing; the arguments are those of `score_stage`.

    Raises:
      RunError: the model before training is to embed, and there is none.
    """
    import numpy as np

    from middo_jax.signals.duplicates import count_duplicates, prompt_hash
    from middo_jax.signals.neighbours.incremental import Earlier
    from middo_jax.signals.table import Measured

    config, scored = session.config, Passes(session)
    diversity, with_diversity = config.diversity, "diversity" in axes
    embeds_before = with_diversity and diversity.embedder == "pre"
    check_embedder(session, pre_model, axes)
    tokenized = session.tokenize(examples)
    raw = raw_prompts(session, examples) if diversity.text == "raw" else None
    hashes = [prompt_hash(e) for e in raw or tokenized]
    before = base = None
    if pre_model is not None and ("complexity" in axes or embeds_before):
        pre = session.load_model(pre_model)
        before = measure_before(
            session,
            pre_model,
            pre,
            tokenized,
            raw,
            hashes,
            with_loss="complexity" in axes,
            with_embeddings=embeds_before,
            earlier=earlier,
            scored=scored,
        )
        base = _shared_base(pre, pre_model, model)
        del pre
        gc.collect()
    loaded = session.load_model(model, base=base)
    after = scored("loss and embeddings", loaded, tokenized)
    known, embedding_nd = Earlier.nothing(len(examples), diversity.k), after.embedding_nd
    if before is not None and before.embedding_nd is not None:
        known, embedding_nd = before.earlier, before.embedding_nd
    elif with_diversity and raw is not None:
        embedding_nd = scored("embeddings of raw prompts", loaded, raw).embedding_nd
    neighbours = _neighbours(session, embedding_nd, known, hashes) if with_diversity else None
    unconditional_n = _loss_of_responses(session, scored, loaded, tokenized) if config.scoring.ifd else None
    rated = None
    if "quality" in axes:
        rated, facts = ratings(session, loaded, examples)
        scored.facts |= {"ratings": facts} if facts else {}
    measured = Measured(
        ids=[e.id for e in examples],
        n_target_tokens=after.n_targets_n,
        truncated=np.asarray([t.truncated for t in tokenized]),
        loss_pre=None if before is None else before.loss_n,
        loss_post=after.loss_n,
        neighbours=neighbours,
        ratings=rated,
        prompt_hashes=hashes,
        loss_unconditional=unconditional_n,
    )
    for name, facts in scored.facts.items():
        session.progress.say(f"  {describe(name, facts)}")
    of_measuring = {
        "n": len(examples),
        "model": str(model.absolute()),
        "embedder": str((pre_model if pre_model and embeds_before else model).absolute()),
        "n_searched": int(known.to_search().sum()) if with_diversity else 0,
        "duplicates": count_duplicates(hashes),
        **({} if before is None else {"pre_identity": before.identity, "n_kept": before.n_kept}),
        "passes": {name: dataclasses.asdict(facts) for name, facts in scored.facts.items()},
    }
    return Scored(measured.to_table(), embedding_nd, of_measuring)


class Passes:
    """Scores examples as the settings say, and keeps what each pass took."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self.facts: dict[str, PassFacts] = {}

    def __call__(self, name: str, model: Model, of: Sequence[TokenizedExample]) -> ExampleScores:
        """One pass of a model over some examples; `name` is what the user sees."""
        from middo_jax.passes.losses import score_examples

        scoring = self._session.config.scoring
        scores, self.facts[name] = score_examples(
            model,
            of,
            batch_tokens=scoring.batch_tokens,
            chunk=scoring.unembed_chunk,
            progress=self._session.progress,
            name=name,
        )
        return scores


def _shared_base(pre: Model, pre_model: Path, model: Path) -> Model | None:
    """The loaded weights that a second model stands on too: adapters leave their base as it is."""
    from middo_jax.models.lora import without_adapters
    from middo_jax.models.source import locate

    return without_adapters(pre) if locate(pre_model).weights == locate(model).weights else None


def _neighbours(session: Session, embedding_nd: np.ndarray, known: Earlier, hashes: list[str]) -> Neighbours:
    from middo_jax.signals.duplicates import groups
    from middo_jax.signals.neighbours.incremental import updated_neighbours

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
    session: Session, scored: Passes, model: Model, tokenized: list[TokenizedExample]
) -> np.ndarray:
    """[n] loss of the responses without what they answer, for IFD."""
    from middo_jax.signals.ifd import mean_by_example, responses_alone

    header_n = response_header(session.tokenizer)
    alone = [responses_alone(example, header_n) for example in tokenized]
    scores = scored("loss of responses alone", model, list(itertools.chain(*alone)))
    return mean_by_example(list(map(len, alone)), scores.loss_n, scores.n_targets_n)


def describe(name: str, facts: PassFacts) -> str:
    """One line about a pass: how fast, how much of it was padding, how many shapes."""
    per_second = facts.real_tokens / max(facts.seconds, 1e-9)
    shapes = "1 shape" if facts.shapes == 1 else f"{facts.shapes} shapes"
    return (
        f"{name}: {per_second:,.0f} real tokens/s, {facts.fill:.1%} of the computed positions real, "
        f"{shapes} compiled in {facts.compile_seconds:.1f} s"
    )


def raw_prompts(session: Session, examples: Sequence[Example]) -> list[TokenizedExample]:
    """The prompts alone, without the template, all of each a prompt."""
    import numpy as np

    if not examples:
        return []
    texts, longest = [example.prompt for example in examples], session.config.model.max_length
    encoded = session.tokenizer(texts, add_special_tokens=False, verbose=False)
    tokenized = []
    for example, ids in zip(examples, encoded["input_ids"], strict=True):
        tokens_n = np.asarray(ids[-longest:], np.int32)
        nothing, everything = np.zeros(len(tokens_n), bool), np.ones(len(tokens_n), bool)
        tokenized.append(
            TokenizedExample(example.id, tokens_n, nothing, everything, len(tokens_n) < len(ids))
        )
    return tokenized


def select_stage(session: Session, directory: RoundDir) -> SelectionFile:
    """Chooses the three sets: selection.parquet and selection.json. Returns selection.json."""
    from middo_jax.signals.select import select
    from middo_jax.signals.table import read_scores, write_scores

    began = time.monotonic()
    if not directory.scores.exists():
        raise RunError(f"{directory.path}: no scores.parquet there; run `middo score` first")
    begun = chain.select(directory).begin()
    table, selection = select(read_scores(directory.scores), session.config)
    write_scores(directory.selected, table)
    write_json(directory.selection, selection)
    counts = {axis: facts["n_selected"] for axis, facts in selection["axes"].items()}
    begun.finish(session.config, time.monotonic() - began, **counts)
    return selection
