"""The training stage: a round's dataset -> checkpoint/ and metrics.jsonl."""

from __future__ import annotations

import gc
import time
from pathlib import Path

from middo_jax.run_dir import RoundDir
from middo_jax.workshop import Workshop, read_dataset


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
    directory.finish(
        "train", [directory.checkpoint / "metadata.json", directory.metrics], time.monotonic() - began
    )
