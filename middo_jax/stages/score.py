"""The diagnosing stages: a round's dataset -> scores.parquet, embeddings.npy, selection.json."""

from __future__ import annotations

import gc
import time
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from middo_jax.data.example import Example
from middo_jax.data.tokenize import TokenizedExample, eos_token_ids
from middo_jax.run_dir import RoundDir, RunError, write_json
from middo_jax.workshop import Workshop, read_dataset

if TYPE_CHECKING:
    from flax import nnx

AXES = ("complexity", "diversity", "quality")


def score_stage(
    workshop: Workshop,
    directory: RoundDir,
    model: Path,
    pre_model: Path | None,
    axes: Collection[str] = AXES,
) -> None:
    """Measures the folder's dataset: scores.parquet and embeddings.npy.

    Args:
      workshop: settings, tokenizer, mesh.
      directory: holds dataset.jsonl.
      model: M_t, whose loss after training, embeddings and ratings are taken.
      pre_model: whose loss is loss_pre; None leaves it null.
      axes: what to measure; the loss under `model` comes with any of them.
    """
    import numpy as np

    from middo_jax.diagnose.diversity import nearest_neighbours
    from middo_jax.diagnose.score import ExampleScores, score_examples
    from middo_jax.diagnose.table import Measured, write_scores
    from middo_jax.models.lora import without_adapters
    from middo_jax.models.source import locate
    from middo_jax.run_dir import atomic

    config, began = workshop.config, time.monotonic()
    examples = read_dataset(directory)
    tokenized = workshop.tokenize(examples)

    def scored(
        name: str, graphdef: nnx.GraphDef, params: nnx.State, of: list[TokenizedExample]
    ) -> ExampleScores:
        with workshop.progress.task(name) as advance:
            return score_examples(
                graphdef,
                params,
                of,
                mesh=workshop.mesh,
                batch_tokens=config.scoring.batch_tokens,
                chunk=config.scoring.unembed_chunk,
                on_progress=advance,
            )

    before = base = None
    if pre_model is not None and "complexity" in axes:
        pre = workshop.load_model(pre_model)
        before = scored("loss before training", *pre, tokenized)
        # Adapters leave their base as it is: both models may stand on one, which then is loaded once.
        base = without_adapters(*pre) if locate(pre_model).weights == locate(model).weights else None
        del pre
        gc.collect()
    graphdef, params = workshop.load_model(model, base=base)
    after = scored("loss and embeddings", graphdef, params, tokenized)
    embedding_nd = after.embedding_nd
    if "diversity" in axes and config.diversity.text == "raw":
        raw = [raw_prompt(workshop, example) for example in examples]
        embedding_nd = scored("embeddings of raw prompts", graphdef, params, raw).embedding_nd
    neighbours = rated = None
    if "diversity" in axes:
        with workshop.progress.task("neighbours") as advance:
            neighbours = nearest_neighbours(
                embedding_nd, config.diversity.k, workshop.mesh, on_progress=advance
            )
    if "quality" in axes:
        rated = ratings(workshop, graphdef, params, examples)
    measured = Measured(
        ids=[e.id for e in examples],
        n_target_tokens=after.n_targets_n,
        truncated=np.asarray([t.truncated for t in tokenized]),
        loss_pre=None if before is None else before.loss_n,
        loss_post=after.loss_n,
        neighbours=neighbours,
        ratings=rated,
    )
    directory.forget("select")  # its flags are in the table that is replaced now
    write_scores(directory.scores, measured.to_table())
    with atomic(directory.embeddings, "wb") as file:
        np.save(file, embedding_nd, allow_pickle=False)
    files, seconds = [directory.scores, directory.embeddings], time.monotonic() - began
    directory.finish("score", files, seconds, n=len(examples), model=str(model.absolute()))


def ratings(workshop: Workshop, graphdef: nnx.GraphDef, params: nnx.State, examples: list[Example]) -> Any:
    """The model's six ratings of every example, [n, 6] as `rubrics.COLUMNS`, by `quality.method`."""
    from middo_jax.diagnose.quality import judge
    from middo_jax.diagnose.sampled import judge_by_sampling

    config = workshop.config
    with workshop.progress.task("ratings") as advance:
        if config.quality.method == "sample":
            return judge_by_sampling(
                graphdef,
                params,
                examples,
                workshop.tokenizer,
                config.quality,
                stop_ids=eos_token_ids(workshop.base, workshop.tokenizer),
                max_batch=config.serve.max_batch,
                max_context=config.serve.max_context,
                seed=config.seed,
                on_progress=advance,
            )
        return judge(
            graphdef,
            params,
            examples,
            workshop.tokenizer,
            mesh=workshop.mesh,
            max_length=config.model.max_length,
            batch_tokens=config.scoring.batch_tokens,
            on_progress=advance,
        )


def raw_prompt(workshop: Workshop, example: Example) -> TokenizedExample:
    """A prompt alone, without the template, all of it a prompt."""
    import numpy as np

    ids = workshop.tokenizer(example.prompt, add_special_tokens=False, verbose=False).input_ids
    tokens_n = np.asarray(ids[-workshop.config.model.max_length :], np.int32)
    nothing, everything = np.zeros(len(tokens_n), bool), np.ones(len(tokens_n), bool)
    return TokenizedExample(example.id, tokens_n, nothing, everything, len(tokens_n) < len(ids))


def select_stage(workshop: Workshop, directory: RoundDir) -> dict[str, Any]:
    """Chooses the three sets: selection.json, and the flags in scores.parquet. Returns selection.json."""
    from middo_jax.diagnose.select import select
    from middo_jax.diagnose.table import read_scores, write_scores

    began = time.monotonic()
    if not directory.scores.exists():
        raise RunError(f"{directory.path}: no scores.parquet there; run `middo score` first")
    table, selection = select(read_scores(directory.scores), workshop.config)
    write_scores(directory.scores, table)
    write_json(directory.selection, selection)
    counts = {axis: facts["n_selected"] for axis, facts in selection["axes"].items()}
    directory.finish("select", [directory.scores, directory.selection], time.monotonic() - began, **counts)
    return selection
