"""The training stage: a round's dataset -> checkpoint/ and metrics.jsonl."""

from __future__ import annotations

import dataclasses
import gc
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from middo_jax.run_dir import RoundDir, RunError
from middo_jax.workshop import Workshop, read_dataset

if TYPE_CHECKING:
    from middo_jax.models.lora import Model


def train_stage(workshop: Workshop, directory: RoundDir, start: Path) -> None:
    """Fine-tunes `start` on the folder's dataset: checkpoint/ and metrics.jsonl."""
    from middo_jax.train.sft import StepMetrics, train

    config, began = workshop.config, time.monotonic()
    (graphdef, params), metadata = load_start(workshop, start)
    tokenized = workshop.tokenize(read_dataset(directory))
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
            metadata=metadata,
            on_step=on_step,
        )
    del params
    gc.collect()
    directory.finish(
        "train", [directory.checkpoint / "metadata.json", directory.metrics], time.monotonic() - began
    )


def load_start(workshop: Workshop, path: Path) -> tuple[Model, dict[str, Any]]:
    """(the model that a training starts from, what its checkpoint will say about itself).

    Without `lora.rank` all parameters are loaded in float32, to be trained. With it they are loaded in
    `model.dtype`, with adapters: those of `path` if it has some, to go on with, else fresh ones.

    Raises:
      RunError: the settings ask for other adapters than `path` has, or for adapters on a checkpoint.
    """
    from middo_jax.models.lora import from_settings, with_fresh_adapters
    from middo_jax.models.source import locate

    source, lora = locate(path), from_settings(workshop.config.lora)
    metadata: dict[str, Any] = {
        "base": str(source.base.resolve()),
        "chat_template": workshop.tokenizer.chat_template,  # an export that carries another one would mislead
    }
    if source.lora != lora and source.trained is not None:
        held = source.lora or "all of a model's weights"
        raise RunError(
            f"{path} holds {held}, the settings ask for {lora or 'no adapters'}: set lora.* alike, or "
            f"write it as a model of its own with `middo export {path} DIR` and start from that"
        )
    if lora is None:
        return workshop.load_model(path, "float32"), metadata
    metadata["lora"] = dataclasses.asdict(lora)
    model = workshop.load_model(path)
    if source.lora is None:
        model = with_fresh_adapters(*model, lora, workshop.mesh, workshop.config.seed)
    return model, metadata
