"""What becomes of a trained model: its held-out loss, its export."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from middo_jax.data.example import Example
from middo_jax.run_dir import RunError
from middo_jax.workshop import Workshop


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
