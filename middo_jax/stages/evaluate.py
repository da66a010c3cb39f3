"""What becomes of a trained model: its held-out loss, its export."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from middo_jax.data.example import Example
from middo_jax.progress import Progress
from middo_jax.run import RunDir, RunError, atomic, write_json
from middo_jax.workshop import Workshop

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from middo_jax.evaluate.heldout import RowLosses


def measure_heldout(
    workshop: Workshop, run: RunDir, models: Mapping[str, Path], heldout: Sequence[Example]
) -> dict[str, float]:
    """Writes heldout_losses.json and heldout_rows.parquet; returns the loss of each model by its name.

    heldout_rows.parquet has one row per model and held-out example, models in the given order: `model`, `id`,
    `nll` (sum over the target tokens, in nats) and `n_target_tokens`. Without held-out examples both files
    are empty.
    """
    losses: list[dict[str, Any]] = []
    rows: dict[str, RowLosses] = {}
    with workshop.progress.task("held-out loss", "models") as advance:
        for done, (name, path) in enumerate(models.items() if heldout else (), 1):
            rows[name] = _row_losses(workshop, path, heldout)
            losses.append({"name": name} | _facts(rows[name]))
            advance(done, len(models), f"{name} {losses[-1]['loss']:.4f}")
    _write_rows(run.heldout_rows, rows)
    write_json(run.heldout_losses, {"n": len(heldout), "models": losses})
    return {m["name"]: m["loss"] for m in losses}


def _write_rows(path: Path, rows: Mapping[str, RowLosses]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {
        "model": pa.array([name for name, of in rows.items() for _ in of.ids], pa.string()),
        "id": pa.array([id_ for of in rows.values() for id_ in of.ids], pa.string()),
        "nll": pa.array([nll for of in rows.values() for nll in of.nll_n.tolist()], pa.float64()),
        "n_target_tokens": pa.array([n for of in rows.values() for n in of.n_targets_n.tolist()], pa.int64()),
    }
    with atomic(path, "wb") as file:
        pq.write_table(pa.table(columns), file)


def heldout_loss(workshop: Workshop, model: Path, examples: Sequence[Example]) -> dict[str, Any]:
    """{"loss", "n_target_tokens"} of a model on examples that it was not trained on."""
    return _facts(_row_losses(workshop, model, examples))


def _facts(rows: RowLosses) -> dict[str, Any]:
    from middo_jax.evaluate.heldout import total

    result = total(rows)
    return {"loss": result.loss, "n_target_tokens": result.n_target_tokens}


def _row_losses(workshop: Workshop, model: Path, examples: Sequence[Example]) -> RowLosses:
    from middo_jax.evaluate.heldout import row_losses

    config = workshop.config
    graphdef, params = workshop.load_model(model)
    return row_losses(
        graphdef,
        params,
        workshop.tokenize(examples),
        mesh=workshop.mesh,
        batch_tokens=config.scoring.batch_tokens,
        chunk=config.scoring.unembed_chunk,
        pack_length=config.model.max_length,
    )


def export_checkpoint(
    checkpoint: Path,
    out: Path,
    dtype: str | None,
    progress: Progress,
    *,
    mesh: Mesh | None = None,
    verify: bool = True,
) -> dict[str, Any]:
    """Writes a trained model as a Hugging Face directory, adapters merged into their base.

    It carries the chat template of the training. Where torch is installed and memory allows, transformers
    opens it, and its logits have to be ours.

    Args:
      checkpoint: of ours, or a PEFT adapter.
      out: must not exist, or be empty.
      dtype: float32, bfloat16 or float16; None is float32, in which training keeps its weights.
      progress: is told how well the export agrees with us, or why nobody knows.
      mesh: where the parameters lie meanwhile; None is all devices, parameters split.
      verify: whether to compare.

    Returns:
      {"verified": True, "max_difference", "largest_logit", "n_prompts", "n_tokens"}, or {"verified": False,
      "reason"}.

    Raises:
      RunError: there is no finished checkpoint.
      FileExistsError: `out` holds something.
      CheckpointError: the export is not our model; nothing is left of it.
    """
    from middo_jax.data.tokenize import eos_token_ids, load_tokenizer
    from middo_jax.models import hf
    from middo_jax.models.checkpoint import read_metadata
    from middo_jax.models.config import read_config
    from middo_jax.models.lora import merge_adapters
    from middo_jax.models.source import load, locate
    from middo_jax.parallel.mesh import make_mesh

    source = locate(checkpoint)
    if source.trained is None:
        raise RunError(f"{checkpoint}: no finished checkpoint there; a round's is at round_XX/checkpoint")
    hf.require_vacant(out)  # rather now than when all is computed
    config, mesh = read_config(source.base), mesh or make_mesh()
    _, params = merge_adapters(*load(source, mesh=mesh))
    tokenizer = load_tokenizer(source.base)
    if template := (read_metadata(checkpoint) or {}).get("chat_template"):
        tokenizer.chat_template = template
    reason = hf.obstacle(config) if verify else "switched off"
    verification = hf.export(
        params,
        config,
        source.base,
        out,
        dtype,
        chat_template=tokenizer.chat_template,
        eos_token_ids=eos_token_ids(source.base, tokenizer),
        expectation=None if reason else hf.expect(params, config, tokenizer, dtype, mesh),
    )
    if reason is not None:
        progress.say(f"not verified: {reason}")
        return {"verified": False, "reason": reason}
    if verification is None:  # the first process has it
        return {"verified": True}
    progress.say(str(verification))
    return {"verified": True, **verification._asdict()}


def export_adapter(checkpoint: Path, out: Path, dtype: str | None = None) -> None:
    """Writes the LoRA adapters of a checkpoint of ours as a PEFT directory, which names their base.

    Raises:
      RunError: it has none.
      FileExistsError: `out` holds something.
    """
    from middo_jax.models import hf
    from middo_jax.models.checkpoint import read_metadata
    from middo_jax.models.config import read_config
    from middo_jax.models.source import load_adapters, locate
    from middo_jax.parallel.mesh import make_mesh

    source = locate(checkpoint)
    config = dataclasses.replace(read_config(source.base), lora=source.lora)
    adapters = load_adapters(source, config, make_mesh())
    template = (read_metadata(checkpoint) or {}).get("chat_template")
    hf.export_adapters(adapters, config, source.base, out, dtype, template)
