"""The stages of a round, each a function from files to files; the loop and the commands both call them.

A stage reads what earlier ones left in a round's folder, writes its own files, and only then enters itself in
the manifest. So any of them can be killed and started again.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from middo_jax.data.example import Example
from middo_jax.data.tokenize import TokenizedExample, eos_token_ids, steering_tokens
from middo_jax.run_dir import RoundDir, RunError, read_jsonl, write_json, write_jsonl
from middo_jax.workshop import Workshop, endpoint, read_dataset

if TYPE_CHECKING:
    from flax import nnx

    from middo_jax.refine import AnswerCache, Outcome, Task, Usage

AXES = ("complexity", "diversity", "quality")
LINEAGE_SCORES = ("loss_pre", "loss_post", "knn_mean_sim", "quality")  # what a sample's lineage keeps


def train_stage(workshop: Workshop, directory: RoundDir, start: Path) -> None:
    """Fine-tunes `start` on the folder's dataset: checkpoint/ and metrics.jsonl."""
    from middo_jax.train.sft import StepMetrics, train

    config, began = workshop.config, time.monotonic()
    tokenized = workshop.tokenize(read_dataset(directory))
    graphdef, params = workshop.load_model(start, "float32")
    losses: list[float] = []
    with workshop.progress.task("train", "steps") as advance:

        def on_step(metrics: StepMetrics) -> None:
            losses.append(metrics.loss)
            note = f"loss {metrics.loss:.3f}, {metrics.tokens_per_second:,.0f} tokens/s"
            advance(metrics.step, metrics.total_steps, note)

        params = train(
            graphdef,
            params,
            tokenized,
            config.train,
            seed=config.seed,
            mesh=workshop.mesh,
            pack_length=config.train.pack_length or config.model.max_length,
            out_dir=directory.path,
            chunk=config.scoring.unembed_chunk,
            metadata={"base": str(workshop.base.resolve())},
            on_step=on_step,
        )
    del params
    gc.collect()
    directory.finish("train", [directory.checkpoint / "metadata.json", directory.metrics], _since(began))


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

    before = None
    if pre_model is not None and "complexity" in axes:
        before = scored("loss before training", *workshop.load_model(pre_model), tokenized)
        gc.collect()
    graphdef, params = workshop.load_model(model)
    after = scored("loss and embeddings", graphdef, params, tokenized)
    embedding_nd = after.embedding_nd
    if "diversity" in axes and config.diversity.text == "raw":
        raw = [_raw_prompt(workshop, example) for example in examples]
        embedding_nd = scored("embeddings of raw prompts", graphdef, params, raw).embedding_nd
    neighbours = ratings = None
    if "diversity" in axes:
        with workshop.progress.task("neighbours") as advance:
            neighbours = nearest_neighbours(
                embedding_nd, config.diversity.k, workshop.mesh, on_progress=advance
            )
    if "quality" in axes:
        ratings = _ratings(workshop, graphdef, params, examples)
    measured = Measured(
        ids=[e.id for e in examples],
        n_target_tokens=after.n_targets_n,
        truncated=np.asarray([t.truncated for t in tokenized]),
        loss_pre=None if before is None else before.loss_n,
        loss_post=after.loss_n,
        neighbours=neighbours,
        ratings=ratings,
    )
    directory.forget("select")  # its flags are in the table that is replaced now
    write_scores(directory.scores, measured.to_table())
    with atomic(directory.embeddings, "wb") as file:
        np.save(file, embedding_nd, allow_pickle=False)
    directory.finish("score", [directory.scores, directory.embeddings], _since(began), n=len(examples))


def _ratings(workshop: Workshop, graphdef: nnx.GraphDef, params: nnx.State, examples: list[Example]) -> Any:
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


def _raw_prompt(workshop: Workshop, example: Example) -> TokenizedExample:
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
    directory.finish("select", [directory.scores, directory.selection], _since(began), **counts)
    return selection


def plan_refinement(directory: RoundDir) -> list[Task]:
    """What the refiner would be asked to do, from the folder's dataset, scores and selection."""
    from middo_jax.diagnose.table import read_scores
    from middo_jax.refine import plan_tasks

    if not directory.is_done("select"):
        raise RunError(f"{directory.path}: no selection from its scores there; run `middo select` first")
    axes = json.loads(directory.selection.read_text(encoding="utf-8"))["axes"]
    rows = read_scores(directory.scores).to_pylist()
    return plan_tasks(
        read_dataset(directory),
        *(axes.get(axis, {}).get("ids", ()) for axis in AXES),
        knn_ids={row["id"]: row["knn_ids"] or () for row in rows},
        scores={row["id"]: {name: row[name] for name in LINEAGE_SCORES} for row in rows},
    )


def refine_stage(
    workshop: Workshop,
    directory: RoundDir,
    round_index: int,
    cache: AnswerCache,
    heldout: Sequence[Example] = (),
) -> Usage:
    """Has the selected samples rewritten: requests.jsonl, refined.jsonl, rejected.jsonl. Returns the cost.

    Every answer is in the cache as soon as it comes, so that a second start pays for nothing twice.
    """
    from middo_jax.refine import ChatClient, reject_duplicates, run
    from middo_jax.refine.cache import Usage

    config, began = workshop.config, time.monotonic()
    tasks = plan_refinement(directory)
    outcomes: list[Outcome] = []
    usage = Usage()
    if tasks:
        with endpoint(workshop) as (url, model), workshop.progress.task("rewrites") as advance:
            client = ChatClient(config.refine, url, model, cache, seed=config.seed, usage=usage)

            def on_done(outcome: Outcome) -> None:
                outcomes.append(outcome)
                accepted = sum(o.example is not None for o in outcomes)
                tokens = usage.prompt_tokens + usage.completion_tokens
                note = f"{accepted} accepted, {tokens:,} tokens, {usage.cache_hits} answers from the cache"
                advance(len(outcomes), len(tasks), note)

            steering = steering_tokens(workshop.tokenizer)
            done = run(tasks, client, config.refine, round_index, on_done, special_tokens=steering)
        outcomes = reject_duplicates([*read_dataset(directory), *heldout], done)
    write_jsonl(directory.requests, (row for o in outcomes for row in o.request_rows()))
    write_jsonl(directory.refined, (o.to_json() for o in outcomes))
    refused = read_jsonl(directory.rejected) if directory.rejected.exists() else []
    refused = [row for row in refused if "where" in row]  # `middo score` keeps unusable input rows here
    refused += [o.rejected_row() for o in outcomes if o.example is None]
    write_jsonl(directory.rejected, refused)
    files = [directory.requests, directory.refined, directory.rejected]
    accepted = sum(o.example is not None for o in outcomes)
    directory.finish(
        "refine", files, _since(began), n=len(outcomes), accepted=accepted, usage=usage.to_json()
    )
    return usage


def merged_dataset(directory: RoundDir) -> list[Example]:
    """D_{t+1}: the folder's dataset with its accepted rewrites, each survivor told what it now scores."""
    from middo_jax.diagnose.table import read_scores
    from middo_jax.refine import Outcome, merge

    examples = read_dataset(directory)
    rows = read_scores(directory.scores).to_pylist()
    scores = {row["id"]: {name: row[name] for name in LINEAGE_SCORES} for row in rows}

    def with_scores(example: Example) -> Example:
        # Once: the first round after a rewrite says what it was good for.
        if example.lineage.op == "seed" or example.lineage.scores_after is not None:
            return example
        lineage = dataclasses.replace(example.lineage, scores_after=scores[example.id])
        return dataclasses.replace(example, lineage=lineage)

    by_id = {e.id: e for e in examples}
    outcomes = [Outcome.from_json(row, by_id) for row in read_jsonl(directory.refined)]
    return merge([with_scores(e) for e in examples], outcomes)


def heldout_loss(workshop: Workshop, model: Path, examples: Sequence[Example]) -> dict[str, Any]:
    """{"loss", "n_target_tokens"} of a model on examples that it was not trained on."""
    from middo_jax.evaluate.heldout import heldout_loss as measure

    config = workshop.config
    graphdef, params = workshop.load_model(model)
    result = measure(
        graphdef,
        params,
        workshop.tokenize(examples),
        mesh=workshop.mesh,
        batch_tokens=config.scoring.batch_tokens,
        chunk=config.scoring.unembed_chunk,
        pack_length=config.model.max_length,
    )
    return {"loss": result.loss, "n_target_tokens": result.n_target_tokens}


def export_checkpoint(checkpoint: Path, out: Path, dtype: str | None = None) -> Path:
    """Writes a checkpoint of ours as a Hugging Face directory; returns `out`.

    Raises:
      RunError: there is no finished checkpoint.
    """
    from middo_jax.models.config import read_config
    from middo_jax.models.hf import export
    from middo_jax.parallel.mesh import make_mesh
    from middo_jax.train.checkpoint import read_metadata, restore_params

    metadata = read_metadata(checkpoint)
    if metadata is None:
        raise RunError(f"{checkpoint}: no finished checkpoint there; a round's is at round_XX/checkpoint")
    base = Path(metadata["base"])
    config = read_config(base)
    _, params = restore_params(checkpoint, config, make_mesh())
    export(params, config, base, out, dtype)
    return out


def _since(began: float) -> float:
    return time.monotonic() - began
